"""Objectives. A loss returns a weighted sum and the sum of its weights; normalisation happens once, in the stage."""

from .token import CrossEntropy

__all__ = ["CrossEntropy"]

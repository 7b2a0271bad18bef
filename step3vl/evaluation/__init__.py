"""Held-out measurement: what is asked, how answers are scored, and what a score is worth."""

from .benchmark import Benchmark, Case, HeldOut
from .runner import Record, mask_images, measure
from .statistics import Score, bootstrap, majority_score, summarise

__all__ = [
    "Benchmark",
    "Case",
    "HeldOut",
    "Record",
    "Score",
    "bootstrap",
    "majority_score",
    "mask_images",
    "measure",
    "summarise",
]

"""Held-out measurement: what is asked, how answers are scored, and what a score is worth (blind, majority, interval)."""

from .benchmark import Benchmark, Case, HeldOut
from .runner import Record, measure, mask_images
from .statistics import Score, bootstrap, majority_score, summarise

__all__ = ["Benchmark", "Case", "HeldOut", "Record", "Score", "bootstrap", "majority_score", "mask_images", "measure", "summarise"]

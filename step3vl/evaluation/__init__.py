"""Held-out measurement: what is asked, how answers are scored, and what a score is worth."""

from .answers import KeptAnswers
from .benchmark import Benchmark, Case, HeldOut
from .runner import Record, evaluate, mask_images, measure
from .statistics import Difference, Score, bootstrap, difference, majority_score, summarise

__all__ = [
    "Benchmark",
    "Case",
    "Difference",
    "HeldOut",
    "KeptAnswers",
    "Record",
    "Score",
    "bootstrap",
    "difference",
    "evaluate",
    "majority_score",
    "mask_images",
    "measure",
    "summarise",
]

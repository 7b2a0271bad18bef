"""A stage that learns synthesis, from its pools to its curve (PaCoRe training; `step3vl pacore train`)."""

from .curve import measure
from .pipeline import make_pools, run, train, warm_start
from .stage import Stage

__all__ = ["Stage", "make_pools", "measure", "run", "train", "warm_start"]

"""Weights on disk: open any source, translate names, load into a model, write whole folders.

Sources are read by their headers first and then one tensor at a time, so that a wrong checkpoint is refused before
anything is allocated, and a large one never has to fit into memory at once.
"""

from step3vl.weights.layouts import LAYOUTS, Layout, detect, layout_named
from step3vl.weights.load import Accepted, Report, check, load_into, load_parts
from step3vl.weights.save import save_sharded, unfinished
from step3vl.weights.source import Entry, TensorSource, open_source

__all__ = [
    "LAYOUTS",
    "Accepted",
    "Entry",
    "Layout",
    "Report",
    "TensorSource",
    "check",
    "detect",
    "layout_named",
    "load_into",
    "load_parts",
    "open_source",
    "save_sharded",
    "unfinished",
]

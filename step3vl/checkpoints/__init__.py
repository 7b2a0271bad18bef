"""Checkpoints in and out: import of published folders, export in the released layout, tiny random twins of both."""

from step3vl.checkpoints.export import export_model
from step3vl.checkpoints.importing import import_model
from step3vl.checkpoints.model import Described, describe, open_model
from step3vl.checkpoints.tiny import ARCHITECTURES, make_tiny
from step3vl.checkpoints.verify import verify

__all__ = [
    "ARCHITECTURES",
    "Described",
    "describe",
    "export_model",
    "import_model",
    "make_tiny",
    "open_model",
    "verify",
]

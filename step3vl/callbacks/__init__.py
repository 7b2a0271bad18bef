"""What is seen while a run goes on: the start tables, speed, a few answers."""

from .answers import Answers
from .progress import ProgressLines
from .start import StartTables
from .throughput import Throughput

__all__ = ["Answers", "ProgressLines", "StartTables", "Throughput"]

"""What happens around a run: the start tables, speed, a few answers, saving before a job ends."""

from .answers import Answers
from .checkpoints import Checkpoints
from .progress import ProgressLines
from .requeue import Requeue
from .start import StartTables
from .throughput import Throughput

__all__ = ["Answers", "Checkpoints", "ProgressLines", "Requeue", "StartTables", "Throughput"]

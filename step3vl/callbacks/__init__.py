"""What happens around a run: start tables, speed, a few answers, saving, ranks that are lost."""

from .answers import Answers
from .checkpoints import Checkpoints
from .dynamics import Dynamics
from .heartbeat import Heartbeat
from .progress import ProgressLines
from .requeue import Requeue
from .rollouts import RolloutTable
from .start import StartTables
from .throughput import Throughput
from .upbringing import Upbringing

__all__ = [
    "Answers",
    "Checkpoints",
    "Dynamics",
    "Heartbeat",
    "ProgressLines",
    "Requeue",
    "RolloutTable",
    "StartTables",
    "Throughput",
    "Upbringing",
]

"""A few decoded answers while training: the quickest way to see whether a model looks at its images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import FSDPStrategy
from rich.console import Console
from rich.table import Table

from step3vl.evaluation import measure

if TYPE_CHECKING:
    from step3vl.stages import Stage


class Answers(Callback):
    """Prints question, gold and answer for the first cases of each benchmark of the run's suite.

    Args:
        every_n_steps: optimizer steps between tables.
        num_cases: cases of each benchmark.
    """

    def __init__(self, every_n_steps: int = 100, num_cases: int = 1):
        self.every_n_steps, self.num_cases = every_n_steps, num_cases
        self.last_step = 0

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Raises ValueError under FSDPStrategy, whose model can only be called as a whole."""
        if isinstance(trainer.strategy, FSDPStrategy):
            raise ValueError(
                "trainer.callbacks: Answers cannot generate under FSDPStrategy; leave it out, or use fsdp2.yaml"
            )

    def on_train_batch_end(self, trainer: Trainer, pl_module: Stage, outputs: Any, batch: Any, i: int) -> None:  # type: ignore[override]
        step = trainer.global_step
        due = step != self.last_step and step % self.every_n_steps == 0
        self.last_step = step
        if not due or not pl_module.suite or pl_module.sampling is None:
            return
        if not trainer.is_global_zero and not pl_module.is_sharded:  # the first rank cannot gather shards alone
            return
        table = Table(title=f"Held-out answers at step {step}")
        for title in ("benchmark", "question", "gold", "answer", "score"):
            table.add_column(title)
        for name, benchmark in pl_module.suite.items():
            cases = benchmark.cases(limit=self.num_cases)
            for r in measure(name, benchmark, cases, pl_module.sampler(), pl_module.sampling, blind=False):
                table.add_row(name, r.question.replace("<image>", ""), r.answer, r.said, f"{r.score:.2f}")
        if trainer.is_global_zero:
            Console().print(table)

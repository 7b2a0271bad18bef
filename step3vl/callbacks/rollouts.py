"""Rollouts to read while a policy learns: prompt, response, what each reward gave. And a file of all that was shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, Trainer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from step3vl.rl.rollout import Rollout
    from step3vl.stages import RLStage

SHOWN_CHARACTERS = 300
"""Of a prompt or response in the table; the file has all."""


class RolloutTable(Callback):
    """Prints, for some prompts of the first rank, the best and the worst response with their rewards.

    The same rollouts are appended whole to `rollouts.jsonl` in the run's folder.

    Args:
        every_n_iterations: iterations between tables.
        num_groups: prompts in a table.
    """

    def __init__(self, every_n_iterations: int = 10, num_groups: int = 3):
        if every_n_iterations < 1 or num_groups < 1:
            raise ValueError(
                f"RolloutTable needs every_n_iterations and num_groups >= 1, got {every_n_iterations} and {num_groups}"
            )
        self.every_n_iterations, self.num_groups = every_n_iterations, num_groups

    def on_train_batch_end(self, trainer: Trainer, pl_module: RLStage, outputs: Any, batch: Any, i: int) -> None:  # type: ignore[override]
        if not trainer.is_global_zero or pl_module.iteration % self.every_n_iterations:
            return
        table = Table(title=f"Rollouts of iteration {pl_module.iteration}: best and worst of a prompt")
        for title in ("prompt", "gold", "response", "reward", "breakdown"):
            table.add_column(title, overflow="fold")
        lines = []
        for group in pl_module.groups[: self.num_groups]:
            ordered = sorted(group, key=lambda rollout: -_value(rollout))
            for rollout in ordered[:1] + ordered[1:][-1:]:
                table.add_row(*map(escape, _cells(rollout)))
                lines.append(json.dumps({"iteration": pl_module.iteration, **_row(rollout)}, ensure_ascii=False))
            table.add_section()
        Console().print(table)
        with (Path(trainer.default_root_dir) / "rollouts.jsonl").open("a", encoding="utf-8", errors="replace") as file:
            file.writelines(f"{line}\n" for line in lines)


def _value(rollout: Rollout) -> float:
    return float("-inf") if rollout.score.total is None else rollout.score.total


def _row(rollout: Rollout) -> dict[str, Any]:
    return {
        "id": rollout.case.id,
        "prompt": rollout.prompt.messages[-1].content,
        "gold": rollout.case.answer,
        "response": rollout.completion.text,
        "truncated": rollout.completion.truncated,
        "outcome": rollout.score.outcome,
        "reward": rollout.score.total,
        "breakdown": rollout.score.parts,
    }


def _cells(rollout: Rollout) -> list[str]:
    row = _row(rollout)
    parts = ", ".join(f"{name} {'-' if x is None else format(x, '.2f')}" for name, x in row["breakdown"].items())
    texts = [str(row["prompt"]).replace("<image>", ""), row["gold"], row["response"]]
    shown = [text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]} ..." for text in texts]
    reward = row["outcome"] if row["reward"] is None else f"{row['reward']:.2f}"
    return [*shown, reward, parts or row["outcome"]]

"""A reward model from preferences: the answer that people chose is to score higher (Bradley and Terry).

STEP3-VL's RLHF is rewarded by a generative judge (report, rewards); this is the other kind, which costs one forward an
answer. A score is the value at the token that ends an answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from step3vl.data.preference_batch import PreferenceBatch
from step3vl.data.processor import Processor
from step3vl.losses.preference import BradleyTerry, preference_accuracy, preference_margin
from step3vl.models import ValueModel, VisionLanguageModel
from step3vl.optim import ParamGroup
from step3vl.parallel import Drawable
from step3vl.types import Batch, Sampling, WeightedSum
from step3vl.weights import open_source

from .base import Recomputed, Stage
from .guard import Guard

FIGURES = ("accuracy", "margin", "score")


class RewardModelStage(Stage):
    """Bradley-Terry on packed pairs (`step3vl.data.preference_data.PreferenceData`).

    Logged every step over all ranks, and as val_* over the whole of data.val_sources:

    loss: -log sigmoid(chosen - rejected - margin), mean over pairs; 0.693 is a model that knows nothing.
    accuracy: share of pairs whose chosen answer scores higher; 0.5 is a coin. That of training runs ahead of val_.
    margin: mean of chosen - rejected. It grows without bound where pairs are easy; then val_loss rises: stop there.
    score: mean over all answers; nothing but loss.center_coef holds it near 0.

    Args:
        model: the scorer, a vision-language model with one value a token; trained in place.
        processor: turns conversations into tokens.
        optimizer: class or card that takes groups of (name, parameter).
        schedule: class or card that takes the optimizer and gives one multiplier a step.
        param_groups: learning rate and weight decay by name pattern; the first match wins.
        freeze: name patterns whose parameters are not trained.
        sampling: not used, because a reward model says nothing; it may stay null.
        loss: of scores.
        init_from: where the body's weights come from: a run, an exported, imported or released folder; or a reward
            model, whose head comes along.
        init_ignore: name patterns of keys in which model and `init_from` may differ, besides the head.
        guard: refuses steps that are not finite; None: the default one.
        recompute: whose blocks run again in backward: none, vision, decoder, or blocks (both).
    """

    def __init__(
        self,
        model: ValueModel,
        processor: Processor,
        optimizer: Callable[[Any], Optimizer],
        schedule: Callable[[Optimizer], LRScheduler] | None = None,
        param_groups: Sequence[ParamGroup] = (),
        freeze: Sequence[str] = (),
        sampling: Sampling | None = None,
        loss: BradleyTerry | None = None,
        init_from: str | None = None,
        init_ignore: Sequence[str] = (),
        guard: Guard | None = None,
        recompute: Recomputed = "none",
    ):
        super().__init__(
            model.vlm,
            processor,
            optimizer,
            schedule,
            param_groups,
            freeze,
            sampling,
            init_from,
            init_ignore,
            guard,
            recompute,
        )
        self.loss = loss or BradleyTerry()
        self._scorer = [model]  # not a part of the module: its parameters are those of `vlm`, under one name
        self.figures = {"step": torch.zeros(0), "val": torch.zeros(0)}

    @property
    def scorer(self) -> ValueModel:
        return self._scorer[0]

    def setup(self, stage: str) -> None:
        """Raises ValueError for a processor that does not mark where an answer ends."""
        if self.processor.template.name == "plain":
            raise ValueError(
                "model.processor.template is 'plain', which does not mark who speaks; a reward model needs 'chat' or "
                "the path of a .jinja file"
            )

    def give_memory(self, module: Drawable, vlm: VisionLanguageModel) -> None:
        """The scorer as a whole, so that its head is drawn as `ValueModel` does it and sharded with the rest."""
        super().give_memory(self.scorer if module is vlm else module, vlm)

    def load_initial_weights(self) -> None:
        """As every stage's; where `init_from` has a language head, or none, ours stays as it was drawn."""
        if isinstance(self.init_from, str) and self.trainer.ckpt_path is None and not has_value_head(self.init_from):
            self.init_ignore = [ValueModel.HEAD, *self.init_ignore]
        super().load_initial_weights()

    # -------------------------------------------------------------------------------------------- steps

    def scores(self, batch: PreferenceBatch) -> tuple[Tensor, Tensor]:
        """Scores of chosen and rejected answers, [P] each, in fp32."""
        found = self.scorer(batch, batch.ends)  # [P,2]
        return found[:, 0], found[:, 1]

    def losses(self, batch: Batch) -> dict[str, WeightedSum]:
        return {"loss": self.judge(batch, "step")}

    def judge(self, batch: Batch, where: str) -> WeightedSum:
        """The loss of a batch; what is logged beside it is added to the figures of `where`."""
        if not isinstance(batch, PreferenceBatch):
            raise ValueError(
                "this stage learns from pairs of answers; data must be of the class "
                "step3vl.data.preference_data.PreferenceData"
            )
        chosen, rejected = self.scores(batch)
        loss = self.loss(chosen, rejected, batch.margins)
        right, margin = preference_accuracy(chosen, rejected), preference_margin(chosen, rejected)
        score = (chosen + rejected).detach().sum() / 2
        sums = torch.stack([right.value, margin.value, score, right.weight, loss.value.detach()]).double()  # [5]
        held = self.figures[where].to(sums.device)
        self.figures[where] = held + sums if len(held) else sums
        return loss

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        super().on_before_optimizer_step(optimizer)
        self.say("step", "")

    def on_validation_epoch_start(self) -> None:
        self.figures["val"] = torch.zeros(0)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.judge(batch, "val")

    def on_validation_epoch_end(self) -> None:
        self.say("val", "val_")

    def say(self, where: str, prefix: str) -> None:
        """Log the figures over all ranks, exactly, and begin anew."""
        sums = self.figures[where] if len(self.figures[where]) else torch.zeros(5, dtype=torch.float64)
        sums = sums.to(self.device)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        *values, num_pairs, loss = sums.tolist()
        if num_pairs:
            for name, value in zip(FIGURES, values):
                self.log(f"{prefix}{name}", value / num_pairs, prog_bar=name == "accuracy")
            if prefix:
                self.log(f"{prefix}loss", loss / num_pairs, prog_bar=True)
        self.figures[where] = torch.zeros(0)

    # -------------------------------------------------------------------------------------------- no answers

    def test_step(self, *_: Any, **__: Any) -> None:
        raise ValueError("a reward model answers nothing; step3vl validate measures it on data.val_sources")

    def predict_step(self, *_: Any, **__: Any) -> Any:
        raise ValueError("a reward model answers nothing; step3vl validate measures it on data.val_sources")


def has_value_head(path: str) -> bool:
    """Whether a checkpoint is one of a reward model or a critic: its head has one row."""
    try:
        entries = open_source(path).keys()
    except (ValueError, OSError):
        return False  # what is wrong with it is said where it is loaded
    heads = [entry.shape for name, entry in entries.items() if name.endswith("lm_head.weight")]
    return any(shape[0] == 1 for shape in heads)

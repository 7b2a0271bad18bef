"""Pre-training of a vision encoder by itself, before a language model sees it: what both published kinds share.

Losses, steps, refusals and checkpoints work as in `step3vl.stages.base`: sums are accumulated and divided, just before
the optimizer step, by the images of the whole step. The encoder is saved as `vision_encoder`, from where
`model.init_from: {vision_encoder: RUN}` takes it into a vision-language model.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from lightning import LightningDataModule
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from step3vl.data.crops import CropBatch
from step3vl.data.image_data import ImageData, PairData
from step3vl.data.pairs import Pairs
from step3vl.data.processor import Processor
from step3vl.models.vision import VisionEncoder
from step3vl.optim import ParamGroup, build_groups, freeze_parameters
from step3vl.parallel import Blueprint, has_no_memory
from step3vl.types import WeightedSum

from .guard import Guard
from .initial import load
from .skipped import Skipped
from .trained import Trained

Images = Pairs | CropBatch


class EncoderStage(Trained):
    """A training stage around a vision encoder alone; each rank holds all of it (strategy ddp, or one device).

    Args:
        vision_encoder: the encoder; trained in place.
        optimizer: class or card that takes groups of (name, parameter).
        schedule: class or card that takes the optimizer and gives one multiplier a step.
        param_groups: learning rate and weight decay by name pattern; the first match wins.
        freeze: name patterns whose parameters are not trained.
        init_from: {vision_encoder: PATH}, where the encoder's first weights come from when no checkpoint is resumed.
        guard: refuses steps that are not finite; None: the default one.
    """

    processor: Processor | None = None

    def __init__(
        self,
        vision_encoder: VisionEncoder,
        optimizer: Callable[[Any], Optimizer],
        schedule: Callable[[Optimizer], LRScheduler] | None = None,
        param_groups: Sequence[ParamGroup] = (),
        freeze: Sequence[str] = (),
        init_from: dict[str, str] | None = None,
        guard: Guard | None = None,
    ):
        super().__init__()
        if init_from is not None and set(init_from) != {"vision_encoder"}:
            raise ValueError(f"model.init_from of an encoder is {{vision_encoder: PATH}} or null, got {init_from!r}")
        self.vision_encoder = vision_encoder
        self.optimizer_factory, self.schedule_factory = optimizer, schedule
        self.param_groups, self.frozen = list(param_groups), list(freeze)
        self.init_from = init_from
        self.guard = guard or Guard()
        self.step_ids: list[str] = []
        self.step_weight = torch.zeros(())
        self.step_loss: dict[str, Tensor] = {}
        self.skipped = Skipped()
        self.scores: dict[str, dict[str, Any]] = {}
        """What `test` measured, by name."""

    # -------------------------------------------------------------------------------------------- to be given

    @abstractmethod
    def losses(self, batch: Any) -> dict[str, WeightedSum]:
        """Named losses of one micro-batch, each a sum over images and their number; their sum is trained."""

    @abstractmethod
    def training_flops(self, batch: Any) -> float:
        """FLOPs of the matrix products of forward and backward of a micro-batch."""

    # -------------------------------------------------------------------------------------------- for the command line

    def connect(self, datamodule: LightningDataModule | None) -> None:
        """Tell the data what the encoder needs from pixels. Raises ValueError for data of another kind of stage."""
        if datamodule is None:
            return
        if not isinstance(datamodule, ImageData):
            raise ValueError(
                f"{type(self).__name__} learns from images, but data is {type(datamodule).__name__}; accepted are "
                "step3vl.data.PairData and step3vl.data.CropData"
            )
        datamodule.connect(self.vision_encoder.image_spec, self.processor)

    def test_loaders(self, datamodule: LightningDataModule | None) -> list[Any]:
        """What `test` goes through: held-out batches, or one empty batch where there are none."""
        loaders = datamodule.test_dataloader() if isinstance(datamodule, PairData) else []
        return [*loaders] or [DataLoader([()], batch_size=None)]  # type: ignore[arg-type]

    # -------------------------------------------------------------------------------------------- memory and weights

    def configure_model(self) -> None:
        """Give an encoder that was built without memory its memory and fresh weights; then freeze."""
        if isinstance(self.trainer.strategy, FSDPStrategy) or self.device_mesh is not None:
            raise ValueError(
                f"{type(self).__name__} is not sharded: use strategy/ddp.yaml, or auto on one device, in place of "
                f"{type(self.trainer.strategy).__name__}"
            )
        if has_no_memory(self.vision_encoder):
            self.fill(self.vision_encoder)
        freeze_parameters(self, self.frozen)

    def fill(self, encoder: VisionEncoder) -> None:
        """Memory and weights that follow from the run's seed, on this rank's device."""
        blueprint, strategy = Blueprint(encoder, encoder.blocks()), self.trainer.strategy
        blueprint.fill(encoder, strategy.root_device, strategy.broadcast(torch.initial_seed()))

    def load_initial_weights(self) -> None:
        """Load `init_from` once, unless the trainer has restored a checkpoint."""
        if self.init_from is not None and self.trainer.ckpt_path is None:
            for line in load(self, self.init_from, ()):
                self.print(line)
        self.init_from = None

    def on_train_start(self) -> None:
        self.load_initial_weights()

    def on_test_start(self) -> None:
        self.load_initial_weights()

    # -------------------------------------------------------------------------------------------- training

    def training_step(self, batch: Images, batch_idx: int) -> Tensor:
        named = self.losses(batch)
        weight = next(iter(named.values())).weight.detach()
        self.step_weight = self.step_weight.to(weight.device) + weight
        for name, loss in named.items():
            self.step_loss[name] = loss.value.detach() + self.step_loss.get(name, 0.0)
        self.step_ids += batch.sample_ids
        self.skipped.report(cast(Any, batch), self.trainer)
        return torch.stack([loss.value for loss in named.values()]).sum()

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Divide accumulated gradients by the images of the whole step; a step that the guard refuses loses them."""
        is_finite = all(bool(value.isfinite()) for value in self.step_loss.values())  # on this rank
        counts = self.step_weight.new_tensor(self.skipped.step)
        sums = torch.stack([self.step_weight, *counts, *self.step_loss.values()]).float()  # [3 + losses]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        weight, drawn, skipped, *values = sums.unbind()
        self.skipped.settle(int(drawn), int(skipped), self.trainer)
        if weight == 0:
            raise ValueError(f"step {self.global_step}: no image of the batch can be used; check data.sources")
        # gradients are averaged over ranks, and Lightning divides each loss by the accumulation count: undone here
        scale = self.trainer.world_size * self.trainer.accumulate_grad_batches / weight
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        torch._foreach_mul_(gradients, scale)
        norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
        total = torch.stack(values).sum() / weight
        if "loss" not in self.step_loss:
            self.log("loss", total, prog_bar=True)
        for name, value in zip(self.step_loss, values):
            self.log(name, value / weight, prog_bar=True)
        self.log("skipped", float(self.skipped.num_skipped))
        self.log("lr", optimizer.param_groups[0]["lr"])
        self.log("grad_norm", norm)
        self.refuse_or_go(float(total), float(norm), is_finite)
        self.step_weight, self.step_loss, self.step_ids = torch.zeros(()), {}, []

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["guard"] = self.guard.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if "guard" in checkpoint:
            self.guard.load_state_dict(checkpoint["guard"])

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer_factory(build_groups(self, self.param_groups))
        if self.schedule_factory is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.schedule_factory(optimizer), "interval": "step"},
        }

    # -------------------------------------------------------------------------------------------- measuring

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Nothing is held out unless a subclass says so; probes are the callback's (`step3vl.callbacks.Upbringing`)."""

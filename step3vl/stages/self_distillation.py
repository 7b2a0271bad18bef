"""Self-supervised pre-training of a vision encoder: a student follows its own moving average over crops (DINOv3).

The teacher is what is kept: it is saved as `vision_encoder`, and a resumed run goes on with it.

Shapes: n images, G global and L local crops of each, P patches, D width, K prototypes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from step3vl.data.crops import CropBatch
from step3vl.losses.self_distillation import SelfDistillation, cross_view, keep_apart, masked_patches
from step3vl.models.flops import TRAINING
from step3vl.models.prototypes import PrototypeHead
from step3vl.models.vision import DINOv3
from step3vl.optim import ParamGroup
from step3vl.types import WeightedSum

from .encoder import EncoderStage
from .guard import Guard


class SelfDistillationStage(EncoderStage):
    """DINO, iBOT and KoLeo with Sinkhorn-Knopp centring and a teacher that is the student's moving average.

    Logged: dino, ibot, koleo, their sum `loss`, and `teacher_entropy` in nats: the teacher's mean uncertainty about one
    crop; at the logarithm of the number of prototypes it says nothing, at 0 it is sure.

    Args:
        vision_encoder: the encoder; its weights are the teacher's. It must offer class tokens and hide patches.
        head: builds, from the encoder's width, what turns a class token into logits over prototypes.
        optimizer: class or card that takes groups of (name, parameter).
        patch_head: the same for masked patches, with prototypes of their own; None: one like `head`.
        loss: terms, temperatures and weights.
        momentum: share of its weights that the teacher keeps at a step.
        schedule: class or card that takes the optimizer and gives one multiplier a step.
        param_groups: learning rate and weight decay by name pattern; the first match wins.
        freeze: name patterns whose parameters are not trained.
        init_from: {vision_encoder: PATH}, where the first weights of both come from when no checkpoint is resumed.
        guard: refuses steps that are not finite; None: the default one.
    """

    vision_encoder: DINOv3
    """The teacher."""

    def __init__(
        self,
        vision_encoder: DINOv3,
        head: Callable[[int], PrototypeHead],
        optimizer: Callable[[Any], Optimizer],
        patch_head: Callable[[int], PrototypeHead] | None = None,
        loss: SelfDistillation | None = None,
        momentum: float = 0.999,
        schedule: Callable[[Optimizer], LRScheduler] | None = None,
        param_groups: Sequence[ParamGroup] = (),
        freeze: Sequence[str] = (),
        init_from: dict[str, str] | None = None,
        guard: Guard | None = None,
    ):
        super().__init__(vision_encoder, optimizer, schedule, param_groups, freeze, init_from, guard)
        if not 0 <= momentum < 1:
            raise ValueError(f"model.momentum must lie in 0..1, 1 excluded, got {momentum}")
        if not isinstance(vision_encoder, DINOv3):
            raise ValueError(
                f"SelfDistillationStage needs class tokens and hidden patches, which {type(vision_encoder).__name__} "
                "does not have; accepted is step3vl.models.vision.DINOv3"
            )
        self.loss, self.momentum = loss or SelfDistillation(), momentum
        self.student: DINOv3 = copy.deepcopy(vision_encoder)
        self.student.model.embeddings.mask_token.requires_grad_(True)
        size = vision_encoder.hidden_size
        self.student_heads = nn.ModuleDict({"image": head(size), "patch": (patch_head or head)(size)})
        self.teacher_heads = copy.deepcopy(self.student_heads)
        for module in (self.vision_encoder, self.teacher_heads):
            module.requires_grad_(False)

    # -------------------------------------------------------------------------------------------- student and teacher

    def configure_model(self) -> None:
        super().configure_model()
        if any(parameter.is_meta for parameter in self.student.parameters()):
            self.fill(self.student)
            self.student.model.embeddings.mask_token.requires_grad_(True)
            self.student.load_state_dict(self.vision_encoder.state_dict())

    def load_initial_weights(self) -> None:
        is_given = self.init_from is not None and self.trainer.ckpt_path is None
        super().load_initial_weights()
        if is_given:
            self.student.load_state_dict(self.vision_encoder.state_dict())

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """(teacher, student) of every parameter."""
        teachers = [*self.vision_encoder.parameters(), *self.teacher_heads.parameters()]
        return list(zip(teachers, [*self.student.parameters(), *self.student_heads.parameters()], strict=True))

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """The student's step, then the teacher's; before callbacks save. A refused step changes neither."""
        super().optimizer_step(*args, **kwargs)
        pairs = self.pairs()
        if any(student.grad is not None for _, student in pairs):
            with torch.no_grad():
                torch._foreach_lerp_([t for t, _ in pairs], [s.detach() for _, s in pairs], 1.0 - self.momentum)

    # -------------------------------------------------------------------------------------------- losses

    def losses(self, batch: CropBatch) -> dict[str, WeightedSum]:
        num_global, num_images = batch.globals.shape[:2]
        num_local = len(batch.locals)
        masked = batch.masked.flatten(0, 1)  # [G*n,P]
        wholes = self.student.normalised(batch.globals.flatten(0, 1))  # [G*n,C,S,S]
        with torch.no_grad():
            self.vision_encoder.eval()
            classes, patches = self.vision_encoder.tokens(wholes)  # [G*n,D], [G*n,P,D]
            of_images = self.teacher_heads["image"](classes).unflatten(0, (num_global, num_images))  # [G,n,K]
            of_patches = self.teacher_heads["patch"](patches[masked])  # [m,K]
            target, patch_target = (self.loss.centred(x, self.global_step) for x in (of_images, of_patches))
        classes, patches = self.student.tokens(wholes, masked)
        guesses = self.student_heads["image"](classes).unflatten(0, (num_global, num_images))  # [G,n,K]
        if num_local:
            parts, _ = self.student.tokens(self.student.normalised(batch.locals.flatten(0, 1)))  # [L*n,D]
            small = self.student_heads["image"](parts).unflatten(0, (num_local, num_images))
            guesses = torch.cat([guesses, small])  # [G+L,n,K]
        patch_guesses = self.student_heads["patch"](patches[masked])  # [m,K]
        temperature = self.loss.student_temperature
        with torch.autocast(guesses.device.type, enabled=False):
            dino = cross_view(guesses, target, temperature, num_same=num_global)
            ibot = masked_patches(patch_guesses, patch_target, batch.masked, temperature)
            apart = [keep_apart(own) for own in classes.unflatten(0, (num_global, num_images))]
        koleo = torch.stack([term.value for term in apart]).mean() * self.loss.koleo_weight
        self.log("teacher_entropy", torch.special.entr(target).sum(-1).mean())
        return {
            "dino": dino,
            "ibot": WeightedSum(ibot.value * self.loss.ibot_weight, ibot.weight),
            "koleo": WeightedSum(koleo, dino.weight),
        }

    def training_flops(self, batch: CropBatch) -> float:
        """The student's forward and backward on all crops, the teacher's forward on global ones."""
        patch, num_images = self.student.image_spec.patch_size, batch.num_images
        total = 0.0
        for crops, factor in ((batch.globals, TRAINING + 1), (batch.locals, TRAINING)):
            side = crops.shape[-1] // patch
            head: Any = self.student_heads["image"]
            total += factor * len(crops) * num_images * (self.student.flops(side, side) + head.flops())
        head = self.student_heads["patch"]
        return total + (TRAINING + 1) * int(batch.masked.sum()) * head.flops()

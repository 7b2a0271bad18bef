"""Contrastive pre-training of a vision encoder: images and captions find each other (PE, SigLIP).

Shapes: n pairs, E width of an embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from step3vl.data.pairs import Pairs
from step3vl.data.processor import Processor
from step3vl.evaluation.probe import retrieval
from step3vl.losses.contrastive import SigmoidContrast, SoftmaxContrast
from step3vl.models.flops import TRAINING
from step3vl.models.text_tower import TextTower
from step3vl.models.vision import VisionEncoder
from step3vl.optim import ParamGroup
from step3vl.types import WeightedSum

from .encoder import EncoderStage
from .guard import Guard


class ContrastiveStage(EncoderStage):
    """A vision encoder with a pooling head against a text tower; both are trained, the encoder alone is kept.

    Args:
        vision_encoder: the encoder; trained in place.
        image_head: builds, from the encoder's width and the width of embeddings, what pools a grid into one vector.
        text_tower: turns captions into vectors.
        processor: makes tokens of captions.
        optimizer: class or card that takes groups of (name, parameter).
        loss: softmax over all pairs (CLIP, PE), or sigmoid for every pair (SigLIP).
        schedule: class or card that takes the optimizer and gives one multiplier a step.
        param_groups: learning rate and weight decay by name pattern; the first match wins.
        freeze: name patterns whose parameters are not trained.
        init_from: {vision_encoder: PATH}, where the encoder's first weights come from when no checkpoint is resumed.
        guard: refuses steps that are not finite; None: the default one.
    """

    def __init__(
        self,
        vision_encoder: VisionEncoder,
        image_head: Callable[[int, int], nn.Module],
        text_tower: TextTower,
        processor: Processor,
        optimizer: Callable[[Any], Optimizer],
        loss: SoftmaxContrast | SigmoidContrast,
        schedule: Callable[[Optimizer], LRScheduler] | None = None,
        param_groups: Sequence[ParamGroup] = (),
        freeze: Sequence[str] = (),
        init_from: dict[str, str] | None = None,
        guard: Guard | None = None,
    ):
        super().__init__(vision_encoder, optimizer, schedule, param_groups, freeze, init_from, guard)
        if processor.vocab_size > text_tower.vocab_size:
            raise ValueError(
                f"the tokenizer has {processor.vocab_size} tokens, text_tower only {text_tower.vocab_size}"
            )
        self.image_head = image_head(vision_encoder.hidden_size, text_tower.out_size)
        self.text_tower, self.processor, self.loss = text_tower, processor, loss
        self.found: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}

    def embed(self, batch: Pairs) -> tuple[Tensor, Tensor]:
        """Embeddings of images and of captions [n,E], of any length."""
        pixels = self.vision_encoder.normalised(batch.pixels)
        grid, _ = self.vision_encoder.encode(pixels, ())  # [n,h,w,D]
        return self.image_head(grid), self.text_tower(batch.ids, batch.mask)

    def losses(self, batch: Pairs) -> dict[str, WeightedSum]:
        images, texts = self.embed(batch)
        with torch.autocast(images.device.type, enabled=False):
            return {"loss": self.loss(images, texts, batch.captions)}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Also logs `cut`, the share of this rank's captions that lost their end."""
        self.log("cut", batch.num_cut / max(1, batch.num_images))
        return super().training_step(batch, batch_idx)

    def training_flops(self, batch: Pairs) -> float:
        patch = self.vision_encoder.image_spec.patch_size
        height, width = (side // patch for side in batch.pixels.shape[-2:])
        image = self.vision_encoder.flops(height, width)
        head: Any = getattr(self.image_head, "flops", None)
        image += head(height * width) if head is not None else 0.0
        texts = sum(self.text_tower.flops(num) for num in batch.mask.sum(1).tolist())
        return TRAINING * (batch.num_images * image + texts)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        super().on_before_optimizer_step(optimizer)
        self.log("scale", self.loss.log_scale.exp())

    def on_test_start(self) -> None:
        super().on_test_start()
        self.found = {}

    def test_step(self, batch: Pairs | tuple, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Embeddings of held-out pairs, by source."""
        if isinstance(batch, Pairs) and batch.num_images:
            images, texts = self.embed(batch)
            self.found.setdefault(batch.sources[0], []).append((images.cpu(), texts.cpu(), batch.captions.cpu()))

    def on_test_epoch_end(self) -> None:
        """R@1 both ways among the pairs of one source, where other pairs are most alike."""
        for name, parts in self.found.items():
            images, texts, captions = (torch.cat(column) for column in zip(*parts))
            for way, score in retrieval(images, texts, captions).items():
                self.scores[f"{name}: {way} R@1"] = score
        self.found = {}

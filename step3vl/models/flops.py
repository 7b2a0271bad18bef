"""FLOPs of the matrix products of a model, from its shapes: what the utilisation of a device is measured with.

One multiplication and one addition are two. Attention inside a document is causal, so half of its square is counted,
and the square is that of the document, not of the packed row. The output layer is counted for learnt tokens only,
because no other row reaches it. Norms, activations and softmax are left out, as is anything that is recomputed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import nn

from step3vl.types import Batch, Size

if TYPE_CHECKING:
    from step3vl.models.decoder import LanguageDecoder
    from step3vl.models.deepstack import DeepStack
    from step3vl.models.projector import Projector
    from step3vl.models.vision.base import VisionEncoder

TRAINING = 3
"""A trained part costs its forward three times: backward needs the gradient of its input and of its weights."""


def matrix_size(modules: Iterable[nn.Module]) -> int:
    """Weights that are multiplied with: all parameters of two and more axes."""
    return sum(p.numel() for module in modules for p in module.parameters() if p.ndim >= 2)


def backward_factors(parts: Iterable[nn.Module | None]) -> list[float]:
    """What each part's forward FLOPs are multiplied with in training; parts in the order of the forward pass.

    3 where weights are trained; 2 where they are frozen, but a gradient passes through to an earlier part; else 1.
    """
    factors, upstream = [], False
    for part in parts:
        trained = part is not None and any(p.requires_grad for p in part.parameters())
        factors.append(float(TRAINING if trained else 2 if upstream else 1))
        upstream = upstream or trained
    return factors


class TrainingFlops:
    """FLOPs of forward and backward of a vision-language model, of a sample before it is read or of a batch."""

    def __init__(
        self,
        vision_encoder: VisionEncoder,
        projector: Projector,
        deepstack: DeepStack | None,
        decoder: LanguageDecoder,
    ):
        self.vision_encoder, self.projector = vision_encoder, projector
        self.deepstack, self.decoder = deepstack, decoder
        self.factors = backward_factors((vision_encoder, projector, deepstack, decoder))
        self._views: dict[tuple[int, int], float] = {}

    def view(self, height: int, width: int) -> float:
        """One view of `height` x `width` pixels: encoder, projector and DeepStack."""
        if (height, width) not in self._views:
            patch = self.vision_encoder.image_spec.patch_size
            cells = height // patch, width // patch
            vision, projector, deepstack, _ = self.factors
            total = vision * self.vision_encoder.flops(*cells) + projector * self.projector.flops(*cells)
            if self.deepstack is not None:
                total += deepstack * self.deepstack.flops(*cells)
            self._views[height, width] = total
        return self._views[height, width]

    def text(self, length: int, num_labels: int) -> float:
        """One document in the decoder."""
        return self.factors[3] * (self.decoder.flops(length) + self.decoder.head_flops(num_labels))

    def sample(self, size: Size) -> float:
        """A sample of which only the size is known."""
        layout = self.vision_encoder.image_spec.layout
        crop, whole = layout.crop_pixels, layout.global_pixels
        views = size.num_crops * self.view(crop, crop) + size.num_global_views * self.view(whole, whole)
        return self.text(size.num_tokens, size.num_labels) + views

    def batch(self, batch: Batch, num_labels: int) -> float:
        """A packed batch with so many learnt tokens; its padding is no work that was wanted, so it counts nothing."""
        total = sum(self.text(length, 0) for length in batch.num_tokens) + self.text(0, num_labels)
        for pixels in batch.images.tensors if batch.images is not None else ():
            total += len(pixels) * self.view(*pixels.shape[-2:])
        return total

"""Image against text: which caption belongs to which image. How PE (softmax, as CLIP) and SigLIP (sigmoid) begin.

Both see the pairs of all ranks, and equal one rank with the whole batch (`step3vl.losses.gather`). Two images with the
same caption are not told apart: the other's caption is neither right nor wrong, and counts for nothing.

Shapes: n pairs of this rank, N pairs of all ranks, D width of an embedding.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from step3vl.types import WeightedSum

from .gather import gather_rows


class SoftmaxContrast(nn.Module):
    """CLIP's loss: the right caption among all captions for each image, and the right image for each caption.

    Args:
        temperature: what cosines are divided by at first; learnt as the logarithm of its inverse.
        max_scale: largest inverse temperature; CLIP's is 100. The weight is brought back to it before it is used.
    """

    def __init__(self, temperature: float = 0.07, max_scale: float = 100.0) -> None:
        super().__init__()
        if temperature <= 0 or max_scale < 1 / temperature:
            raise ValueError(
                f"temperature must be above 0 and 1 / temperature at most max_scale, got {temperature} and {max_scale}"
            )
        self.max_scale = max_scale
        self.log_scale = nn.Parameter(torch.tensor(-math.log(temperature)))

    def forward(self, images: Tensor, texts: Tensor, captions: Tensor | None = None) -> WeightedSum:
        """Embeddings [n,D] each, of any length -> the sum over this rank's pairs, and their number.

        captions: [n] long, equal where captions are equal; None: all differ.
        """
        images, texts, all_images, all_texts, first = _gathered(images, texts)
        with torch.no_grad():
            self.log_scale.clamp_(max=math.log(self.max_scale))  # as CLIP: the weight itself, so that it can come back
        scale = self.log_scale.exp()
        num = len(images)
        target = torch.arange(first, first + num, device=images.device)  # [n]
        by_image, by_text = scale * images @ all_texts.T, scale * texts @ all_images.T  # [n,N]
        rivals = _same_caption(captions, first, num)
        if rivals is not None:
            by_image, by_text = (logits.masked_fill(rivals, -math.inf) for logits in (by_image, by_text))
        both = [F.cross_entropy(logits, target, reduction="sum") for logits in (by_image, by_text)]
        return WeightedSum((both[0] + both[1]) / 2, scale.new_tensor(float(num)))


class SigmoidContrast(nn.Module):
    """SigLIP's loss: for every image and every caption, whether they belong together. Divided by images, not by pairs.

    Args:
        log_scale: t' of the paper: cosines are multiplied by exp(t'); learnt.
        bias: added to them; learnt. So far below 0 at first, because nearly all pairs do not belong together.
    """

    def __init__(self, log_scale: float = math.log(10), bias: float = -10.0) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(float(log_scale)))
        self.bias = nn.Parameter(torch.tensor(float(bias)))

    def forward(self, images: Tensor, texts: Tensor, captions: Tensor | None = None) -> WeightedSum:
        """As `SoftmaxContrast`: this rank's images against the captions of all ranks, and the number of its images."""
        images, _, _, all_texts, first = _gathered(images, texts)
        num = len(images)
        logits = self.log_scale.exp() * images @ all_texts.T + self.bias  # [n,N]
        signs = -torch.ones_like(logits)
        signs[torch.arange(num), torch.arange(first, first + num)] = 1.0
        losses = -F.logsigmoid(signs * logits)  # [n,N]
        rivals = _same_caption(captions, first, num)
        if rivals is not None:
            losses = losses.masked_fill(rivals, 0.0)
        return WeightedSum(losses.sum(), logits.new_tensor(float(num)))


def _gathered(images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """Unit embeddings of this rank [n,D] and of all ranks [N,D], in float32, and where this rank's begin."""
    if images.shape != texts.shape or images.ndim != 2:
        raise ValueError(
            f"as many image as text embeddings of one width are needed, [n,D] each; got {list(images.shape)} and "
            f"{list(texts.shape)}"
        )
    images, texts = (F.normalize(x.float(), dim=-1) for x in (images, texts))
    both, first = gather_rows(torch.stack([images, texts], dim=1))  # [N,2,D]
    all_images, all_texts = both.unbind(1)
    return images, texts, all_images, all_texts, first


def _same_caption(captions: Tensor | None, first: int, num: int) -> Tensor | None:
    """[n,N] True where another pair has the same caption."""
    if captions is None:
        return None
    everyone, _ = gather_rows(captions)
    same = captions[:, None] == everyone[None]
    same[torch.arange(num), torch.arange(first, first + num)] = False
    return same

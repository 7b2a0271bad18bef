"""The nouns that travel between rooms: what a sample is, what a batch is, how an image is described, who generates.

Letters used in shape comments: B rows of a batch, T tokens a row, t tokens of one example, N views (crops and
global views), C colour channels, H/W pixels, h/w grid cells, D feature width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Literal, NamedTuple, Protocol

import torch
from PIL import Image
from torch import Tensor

IGNORE_INDEX = -100
"""Label of a position that teaches nothing."""

IMAGE_MARK = "<image>"
"""Stands in a message's text where the sample's next image belongs."""

Triple = tuple[float, float, float]


# ------------------------------------------------------------------------------------------------ what is stored


@dataclass(slots=True, kw_only=True)
class Message:
    """One turn. `content` is text; each `<image>` in it stands for the sample's next image.

    Example: Message(role="user", content="<image>Read row 2.")
    """

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(slots=True, kw_only=True)
class Region:
    """A named place in an image: box (x0, y0, x1, y1) in pixels of image number `image`, x1 and y1 exclusive."""

    label: str
    box: tuple[float, float, float, float]
    image: int = 0


@dataclass(slots=True, kw_only=True)
class Sample:
    """One documented row of data; the same row serves pre-training, SFT, RL and evaluation (docs/data_format.md).

    The last message is the assistant's and `answer` is its checkable form; earlier turns are context.
    """

    id: str
    domain: str
    """knowledge | education | documents | code | grounding | vqa | gui | text"""
    subset: str
    level: int
    """0 (aligned, easiest) to 4."""
    messages: list[Message]
    images: list[Image.Image] = field(default_factory=list)
    answer: str | None = None
    answer_type: str | None = None
    """exact | letter | contains | number | math | point | box: names the scorer. None: nothing to check."""
    regions: list[Region] = field(default_factory=list)
    """For point and box answers, the region with label "answer" is the gold place."""
    source: str = "generated"
    licence: str = "Apache-2.0"

    @property
    def conversation(self) -> list[Message]:
        """The messages a model is shown: everything before the final assistant turn."""
        return self.messages[:-1] if self.messages and self.messages[-1].role == "assistant" else self.messages


# ------------------------------------------------------------------------------------------------ images


@dataclass(frozen=True, slots=True, kw_only=True)
class MultiCrop:
    """Global view plus crops (STEP3-VL): the numbers of the algorithm in `step3vl.data.images`, all in pixels."""

    global_size: int = 728
    """Side of the global view; also the long side up to which an image is not cropped."""
    crop_size: int = 504
    """Side of a crop window."""
    max_side: int = 3024
    """Longer images are first scaled down to this long side."""
    min_side: int = 32
    """An image with a shorter side and an aspect ratio above 4 is padded to a square."""
    global_view: int | None = None
    """Side at which the global view reaches the encoder; None: global_size."""
    crop_view: int | None = None
    """Side at which a crop reaches the encoder; None: crop_size."""

    @property
    def global_pixels(self) -> int:
        return self.global_view or self.global_size

    @property
    def crop_pixels(self) -> int:
        return self.crop_view or self.crop_size


class ImageSpec(NamedTuple):
    """What an encoder needs from pixels; `step3vl.data.images` carries it out."""

    patch_size: int
    mean: Triple
    std: Triple
    layout: MultiCrop


@dataclass(slots=True)
class Grids:
    """Images or feature maps of several sizes: one stacked tensor a size, and their order in the sequence.

    tensors: one a size: pixels [n,C,H,W] or features [n,h,w,D].
    order:   [N] long; order[k] is the row, in the concatenation of all tensors, of the k-th view in reading order.
    """

    tensors: tuple[Tensor, ...]
    order: Tensor

    @classmethod
    def stack(cls, views: Sequence[Tensor]) -> Grids:
        """Group views of equal shape; reading order is the order given."""
        if not views:
            raise ValueError("Grids.stack needs at least one view, got none")
        shapes: dict[tuple[int, ...], list[int]] = {}
        for k, view in enumerate(views):
            shapes.setdefault(tuple(view.shape), []).append(k)
        rows = [k for members in shapes.values() for k in members]
        order = torch.empty(len(views), dtype=torch.long)
        order[torch.tensor(rows)] = torch.arange(len(views))
        return cls(tuple(_stacked([views[k] for k in members]) for members in shapes.values()), order)

    def unstack(self) -> list[Tensor]:
        """The views one by one, in reading order."""
        rows = [row for tensor in self.tensors for row in tensor.unbind(0)]
        return [rows[k] for k in self.order.tolist()]

    def map(self, function: Callable[[Tensor], Tensor]) -> Grids:
        """Apply `function` to each stacked tensor; it must keep the first axis."""
        return Grids(tuple(function(tensor) for tensor in self.tensors), self.order)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Grids:
        return self.map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def __len__(self) -> int:
        return len(self.order)


def _stacked(views: list[Tensor]) -> Tensor:
    """[n,C,H,W] with memory laid out as in the views: decoded pixels, channels innermost, are copied row by row."""
    if views[0].ndim == 3 and views[0].stride(0) == 1:
        return torch.stack([view.permute(1, 2, 0) for view in views]).permute(0, 3, 1, 2)
    return torch.stack(views)


# ------------------------------------------------------------------------------------------------ what is trained on


class Size(NamedTuple):
    """What a sample costs, known without decoding a pixel."""

    num_tokens: int
    num_labels: int
    """Tokens that are learnt."""
    num_crops: int
    num_global_views: int
    """One an image."""


@dataclass(slots=True, kw_only=True)
class Example:
    """One tokenised sample. `labels[i]` is the token to predict *at* position i (already shifted by one)."""

    id: str
    input_ids: Tensor  # [t] long
    labels: Tensor  # [t] long, IGNORE_INDEX where nothing is learnt
    position_ids: Tensor  # [t] long
    views: list[Tensor] = field(default_factory=list)  # N x [C,H,W] uint8, in reading order
    num_visual_tokens: int = 0
    source: str = ""
    """Name of the mixture's source that it was drawn from."""


@dataclass(slots=True, kw_only=True)
class Batch:
    """Packed rows. Positions restart at each packed sample; padding is a document of its own with no labels."""

    input_ids: Tensor  # [B,T] long
    labels: Tensor  # [B,T] long; the token to predict at this position; IGNORE_INDEX where nothing is learnt
    loss_weights: Tensor  # [B,T] float; the normalisation lives here (token | sample | sqrt)
    position_ids: Tensor  # [B,T] long
    branches: Tensor | None = None  # [B,T] long; 0: seen by all of its document, k > 0: by branch k of it alone
    images: Grids | None = None  # views [n,C,H,W] uint8, in reading order over the rows
    sample_ids: list[str] = field(default_factory=list)  # in reading order over the rows
    num_visual_tokens: list[int] = field(default_factory=list)  # for each sample
    num_tokens: list[int] = field(default_factory=list)  # for each sample
    sources: list[str] = field(default_factory=list)  # for each sample: the mixture's source it was drawn from
    num_padding: int = 0  # tokens that belong to no sample
    skipped: list[str] = field(default_factory=list)  # "id: reason" of samples that could not be used

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """Lightning moves anything that has this method."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {k: v.to(device, non_blocking=non_blocking) if hasattr(v, "to") else v for k, v in values.items()}
        return Batch(**moved)


class WeightedSum(NamedTuple):
    """A loss before normalisation: the weighted sum (a scalar tensor with gradient) and the sum of its weights."""

    value: Tensor
    weight: Tensor

    def mean(self) -> Tensor:
        return self.value / self.weight.clamp_min(1e-8)


# ------------------------------------------------------------------------------------------------ generation


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How to generate. `max_new_tokens` has no default: truncation is a choice. Temperature 0 is greedy."""

    max_new_tokens: int
    temperature: float = 0.0
    seed: int | None = None
    """Random numbers of one call begin with it; None: they go on from call to call."""
    top_p: float = 1.0
    """Draw from the fewest likeliest tokens that hold this share of the probability; 1: from all."""
    top_k: int | None = None
    """Draw from the k likeliest tokens; None: from all."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer and do not belong to it."""


@dataclass(slots=True, kw_only=True)
class Completion:
    """What a model said. `truncated` is True when it ran into `max_new_tokens`.

    Example: Completion(text="471", token_ids=[52, 55, 49, 2], truncated=False)
    """

    text: str
    token_ids: list[int]
    """Empty when the generator does not tell them."""
    truncated: bool
    num_tokens: int = 0
    """Length of the answer in tokens."""
    logprobs: list[float] = field(default_factory=list)
    """Log-probability of each of `token_ids` at the sampling temperature (1 when greedy), before top-k and top-p cut
    anything off; empty when the generator does not tell them."""
    error: str | None = None
    """Why there is no answer: the generator failed, after its retries. Such an answer is not a wrong one."""


@dataclass(slots=True, kw_only=True)
class Prompt:
    """What is sent to a model: messages that end before the assistant's turn, and their images."""

    messages: list[Message]
    images: list[Image.Image] = field(default_factory=list)
    begun_ids: list[int] = field(default_factory=list)
    """Token ids of an answer that was begun: it is continued, and the completion holds what is new alone."""


class Generator(Protocol):
    """Anything that answers prompts: our sampler, a server, PaCoRe over either. Returns n completions a prompt."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, n: int = 1) -> list[list[Completion]]: ...

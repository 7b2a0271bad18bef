"""The vision-language model: embed tokens, encode images, project, put visual tokens in their places, decode.

STEP3-VL report, architecture. Visual tokens enter the text sequence where the placeholder token stands, with ordinary
1-D positions; crops come before the global view, as the processor has laid them out.

Shapes: B rows, T tokens a row, D decoder width, V visual tokens of the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from step3vl.models.attention import PromptTape, StepCache, document_lengths
from step3vl.models.decoder import Injection, LanguageDecoder
from step3vl.models.deepstack import DeepStack
from step3vl.models.flops import TrainingFlops
from step3vl.models.projector import Projector
from step3vl.models.vision.base import VisionEncoder
from step3vl.types import Batch, Grids, ImageSpec

if TYPE_CHECKING:
    from transformers import Cache


class VisionLanguageModel(nn.Module):
    """A vision encoder and a decoder, joined by a projector. Returns hidden states; `decoder.lm_head` gives logits.

    Args:
        vision_encoder: turns views into grids of features.
        projector: builds the projector from the encoder's and the decoder's width.
        decoder: the language model.
        deepstack: builds, from the same widths, what carries inner encoder layers into the decoder; None: nothing does.

    Raises:
        ValueError: DeepStack names a layer that is not there, or makes another number of tokens than the projector.
    """

    def __init__(
        self,
        vision_encoder: VisionEncoder,
        projector: Callable[[int, int], Projector],
        decoder: LanguageDecoder,
        deepstack: Callable[[int, int], DeepStack] | None = None,
    ) -> None:
        super().__init__()
        self.vision_encoder = vision_encoder
        self.projector = projector(vision_encoder.hidden_size, decoder.hidden_size)
        self.decoder = decoder
        self.deepstack = None if deepstack is None else deepstack(vision_encoder.hidden_size, decoder.hidden_size)
        if self.deepstack is not None:
            self._check_deepstack(self.deepstack)
        self.image_token_id: int | None = None
        self.num_encoder_passes: int | None = None
        """How often the encoder runs for packed rows, whatever is in them; None: once for each size of views there is.

        Ranks that share parameters must run every part equally often, or they wait for one another for ever.
        """

    def bind(self, image_token_id: int) -> None:
        """Say which token stands for one visual token. Must come before the first batch with images."""
        if not 0 <= image_token_id < self.decoder.vocab_size:
            raise ValueError(
                f"image_token_id {image_token_id} is outside the decoder's vocabulary of {self.decoder.vocab_size}"
            )
        self.image_token_id = image_token_id

    @property
    def image_spec(self) -> ImageSpec:
        """What the encoder needs from pixels."""
        return self.vision_encoder.image_spec

    @property
    def downsample(self) -> int:
        """Grid cells a side that become one visual token."""
        return self.projector.downsample

    def num_visual_tokens(self, pixels: int) -> int:
        """How many visual tokens a square view with a side of `pixels` becomes."""
        return self.projector.grid(pixels // self.image_spec.patch_size) ** 2

    def flops(self) -> TrainingFlops:
        """What training costs, with the parameters that are trained at the moment of this call."""
        return TrainingFlops(self.vision_encoder, self.projector, self.deepstack, self.decoder)

    def image_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters that only a view brings into play: all but the decoder's."""
        return (parameter for part in self.children() if part is not self.decoder for parameter in part.parameters())

    def init_weights(self) -> None:
        """Draw the weights of all parts afresh, for example after construction on the meta device."""
        self.vision_encoder.init_weights()
        self.projector.init_weights()
        self.decoder.init_weights()
        if self.deepstack is not None:
            self.deepstack.init_weights()

    def forward(
        self,
        batch: Batch,
        cache: Cache | PromptTape | StepCache | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [B,T,D] of packed rows, which may leave their keys and values on a tape; with another cache or
        a mask [B, cached + T], of one sequence a row.

        Raises:
            ValueError: there are images before `bind`, or as many visual tokens as placeholders are not there.
        """
        embeds = self.decoder.embed(batch.input_ids)  # [B,T,D]
        injection = None
        is_packed = attention_mask is None and (cache is None or isinstance(cache, PromptTape))
        blank = self.blank_views(batch) if is_packed else None
        if blank is not None:
            visual, levels = self.encode_images(blank)
            nothing = torch.stack([tokens.sum() for tokens in (visual, *levels)]).sum() * 0.0
            embeds = embeds + nothing.to(embeds.dtype)  # every parameter has a gradient, here of zeros
        if batch.images is not None:
            visual, levels = self.encode_images(batch.images)
            embeds = self.place(embeds, visual, batch)
            if self.deepstack is not None:
                at = batch.input_ids.eq(cast(int, self.image_token_id))  # [B,T]; an int, or `place` had raised
                injection = Injection(at, dict(zip(self.deepstack.inject_after, levels, strict=True)))
        elif self.image_token_id is not None:
            self._check(int((batch.input_ids == self.image_token_id).sum()), 0, batch)
        return self.decoder(embeds, batch.position_ids, cache, attention_mask, injection, batch.branches)

    def encode_images(self, images: Grids) -> tuple[Tensor, list[Tensor]]:
        """Visual tokens of all views in reading order [V,D], and DeepStack's levels [V,D] in the same order."""
        features = self.vision_encoder(images, () if self.deepstack is None else self.deepstack.taps)
        views = features.final.map(self.projector).unstack()  # each [h,w,D]
        visual = torch.cat([view.flatten(0, 1) for view in views])
        return visual, [] if self.deepstack is None else self.deepstack(features.taps)

    def blank_views(self, batch: Batch) -> Grids | None:
        """Black views, each the smallest that makes a token, one for each pass of the encoder that the batch lacks.

        Raises:
            ValueError: the batch has views of more sizes than there are passes.
        """
        if self.num_encoder_passes is None:
            return None
        sizes = [] if batch.images is None else [tuple(pixels.shape[-2:]) for pixels in batch.images.tensors]
        num_blank = self.num_encoder_passes - len(sizes)
        if num_blank < 0:
            raise ValueError(
                f"a batch has views of {len(sizes)} sizes ({', '.join(f'{h}x{w}' for h, w in sizes)}), but with "
                f"several ranks the encoder runs {self.num_encoder_passes} times in every step, once for each size of "
                "image_spec.layout"
            )
        side = self.image_spec.patch_size * self.downsample
        black = torch.zeros(1, 3, side, side, dtype=torch.uint8, device=batch.input_ids.device)  # [1,C,H,W]
        return Grids((black,) * num_blank, torch.arange(num_blank)) if num_blank else None

    def place(self, embeds: Tensor, visual: Tensor, batch: Batch) -> Tensor:
        """Put visual tokens [V,D] into embeddings [B,T,D] at the placeholders, in reading order."""
        if self.image_token_id is None:
            raise ValueError("the batch has images, but bind(image_token_id) was not called on the model")
        at = (batch.input_ids.flatten() == self.image_token_id).nonzero().squeeze(1)  # [V]
        self._check(len(at), len(visual), batch)
        return embeds.flatten(0, 1).index_copy(0, at, visual.to(embeds.dtype)).view_as(embeds)

    def _check_deepstack(self, deepstack: DeepStack) -> None:
        for name, numbers, part in (
            ("taps", deepstack.taps, self.vision_encoder),
            ("inject_after", deepstack.inject_after, self.decoder),
        ):
            if max(numbers) >= len(part.blocks()):
                raise ValueError(
                    f"deepstack: {name} is {list(numbers)}, but {type(part).__name__} has the layers 0 to "
                    f"{len(part.blocks()) - 1}"
                )
        for side in range(1, 129):
            if deepstack.grid(side) != self.projector.grid(side):
                raise ValueError(
                    f"deepstack makes {deepstack.grid(side)} tokens a side of {side} grid cells, the projector "
                    f"{type(self.projector).__name__} makes {self.projector.grid(side)}; they must be equal"
                )

    def _check(self, num_placeholders: int, num_visual: int, batch: Batch) -> None:
        if num_placeholders != num_visual:
            raise ValueError(
                f"{num_placeholders} image placeholders in the text, but {num_visual} visual tokens from the images; "
                + _culprit(batch, self.image_token_id)
            )


def _culprit(batch: Batch, image_token_id: int | None) -> str:
    """Name the first sample whose placeholders are not as many as it declares; all samples when each one agrees."""
    is_image = batch.input_ids.flatten() == (-1 if image_token_id is None else image_token_id)
    found = [int(part.sum()) for part in is_image.split(document_lengths(batch.position_ids))]
    declared = list(zip(batch.sample_ids, batch.num_visual_tokens))
    if len(found) != len(declared):  # padding is a document too, but it has no placeholders
        found = [count for count in found if count]
        declared = [(name, count) for name, count in declared if count]
    for count, (name, wanted) in zip([*found, *[0] * len(declared)], declared):
        if count != wanted:
            return f"sample {name!r} has {count} placeholders and declares {wanted} visual tokens"
    return f"samples: {', '.join(batch.sample_ids) or 'not named'}"

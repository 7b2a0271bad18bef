"""A vision-language model that says one number a token: PPO's critic, and the reward model of Bradley and Terry.

It is a whole model of its own, which shares nothing with the policy; its language head has one row in place of one a
token of the vocabulary (Open-Reasoner-Zero: normal with standard deviation 1 / (D + 1), no bias).

Shapes: B rows, T tokens a row, D decoder width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from step3vl.models.vlm import VisionLanguageModel
from step3vl.types import Batch


class ValueModel(nn.Module):
    """Values of tokens; `vlm` gets another language head, [1,D]."""

    HEAD = r"^decoder\.lm_head\."
    """What a language model's weights and these differ in: a pattern for `step3vl.weights.load_parts`."""

    def __init__(self, vlm: VisionLanguageModel) -> None:
        super().__init__()
        self.vlm = vlm
        decoder = vlm.decoder
        decoder.tie_embeddings = False  # type: ignore[assignment]
        decoder.lm_head = nn.Linear(decoder.hidden_size, 1, bias=False)
        if not decoder.lm_head.weight.is_meta:
            self.init_head()

    def init_weights(self) -> None:
        """Draw all weights afresh."""
        self.vlm.init_weights()
        self.init_head()

    def init_head(self) -> None:
        """Draw the head alone afresh."""
        nn.init.normal_(self.vlm.decoder.lm_head.weight, std=1.0 / (self.vlm.decoder.hidden_size + 1))

    def blocks(self) -> Sequence[nn.Module]:
        """Units of sharding and of recomputation."""
        return [*self.vlm.vision_encoder.blocks(), *self.vlm.decoder.blocks()]

    def forward(self, batch: Batch, places: Tensor | None = None) -> Tensor:
        """Values in fp32: at each position that of the text up to and including its token.

        Args:
            batch: rows [B,T].
            places: positions in the rows laid end to end; the head then reads these alone, in fp32 also under
                autocast, because what bf16 keeps of a score is less than what two answers may differ in.

        Returns:
            [B,T], or the shape of `places`.
        """
        hidden = self.vlm(batch)  # [B,T,D]
        head = self.vlm.decoder.lm_head
        if places is None:
            return cast(Tensor, head(hidden)).squeeze(-1).to(torch.float32)
        rows = hidden.flatten(0, 1).index_select(0, places.flatten())  # [n,D]
        with torch.autocast(rows.device.type, enabled=False):
            return (rows.float() @ head.weight.float().T).view(places.shape)

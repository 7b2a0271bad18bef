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

    def forward(self, batch: Batch) -> Tensor:
        """Values [B,T] in fp32: at each position that of the text up to and including its token."""
        return cast(Tensor, self.vlm.decoder.lm_head(self.vlm(batch))).squeeze(-1).to(torch.float32)

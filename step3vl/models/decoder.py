"""The language decoder: a Qwen3 text model (STEP3-VL report, architecture: Qwen3-8B) and its output layer.

Built on transformers' Qwen3-VL text model, which with 1-D positions equals Qwen3 exactly. Packed rows are flattened,
and each document attends to itself alone.

Shapes: B rows, T tokens a row, D width, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from step3vl.models.attention import NAME, PromptTape, StepCache, document_lengths, packing_arguments, register
from step3vl.models.branches import seen
from step3vl.models.flops import matrix_size

if TYPE_CHECKING:
    from transformers import Cache


class Injection(NamedTuple):
    """What is added to hidden states inside the decoder (DeepStack). Order of V: reading order over the rows."""

    at: Tensor  # [B,T] bool, True at the V visual positions
    added: dict[int, Tensor]  # number of a layer -> [V,D], added to its output at those positions


class LanguageDecoder(nn.Module, ABC):
    """Turns embeddings into hidden states, and hidden states into logits with `lm_head`."""

    hidden_size: int
    """D, the width of embeddings and hidden states."""
    vocab_size: int
    lm_head: nn.Linear
    """Hidden states [..., D] -> logits [..., V]."""

    @abstractmethod
    def embed(self, ids: Tensor) -> Tensor:
        """Token ids [B,T] -> embeddings [B,T,D]."""

    @abstractmethod
    def forward(
        self,
        embeds: Tensor,
        position_ids: Tensor,
        cache: Cache | PromptTape | StepCache | None = None,
        attention_mask: Tensor | None = None,
        injection: Injection | None = None,
        branches: Tensor | None = None,
    ) -> Tensor:
        """Embeddings [B,T,D] -> hidden states [B,T,D].

        Without cache and mask the rows are packed: a document starts wherever a position [B,T] is 0, and sees only
        itself. With a transformers cache or a mask each row is one sequence; the mask [B, cached + T] is True at real
        tokens. To generate, packed rows with a tape leave their keys and values there, and with a step cache each row
        is the next token of a sequence, T = 1.
        An injection is added after the layers that it names; None, as in steps without images, adds nothing.
        Branches [B,T] part the documents of packed rows (`step3vl.models.branches`); None: there are none.
        """

    @abstractmethod
    def blocks(self) -> Sequence[nn.Module]:
        """The layers, in order: units of sharding and of recomputation."""

    @abstractmethod
    def flops(self, length: int) -> float:
        """FLOPs of the forward of a document of `length` tokens, without the output layer."""

    def head_flops(self, num_labels: int) -> float:
        """FLOPs of the output layer for `num_labels` learnt tokens."""
        return 2.0 * num_labels * self.hidden_size * self.vocab_size

    @abstractmethod
    def init_weights(self) -> None:
        """Draw all weights afresh and recompute all buffers; also while some or all are on the meta device."""


class Qwen3Decoder(LanguageDecoder):
    """Qwen3: RMSNorm, grouped-query attention with normalised q and k, rotary positions, SwiGLU, no biases.

    Args:
        hidden_size: width of the residual stream.
        intermediate_size: width inside the MLP.
        num_layers: number of layers.
        num_heads: query heads.
        num_kv_heads: key and value heads.
        head_dim: width of a head.
        vocab_size: number of token ids.
        rope_theta: base of the rotary frequencies.
        rms_norm_eps: epsilon of all norms.
        max_positions: longest document that the model is meant for, in tokens.
        tie_embeddings: whether the output layer shares the embedding's weights.
        attention: "per_document": packed rows on any device, by torch's varlen_attn on GPUs in 16 bits, else by a loop.
            "flash_attention_2" needs flash-attn. "sdpa" builds a dense mask (for comparison).
        init_std: standard deviation of freshly drawn weights.
        zero_init_outputs: start o_proj, down_proj and an untied output layer at zero, which helps very small models.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_layers: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        vocab_size: int,
        rope_theta: float = 1e6,
        rms_norm_eps: float = 1e-6,
        max_positions: int = 40960,
        tie_embeddings: bool = False,
        attention: Literal["per_document", "flash_attention_2", "sdpa"] = "per_document",
        init_std: float = 0.02,
        zero_init_outputs: bool = False,
    ) -> None:
        from transformers import Qwen3VLTextConfig, Qwen3VLTextModel

        super().__init__()
        if num_heads % num_kv_heads:
            raise ValueError(f"num_heads {num_heads} is not a multiple of num_kv_heads {num_kv_heads}")
        register()
        self.hidden_size = hidden_size
        self.vocab_size = vocab_size
        self.attention = attention
        self.tie_embeddings = tie_embeddings
        self.init_std = init_std
        self.zero_init_outputs = zero_init_outputs
        side = head_dim * 5 // 32  # any split into sections is the same when t, h and w positions are equal
        config = Qwen3VLTextConfig(
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            num_key_value_heads=num_kv_heads,
            head_dim=head_dim,
            vocab_size=vocab_size,
            rms_norm_eps=rms_norm_eps,
            max_position_embeddings=max_positions,
            initializer_range=init_std,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": float(rope_theta),
                "mrope_section": [head_dim // 2 - 2 * side, side, side],
                "mrope_interleaved": True,
            },
        )
        self.model = Qwen3VLTextModel(config)
        self.model.set_attn_implementation(attention)
        self.lm_head = nn.Linear(hidden_size, vocab_size, bias=False)
        self.num_layers = num_layers
        self.attention_size = num_heads * head_dim
        """Width of a layer's queries."""
        self.matrix_size = matrix_size(self.model.layers)
        self.init_weights()

    def embed(self, ids: Tensor) -> Tensor:
        return self.model.embed_tokens(ids)

    def blocks(self) -> Sequence[nn.Module]:
        return list(self.model.layers)

    def flops(self, length: int) -> float:
        linear = 2.0 * length * self.matrix_size
        return linear + self.num_layers * 4.0 * self.attention_size * length * length / 2

    def init_weights(self) -> None:
        self.model.apply(self.model._init_weights)
        if not self.tie_embeddings:
            nn.init.normal_(self.lm_head.weight, std=self.init_std)
        if self.zero_init_outputs:
            for name, weight in self.model.named_parameters():
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    nn.init.zeros_(weight)
            if not self.tie_embeddings:  # a tied output layer is the embedding, which must not vanish
                nn.init.zeros_(self.lm_head.weight)
        self._tie()

    def _tie(self) -> None:
        if self.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self,
        embeds: Tensor,
        position_ids: Tensor,
        cache: Cache | PromptTape | StepCache | None = None,
        attention_mask: Tensor | None = None,
        injection: Injection | None = None,
        branches: Tensor | None = None,
    ) -> Tensor:
        if isinstance(cache, StepCache):
            return self._step(embeds, position_ids, cache)
        if isinstance(cache, PromptTape):
            with self._per_document():
                return self._packed(embeds, position_ids, injection, cache)
        if cache is None and attention_mask is None:
            return self._packed(embeds, position_ids, injection, branches=branches)
        if attention_mask is not None and embeds.shape[1] == 1 and self.attention != "flash_attention_2":
            attention_mask = attention_mask[:, None, None].bool()  # [B,1,1,K]: one query sees every real token
        return self.model(
            inputs_embeds=embeds,
            position_ids=position_ids,
            past_key_values=cache,
            attention_mask=attention_mask,
            use_cache=cache is not None,
            **_deepstack_arguments(injection),
        ).last_hidden_state

    def _packed(
        self,
        embeds: Tensor,
        position_ids: Tensor,
        injection: Injection | None,
        tape: PromptTape | None = None,
        branches: Tensor | None = None,
    ) -> Tensor:
        lengths = document_lengths(position_ids)
        masks = None if branches is None else seen(lengths, branches.flatten())
        if masks is not None and self.attention != NAME:
            raise ValueError(f"decoder.attention is {self.attention!r}; documents with branches need {NAME!r}")
        dummy = no_mask(embeds)
        if injection is not None:
            injection = injection._replace(at=injection.at.flatten()[None])  # [1,B*T]
        hidden = self.model(
            inputs_embeds=embeds.flatten(0, 1)[None],  # [1,B*T,D]
            position_ids=position_ids.flatten()[None],
            attention_mask=dummy if self.attention == "per_document" or tape is not None else None,
            use_cache=False,
            **packing_arguments(lengths, embeds.device),
            **({} if tape is None else {"prompt_tape": tape}),
            **({} if masks is None else {"document_masks": masks}),
            **_deepstack_arguments(injection),
        ).last_hidden_state
        return hidden.view_as(embeds)

    def _step(self, embeds: Tensor, position_ids: Tensor, cache: StepCache) -> Tensor:
        with self._per_document():
            return self.model(
                inputs_embeds=embeds,  # [R,1,D]
                position_ids=position_ids,
                attention_mask=no_mask(embeds),
                use_cache=False,
                step_cache=cache,
            ).last_hidden_state

    @contextmanager
    def _per_document(self) -> Iterator[None]:
        """Our attention function inside, whichever the decoder trains with: no other knows tapes and step caches."""
        config = self.model.config
        before = config._attn_implementation
        if before == NAME:
            yield
            return
        config._attn_implementation = NAME
        try:
            yield
        finally:
            config._attn_implementation = before


def no_mask(embeds: Tensor) -> Tensor:
    """Stands for a mask, and keeps transformers from making one of T x T."""
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=embeds.device)


def _deepstack_arguments(injection: Injection | None) -> dict[str, Any]:
    """The injection as transformers takes it: one entry for each layer from the first; a skipped layer gets a zero."""
    if injection is None:
        return {}
    nothing = torch.zeros((), device=injection.at.device)
    added = [injection.added.get(layer, nothing) for layer in range(max(injection.added) + 1)]
    return {"visual_pos_masks": injection.at, "deepstack_visual_embeds": added}

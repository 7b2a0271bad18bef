"""What a forward keeps for its backward, measured on the run's own classes rather than derived from a formula.

The model is built with one and with two layers and its full widths, and is run on a few tokens on the CPU, with weights
that take no memory. What autograd keeps is then known for a token and for a block, and is scaled to the run.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from step3vl.diagnose import import_class
from step3vl.models import LanguageDecoder, VisionLanguageModel
from step3vl.models.vision import VisionEncoder
from step3vl.types import Grids

from .parts import build_vlm

FEW, MORE = 16, 32
"""Tokens of the two trials of the decoder: few, because attention on a CPU may keep weights that a GPU does not."""
SMALL, LARGE = 2, 4
"""Grid cells a side of the two trial views; the projector gets twice as many."""
NUM_HEAD_ROWS = 8
"""Vocabulary of the trial decoder, whose output layer is not run."""


class Trial(NamedTuple):
    """Bytes that one forward kept, and bytes of hidden states that went into the first block."""

    kept: int
    block_input: int


@dataclass(frozen=True)
class Kept:
    """Bytes that one part of a model keeps from forward to backward; a token is a patch in the vision encoder."""

    num_blocks: int
    a_token_and_block: float
    a_token: float
    """Outside the blocks: embedding, norms."""
    a_block: float
    """Whatever the number of tokens: 16-bit copies of weights under autocast."""
    input_of_a_block: float
    """A token's hidden state, which recomputation keeps in place of the block's inside."""

    def bytes(self, num_tokens: float, recomputes: bool) -> float:
        """For so many tokens in one micro-batch; with recomputation, one block's inside exists at a time."""
        inside = num_tokens * self.a_token_and_block + self.a_block
        if not recomputes:
            return num_tokens * self.a_token + self.num_blocks * inside
        return num_tokens * (self.a_token + self.num_blocks * self.input_of_a_block) + inside


NOTHING = Kept(0, 0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Activations:
    """What each part keeps. The projector has no blocks: its tokens are visual tokens."""

    vision_encoder: Kept
    projector: Kept
    decoder: Kept


def measure(card: Mapping[str, Any], precision: str, computes_in: torch.dtype = torch.float32) -> Activations:
    """Measure a composed `model.vlm`.

    Args:
        card: the model.
        precision: one of Lightning's; one that ends in -mixed means autocast.
        computes_in: number format of weights and hidden states where blocks compute.

    Raises:
        ValueError: the encoder or the decoder has blocks but no argument `num_layers`, so that no shallow one can be
            built.
    """
    init = card["init_args"]
    depth = {}
    parts = ["vision_encoder", "decoder"]
    if not _has_tower(card):
        parts = ["decoder"]
    for part in parts:
        arguments = init[part].get("init_args") or {}
        if "num_layers" not in arguments:
            name = init[part]["class_path"].rpartition(".")[2]
            raise ValueError(f"{name} has no argument num_layers: what its blocks keep cannot be measured")
        depth[part] = int(arguments["num_layers"])
    dtype = computes_in
    tower: list[list[Trial]] = []
    decoder: list[list[Trial]] = []
    for num_layers in (1, 2):
        vlm = _shallow(card, num_layers)
        _weightless(vlm, dtype)
        if "vision_encoder" in parts:
            see = [_see(vlm.vision_encoder, side, dtype) for side in (SMALL, LARGE)]
            tower.append([_try(look, vlm, vlm.vision_encoder.blocks()[0], precision) for look in see])
        first = vlm.decoder.blocks()[0]
        decoder.append([_try(_decode(vlm.decoder, num, dtype), vlm, first, precision) for num in (FEW, MORE)])
    few, more = (_try(_project(vlm, 2 * side, dtype), vlm, None, precision) for side in (SMALL, LARGE))
    visual = [vlm.projector.grid(2 * side) ** 2 for side in (SMALL, LARGE)]
    return Activations(
        vision_encoder=_solve(tower, (SMALL**2, LARGE**2), depth["vision_encoder"]) if tower else NOTHING,
        projector=Kept(0, 0.0, (more.kept - few.kept) / (visual[1] - visual[0]), 0.0, 0.0),
        decoder=_solve(decoder, (FEW, MORE), depth["decoder"]),
    )


def _has_tower(card: Mapping[str, Any]) -> bool:
    """Whether the encoder has blocks; the one of noise has none, and keeps nothing."""
    part = card["init_args"]["vision_encoder"]
    accepted = inspect.signature(import_class(part["class_path"], "model.vlm.vision_encoder")).parameters
    return "num_layers" in accepted or bool(build_vlm(card).vision_encoder.blocks())


def _decode(decoder: LanguageDecoder, num_tokens: int, dtype: torch.dtype) -> Callable[[], Any]:
    embeds = torch.zeros(1, num_tokens, decoder.hidden_size, dtype=dtype, requires_grad=True)
    return lambda: decoder(embeds, torch.arange(num_tokens)[None])


def _see(encoder: VisionEncoder, side: int, dtype: torch.dtype) -> Callable[[], Any]:
    pixels = side * encoder.image_spec.patch_size
    return lambda: encoder(Grids.stack([torch.zeros(3, pixels, pixels, dtype=dtype)]))


def _project(vlm: VisionLanguageModel, side: int, dtype: torch.dtype) -> Callable[[], Any]:
    features = torch.zeros(1, side, side, vlm.vision_encoder.hidden_size, dtype=dtype, requires_grad=True)
    return lambda: vlm.projector(features)


def _solve(trials: list[list[Trial]], tokens: tuple[int, int], num_blocks: int) -> Kept:
    """Four trials, [one or two layers][few or more tokens]: what is kept is linear in tokens and in blocks."""
    added = tokens[1] - tokens[0]
    slope = [(more.kept - few.kept) / added for few, more in trials]
    constant = [few.kept - slope[i] * tokens[0] for i, (few, _) in enumerate(trials)]
    a_token_and_block = slope[1] - slope[0]
    (few, more), _ = trials
    return Kept(
        num_blocks=num_blocks,
        a_token_and_block=a_token_and_block,
        a_token=slope[0] - a_token_and_block,
        a_block=max(0.0, constant[1] - constant[0]),
        input_of_a_block=(more.block_input - few.block_input) / added,
    )


def _shallow(card: Mapping[str, Any], num_layers: int) -> VisionLanguageModel:
    """The model with so many layers a part, a small vocabulary, and attention that runs anywhere."""
    card = copy.deepcopy(dict(card))
    init = card["init_args"]
    init["deepstack"] = None
    for part in ("vision_encoder", "decoder"):
        if "num_layers" in init[part]["init_args"]:
            init[part]["init_args"]["num_layers"] = num_layers
    for key, value in (("vocab_size", NUM_HEAD_ROWS), ("attention", "per_document")):
        if key in init["decoder"]["init_args"]:
            init["decoder"]["init_args"][key] = value
    return build_vlm(card)


def _weightless(module: nn.Module, dtype: torch.dtype) -> None:
    """Bring a module from the meta device to the CPU; its weights are views of one zero and take no memory."""
    zero = torch.zeros((), dtype=dtype)
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            setattr(part, name, nn.Parameter(zero.expand(parameter.shape), requires_grad=parameter.requires_grad))
        for name, buffer in list(part.named_buffers(recurse=False)):
            setattr(part, name, torch.zeros(buffer.shape, dtype=buffer.dtype))


def _try(run: Callable[[], Any], weights_of: nn.Module, block: nn.Module | None, precision: str) -> Trial:
    """One forward: what autograd keeps beside the weights, and what goes into `block`."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in weights_of.parameters()}
    seen: dict[int, Tensor] = {}  # holds the tensors, so that no address comes twice
    inputs: list[int] = []

    def pack(tensor: Tensor) -> None:
        seen.setdefault(tensor.untyped_storage().data_ptr(), tensor.detach())

    def enter(module: nn.Module, positional: tuple, named: dict) -> None:
        hidden = next(value for value in (*positional, *named.values()) if isinstance(value, Tensor))
        inputs.append(hidden.numel() * hidden.element_size())

    hook = block.register_forward_pre_hook(enter, with_kwargs=True) if block is not None else None
    mixed = torch.autocast("cpu", torch.bfloat16, enabled=precision.endswith("-mixed"))
    with saved_tensors_hooks(pack, lambda nothing: nothing), mixed:
        run()
    if hook is not None:
        hook.remove()
    kept = sum(tensor.untyped_storage().nbytes() for address, tensor in seen.items() if address not in weights)
    return Trial(kept, inputs[0] if inputs else 0)

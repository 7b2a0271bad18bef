"""Cards of single parts from the config.json of published checkpoints; for PE-lang, from the shapes of its tensors.

transformers' configuration classes fill in what a config.json leaves out. What our parts cannot do is refused here,
before a tensor is read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from step3vl.weights import Entry, Layout

PE_NUM_HEADS = 16
"""Not in the checkpoint; every released PE-lang has 16."""


def part_card(
    layout: Layout, entries: Mapping[str, Entry], config: dict[str, Any] | None
) -> tuple[str, dict[str, Any]]:
    """(part, card) of a checkpoint that holds one part of a model.

    Raises:
        ValueError: config.json is needed and missing, or asks for something that the part does not do.
    """
    if layout.name.startswith("pe"):
        return "vision_encoder", pe_card(layout, entries)
    if config is None:
        raise ValueError(f"a {layout.name} checkpoint needs its config.json beside the weights")
    if layout.name.startswith("dinov3"):
        return "vision_encoder", dinov3_card(config)
    if layout.name.startswith("siglip"):
        return "vision_encoder", siglip_card(config.get("vision_config", config), naflex=layout.num_axes == 2)
    text = dict(config.get("text_config", config))
    text["tie_word_embeddings"] = config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
    return "decoder", qwen3_card(text)


def pe_card(layout: Layout, entries: Mapping[str, Entry]) -> dict[str, Any]:
    """Meta's PE-lang: gelu, pixels between -1 and 1, sizes from the shapes."""

    def shape(name: str) -> tuple[int, ...]:
        theirs = layout.to_theirs(f"vision_encoder.{name}") or ""
        if theirs not in entries:
            raise ValueError(f"the checkpoint has no {theirs}, which every PE-lang has")
        return entries[theirs].shape

    has_class_token = layout.to_theirs("vision_encoder.class_embedding") in entries
    numbers = [int(m[1]) for name in entries if (m := re.search(r"resblocks\.(\d+)\.", name))]
    arguments = {
        "hidden_size": shape("conv1.weight")[0],
        "num_layers": max(numbers, default=-1) + 1,
        "num_heads": PE_NUM_HEADS,
        "mlp_size": shape("transformer.resblocks.0.mlp.c_fc.weight")[0],
        "patch_size": shape("conv1.weight")[-1],
        "grid_size": math.isqrt(shape("positional_embedding")[0]),  # a class token's row does not reach the next square
        "hidden_act": "gelu",
        "use_class_token": has_class_token,
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
    }
    return {"class_path": "step3vl.models.vision.PELang", "init_args": arguments}


def dinov3_card(config: dict[str, Any]) -> dict[str, Any]:
    """DINOv3 ViT of any size."""
    from transformers import DINOv3ViTConfig

    full = DINOv3ViTConfig(**_plain(config))
    _same(full, layer_norm_eps=1e-5, key_bias=False, proj_bias=True, mlp_bias=True, num_channels=3)
    _same(full, hidden_act="silu" if full.use_gated_mlp else "gelu")
    _theta(full, 100.0)
    arguments = {
        "hidden_size": full.hidden_size,
        "num_layers": full.num_hidden_layers,
        "num_heads": full.num_attention_heads,
        "intermediate_size": full.intermediate_size,
        "use_gated_mlp": full.use_gated_mlp,
        "use_query_bias": full.query_bias,
        "use_value_bias": full.value_bias,
        "patch_size": full.patch_size,
        "num_registers": full.num_register_tokens,
    }
    return {"class_path": "step3vl.models.vision.DINOv3", "init_args": arguments}


def siglip_card(config: dict[str, Any], naflex: bool) -> dict[str, Any]:
    """SigLIP and SigLIP 2, of one resolution or NaFlex."""
    from transformers import Siglip2VisionConfig, SiglipVisionConfig

    full: Any = (Siglip2VisionConfig if naflex else SiglipVisionConfig)(**_plain(config))
    _same(full, hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6, num_channels=3)
    arguments = {
        "hidden_size": full.hidden_size,
        "num_layers": full.num_hidden_layers,
        "num_heads": full.num_attention_heads,
        "intermediate_size": full.intermediate_size,
        "grid_size": math.isqrt(full.num_patches) if naflex else full.image_size // full.patch_size,
        "patch_size": full.patch_size,
    }
    name = "SigLIP2NaFlex" if naflex else "SigLIP2"
    return {"class_path": f"step3vl.models.vision.{name}", "init_args": arguments}


def qwen3_card(config: dict[str, Any]) -> dict[str, Any]:
    """Qwen3, or the text tower of Qwen3-VL or STEP3-VL; with 1-D positions all three are the same."""
    from transformers import Qwen3Config

    theta = config.get("rope_theta")
    for rope in (config.get("rope_scaling") or {}, config.get("rope_parameters") or {}):
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in ("default", "mrope"):
            raise ValueError(f"config.json: rope type {kind!r} is not supported, only plain rotary positions")
        theta = rope.get("rope_theta", theta)
    if theta is None:
        raise ValueError("config.json: rope_theta is missing")
    rest = {k: v for k, v in _plain(config).items() if not k.startswith("rope_")}
    full = Qwen3Config(**rest)
    _same(full, hidden_act="silu", attention_bias=False, use_sliding_window=False)
    arguments = {
        "hidden_size": full.hidden_size,
        "intermediate_size": full.intermediate_size,
        "num_layers": full.num_hidden_layers,
        "num_heads": full.num_attention_heads,
        "num_kv_heads": full.num_key_value_heads,
        "head_dim": full.head_dim,
        "vocab_size": full.vocab_size,
        "rope_theta": float(theta),
        "rms_norm_eps": full.rms_norm_eps,
        "max_positions": full.max_position_embeddings,
        "tie_embeddings": bool(config.get("tie_word_embeddings", False)),
    }
    return {"class_path": "step3vl.models.Qwen3Decoder", "init_args": arguments}


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """Without keys that say how the file was made, and without layer lists, which follow from the counts."""
    drop = ("model_type", "architectures", "transformers_version", "auto_map", "layer_types", "torch_dtype", "dtype")
    return {key: value for key, value in config.items() if key not in drop}


def _same(full: Any, **wanted: Any) -> None:
    for key, value in wanted.items():
        given = getattr(full, key)
        if given != value:
            raise ValueError(f"config.json: {key} is {given!r}; only {value!r} is supported")


def _theta(full: Any, wanted: float) -> None:
    given = (getattr(full, "rope_parameters", None) or {}).get("rope_theta", getattr(full, "rope_theta", wanted))
    if given != wanted:
        raise ValueError(f"config.json: rope_theta is {given}; only {wanted} is supported")

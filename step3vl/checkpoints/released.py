"""config.json of the STEP3-VL release <-> our card of the model, and the small JSON files around it.

Confirmed by what engines with native support read: architectures, vision_config's width, layers, heads, image_size,
patch_size, mlp_ratio, ls_init_value, hidden_act, output_dim and the five use_* flags, text_config as Qwen3's,
projector_bias (vLLM, SGLang); model_type, understand_projector_stride, image_token_id (two ports of the release).
Not confirmed: the keys of preprocessor_config.json, which follow transformers' port of the successor model; engines
bring their own image processor and do not read it.
"""

from __future__ import annotations

import math
from typing import Any

from step3vl.checkpoints.cards import qwen3_card
from step3vl.data.processor import Processor

ARCHITECTURE = "StepVLForConditionalGeneration"
MODEL_TYPE = "step_robotics"
CONFIGURATION = "configuration_step_vl.py"
CLASSES = {
    "vision_encoder": "step3vl.models.vision.PELang",
    "projector": "step3vl.models.ConvProjector",
    "decoder": "step3vl.models.Qwen3Decoder",
}
VLM = "step3vl.models.VisionLanguageModel"
LAYOUT = {"global_size": 728, "crop_size": 504, "max_side": 3024, "min_side": 32}
"""STEP3-VL's cuts, which engines hard-code."""


def released_config(card: dict[str, Any], processor: Processor, dtype: str) -> dict[str, Any]:
    """config.json for a completed card of the model.

    Raises:
        ValueError: a part is of another class than the released model's, or DeepStack is on: the layout has no place
            for it.
    """
    vision, projector, text = (_arguments(card, part) for part in CLASSES)
    if card["init_args"].get("deepstack") is not None:
        raise ValueError(
            "deepstack is on: the released STEP3-VL layout has no place for it; a model without it can be exported"
        )
    if vision["layer_scale"] is None:
        raise ValueError("the released tower has LayerScale; layer_scale must be a number")
    views = vision["layout"] or {}
    for view, size in (("global_view", "global_size"), ("crop_view", "crop_size")):
        if views.get(view) not in (None, views.get(size)):
            raise ValueError(
                f"layout.{view} is {views[view]}: the released layout shows a view at the {size} it is cut"
            )
    return {
        "architectures": [ARCHITECTURE],
        "auto_map": {"AutoConfig": f"{CONFIGURATION.removesuffix('.py')}.StepRoboticsConfig"},
        "model_type": MODEL_TYPE,
        "torch_dtype": dtype,
        "image_token_id": processor.image_token_id,
        "understand_projector_stride": 2,
        "projector_bias": projector["bias"],
        "hidden_size": text["hidden_size"],
        "tie_word_embeddings": text["tie_embeddings"],
        "vision_config": {
            "width": vision["hidden_size"],
            "layers": vision["num_layers"],
            "heads": vision["num_heads"],
            "num_channels": 3,
            "image_size": vision["grid_size"] * vision["patch_size"],
            "patch_size": vision["patch_size"],
            "mlp_ratio": exact_ratio(vision["mlp_size"], vision["hidden_size"]),
            "hidden_act": vision["hidden_act"],
            "layer_norm_eps": 1e-5,
            "ls_init_value": vision["layer_scale"],
            "output_dim": None,
            "use_abs_posemb": True,
            "use_cls_token": vision["use_class_token"],
            "use_ln_post": False,
            "use_ln_pre": True,
            "use_rope2d": True,
        },
        "text_config": {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "vocab_size": text["vocab_size"],
            "hidden_size": text["hidden_size"],
            "intermediate_size": text["intermediate_size"],
            "num_hidden_layers": text["num_layers"],
            "num_attention_heads": text["num_heads"],
            "num_key_value_heads": text["num_kv_heads"],
            "head_dim": text["head_dim"],
            "hidden_act": "silu",
            "attention_bias": False,
            "max_position_embeddings": text["max_positions"],
            "rms_norm_eps": text["rms_norm_eps"],
            "rope_theta": text["rope_theta"],
            "rope_parameters": {"rope_type": "default", "rope_theta": text["rope_theta"]},
            "tie_word_embeddings": text["tie_embeddings"],
            "torch_dtype": dtype,
        },
    }


def preprocessor_config(card: dict[str, Any]) -> dict[str, Any]:
    """preprocessor_config.json: how an image is cut and normalised."""
    vision = _arguments(card, "vision_encoder")
    layout = LAYOUT | {k: v for k, v in (vision["layout"] or {}).items() if v is not None}
    return {
        "processor_class": "Step3VLProcessor",
        "image_mean": list(vision["mean"]),
        "image_std": list(vision["std"]),
        "size": {"height": layout["global_size"], "width": layout["global_size"]},
        "patch_size": layout["crop_size"],
        "max_image_size": layout["max_side"],
        "min_image_size": layout["min_side"],
        "vision_patch_size": vision["patch_size"],
        "downsampler_stride": 4,
    }


def generation_config(processor: Processor) -> dict[str, Any]:
    """generation_config.json: what ends an answer. Sampling is a choice of who asks."""
    return {"eos_token_id": sorted(processor.stop_ids), "pad_token_id": processor.pad_id}


def card_of(config: dict[str, Any], preprocessor: dict[str, Any]) -> dict[str, Any]:
    """The card of a released model from its config.json and, where there is one, preprocessor_config.json.

    Raises:
        ValueError: the configuration asks for something that our tower or projector does not do.
    """
    vision = config["vision_config"]
    wanted = {
        "use_ln_pre": True,
        "use_ln_post": False,
        "use_abs_posemb": True,
        "use_rope2d": True,
        "layer_norm_eps": 1e-5,
    }
    for key, value in wanted.items():
        if vision.get(key, value) != value:
            raise ValueError(f"config.json: vision_config.{key} is {vision[key]!r}; this tower has {value!r}")
    if config.get("understand_projector_stride", 2) != 2:
        raise ValueError(f"config.json: understand_projector_stride is {config['understand_projector_stride']}, not 2")
    size = preprocessor.get("size", {}).get("height", vision.get("image_size", LAYOUT["global_size"]))
    encoder = {
        "hidden_size": vision["width"],
        "num_layers": vision["layers"],
        "num_heads": vision["heads"],
        "mlp_size": int(vision["width"] * vision["mlp_ratio"]),
        "patch_size": vision["patch_size"],
        "grid_size": vision["image_size"] // vision["patch_size"],
        "hidden_act": vision["hidden_act"],
        "layer_scale": vision["ls_init_value"],
        "use_class_token": bool(vision.get("use_cls_token", vision.get("ues_cls_token", False))),
        "layout": {
            "global_size": size,
            "crop_size": preprocessor.get("patch_size", LAYOUT["crop_size"]),
            "max_side": preprocessor.get("max_image_size", LAYOUT["max_side"]),
            "min_side": preprocessor.get("min_image_size", LAYOUT["min_side"]),
        },
    }
    for ours, theirs in (("mean", "image_mean"), ("std", "image_std")):
        if theirs in preprocessor:
            encoder[ours] = list(preprocessor[theirs])
    text = dict(config["text_config"])
    text["tie_word_embeddings"] = config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
    parts = {
        "vision_encoder": {"class_path": CLASSES["vision_encoder"], "init_args": encoder},
        "projector": {"class_path": CLASSES["projector"], "init_args": {"bias": config.get("projector_bias", False)}},
        "decoder": qwen3_card(text),
    }
    return {"class_path": VLM, "init_args": parts}


def exact_ratio(mlp_size: int, hidden_size: int) -> float:
    """mlp_size / hidden_size such that int(hidden_size * ratio), which readers compute, gives mlp_size back."""
    ratio = mlp_size / hidden_size
    while int(hidden_size * ratio) < mlp_size:
        ratio = math.nextafter(ratio, math.inf)
    return ratio


def _arguments(card: dict[str, Any], part: str) -> dict[str, Any]:
    given = card["init_args"][part]
    if given["class_path"] != CLASSES[part]:
        raise ValueError(
            f"{part} is {given['class_path']}: the released STEP3-VL layout has no place for it; "
            f"a model of {', '.join(CLASSES.values())} can be exported"
        )
    return given["init_args"]

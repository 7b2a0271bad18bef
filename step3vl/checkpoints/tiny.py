"""Tiny random checkpoints with the full structure of published ones, to try every command on without a download."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from step3vl.checkpoints.export import write_released
from step3vl.checkpoints.model import build, complete
from step3vl.config import compose, nearest
from step3vl.data.processor import Processor
from step3vl.data.tokenizer import load_tokenizer
from step3vl.models import VisionLanguageModel
from step3vl.weights import Entry, unfinished

TOWER: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION: dict[str, Any] = {**TOWER, "patch_size": 16}
TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
}
ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 1_000_000.0}


def make_tiny(arch: str, out: str | Path, seed: int = 0) -> None:
    """Write a tiny random checkpoint of `arch` (see ARCHITECTURES) to `out`, the same for the same seed.

    Raises:
        ValueError: there is no such architecture, or `out` exists.
    """
    if arch not in ARCHITECTURES:
        raise ValueError(f"no architecture {arch!r}; {nearest(arch, list(ARCHITECTURES))}")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        ARCHITECTURES[arch](Path(out))


def _step3vl(out: Path) -> None:
    card = compose(["vlm/step3vl_10b.yaml"], scale="tiny").config
    card["init_args"]["decoder"]["init_args"]["zero_init_outputs"] = False
    vlm = scatter(build(card, VisionLanguageModel))
    tensors = vlm.state_dict()
    entries = {name: Entry(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    readme = "# Tiny STEP3-VL\n\nRandom weights in the layout of STEP3-VL-10B, for trying things out.\n"
    processor = Processor(template="chat")
    full = complete(card, VisionLanguageModel)
    write_released(
        out, full, processor, entries, tensors.__getitem__, torch.bfloat16, readme, max_shard_bytes=1_000_000
    )


def _pe(out: Path) -> None:
    from step3vl.models.vision import PELang

    sizes: dict[str, Any] = {"hidden_size": 64, "num_layers": 2, "num_heads": 16, "mlp_size": 128}
    encoder = scatter(PELang(**sizes, patch_size=14, grid_size=4, hidden_act="gelu"))
    with unfinished(out) as part:
        torch.save(encoder.state_dict(), part / "PE-Lang-tiny.pt")


def _dinov3(out: Path) -> None:
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    _save(DINOv3ViTModel(DINOv3ViTConfig(**VISION, num_register_tokens=4, image_size=64)), out)


def _siglip2(out: Path) -> None:
    from transformers import SiglipConfig, SiglipModel

    text = _siglip_text()
    _save(SiglipModel(SiglipConfig(text_config=text, vision_config={**VISION, "image_size": 64})), out)


def _siglip2_naflex(out: Path) -> None:
    from transformers import Siglip2Config, Siglip2Model

    text = _siglip_text()
    _save(Siglip2Model(Siglip2Config(text_config=text, vision_config={**VISION, "num_patches": 16})), out)


def _siglip_text() -> dict[str, Any]:
    tokens = {"vocab_size": 64, "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 1}
    return {**TOWER, **tokens, "projection_size": 64, "max_position_embeddings": 16}


def _qwen3(out: Path) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = load_tokenizer()
    config = Qwen3Config(**TEXT, vocab_size=tokenizer.vocab_size, rope_parameters=ROPE, tie_word_embeddings=True)
    _save(Qwen3ForCausalLM(config), out, with_tokenizer=True)


def _qwen3_vl(out: Path) -> None:
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    rope = {**ROPE, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    text = {**TEXT, "vocab_size": load_tokenizer().vocab_size, "rope_parameters": rope}
    vision = {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 4,
        "out_hidden_size": TEXT["hidden_size"],
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    }
    config = Qwen3VLConfig(text_config=text, vision_config=vision)
    _save(Qwen3VLForConditionalGeneration(config), out, with_tokenizer=True)


ARCHITECTURES: dict[str, Callable[[Path], None]] = {
    "step3vl": _step3vl,
    "pe": _pe,
    "dinov3": _dinov3,
    "siglip2": _siglip2,
    "siglip2_naflex": _siglip2_naflex,
    "qwen3": _qwen3,
    "qwen3_vl": _qwen3_vl,
}


def scatter(model: Any) -> Any:
    """Add noise to every parameter, so that none is all zeros or all ones and a mix-up shows."""
    assert isinstance(model, nn.Module)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model


def _save(model: Any, out: Path, with_tokenizer: bool = False) -> None:
    """As transformers writes it, which is the published layout."""
    with unfinished(out) as part, _quiet():
        scatter(model).save_pretrained(part)
        if with_tokenizer:
            load_tokenizer().save(part)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars and notes."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()

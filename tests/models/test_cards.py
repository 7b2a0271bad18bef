"""Every encoder and decoder card gives the published model: its number of parameters, and a tiny twin of its kind."""

from __future__ import annotations

import pytest
import torch
import yaml

from .conftest import CONFIGS

NUM_PARAMETERS = {
    "vision/pe_lang_g14.yaml": 1_743_503_104,
    "vision/pe_lang_g14_448.yaml": 1_740_922_624,
    "vision/pe_lang_l14_448.yaml": 291_415_040,
    "vision/dinov3_vits16.yaml": 21_596_544,
    "vision/dinov3_vits16plus.yaml": 28_692_864,
    "vision/dinov3_vitb16.yaml": 85_660_416,
    "vision/dinov3_vitl16.yaml": 303_129_600,
    "vision/dinov3_vith16plus.yaml": 840_592_640,
    "vision/dinov3_vit7b16.yaml": 6_716_035_072,
    "vision/siglip2_base.yaml": 86_088_960,
    "vision/siglip2_large.yaml": 303_688_704,
    "vision/siglip2_so400m.yaml": 413_018_352,
    "vision/siglip2_giant.yaml": 1_135_329_792,
    "vision/siglip2_base_naflex.yaml": 85_843_200,
    "vision/siglip2_so400m_naflex.yaml": 412_649_712,
    "decoder/qwen3_0p6b.yaml": 596_049_920,
    "decoder/qwen3_1p7b.yaml": 1_720_574_976,
    "decoder/qwen3_4b.yaml": 4_022_468_096,
    "decoder/qwen3_8b.yaml": 8_190_735_360,
}
PUBLISHED_MILLIONS = {  # SigLIP 2 without its head at 384 px, rounded as published
    "vision/siglip2_base.yaml": 86.1,
    "vision/siglip2_large.yaml": 303.7,
    "vision/siglip2_so400m.yaml": 413.0,
    "vision/siglip2_giant.yaml": 1135.3,
}


def arguments(name: str, scale: str = "") -> dict:
    return yaml.safe_load((CONFIGS / scale / name).read_text())["init_args"]


def test_every_card_is_in_the_table() -> None:
    cards = {f"{room}/{file.name}" for room in ("vision", "decoder") for file in (CONFIGS / room).iterdir()}
    assert cards == set(NUM_PARAMETERS) | {"decoder/alignment.yaml"}  # which names another card


@pytest.mark.parametrize("name", NUM_PARAMETERS)
def test_number_of_parameters(name: str, card) -> None:
    with torch.device("meta"):
        made = card(name)
    count = sum(weight.numel() for weight in made.parameters())
    assert count == NUM_PARAMETERS[name]
    assert f"{count:,} parameters" in (CONFIGS / name).read_text().splitlines()[0]
    if name in PUBLISHED_MILLIONS:
        assert round(count / 1e6, 1) == PUBLISHED_MILLIONS[name]


@pytest.mark.parametrize("name", NUM_PARAMETERS)
def test_tiny_twin_keeps_the_structure(name: str) -> None:
    """Flags, kinds and pixel statistics are the same; only sizes shrink."""
    full, tiny = arguments(name), arguments(name, "tiny")
    kept = {key: value for key, value in full.items() if isinstance(value, (bool, str, list))}
    assert kept == {key: tiny[key] for key in kept}
    assert set(full) <= set(tiny) <= set(full) | {"zero_init_outputs"}
    sizes = {"hidden_size", "num_layers", "num_heads", "intermediate_size", "mlp_size", "vocab_size"} & set(full)
    larger = [full[key] / tiny[key] for key in sizes]
    assert min(larger) > 1.5


@pytest.mark.parametrize("name", [name for name in NUM_PARAMETERS if name.startswith("vision/")])
def test_position_table_is_smaller_than_the_views_in_both_or_in_neither(name: str) -> None:
    full, tiny = arguments(name), arguments(name, "tiny")
    if "grid_size" in full:
        views = (full["layout"].get("global_view") or full["layout"]["global_size"]) // full["patch_size"]
        assert (full["grid_size"] < views) == (tiny["grid_size"] < 16)


@pytest.mark.parametrize("name", NUM_PARAMETERS)
def test_every_number_of_a_full_card_says_where_it_comes_from(name: str) -> None:
    for line in (CONFIGS / name).read_text().splitlines()[1:]:
        value = line.partition(":")[2].partition("#")[0].strip()
        if value and not line.startswith("class_path"):
            assert "  # " in line, line

from __future__ import annotations

import pytest
import torch

from step3vl.models import ConvProjector, Qwen3Decoder, VisionLanguageModel
from step3vl.models.vision import PELang
from step3vl.types import IGNORE_INDEX, Batch, Grids, MultiCrop

IMAGE = 5
GLOBAL, CROP = 4, 1  # tokens of a 32 px view (8x8 patches, then 4x4, then 2x2) and of a 16 px view


def model() -> VisionLanguageModel:
    torch.manual_seed(0)
    vision = PELang(32, 2, 2, 64, patch_size=4, grid_size=8, layout=MultiCrop(global_size=32, crop_size=16))
    made = VisionLanguageModel(vision, ConvProjector, Qwen3Decoder(48, 96, 2, 4, 2, 16, 64))
    made.bind(IMAGE)
    return made


def batch(documents: list[tuple[list[int], int]], sides: list[int], padding: int = 0) -> Batch:
    """One packed row: for each document its ids and how many visual tokens it declares."""
    torch.manual_seed(1)
    parts = [ids for ids, _ in documents] + ([[0] * padding] if padding else [])
    ids = torch.tensor([token for part in parts for token in part])[None]
    return Batch(
        input_ids=ids,
        labels=torch.full_like(ids, IGNORE_INDEX),
        loss_weights=torch.zeros(ids.shape),
        position_ids=torch.cat([torch.arange(len(part)) for part in parts])[None],
        images=Grids.stack([torch.randn(3, side, side) for side in sides]) if sides else None,
        sample_ids=[f"s{k}" for k in range(len(documents))],
        num_visual_tokens=[count for _, count in documents],
        num_padding=padding,
    )


def mixed() -> Batch:
    first = [7, *[IMAGE] * CROP, 8, *[IMAGE] * GLOBAL, 9]
    third = [10, *[IMAGE] * GLOBAL, 11, 12]
    return batch([(first, CROP + GLOBAL), ([13, 14, 15], 0), (third, GLOBAL)], [16, 32, 32], padding=3)


def test_step3vl_10b_has_the_published_number_of_parameters(card) -> None:
    with torch.device("meta"):
        vlm = card("vlm/step3vl_10b.yaml")
    assert sum(weight.numel() for weight in vlm.parameters()) == 10_171_750_144
    assert (vlm.num_visual_tokens(728), vlm.num_visual_tokens(504), vlm.downsample) == (169, 81, 4)


def test_tiny_twin_has_the_same_structure(card) -> None:
    with torch.device("meta"):
        full, tiny = card("vlm/step3vl_10b.yaml"), card("vlm/step3vl_10b.yaml", "tiny")

    def names(vlm: VisionLanguageModel) -> set[str]:
        return {".".join("N" if part.isdigit() else part for part in name.split(".")) for name in vlm.state_dict()}

    assert names(full) == names(tiny)
    assert [type(part) for part in full.children()] == [type(part) for part in tiny.children()]


def test_visual_tokens_land_at_placeholders_in_reading_order() -> None:
    vlm, packed = model(), mixed()
    visual, levels = vlm.encode_images(packed.images)
    assert visual.shape == (CROP + 2 * GLOBAL, 48) and levels == []
    views = packed.images.unstack()
    alone = [vlm.encode_images(Grids.stack([view]))[0] for view in views]
    torch.testing.assert_close(visual, torch.cat(alone), rtol=0, atol=1e-5)
    placed = vlm.place(vlm.decoder.embed(packed.input_ids), visual, packed)[0]
    is_image = packed.input_ids[0] == IMAGE
    assert torch.equal(placed[is_image], visual)
    assert torch.equal(placed[~is_image], vlm.decoder.embed(packed.input_ids)[0][~is_image])


def test_packed_equals_separate_with_images() -> None:
    vlm, packed = model(), mixed()
    hidden = vlm(packed)[0]
    views = packed.images.unstack()
    spans = [(0, 8, views[:2]), (8, 11, []), (11, 18, views[2:])]
    for start, end, seen in spans:
        ids = packed.input_ids[0, start:end].tolist()
        alone = batch([(ids, ids.count(IMAGE))], [])
        alone.images = Grids.stack(seen) if seen else None
        torch.testing.assert_close(hidden[start:end], vlm(alone)[0], rtol=0, atol=1e-5)


def test_images_teach_every_part() -> None:
    vlm = model()
    vlm(mixed()).square().sum().backward()
    for name, weight in vlm.named_parameters():
        if "lm_head" not in name:
            assert weight.grad is not None and weight.grad.abs().sum() > 0, name


def test_text_alone_skips_the_tower(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = model()
    monkeypatch.setattr(vlm.vision_encoder, "encode", None)
    assert vlm(batch([([7, 8, 9], 0)], [])).shape == (1, 3, 48)


@pytest.mark.parametrize(
    ("packed", "message"),
    [
        (
            batch([([7, *[IMAGE] * GLOBAL], GLOBAL), ([8, *[IMAGE] * 3, 9], GLOBAL)], [32, 32]),
            "7 image placeholders in the text, but 8 visual tokens from the images; sample 's1' has 3 placeholders and "
            "declares 4",
        ),
        (
            batch([([7, *[IMAGE] * 2], GLOBAL), ([8, 9], 0), ([8, *[IMAGE] * 4], GLOBAL)], [32, 32], padding=2),
            "6 image placeholders .* 8 visual tokens .*'s0' has 2 placeholders and declares 4",
        ),
        (
            batch([([7, *[IMAGE] * 4], 4), ([7, *[IMAGE] * 4], 4)], [32]),
            "8 image .* 4 visual tokens .* samples: s0, s1",
        ),
        (batch([([7, *[IMAGE] * 4], 4)], []), "4 image placeholders .* 0 visual tokens .* samples: s0"),
        (
            batch([([7, 8, 9], 4)], [32]),
            "0 image placeholders .* 4 visual tokens .*'s0' has 0 placeholders and declares 4",
        ),
    ],
)
def test_counts_that_disagree_are_named(packed: Batch, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model()(packed)


def test_images_before_bind_are_refused() -> None:
    vlm = model()
    vlm.image_token_id = None
    with pytest.raises(ValueError, match="bind"):
        vlm(mixed())
    with pytest.raises(ValueError, match=r"image_token_id 64 is outside .* 64"):
        vlm.bind(64)


def test_meta_construction_then_init() -> None:
    with torch.device("meta"):
        vlm = model()
    vlm.to_empty(device="cpu")
    for tensor in [*vlm.parameters(), *vlm.buffers()]:
        torch.nn.init.constant_(tensor, float("nan"))
    vlm.init_weights()
    assert torch.isfinite(vlm(mixed())).all()
    direct = model()
    vlm.load_state_dict(direct.state_dict())
    assert torch.equal(vlm(mixed()), direct(mixed()))


def test_bfloat16_autocast_trains() -> None:
    vlm = model()
    with torch.autocast("cpu", torch.bfloat16):
        hidden = vlm(mixed())
    hidden.float().square().sum().backward()
    assert all(torch.isfinite(w.grad).all() for name, w in vlm.named_parameters() if "lm_head" not in name)

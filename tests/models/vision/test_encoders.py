"""What every encoder must do. A new card joins the list, and is tested."""

from __future__ import annotations

import pytest
import torch

from step3vl.types import Grids

from ..conftest import CONFIGS

CARDS = sorted(f"vision/{file.name}" for file in (CONFIGS / "vision").iterdir())


@pytest.fixture(params=CARDS)
def vision(request, card):
    torch.manual_seed(0)
    return card(request.param, "tiny")


def images() -> Grids:
    torch.manual_seed(1)
    return Grids.stack([torch.randn(3, 48, 48), torch.randn(3, 64, 64), torch.randn(3, 48, 48), torch.randn(3, 32, 64)])


def test_shapes_and_reading_order(vision) -> None:
    features = vision(images())
    assert features.taps == []
    assert [tuple(view.shape) for view in features.final.unstack()] == [
        (12, 12, 64),
        (16, 16, 64),
        (12, 12, 64),
        (8, 16, 64),
    ]
    alone = vision(Grids.stack([images().unstack()[2]])).final.tensors[0][0]
    torch.testing.assert_close(features.final.unstack()[2], alone, rtol=0, atol=1e-5)


def test_taps_are_block_outputs(vision) -> None:
    kept = []
    vision.blocks()[1].register_forward_hook(lambda module, args, output: kept.append(output))
    square = Grids.stack(images().unstack()[1:2])
    first, again = vision(square, taps=[1, 1]).taps
    prefix = kept[0].shape[1] - 256
    assert torch.equal(first.tensors[0].flatten(1, 2), kept[0][:, prefix:])
    assert torch.equal(first.tensors[0], again.tensors[0])


def test_every_weight_learns(vision) -> None:
    final = vision(images()).final
    sum((view.square().sum() for view in final.tensors), torch.zeros(())).backward()
    for name, weight in vision.named_parameters():
        if weight.requires_grad:
            assert weight.grad is not None and weight.grad.abs().sum() > 0, name


def test_meta_construction_then_init_equals_direct_construction(vision, request, card) -> None:
    with torch.device("meta"):
        made = card(request.node.callspec.params["vision"], "tiny")
    made.to_empty(device="cpu")
    for tensor in [*made.parameters(), *made.buffers()]:
        tensor.data.fill_(float("nan") if tensor.is_floating_point() else -1)
    made.init_weights()
    for (name, ours), (_, direct) in zip(made.state_dict().items(), vision.state_dict().items()):
        assert torch.isfinite(ours).all(), name
        assert ours.std().item() == pytest.approx(direct.std().item(), rel=0.25, abs=2e-3), name
    made.load_state_dict(vision.state_dict())
    assert torch.equal(made(images()).final.tensors[0], vision(images()).final.tensors[0])


def test_trains_after_inference(vision) -> None:
    """Tables that were computed while generating must serve training too."""
    with torch.inference_mode():
        before = vision(images()).final.tensors[0].clone()
    after = vision(images()).final.tensors[0]
    after.sum().backward()
    assert torch.equal(before, after)


@pytest.mark.parametrize("name", CARDS)
def test_all_encoders_give_as_many_tokens(name: str, card) -> None:
    with torch.device("meta"):
        full = card(name).image_spec
    tiny = card(name, "tiny").image_spec
    assert (full.layout.global_pixels // full.patch_size, full.layout.crop_pixels // full.patch_size) == (52, 36)
    assert (tiny.layout.global_pixels // tiny.patch_size, tiny.layout.crop_pixels // tiny.patch_size) == (16, 12)
    assert full.layout.global_pixels % full.patch_size == full.layout.crop_pixels % full.patch_size == 0


def test_lazy_exports() -> None:
    import step3vl.models
    import step3vl.models.vision

    for package in (step3vl.models, step3vl.models.vision):
        for name in package.__all__:
            assert getattr(package, name).__name__ == name
        with pytest.raises(AttributeError, match="NoSuch"):
            _ = package.NoSuch


def test_8_bit_pixels_are_normalised_by_the_encoder(vision) -> None:
    random = torch.Generator().manual_seed(2)
    levels = [torch.randint(256, (side, 48, 3), generator=random).byte().permute(2, 0, 1) for side in (48, 32, 48)]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in vision.image_spec[1:3])
    floats = Grids.stack([(view / 255 - mean) / std for view in levels])
    stacked = Grids.stack(levels)
    assert stacked.tensors[0].dtype == torch.uint8
    for pixels, expected in zip(stacked.tensors, floats.tensors):
        before = pixels.clone()
        assert torch.equal(vision.normalised(pixels), expected)
        assert torch.equal(vision.normalised(pixels.contiguous()), expected)
        assert vision.normalised(expected) is expected
        assert torch.equal(pixels, before), "the batch's own pixels stay"
    for ours, theirs in zip(vision(stacked).final.tensors, vision(floats).final.tensors):
        assert torch.equal(ours, theirs)
    assert vision.bfloat16().normalised(stacked.tensors[0]).dtype == torch.bfloat16

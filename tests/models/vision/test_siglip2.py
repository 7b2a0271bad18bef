from __future__ import annotations

import pytest
import torch
from torch import Tensor

from step3vl.models.vision import SigLIP2, SigLIP2NaFlex
from step3vl.models.vision.siglip2 import patchify
from step3vl.types import Grids

WIDTH, LAYERS, HEADS, MLP, GRID, PATCH = 64, 3, 4, 128, 4, 8
SIZES = [(32, 32), (16, 24), (48, 40), (64, 16)]  # native; smaller; larger; as many patches as native, another shape
SHAPE = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": MLP,
    "patch_size": PATCH,
    "vision_use_head": False,
}


def made(form: type) -> SigLIP2 | SigLIP2NaFlex:
    torch.manual_seed(0)
    vision = form(WIDTH, LAYERS, HEADS, MLP, grid_size=GRID, patch_size=PATCH)
    with torch.no_grad():  # every weight must matter to the comparison, also those that start at a constant
        for weight in vision.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return vision


def padded(views: list[Tensor], num_patches: int) -> dict[str, Tensor]:
    """What transformers' NaFlex model takes, cut patch by patch: views of several sizes in one padded batch."""
    pixels, mask, shapes = (
        torch.zeros(len(views), num_patches, 3 * PATCH * PATCH),
        torch.zeros(len(views), num_patches),
        [],
    )
    for n, view in enumerate(views):
        height, width = (side // PATCH for side in view.shape[1:])
        for y in range(height):
            for x in range(width):
                cell = view[:, y * PATCH : (y + 1) * PATCH, x * PATCH : (x + 1) * PATCH]
                pixels[n, y * width + x] = cell.permute(1, 2, 0).flatten()
        mask[n, : height * width] = 1
        shapes.append([height, width])
    return {"pixel_values": pixels, "pixel_attention_mask": mask.long(), "spatial_shapes": torch.tensor(shapes)}


@pytest.mark.parametrize("size", SIZES)
def test_fixed_form_equals_transformers(size: tuple[int, int]) -> None:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    ours = made(SigLIP2)
    config = SiglipVisionConfig(image_size=GRID * PATCH, attn_implementation="eager", **SHAPE)
    theirs = SiglipVisionModel(config).eval()
    theirs.load_state_dict(ours.model.state_dict())
    pixels = torch.randn(2, 3, *size)
    with torch.no_grad():
        native = size == SIZES[0]
        expected = theirs(pixels, interpolate_pos_encoding=not native, output_hidden_states=True)
        features = ours(Grids.stack(list(pixels)), taps=[2, 0])
    assert features.final.tensors[0].shape == (2, size[0] // PATCH, size[1] // PATCH, WIDTH)
    assert expected.last_hidden_state.std() > 0.3
    got = [features.final, *features.taps]
    for one, other in zip(got, (expected.last_hidden_state, expected.hidden_states[3], expected.hidden_states[1])):
        torch.testing.assert_close(one.tensors[0].flatten(1, 2), other, rtol=0, atol=1e-5)


def test_naflex_form_equals_transformers_with_padding() -> None:
    from transformers import Siglip2VisionConfig, Siglip2VisionModel

    ours = made(SigLIP2NaFlex)
    theirs = Siglip2VisionModel(Siglip2VisionConfig(num_patches=GRID**2, attn_implementation="eager", **SHAPE)).eval()
    theirs.load_state_dict(ours.model.state_dict())
    views = [torch.randn(3, *size) for size in [*SIZES, SIZES[1]]]
    with torch.no_grad():
        expected = theirs(**padded(views, num_patches=35), output_hidden_states=True)
        features = ours(Grids.stack(views), taps=[1])
    tapped = features.taps[0].unstack()
    for n, view in enumerate(features.final.unstack()):
        assert view.shape == (views[n].shape[1] // PATCH, views[n].shape[2] // PATCH, WIDTH)
        count = view.shape[0] * view.shape[1]
        torch.testing.assert_close(view.flatten(0, 1), expected.last_hidden_state[n, :count], rtol=0, atol=1e-5)
        torch.testing.assert_close(tapped[n].flatten(0, 1), expected.hidden_states[2][n, :count], rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", [SigLIP2, SigLIP2NaFlex])
def test_names_are_those_of_the_released_weights(form: type) -> None:
    linear = (
        "layer_norm1",
        "layer_norm2",
        "mlp.fc1",
        "mlp.fc2",
        *(f"self_attn.{p}_proj" for p in ("q", "k", "v", "out")),
    )
    names = {
        f"encoder.layers.{n}.{part}.{kind}" for n in range(LAYERS) for part in linear for kind in ("weight", "bias")
    }
    names |= {
        "embeddings.patch_embedding.weight",
        "embeddings.patch_embedding.bias",
        "embeddings.position_embedding.weight",
    }
    assert set(made(form).model.state_dict()) == names | {"post_layernorm.weight", "post_layernorm.bias"}


@pytest.mark.parametrize("form", [SigLIP2, SigLIP2NaFlex])
def test_initialisation_restores_weights_and_position_numbers(form: type) -> None:
    with torch.device("meta"):
        vision = form(256, 1, 4, 512, grid_size=8, patch_size=PATCH)
    vision.to_empty(device="cpu")
    for tensor in [*vision.parameters(), *vision.buffers()]:
        tensor.data.fill_(-7)
    torch.manual_seed(0)
    vision.init_weights()
    embeddings, block = vision.model.embeddings, vision.blocks()[0]
    assert embeddings.position_embedding.weight.std().item() == pytest.approx(256**-0.5, rel=0.05)
    assert block.self_attn.q_proj.weight.abs().max().item() == pytest.approx((6 / 512) ** 0.5, rel=0.05)  # xavier
    assert block.layer_norm1.weight.eq(1).all() and not block.self_attn.q_proj.bias.any()
    buffers = dict(vision.named_buffers())
    if form is SigLIP2:
        assert buffers.pop("model.embeddings.position_ids").tolist() == [list(range(64))]
    assert buffers == {}


@pytest.mark.parametrize("form", [SigLIP2, SigLIP2NaFlex])
def test_same_image_same_features_in_train_mode(form: type) -> None:
    vision, images = made(form), Grids.stack([torch.randn(3, 32, 48)])
    first, second = (vision.train()(images).final.tensors[0] for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(first, vision.eval()(images).final.tensors[0])


def test_patches_are_cut_in_reading_order() -> None:
    pixels = torch.arange(2 * 3 * 16 * 24.0).view(2, 3, 16, 24)
    patches = patchify(pixels, PATCH)
    assert patches.shape == (2, 2, 3, 3 * PATCH * PATCH)
    assert torch.equal(patches[1, 1, 2], pixels[1, :, 8:16, 16:24].permute(1, 2, 0).flatten())


def test_views_have_as_many_patches_as_step3vl_with_either_patch_size() -> None:
    for patch, views in ((16, (832, 576)), (14, (728, 504))):
        with torch.device("meta"):
            spec = SigLIP2(64, 1, 2, 64, grid_size=8, patch_size=patch).image_spec
        assert (spec.layout.global_pixels, spec.layout.crop_pixels) == views
        assert spec.mean == spec.std == (0.5, 0.5, 0.5)


def test_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="hidden_size 64 is not a multiple of num_heads 5"):
        SigLIP2(64, 1, 5, 64, grid_size=4)
    with pytest.raises(ValueError, match=r"side of 36 pixels .* patch_size 8 of SigLIP2NaFlex"):
        made(SigLIP2NaFlex)(Grids.stack([torch.randn(3, 32, 36)]))

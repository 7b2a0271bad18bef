from __future__ import annotations

import pytest
import torch

from step3vl.models.vision import DINOv3
from step3vl.types import Grids


@pytest.fixture
def vision() -> DINOv3:
    torch.manual_seed(0)
    return DINOv3(32, 3, 2, 64, patch_size=8, num_registers=2)


def test_large_has_the_published_number_of_parameters(card) -> None:
    with torch.device("meta"):
        assert sum(weight.numel() for weight in card("vision/dinov3_vitl16.yaml").parameters()) == 303_129_600


def test_same_image_same_features_in_train_mode(vision: DINOv3) -> None:
    images = Grids.stack([torch.randn(3, 32, 32)])
    first, second = (vision.train()(images).final.tensors[0] for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(first, vision.eval()(images).final.tensors[0])


def test_features_are_the_normed_patch_tokens(vision: DINOv3) -> None:
    pixels = torch.randn(2, 3, 16, 32)
    features = vision(Grids.stack(list(pixels)), taps=[2, 0])
    tokens = vision.model(pixel_values=pixels).last_hidden_state
    assert features.final.tensors[0].shape == (2, 2, 4, 32)
    assert torch.equal(features.final.tensors[0].flatten(1, 2), tokens[:, 3:])  # class token, two registers
    last, first = (tap.tensors[0] for tap in features.taps)
    torch.testing.assert_close(vision.model.norm(last), features.final.tensors[0])
    assert not torch.allclose(first, last)


def test_unused_weight_is_not_trained(vision: DINOv3) -> None:
    vision(Grids.stack([torch.randn(3, 16, 16)])).final.tensors[0].sum().backward()
    assert [name for name, weight in vision.named_parameters() if weight.requires_grad and weight.grad is None] == []
    assert [name for name, weight in vision.named_parameters() if not weight.requires_grad] == [
        "model.embeddings.mask_token"
    ]


def test_gated_mlp_is_swiglu() -> None:
    mlp = DINOv3(32, 1, 2, 64, use_gated_mlp=True, patch_size=8).blocks()[0].mlp
    x = torch.randn(5, 32)
    gate, value = mlp.gate_proj(x), mlp.up_proj(x)
    torch.testing.assert_close(mlp(x), mlp.down_proj(gate * torch.sigmoid(gate) * value))


@pytest.mark.parametrize("biases", [True, False])
def test_gated_form_equals_transformers(biases: bool) -> None:
    """The S+, H+ (biases) and 7B (none on query and value) forms, at the training size and at another."""
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    torch.manual_seed(0)
    flags = {"use_gated_mlp": True, "use_query_bias": biases, "use_value_bias": biases}
    ours = DINOv3(64, 3, 4, 96, patch_size=16, num_registers=4, **flags)
    with torch.no_grad():  # every weight must matter to the comparison, also those that start at a constant
        for weight in ours.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    config = DINOv3ViTConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        hidden_act="silu",
        use_gated_mlp=True,
        num_register_tokens=4,
        query_bias=biases,
        value_bias=biases,
        image_size=64,
        attn_implementation="eager",
    )
    theirs = DINOv3ViTModel(config).eval()
    theirs.load_state_dict(ours.model.state_dict())
    attention = ours.blocks()[0].attention
    found = [getattr(attention, f"{part}_proj").bias is not None for part in "qkvo"]
    assert found == [biases, False, biases, True]
    for height, width in ((64, 64), (32, 48), (96, 80)):
        pixels = torch.randn(2, 3, height, width)
        with torch.no_grad():
            expected = theirs(pixels).last_hidden_state[:, 5:]
            features = ours(Grids.stack(list(pixels))).final.tensors[0]
        assert features.shape == (2, height // 16, width // 16, 64) and expected.std() > 0.3
        torch.testing.assert_close(features.flatten(1, 2), expected, rtol=0, atol=1e-5)

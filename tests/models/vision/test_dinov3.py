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
    made = DINOv3(32, 1, 2, 64, use_gated_mlp=True, patch_size=8)
    assert made.model.config.hidden_act == "silu" and hasattr(made.blocks()[0].mlp, "gate_proj")

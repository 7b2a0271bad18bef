"""Noise says nothing: features do not depend on the image, and are new at every look."""

import torch

from step3vl.models.vision.noise import NoiseEncoder
from step3vl.types import Grids


def test_features_do_not_depend_on_the_image():
    encoder = NoiseEncoder(32, 4)
    black, white = (torch.full((3, 3, 16, 24), value, dtype=torch.uint8) for value in (0, 255))
    looks = []
    for pixels in (black, white):
        torch.manual_seed(5)
        looks.append(encoder(Grids((pixels,), (0, 1, 2))).final.tensors[0])
    assert looks[0].shape == (3, 4, 6, 32) and torch.equal(*looks)
    again = encoder(Grids((black,), (0, 1, 2))).final.tensors[0]
    assert not torch.equal(again, looks[0]) and abs(float(again.std()) - 1) < 0.05
    again.sum().backward()
    assert encoder.norm.bias.grad is not None and list(encoder.blocks()) == []

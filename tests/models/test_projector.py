from __future__ import annotations

import pytest
import torch

from step3vl.models import ConvProjector


@pytest.mark.parametrize(("side", "tokens"), [(52, 13), (36, 9), (16, 4), (12, 3), (1, 1), (5, 2), (9, 3)])
def test_grid_is_what_comes_out(side: int, tokens: int) -> None:
    projector = ConvProjector(4, 6)
    out = projector(torch.randn(2, side, side + 4, 4))
    assert out.shape == (2, tokens, ConvProjector.grid(side + 4), 6) == (2, ConvProjector.grid(side), tokens + 1, 6)


def test_sizes_of_the_released_projector() -> None:
    with torch.device("meta"):
        projector = ConvProjector(1536, 4096)
    sizes = {name: sum(weight.numel() for weight in part.parameters()) for name, part in projector.named_children()}
    assert sizes["vit_downsampler1"] + sizes["vit_downsampler2"] == 212_345_856
    assert sizes["vit_large_projector"] == 25_165_824


def test_is_linear_without_activation() -> None:
    torch.manual_seed(0)
    projector = ConvProjector(4, 6).double()
    a, b, zero = (scale * torch.randn(1, 8, 8, 4, dtype=torch.double) for scale in (1, 1, 0))
    torch.testing.assert_close(projector(a + b) + projector(zero), projector(a) + projector(b))

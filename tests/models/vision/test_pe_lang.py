from __future__ import annotations

import pytest
import torch
from torch import Tensor

from step3vl.models import ConvProjector
from step3vl.models.vision import PELang
from step3vl.types import Grids

WIDTH, LAYERS, HEADS, GRID = 64, 2, 4, 8


def tower(hidden_act: str = "quick_gelu", use_class_token: bool = False) -> PELang:
    torch.manual_seed(0)
    options = {"hidden_act": hidden_act, "use_class_token": use_class_token}
    made = PELang(WIDTH, LAYERS, HEADS, 2 * WIDTH, patch_size=14, grid_size=GRID, **options)
    with torch.no_grad():  # every weight must matter to the comparison, also those that start at a constant
        for weight in made.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    return made


def half_split(weight: Tensor) -> Tensor:
    """Rows of a q or k projection from adjacent pairs to the two halves that transformers rotates."""
    return torch.cat([weight.unflatten(0, (HEADS, -1))[:, 0::2], weight.unflatten(0, (HEADS, -1))[:, 1::2]], 1).flatten(
        0, 1
    )


def as_transformers(vision: PELang, projector: ConvProjector) -> dict[str, Tensor]:
    """Our weights under the names, and in the rotary order, of transformers' Step3p7VisionModel."""
    state = {
        "embeddings.patch_embedding.weight": vision.conv1.weight,
        "embeddings.position_embedding.weight": vision.positional_embedding,
        "pre_layernorm.weight": vision.ln_pre.weight,
        "pre_layernorm.bias": vision.ln_pre.bias,
    }
    for number, block in enumerate(vision.blocks()):
        prefix = f"layers.{number}."
        for kind, ours in (("weight", block.attn.in_proj_weight), ("bias", block.attn.in_proj_bias)):
            query, key, value = ours.chunk(3)
            state[f"{prefix}self_attn.q_proj.{kind}"] = half_split(query)
            state[f"{prefix}self_attn.k_proj.{kind}"] = half_split(key)
            state[f"{prefix}self_attn.v_proj.{kind}"] = value
            state[f"{prefix}self_attn.out_proj.{kind}"] = getattr(block.attn.out_proj, kind)
            state[f"{prefix}layernorm_before.{kind}"] = getattr(block.ln_1, kind)
            state[f"{prefix}layernorm_after.{kind}"] = getattr(block.ln_2, kind)
            state[f"{prefix}mlp.fc1.{kind}"] = getattr(block.mlp.c_fc, kind)
            state[f"{prefix}mlp.fc2.{kind}"] = getattr(block.mlp.c_proj, kind)
        state[f"{prefix}lambda_1"], state[f"{prefix}lambda_2"] = block.ls_1.gamma, block.ls_2.gamma
    for name in ("1", "2"):
        for kind in ("weight", "bias"):
            state[f"downsampler{name}.{kind}"] = getattr(getattr(projector, f"vit_downsampler{name}"), kind)
    return {name: weight.detach() for name, weight in state.items()}


@pytest.mark.parametrize("hidden_act", ["gelu", "quick_gelu"])
def test_equals_transformers_step_tower(hidden_act: str) -> None:
    from transformers import Step3p7VisionConfig, Step3p7VisionModel

    ours, projector = tower(hidden_act), ConvProjector(WIDTH, 32)
    config = Step3p7VisionConfig(
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        image_size=14 * GRID,
        patch_size=14,
        mlp_ratio=2.0,
        max_position_embeddings=GRID * GRID,
        hidden_act=hidden_act,
    )
    theirs = Step3p7VisionModel(config).eval()
    assert not theirs.load_state_dict(as_transformers(ours, projector)).missing_keys
    blocks: list[Tensor] = []
    theirs.layers[-1].register_forward_hook(lambda module, args, output: blocks.append(output))
    for height, width in ((112, 112), (56, 84), (168, 140)):  # native, smaller, larger
        pixels = torch.randn(2, 3, height, width)
        with torch.no_grad():
            expected = theirs(pixels).last_hidden_state
            features = ours(Grids.stack(list(pixels))).final.tensors[0]
            condensed = projector.condense(features)
        assert features.shape == (2, height // 14, width // 14, WIDTH)
        assert features.abs().mean() > 0.05
        torch.testing.assert_close(features.flatten(1, 2), blocks.pop(), rtol=0, atol=1e-5)
        torch.testing.assert_close(condensed.flatten(1, 2), expected, rtol=0, atol=1e-5)


def reference(vision: PELang, pixels: Tensor) -> Tensor:
    """Meta's model with a class token, step by step in float64 for one image: [1 + patches, D]."""
    p = {name: weight.detach().double() for name, weight in vision.named_parameters()}
    height, width = pixels.shape[1] // 14, pixels.shape[2] // 14
    cells = [pixels[:, 14 * y :, 14 * x :][:, :14, :14].double() for y in range(height) for x in range(width)]
    patches = torch.stack([p["conv1.weight"].flatten(1) @ cell.flatten() for cell in cells])
    table = p["positional_embedding"][1:].T.reshape(1, WIDTH, GRID, GRID)
    table = torch.nn.functional.interpolate(table, (height, width), mode="bilinear", align_corners=False)
    x = torch.cat([p["class_embedding"][None] + p["positional_embedding"][:1], patches + table[0].flatten(1).T])
    places = [(0, 0)] + [(column + 1, row + 1) for row in range(height) for column in range(width)]
    size = WIDTH // HEADS

    def norm(x: Tensor, name: str) -> Tensor:
        return torch.nn.functional.layer_norm(x, (WIDTH,), p[f"{name}.weight"], p[f"{name}.bias"], 1e-5)

    def turn(x: Tensor) -> Tensor:
        out = x.clone()  # [L,size] of one head
        for token, place in enumerate(places):
            for axis in (0, 1):
                for k in range(size // 4):
                    angle = torch.tensor(place[axis] * 10000.0 ** (-2 * k / (size // 2)), dtype=torch.float64)
                    at = axis * size // 2 + 2 * k
                    one, other = x[token, at], x[token, at + 1]
                    out[token, at] = one * angle.cos() - other * angle.sin()
                    out[token, at + 1] = other * angle.cos() + one * angle.sin()
        return out

    x = norm(x, "ln_pre")
    for number in range(LAYERS):
        name = f"transformer.resblocks.{number}"
        query, key, value = (
            norm(x, f"{name}.ln_1") @ p[f"{name}.attn.in_proj_weight"].T + p[f"{name}.attn.in_proj_bias"]
        ).chunk(3, dim=1)
        heads = []
        for one in range(HEADS):
            part = slice(one * size, (one + 1) * size)
            scores = turn(query[:, part]) @ turn(key[:, part]).T / size**0.5
            heads.append(scores.softmax(dim=1) @ value[:, part])
        mixed = torch.cat(heads, dim=1) @ p[f"{name}.attn.out_proj.weight"].T + p[f"{name}.attn.out_proj.bias"]
        x = x + mixed * p[f"{name}.ls_1.gamma"]
        inner = norm(x, f"{name}.ln_2") @ p[f"{name}.mlp.c_fc.weight"].T + p[f"{name}.mlp.c_fc.bias"]
        inner = 0.5 * inner * (1 + torch.erf(inner / 2**0.5))
        outer = inner @ p[f"{name}.mlp.c_proj.weight"].T + p[f"{name}.mlp.c_proj.bias"]
        x = x + outer * p[f"{name}.ls_2.gamma"]
    return x


@pytest.mark.parametrize("size", [(14 * GRID, 14 * GRID), (42, 70), (154, 126)])
def test_class_token_form_equals_a_reference(size: tuple[int, int]) -> None:
    vision = tower("gelu", use_class_token=True)
    pixels = torch.randn(2, 3, *size)
    expected = torch.stack([reference(vision, image) for image in pixels]).float()
    with torch.no_grad():
        final, (first, last) = vision(Grids.stack(list(pixels)), taps=[0, 1])
    assert final.tensors[0].shape == (2, size[0] // 14, size[1] // 14, WIDTH)
    torch.testing.assert_close(final.tensors[0].flatten(1, 2), expected[:, 1:], rtol=0, atol=1e-5)
    assert torch.equal(last.tensors[0], final.tensors[0]) and not torch.equal(first.tensors[0], last.tensors[0])


def test_class_token_form_has_one_weight_more() -> None:
    with_token, without = (tower("gelu", use_class_token=flag).state_dict() for flag in (True, False))
    assert set(with_token) - set(without) == {"class_embedding"}
    assert with_token["class_embedding"].shape == (WIDTH,)
    assert with_token["positional_embedding"].shape == (1 + GRID * GRID, WIDTH)


def test_full_size_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        assert sum(weight.numel() for weight in PELang().parameters()) == 1_743_503_104


def test_names_are_those_of_the_released_weights() -> None:
    block = {
        name.removeprefix("transformer.resblocks.0.")
        for name, _ in tower().named_parameters()
        if "resblocks.0." in name
    }
    linear = {
        f"{part}.{kind}"
        for part in ("attn.out_proj", "ln_1", "ln_2", "mlp.c_fc", "mlp.c_proj")
        for kind in ("weight", "bias")
    }
    assert block == linear | {"attn.in_proj_weight", "attn.in_proj_bias", "ls_1.gamma", "ls_2.gamma"}
    outside = {name for name, _ in tower().named_parameters() if "resblocks" not in name}
    assert outside == {"conv1.weight", "positional_embedding", "ln_pre.weight", "ln_pre.bias"}
    assert set(tower().state_dict()) == {name for name, _ in tower().named_parameters()}


def test_initial_weights() -> None:
    torch.manual_seed(0)
    vision = PELang(256, 2, 4, 512, patch_size=14, grid_size=8)
    for _ in range(2):  # as constructed, and drawn afresh
        for block in vision.blocks():
            assert torch.equal(block.ls_1.gamma, torch.full((256,), 0.1))
            assert not block.attn.in_proj_bias.any() and not block.attn.out_proj.bias.any()
            bound = (6 / (256 + 768)) ** 0.5  # xavier uniform
            assert 0.95 * bound < block.attn.in_proj_weight.abs().max() <= bound
        assert vision.positional_embedding.std().item() == pytest.approx(256**-0.5, rel=0.05)
        vision.init_weights()


def test_rotary_positions_tell_columns_from_rows() -> None:
    """Moving content one cell changes attention alike everywhere, but differently along x and y."""
    from step3vl.models.vision.pe_lang import rotary_angles

    angles = rotary_angles(3, 5, 16, torch.device("cpu")).unflatten(0, (3, 5))  # [y,x,8]
    assert torch.equal(angles[0, :, 4:], torch.zeros(5, 4)) and torch.equal(angles[:, 0, :4], torch.zeros(3, 4))
    assert angles[0, 4, :4].tolist() == pytest.approx([4 * 10000 ** (-2 * k / 8) for k in range(4)])
    assert torch.equal(angles[2, 0, 4:], 2 * angles[1, 0, 4:])


def test_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"side of 60 pixels .* patch_size 14"):
        tower()(Grids.stack([torch.randn(3, 56, 60)]))
    with pytest.raises(ValueError, match=r"tap 2 .* 0 to 1"):
        tower()(Grids.stack([torch.randn(3, 56, 56)]), taps=[2])
    with pytest.raises(ValueError, match="hidden_size 60 over num_heads 10"):
        PELang(60, 1, 10, 8)

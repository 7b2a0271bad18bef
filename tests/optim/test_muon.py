"""MuonAdamW against torch's own Muon and AdamW, and who gets which rule."""

import pytest
import torch
from torch import nn

from step3vl.optim import MuonAdamW, ParamGroup, build_groups, freeze_parameters
from step3vl.optim.muon import orthogonalise


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(7, 8)
        self.wide, self.tall = nn.Linear(8, 24), nn.Linear(24, 8)
        self.norm = nn.LayerNorm(8)
        self.in_proj_weight = nn.Parameter(torch.randn(24, 8))
        self.conv = nn.Conv2d(3, 4, 3)
        self.lm_head = nn.Linear(8, 7, bias=False)


def with_gradients(seed=0):
    torch.manual_seed(seed)
    model = Model()
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    return model


def test_who_gets_muon():
    optimizer = MuonAdamW(build_groups(Model()), lr=1e-2)
    muon = {n for g in optimizer.param_groups if g["algorithm"] == "muon" for n in g["param_names"]}
    every = {n for g in optimizer.param_groups for n in g["param_names"]}
    assert muon == {"wide.weight", "tall.weight", "in_proj_weight"}
    assert every == {n for n, _ in Model().named_parameters()}


def test_equals_torch_muon():
    ours, theirs = with_gradients(), with_gradients()
    a = MuonAdamW(build_groups(ours), lr=1e-2, weight_decay=0.1)
    b = torch.optim.Muon(
        [theirs.wide.weight, theirs.tall.weight], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    for _ in range(5):
        a.step(), b.step()
    for name in ("wide", "tall"):
        x, y = getattr(ours, name).weight, getattr(theirs, name).weight
        torch.testing.assert_close(x, y, atol=2e-3, rtol=0)  # bf16 Newton-Schulz noise


def test_equals_torch_adamw():
    ours, theirs = with_gradients(), with_gradients()
    a = MuonAdamW(build_groups(ours), lr=1e-3, adamw_lr=1e-2, weight_decay=0.1)
    b = torch.optim.AdamW([theirs.lm_head.weight, theirs.conv.weight], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    for _ in range(5):
        a.step(), b.step()
    torch.testing.assert_close(ours.lm_head.weight, theirs.lm_head.weight, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(ours.conv.weight, theirs.conv.weight, atol=1e-6, rtol=1e-5)


def test_fused_projections_are_orthogonalised_apart():
    model = with_gradients()
    model.in_proj_weight.data.zero_()
    MuonAdamW(build_groups(model), lr=1.0, weight_decay=0.0).step()
    for piece in model.in_proj_weight.detach().chunk(3):
        singular = torch.linalg.svdvals(piece / (0.2 * 8**0.5))
        assert singular.min() > 0.3 and singular.max() < 1.3


def test_update_rms_is_in_adamw_range():
    torch.manual_seed(0)
    for shape in [(64, 64), (32, 96), (96, 32)]:
        update = 0.2 * max(shape) ** 0.5 * orthogonalise(torch.randn(1, *shape))
        assert 0.15 < update.square().mean().sqrt() < 0.22


def test_zero_gradient_stays_finite():
    assert not orthogonalise(torch.zeros(2, 4, 6)).isnan().any()


def test_state_survives_a_round_trip():
    straight, resumed = with_gradients(), with_gradients()
    a, b = MuonAdamW(build_groups(straight), lr=1e-2), MuonAdamW(build_groups(resumed), lr=1e-2)
    a.step(), b.step()
    c = MuonAdamW(build_groups(resumed), lr=1e-2)
    c.load_state_dict(b.state_dict())
    a.step(), c.step()
    for p, q in zip(straight.parameters(), resumed.parameters()):
        assert torch.equal(p, q)


def test_names_are_required():
    with pytest.raises(ValueError, match="names decide who gets Muon"):
        MuonAdamW(list(Model().parameters()))


def test_groups_take_their_own_rate_and_vectors_do_not_decay():
    groups = build_groups(
        Model(), [ParamGroup(pattern="^wide", lr=1e-5), ParamGroup(pattern="embed", weight_decay=0.5)]
    )
    by_name = {name: g for g in groups for name, _ in g["params"]}
    assert by_name["wide.weight"]["lr"] == 1e-5 and by_name["wide.bias"]["lr"] == 1e-5
    assert by_name["embed_tokens.weight"]["weight_decay"] == 0.5 and "weight_decay" not in by_name["wide.weight"]
    assert by_name["norm.weight"]["weight_decay"] == 0.0


def test_a_pattern_that_matches_nothing_is_an_error():
    with pytest.raises(ValueError, match=r"param_groups: pattern 'vision' matches no parameter; names start with"):
        build_groups(Model(), [ParamGroup(pattern="vision")])
    model = Model()
    with pytest.raises(ValueError, match="freeze: pattern 'tower'"):
        freeze_parameters(model, ["tower"])
    freeze_parameters(model, ["."])
    with pytest.raises(ValueError, match="every parameter is frozen"):
        build_groups(model)

"""MuonAdamW against torch's own Muon and AdamW, and who gets which rule."""

import pytest
import torch
from torch import nn

from step3vl.optim import MuonAdamW, build_groups
from step3vl.optim.newton_schulz import orthogonalise


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


def muon_names(optimizer):
    return {n for g in optimizer.param_groups if g["algorithm"] == "muon" for n in g["param_names"]}


def test_who_gets_muon():
    optimizer = MuonAdamW(build_groups(Model()), lr=1e-2)
    every = [n for g in optimizer.param_groups for n in g["param_names"]]
    assert muon_names(optimizer) == {"wide.weight", "tall.weight", "in_proj_weight"}
    assert sorted(every) == sorted(n for n, _ in Model().named_parameters())  # each exactly once
    optimizer = MuonAdamW(build_groups(Model()), adamw_patterns=("^wide", "embed"), flatten_convs=True)
    assert muon_names(optimizer) == {"tall.weight", "in_proj_weight", "conv.weight", "lm_head.weight"}


def test_value_heads_stay_with_adamw():
    """By name when they are matrices, by shape when they have one output."""
    model = nn.ModuleDict({"value_head": nn.Linear(8, 4), "critic": nn.Linear(8, 1), "hidden": nn.Linear(8, 8)})
    assert muon_names(MuonAdamW(build_groups(model))) == {"hidden.weight"}


SHAPES = [(8, 24), (24, 8), (33, 33), (2, 200), (200, 2), (65, 17), (4, 3, 3, 3), (16, 3, 1, 1), (2, 16, 5, 5)]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_equals_torch_muon(shape):
    """Any matrix, and convolution kernels as (out, in x height x width)."""
    torch.manual_seed(0)
    ours = nn.Parameter(torch.randn(shape))
    start = ours.detach().flatten(1).clone()
    theirs = nn.Parameter(start.clone())
    a = MuonAdamW([{"params": [("matrix", ours)]}], lr=1e-2, weight_decay=0.1, flatten_convs=True)
    b = torch.optim.Muon([theirs], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    assert [g["algorithm"] for g in a.param_groups] == ["muon"]
    for _ in range(5):
        gradient = torch.randn(shape)
        ours.grad, theirs.grad = gradient, gradient.flatten(1)
        a.step(), b.step()
    moved = (theirs - start).norm()
    assert (ours.flatten(1) - theirs).norm() < 0.05 * moved and moved > 0.01  # bf16 Newton-Schulz noise


@pytest.mark.parametrize("shape", [(1, 24), (24, 1), (1, 1), (24,), (), (1, 3, 2, 2), (5, 1, 1, 1), (2, 3, 4)])
def test_what_is_no_matrix_takes_adamw_s_step(shape):
    """One row or one column has a single direction: Newton-Schulz would only normalise it."""
    torch.manual_seed(0)
    ours = nn.Parameter(torch.randn(shape))
    theirs = nn.Parameter(ours.detach().clone())
    a = MuonAdamW([{"params": [("matrix", ours)]}], lr=1e-2, weight_decay=0.1, flatten_convs=True)
    b = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    assert [g["algorithm"] for g in a.param_groups] == ["adamw"]
    for _ in range(5):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        a.step(), b.step()
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


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


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (dict(lr=0.0), "lr > 0 and 0 <= momentum < 1, got lr=0.0"),
        (
            dict(adamw_patterns=("embed", "tal.weight")),
            "adamw_patterns: 'tal.weight' matches no .* did you mean tall.we",
        ),
        (dict(fused_patterns={"qkv": 3}), "fused_patterns: 'qkv' matches no parameter; names start with"),
        (dict(fused_patterns={"wide.weight": 5}), "'wide.weight' says 5 maps, but wide.weight has 24 rows"),
    ],
)
def test_impossible_arguments_are_refused(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        MuonAdamW(build_groups(Model()), **arguments)


def test_default_patterns_need_not_match():
    MuonAdamW(build_groups(nn.Linear(4, 4)))


# ------------------------------------------------------------------------------------------------ 16-bit parameters


def bf16_and_fp32(**arguments):
    """The same bf16 values as a bf16 model with fp32 copies, and as an fp32 model; their optimizers."""
    ours, exact = with_gradients().bfloat16(), with_gradients()
    exact.load_state_dict(ours.state_dict())  # rounds to what bf16 holds
    return ours, exact, MuonAdamW(build_groups(ours), **arguments), MuonAdamW(build_groups(exact), **arguments)


def set_gradients(*models):
    for p in models[0].parameters():
        p.grad = torch.randn_like(p)
    for model in models[1:]:
        for p, q in zip(models[0].parameters(), model.parameters()):
            q.grad = p.grad.to(q.dtype)


def test_steps_on_bf16_parameters_are_those_on_fp32_ones():
    ours, exact, a, b = bf16_and_fp32(lr=1e-5, weight_decay=0.1)
    for _ in range(3):
        set_gradients(ours, exact)
        a.step(), b.step()
    for (name, p), q in zip(ours.named_parameters(), exact.parameters()):
        torch.testing.assert_close(a.state[p]["master"], q.detach(), atol=1e-7, rtol=1e-6, msg=lambda m, n=name: n + m)
        assert p.dtype == torch.bfloat16 and torch.equal(p, a.state[p]["master"].bfloat16())


@pytest.mark.parametrize(("shape", "lr"), [((4,), 1e-4), ((4, 4), 5e-4)], ids=["adamw", "muon"])
def test_small_steps_are_not_lost_in_bf16(shape, lr):
    """One step is less than half of bf16's unit below 1.0, 2^-8: without the fp32 copy nothing would ever move."""
    p = nn.Parameter(torch.ones(shape, dtype=torch.bfloat16))
    optimizer = MuonAdamW([{"params": [("p", p)]}], lr=lr, weight_decay=0.0)
    p.grad = torch.eye(4, dtype=torch.bfloat16) if p.ndim == 2 else torch.ones_like(p)
    optimizer.step()
    assert torch.equal(p, torch.ones_like(p))
    for _ in range(200):
        optimizer.step()
    assert (p.diagonal() if p.ndim == 2 else p).max() < 0.985


def test_fp32_parameters_have_no_copy():
    model = with_gradients()
    optimizer = MuonAdamW(build_groups(model))
    optimizer.step()
    assert not any("master" in state for state in optimizer.state.values())


def test_bf16_state_survives_a_round_trip_in_fp32(tmp_path):
    ours, exact, a, b = bf16_and_fp32(lr=1e-5)
    for _ in range(2):
        set_gradients(ours, exact)
        a.step(), b.step()
    torch.save({"model": ours.state_dict(), "optimizer": a.state_dict()}, tmp_path / "c.pt")
    saved = torch.load(tmp_path / "c.pt", weights_only=True)
    resumed = Model().bfloat16()
    resumed.load_state_dict(saved["model"])
    c = MuonAdamW(build_groups(resumed), lr=1e-5)
    c.load_state_dict(saved["optimizer"])
    for p, q in zip(ours.parameters(), resumed.parameters()):
        for name, value in a.state[p].items():
            assert c.state[q][name].dtype == torch.float32 and torch.equal(c.state[q][name], value), name
    set_gradients(ours, resumed)
    a.step(), c.step()
    for p, q in zip(ours.parameters(), resumed.parameters()):
        assert torch.equal(p, q) and torch.equal(a.state[p]["master"], c.state[q]["master"])


def test_a_bf16_run_goes_on_from_an_fp32_checkpoint():
    ours, exact, a, b = bf16_and_fp32(lr=1e-3)
    set_gradients(ours, exact)
    b.step()
    a.load_state_dict(b.state_dict())
    set_gradients(ours, exact)
    a.step()
    for p in ours.parameters():
        assert torch.equal(p, a.state[p]["master"].bfloat16())


def test_iterations_in_fp32_differ_by_bf16_noise_alone():
    torch.manual_seed(0)
    given = torch.randn(2, 24, 40)
    coarse, fine = orthogonalise(given), orthogonalise(given, dtype=torch.float32)
    assert 0 < (coarse - fine).abs().max() < 0.2 * fine.abs().max()
    with pytest.raises(ValueError, match="ns_dtype is 'float16'; accepted are 'bfloat16' and 'float32'"):
        MuonAdamW([{"params": [("w", nn.Parameter(torch.ones(2, 2)))]}], ns_dtype="float16")

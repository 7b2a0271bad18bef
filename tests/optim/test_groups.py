"""Groups by name pattern: each parameter once, its own rate and decay, and no pattern without effect."""

import pytest
import torch
from torch import nn

from step3vl.optim import MuonAdamW, ParamGroup, build_groups, freeze_parameters

from .test_muon import Model


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.vision_encoder = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])})
        self.projector = nn.Linear(4, 8)
        self.decoder = nn.ModuleDict({"embed_tokens": nn.Embedding(9, 8), "lm_head": nn.Linear(8, 9, bias=False)})
        self.decoder.lm_head.weight = self.decoder.embed_tokens.weight


def by_name(groups):
    pairs = [(name, group) for group in groups for name, _ in group["params"]]
    assert len({name for name, _ in pairs}) == len(pairs), "a parameter is in two groups"
    return dict(pairs)


def test_groups_take_their_own_rate_and_vectors_do_not_decay():
    groups = by_name(
        build_groups(Model(), [ParamGroup(pattern="^wide", lr=1e-5), ParamGroup(pattern="embed", weight_decay=0.5)])
    )
    assert groups["wide.weight"]["lr"] == 1e-5 and groups["wide.bias"]["lr"] == 1e-5
    assert groups["embed_tokens.weight"]["weight_decay"] == 0.5 and "weight_decay" not in groups["wide.weight"]
    assert groups["norm.weight"]["weight_decay"] == 0.0
    assert (
        by_name(build_groups(Model(), [ParamGroup(pattern="norm", weight_decay=0.3)]))["norm.weight"]["weight_decay"]
        == 0.3
    )


def test_every_trainable_parameter_is_in_exactly_one_group():
    model = Nested()
    patterns = [
        ParamGroup(pattern=r"blocks\.1"),
        ParamGroup(pattern="vision_encoder", lr=1.0),
        ParamGroup(pattern="weight"),
    ]
    freeze_parameters(model, ["projector"])
    groups = by_name(build_groups(model, patterns))
    assert set(groups) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert "projector.weight" not in groups and "decoder.lm_head.weight" not in groups  # frozen; tied: under one name
    assert (
        "lr" not in groups["vision_encoder.blocks.1.weight"] and groups["vision_encoder.blocks.0.weight"]["lr"] == 1.0
    )
    assert groups["decoder.embed_tokens.weight"]["name"] == "weight"


def test_rates_decay_and_freezing_by_pattern_reach_the_step():
    """One step of SGD-like certainty: what is frozen stays, and each group moves by its own rate and decay."""
    for make in (torch.optim.AdamW, MuonAdamW):
        torch.manual_seed(0)
        model = Nested()
        freeze_parameters(model, [r"^vision_encoder\.blocks\.0"])
        patterns = [
            ParamGroup(pattern="^vision", lr=0.0, weight_decay=0.0),
            ParamGroup(pattern="projector", lr=0.1, weight_decay=0.5),
        ]
        optimizer = make(build_groups(model, patterns), lr=1e-3, weight_decay=0.0)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        for p in model.parameters():
            p.grad = torch.zeros_like(p)  # only decay moves
        optimizer.step()
        for name, p in model.named_parameters():
            factor = 1 - 0.1 * 0.5 if name.startswith("projector") else 1.0  # the bias too: its ParamGroup sets a decay
            torch.testing.assert_close(p.detach(), before[name] * factor, msg=name)


@pytest.mark.parametrize(
    ("pattern", "sentence"),
    [
        ("vision_encodr", "param_groups: pattern 'vision_encodr' matches no parameter; did you mean vision_encoder"),
        (r"^projektor\.", "did you mean projector"),
        (
            "zzz",
            "matches no parameter; names start with decoder.embed_tokens, projector.bias, projector.weight, vision_",
        ),
        ("lm_head", "matches decoder.lm_head.weight, which is tied to decoder.embed_tokens.weight: use that name"),
        ("a(", r"param_groups: 'a\(' is not a regular expression"),
    ],
)
def test_a_pattern_that_matches_nothing_is_an_error(pattern, sentence):
    with pytest.raises(ValueError, match=sentence):
        build_groups(Nested(), [ParamGroup(pattern=pattern)])
    with pytest.raises(ValueError, match=sentence.replace("param_groups", "freeze")):
        freeze_parameters(Nested(), [pattern])


def test_a_pattern_whose_parameters_are_all_taken_is_an_error():
    patterns = [ParamGroup(pattern="vision", lr=1e-5), ParamGroup(pattern=r"blocks\.1", lr=1e-4)]
    with pytest.raises(
        ValueError, match=r"has no effect: all it matches is taken by 'vision' before it; put the narrow"
    ):
        build_groups(Nested(), patterns)
    build_groups(Nested(), patterns[::-1])


def test_nothing_to_train_is_an_error():
    model = Model()
    freeze_parameters(model, ["."])
    with pytest.raises(ValueError, match="every parameter is frozen"):
        build_groups(model)

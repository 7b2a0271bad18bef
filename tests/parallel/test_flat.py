"""What Lightning's FSDPStrategy is told on GPUs; it runs on no CPU, so that its parts are tested alone."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn

from step3vl.callbacks import Answers
from step3vl.cli import main
from step3vl.optim import ParamGroup, build_groups
from step3vl.parallel import Blueprint, flat
from step3vl.stages import PretrainStage

from .ranks import small_vlm
from .test_blueprint import blocks, filled, without_memory


def test_modules_filled_one_by_one_are_the_model_filled_at_once(monkeypatch):
    """In any order in which a wrapper may call: blocks first, the rest afterwards; each unit is drawn once."""
    wanted, vlm = filled(small_vlm), without_memory(small_vlm)
    blueprint, drawn = Blueprint(vlm, blocks(vlm)), []
    draw = blueprint.draw
    monkeypatch.setattr(blueprint, "draw", lambda unit, seed: drawn.append(unit) or draw(unit, seed))
    fill = flat.initialiser(vlm, blueprint, "cpu", 0)
    for block in blocks(vlm):
        for part in block.modules():
            fill(part)
    for part in vlm.modules():
        fill(part)
    assert sorted(drawn) == sorted(blueprint.units)
    for (name, a), b in zip(wanted.named_parameters(), vlm.parameters(), strict=True):
        assert torch.equal(a, b) and b.requires_grad, name
    for (name, a), b in zip(wanted.named_buffers(), vlm.buffers(), strict=True):
        assert torch.equal(a, b), name


def test_the_strategy_is_told_blocks_and_weights():
    vlm = without_memory(small_vlm)
    strategy = SimpleNamespace(kwargs={}, root_device=torch.device("cpu"))
    stage = PretrainStage(vlm, None, torch.optim.AdamW)
    flat.tell(strategy, vlm, blocks(vlm), Blueprint(vlm, blocks(vlm)), 0)
    policy, fill = strategy.kwargs["auto_wrap_policy"], strategy.kwargs["param_init_fn"]
    assert [bool(policy._lambda_fn(part)) for part in stage.modules()].count(True) == len(blocks(vlm))
    assert strategy.kwargs["use_orig_params"] is True
    fill(vlm.decoder.lm_head)
    assert torch.equal(vlm.decoder.lm_head.weight, filled(small_vlm).decoder.lm_head.weight)


class Wrapped(nn.Module):
    """Names as a wrapper makes them, parameters without shapes."""

    def __init__(self, module):
        super().__init__()
        self._fsdp_wrapped_module = module
        for part in module.modules():
            for leaf, weight in part._parameters.items():
                if weight is not None:
                    part._parameters[leaf] = nn.Parameter(weight.detach().flatten())


def test_groups_are_made_before_shapes_are_lost():
    vlm = small_vlm()
    before = build_groups(vlm, [ParamGroup(pattern="mlp", lr=0.5)])
    layers = vlm.decoder.model.layers
    for number in range(len(layers)):
        layers[number] = Wrapped(layers[number])
    after = flat.renewed(before, vlm)
    assert [{k: v for k, v in g.items() if k != "params"} for g in after] == [
        {k: v for k, v in g.items() if k != "params"} for g in before
    ]
    assert [[name for name, _ in g["params"]] for g in after] == [[name for name, _ in g["params"]] for g in before]
    ours = {id(p) for p in vlm.parameters()}
    assert {id(p) for g in after for _, p in g["params"]} == ours and len(after) == 4


def test_cpus_are_refused_in_one_sentence(workplace, capsys):
    run = "experiments/step3vl_10b/1_pretrain_phase1.yaml"
    assert main(["fit", "-c", run, "--scale=tiny", "--trainer.strategy=strategy/fsdp1.yaml"]) == 2
    assert "requires a GPU accelerator" in capsys.readouterr().err


def test_answers_are_refused():
    with pytest.raises(ValueError, match="Answers cannot generate under FSDPStrategy"):
        Answers().setup(SimpleNamespace(strategy=FSDPStrategy()), None, "fit")


def test_init_from_is_refused():
    stage = PretrainStage(small_vlm(), None, torch.optim.AdamW, init_from="runs/elsewhere")
    stage.trainer = SimpleNamespace(world_size=1, strategy=FSDPStrategy())
    with pytest.raises(ValueError, match=r"init_from cannot be read under FSDPStrategy; use strategy/fsdp2.yaml"):
        stage.configure_model()

"""A model built without memory becomes one that was built in full: its weights are drawn, its buffers computed."""

import re

import pytest
import torch
from torch import nn

from step3vl.config import CONFIGS
from step3vl.models import ConvProjector, VisionLanguageModel
from step3vl.parallel import Blueprint, has_no_memory
from step3vl.parallel.blueprint import seeded, state

from ..models.conftest import build_card
from .ranks import launch, small_vlm

ENCODERS = sorted(path.name for path in (CONFIGS / "tiny" / "vision").glob("*.yaml"))


def blocks(vlm):
    return [*vlm.vision_encoder.blocks(), *vlm.decoder.blocks()]


def without_memory(make):
    with torch.device("meta"):
        return make()


def filled(make, seed=0):
    vlm = without_memory(make)
    Blueprint(vlm, blocks(vlm)).fill(vlm, "cpu", seed)
    return vlm


def with_encoder(card):
    return VisionLanguageModel(
        build_card(f"vision/{card}", "tiny"), ConvProjector, build_card("decoder/qwen3_8b.yaml", "tiny")
    )


def stray_tensors(module):
    """Tensors that hang on a module beside its parameters and buffers."""
    for name, part in module.named_modules():
        for key, value in vars(part).items():
            if isinstance(value, torch.Tensor):
                yield f"{name}.{key}", value


@pytest.mark.parametrize("card", ENCODERS)
def test_every_buffer_and_the_spread_of_every_weight_are_as_built(card):
    torch.manual_seed(1)
    built, made = with_encoder(card), filled(lambda: with_encoder(card))
    assert [name for name, _ in state(built)] == [name for name, _ in state(made)]
    assert {n: b.dtype for n, b in built.named_buffers()} == {n: b.dtype for n, b in made.named_buffers()}
    for (name, wanted), found in zip(built.named_buffers(), made.buffers()):
        assert torch.equal(found, wanted), name
    for (name, wanted), found in zip(built.named_parameters(), made.parameters()):
        assert found.requires_grad == wanted.requires_grad and found.dtype == wanted.dtype
        if wanted.numel() < 500 or wanted.std() == 0:  # norms, biases, factors: constants or few
            assert (found - wanted).abs().max() <= 6 * wanted.std() + 1e-6, name
        else:
            assert 0.85 < found.std() / wanted.std() < 1.15 and not torch.equal(found, wanted), name
    assert not has_no_memory(made) and not any(tensor.is_meta for _, tensor in stray_tensors(made))


def test_a_weight_depends_on_the_seed_and_its_own_unit_alone():
    """DeepStack or another width of the vocabulary leaves all other weights as they are; another seed leaves none."""
    plain, deep, other = (filled(m) for m in (small_vlm, lambda: small_vlm(True), lambda: small_vlm(vocab=99)))
    deep_weights, other_weights = deep.state_dict(), other.state_dict()
    for name, weight in plain.state_dict().items():
        assert torch.equal(deep_weights[name], weight), name
        if "embed_tokens" not in name and "lm_head" not in name:
            assert torch.equal(other_weights[name], weight), name
    again, moved = filled(small_vlm), filled(small_vlm, seed=1)
    for (name, a), b, c in zip(again.named_parameters(), plain.parameters(), moved.parameters()):
        assert torch.equal(a, b), name
        assert torch.equal(a, c) == bool(a.min() == a.max()), name
    first, second = plain.decoder.blocks()[:2]
    assert not torch.equal(first.mlp.up_proj.weight, second.mlp.up_proj.weight)


def test_tied_weights_stay_tied_and_zeroed_ones_zero():
    vlm = filled(lambda: small_vlm(tie_embeddings=True, zero_init_outputs=True))
    assert vlm.decoder.lm_head.weight is vlm.decoder.model.embed_tokens.weight
    assert vlm.decoder.lm_head.weight.std() > 0
    assert not vlm.decoder.blocks()[0].mlp.down_proj.weight.any()


def test_the_random_state_outside_is_left_alone():
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    filled(small_vlm)
    assert torch.equal(torch.rand(3), wanted) and torch.initial_seed() == 5
    with seeded("a"):
        one = torch.rand(3)
    with seeded("b"):
        assert not torch.equal(torch.rand(3), one)


class Forgetful(nn.Module):
    def __init__(self, forgets):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("table", torch.arange(4))
        self.forgets = forgets

    def init_weights(self):
        with torch.no_grad():
            if self.forgets != "weight":
                self.weight.data.fill_(1)
            if self.forgets != "table":
                self.table.copy_(torch.arange(4))


@pytest.mark.parametrize("forgets", ["weight", "table"])
def test_what_init_weights_forgets_is_named(forgets):
    model = without_memory(lambda: Forgetful(forgets))
    with pytest.raises(ValueError, match=f"Forgetful.init_weights leaves {forgets} without values"):
        Blueprint(model, []).fill(model, "cpu", 0)
    whole = without_memory(lambda: Forgetful(None))
    Blueprint(whole, []).fill(whole, "cpu", 0)
    assert whole.table.tolist() == [0, 1, 2, 3] and whole.weight.tolist() == [1, 1]


SHARDED = """
import torch, torch.distributed as dist
from pathlib import Path
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from step3vl.parallel import Blueprint, has_no_memory, shard
from tests.parallel.ranks import small_vlm
from tests.parallel.test_blueprint import blocks, filled, with_encoder, without_memory

dist.init_process_group("gloo")
rank = dist.get_rank()
meshes = [init_device_mesh("cpu", (2,)), init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))]
makes = [lambda: small_vlm(True), lambda: small_vlm(tie_embeddings=True)]
makes += [lambda card=card: with_encoder(card) for card in ("dinov3_vits16.yaml", "siglip2_base_naflex.yaml")]
for make in makes:
    torch.manual_seed(3 + rank)
    built, whole = make(), filled(make)
    for mesh in meshes:
        made = without_memory(make)
        blueprint = Blueprint(made, blocks(made))
        shard(made, blocks(made), mesh)
        blueprint.fill(made, "cpu", 0)
        assert not has_no_memory(made)
        for (name, p), wanted in zip(made.named_parameters(), whole.parameters(), strict=True):
            assert isinstance(p, DTensor) and torch.equal(p.full_tensor(), wanted), name
        for (name, b), wanted in zip(made.named_buffers(), built.buffers(), strict=True):
            assert torch.equal(b, wanted), name
        tied = [n for n, p in made.named_parameters(remove_duplicate=False) if p is made.decoder.lm_head.weight]
        assert len(tied) == (2 if built.decoder.tie_embeddings else 1)

def peak_since(before=None):  # MB of resident memory at its highest; called without arguments, starts to count
    if before is None:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    kb = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith(("VmHWM", "VmRSS"))}
    return kb["VmRSS"] / 1024 if before is None else kb["VmHWM"] / 1024 - before

make = lambda: small_vlm(hidden=640, num_layers=16, vocab=4000)
made = without_memory(make)
size = lambda parameters: sum(p.numel() for p in parameters) * 4 / 2**20
full, block = size(made.parameters()), size(made.decoder.blocks()[0].parameters())
before = peak_since()
blueprint = Blueprint(made, blocks(made))
shard(made, blocks(made), meshes[0])
blueprint.fill(made, "cpu", 0)
print(f"rank {rank}: full {full:.0f} block {block:.0f} peak {peak_since(before):.0f}", flush=True)
dist.destroy_process_group()
"""


@pytest.mark.timeout(200)
def test_two_ranks_hold_what_one_holds_and_never_more_than_a_shard_and_a_unit(tmp_path):
    """Values on real ranks, shards and buffers; then the peak of the memory that making a larger model takes."""
    out = launch(SHARDED, tmp_path)
    peaks = re.findall(r"full (\d+) block (\d+) peak (\d+)", out)  # MB
    assert len(peaks) == 2
    for full, block, peak in (map(int, found) for found in peaks):
        assert full > 150 and peak < full / 2 + 3 * block + 20, f"{peak} MB of {full} MB"

"""What travels between ranks and in which format; which meshes are taken."""

from types import SimpleNamespace

import pytest
import torch
from torch.distributed.fsdp import MixedPrecisionPolicy

from step3vl.parallel import ShardedStrategy, data_mesh, formats

from .ranks import launch

GATHERS = """
import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from step3vl.losses import CrossEntropy
from step3vl.parallel import formats, shard
from tests.parallel.ranks import small_batch, small_vlm

dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
for policy, wanted in ((None, torch.float32), (formats("bfloat16", "float32"), torch.bfloat16)):
    torch.manual_seed(0)
    vlm, seen, batch = small_vlm(True), set(), small_batch(0, (32,))
    shard(vlm, [*vlm.vision_encoder.blocks(), *vlm.decoder.blocks()], mesh, policy)
    for part in (vlm.vision_encoder.blocks()[0].mlp.c_fc, vlm.decoder.blocks()[0].mlp.up_proj, vlm.projector):
        part.register_forward_pre_hook(lambda part, _: seen.update(p.dtype for p in part.parameters()))
    with torch.autocast("cpu", torch.bfloat16):  # as under bf16-mixed
        loss = CrossEntropy()(vlm(batch), vlm.decoder.lm_head, batch).value
    loss.backward()
    assert seen == {wanted}, seen
    assert loss.dtype == torch.float32 and loss.isfinite()
    assert {p.dtype for p in vlm.parameters()} == {p.grad.dtype for p in vlm.parameters()} == {torch.float32}
    assert {b.dtype for b in vlm.buffers()} == {torch.float32}  # rotary frequencies are not rounded
dist.destroy_process_group()
"""


@pytest.mark.timeout(200)
def test_blocks_are_gathered_in_the_chosen_format_and_kept_in_fp32(tmp_path):
    launch(GATHERS, tmp_path)


def test_formats():
    assert formats() == MixedPrecisionPolicy()
    assert formats("bfloat16", "float32") == MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    with pytest.raises(ValueError, match=r"reduce_dtype is 'half'; accepted are 'float32', 'bfloat16'"):
        formats(None, "half")


class Mesh:
    def __init__(self, **sizes):
        self.sizes, self.mesh_dim_names = sizes, tuple(sizes)

    def __getitem__(self, names):
        names = names if isinstance(names, tuple) else (names,)
        return SimpleNamespace(names=names, size=lambda: self.sizes[names[0]])


def test_the_mesh_of_pieces_and_copies():
    assert data_mesh(Mesh(data_parallel=4, tensor_parallel=1)).names == ("data_parallel",)
    assert data_mesh(Mesh(replicate=2, data_parallel=2, tensor_parallel=1)).names == ("replicate", "data_parallel")
    with pytest.raises(ValueError, match=r"tensor_parallel_size is 2; accepted is 1"):
        data_mesh(Mesh(data_parallel=2, tensor_parallel=2))


def test_copies_and_pieces_see_different_data():
    """Eight ranks, two copies of four pieces: eight parts of the data."""
    strategy = ShardedStrategy(4, 2)
    seen = []
    for rank in range(8):
        strategy.cluster_environment = SimpleNamespace(global_rank=lambda rank=rank: rank)
        seen.append(tuple(strategy.distributed_sampler_kwargs.values()))
    assert seen == [(8, rank) for rank in range(8)]

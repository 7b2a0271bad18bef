"""MuonAdamW on two ranks with sharded parameters (FSDP2 over gloo): the steps of one rank, and its state comes back."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import copy, os, torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from step3vl.optim import MuonAdamW, build_groups
from step3vl.parallel import shard

class Model(nn.Module):
    def __init__(self):  # uneven rows, one row, one column, a convolution, stacked projections
        super().__init__()
        self.narrow, self.tall, self.back = nn.Linear(8, 3), nn.Linear(3, 17), nn.Linear(17, 8)
        self.in_proj_weight = nn.Parameter(torch.randn(9, 8))
        self.conv, self.column, self.value_head = nn.Conv1d(9, 4, 1), nn.Linear(1, 4), nn.Linear(4, 1)

    def forward(self, x):
        x = self.back(self.tall(self.narrow(x).tanh()).tanh()) @ self.in_proj_weight.T
        return self.value_head((self.conv(x.mT).mT + self.column(x[..., :1])).tanh())

def make(dtype):
    torch.manual_seed(0)
    return Model().to(dtype)

def train(model, optimizer, steps):
    for step in steps:
        torch.manual_seed(step)
        optimizer.zero_grad()
        model(torch.randn(2, 5, 8).to(model.conv.weight.dtype)).square().sum().backward()
        optimizer.step()

dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 1e-6)):
    one, two = make(dtype), make(dtype)
    shard(two, [two.tall, two.back], mesh)
    a, b = (MuonAdamW(build_groups(m), lr=1e-3) for m in (one, two))
    train(one, a, range(3)), train(two, b, range(3))
    for (name, p), q in zip(one.named_parameters(), two.parameters()):
        kept = [(p, q), *((a.state[p][k], b.state[q][k]) for k in a.state[p] if k != "step")]
        assert ("master" in a.state[p]) == (dtype == torch.bfloat16)
        for x, y in kept:
            close = dict(atol=tolerance, rtol=0, msg=lambda m: f"{name}: {m}")
            torch.testing.assert_close(y.full_tensor(), x.detach(), **close)

    saved = copy.deepcopy(get_optimizer_state_dict(two, b))
    again = make(dtype)
    again.load_state_dict(one.state_dict())
    shard(again, [again.tall, again.back], mesh)
    c = MuonAdamW(build_groups(again), lr=1e-3)
    set_optimizer_state_dict(again, c, saved)
    train(two, b, range(3, 5)), train(again, c, range(3, 5))
    for p, q in zip(two.parameters(), again.parameters()):
        assert torch.equal(p.to_local(), q.to_local())
        for k, value in c.state[q].items():
            assert value.dtype == torch.float32, (k, value.dtype)
dist.barrier()
os._exit(0)  # taking torch's threads down can abort the process
"""


@pytest.mark.timeout(120)
def test_two_ranks_step_as_one(tmp_path):
    (tmp_path / "run.py").write_text(SCRIPT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "run.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-3000:]

"""The loss on two ranks with sharded parameters (FSDP2 over gloo): the gradients of one rank with the whole batch."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import os, sys, torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from step3vl.losses import CrossEntropy
from step3vl.parallel import shard
from step3vl.types import IGNORE_INDEX, Batch

class Model(nn.Module):
    def __init__(self, tied):
        super().__init__()
        self.embed, self.block, self.lm_head = nn.Embedding(13, 8), nn.Linear(8, 8), nn.Linear(8, 13, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, batch):
        return self.block(self.embed(batch.input_ids)).tanh()

def make(seed, labelled):
    torch.manual_seed(seed)
    ids = torch.randint(0, 13, (2, 6))
    labels = torch.randint(0, 13, (2, 6)) if labelled else torch.full((2, 6), IGNORE_INDEX)
    return Batch(input_ids=ids, labels=labels, loss_weights=torch.rand(2, 6), position_ids=ids)

dist.init_process_group("gloo")
rank, mesh = dist.get_rank(), init_device_mesh("cpu", (2,))
for labelled in (True, False):  # on rank 1; a rank without a label must neither hang nor move the others
    for tied in (False, True):
        batches = [make(1, True), make(2, labelled)]
        torch.manual_seed(0)
        whole = Model(tied)
        for batch in batches:
            CrossEntropy(chunk_size=5)(whole(batch), whole.lm_head, batch).value.backward()
        torch.manual_seed(0)
        model = Model(tied)
        shard(model, [model.block], mesh)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        for _ in range(2):
            with torch.no_grad():  # a validation leaves the root's parameters whole
                CrossEntropy()(model(batches[rank]), model.lm_head, batches[rank])
            optimizer.zero_grad()
            CrossEntropy(chunk_size=5)(model(batches[rank]), model.lm_head, batches[rank]).value.backward()
            optimizer.step()
        for (name, wanted), parameter in zip(whole.named_parameters(), model.parameters()):
            torch.testing.assert_close(2 * parameter.grad.full_tensor(), wanted.grad, msg=lambda m: f"{name}: {m}")
try:
    model = Model(False)
    shard(model, [model.block, model.lm_head], mesh)
    CrossEntropy()(model(batches[rank]), model.lm_head, batches[rank])
    sys.exit("a head that is a unit of its own was not refused")
except ValueError as refused:
    assert "lm_head is sharded" in str(refused)
dist.barrier()
os._exit(0)  # taking torch's threads down can abort the process
"""


@pytest.mark.timeout(120)
def test_two_ranks_give_the_gradients_of_one(tmp_path):
    (tmp_path / "run.py").write_text(SCRIPT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "run.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-3000:]

"""Ranks whose batches hold no image, or views of fewer sizes: nobody waits for ever, and the steps are those of one."""

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from torch.utils.data import DataLoader

from step3vl.data import Processor
from step3vl.parallel import ShardedStrategy
from step3vl.stages import PretrainStage
from step3vl.types import Grids

from .ranks import launch, small_batch, small_vlm

PASSES = """
import torch, torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from step3vl.losses import CrossEntropy
from step3vl.parallel import recompute, shard
from tests.parallel.ranks import small_batch, small_vlm

dist.init_process_group("gloo")
rank, mesh = dist.get_rank(), init_device_mesh("cpu", (2,))

class Model(nn.Module):
    def __init__(self, deepstack):
        super().__init__()
        torch.manual_seed(0)
        self.vlm = small_vlm(deepstack)
        for name, weight in self.vlm.named_parameters():
            if ".last." in name:  # DeepStack starts at zero
                nn.init.normal_(weight, std=0.1)

    def forward(self, batch):
        return CrossEntropy()(self.vlm(batch), self.vlm.decoder.lm_head, batch).value

for deepstack in (False, True):
    for sides in ([(32,), ()], [(32, 16), ()], [(16, 32, 16), (32,)], [(), ()]):
        batches = [small_batch(seed, shown) for seed, shown in enumerate(sides)]
        whole = Model(deepstack)
        wanted = [whole(batch) for batch in batches]
        sum(wanted).backward()
        for kind in ("fsdp2", "fsdp2 recomputed", "ddp"):
            model = Model(deepstack)
            model.vlm.num_encoder_passes = 2
            blocks = [*model.vlm.vision_encoder.blocks(), *model.vlm.decoder.blocks()]
            recompute(blocks if "recomputed" in kind else ())
            if "fsdp2" in kind:
                shard(model.vlm, blocks, mesh)
            run = DistributedDataParallel(model) if kind == "ddp" else model
            for _ in range(2):
                model.zero_grad()
                with torch.no_grad():
                    torch.testing.assert_close(run(batches[rank]), wanted[rank], atol=1e-5, rtol=0)
                loss = run(batches[rank])
                loss.backward()
            torch.testing.assert_close(loss, wanted[rank], atol=1e-5, rtol=0)
            for (name, p), q in zip(whole.named_parameters(), model.parameters()):
                grad = p.grad if p.grad is not None else torch.zeros_like(p)
                found = 2 * (q.grad.full_tensor() if kind != "ddp" else q.grad)
                where = f"{kind} {sides} {name}: "
                torch.testing.assert_close(found, grad, atol=2e-5, rtol=1e-5, msg=lambda m: where + m)
dist.destroy_process_group()
"""

STAGE = """
import torch
from tests.parallel.test_text_only import train

losses, weights, rank = train("fsdp2")
if rank == 0:
    torch.save((losses, weights), "fsdp2.pt")
"""
SIDES = [[(32, 16), ()], [(), ()], [(16,), ()], [(), ()]]  # of views; steps x ranks: rank 1 never sees an image


def train(kind):
    """Losses of the steps, weights after them, and the rank; a single rank takes the batches of both, one by one."""
    seed_everything(7, verbose=False)
    with torch.device("meta"):
        vlm = small_vlm(True)
    stage = PretrainStage(vlm, Processor(template="plain"), lambda groups: torch.optim.AdamW(groups, lr=1e-2))
    num_ranks = 2 if kind == "fsdp2" else 1
    trainer = Trainer(
        accelerator="cpu",
        devices=num_ranks,
        strategy=ShardedStrategy(2) if kind == "fsdp2" else "auto",
        max_steps=len(SIDES),
        accumulate_grad_batches=2 // num_ranks,
        log_every_n_steps=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
    )
    ranks = [trainer.global_rank] if num_ranks == 2 else [0, 1]
    batches = [small_batch(10 * step + rank, shown[rank]) for step, shown in enumerate(SIDES) for rank in ranks]
    losses = []
    stage.on_train_batch_end = lambda *_: losses.append(float(trainer.callback_metrics.get("loss", 0)))
    trainer.fit(stage, DataLoader(batches, batch_size=None))
    whole = {n: p.full_tensor() if num_ranks == 2 else p.detach() for n, p in stage.vlm.named_parameters()}
    return losses if num_ranks == 2 else losses[1::2], whole, trainer.global_rank


@pytest.mark.timeout(300)
def test_gradients_are_those_of_one_rank(tmp_path):
    launch(PASSES, tmp_path)


@pytest.mark.timeout(300)
def test_steps_without_any_image_leave_the_encoder_alone_as_on_one_rank(tmp_path):
    """Weight decay and moments would move it if blank views counted: AdamW, four steps, two of them all text."""
    launch(STAGE, tmp_path)
    losses, weights, _ = train("one")
    two_losses, two_weights = torch.load(tmp_path / "fsdp2.pt")
    assert two_losses == pytest.approx(losses, abs=1e-6)
    for name, weight in weights.items():
        torch.testing.assert_close(two_weights[name], weight, atol=2e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_one_rank_alone_runs_no_blank_view():
    vlm = small_vlm()
    seen = []
    vlm.vision_encoder.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    vlm(small_batch(0))
    assert not seen
    vlm.num_encoder_passes = 2
    vlm(small_batch(0))
    vlm(small_batch(0, (32,)))
    vlm(small_batch(0, (32, 16)))
    assert [[tuple(p.shape) for p in grids.tensors] for grids in seen] == [
        [(1, 3, 16, 16)] * 2,
        [(1, 3, 16, 16)],
        [(1, 3, 32, 32)],
        [(1, 3, 32, 32), (1, 3, 16, 16)],
    ]


def test_a_third_size_is_refused():
    vlm, batch = small_vlm(), small_batch(0, (32, 16))
    vlm.num_encoder_passes = 2
    batch.images = Grids.stack([*batch.images.unstack(), torch.zeros(3, 48, 48, dtype=torch.uint8)])
    with pytest.raises(ValueError, match=r"views of 3 sizes .*48x48.* runs 2 times"):
        vlm(batch)

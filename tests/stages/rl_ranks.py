"""One run of reinforcement learning on some ranks, for test_rl_ranks.py: python -m tests.stages.rl_ranks ARGUMENTS."""

import json
import sys
from pathlib import Path

import torch
from lightning.pytorch import seed_everything
from torch.distributed.tensor import DTensor

from step3vl.cli import leave
from step3vl.data import Source
from step3vl.losses.policy import PPOClip
from step3vl.parallel import ShardedStrategy

from .rl_run import build, critic, fit

NUM_PROMPTS = 8


def whole(module):
    found = {}
    for name, p in module.named_parameters():
        tensor = p.detach()
        found[name] = tensor.full_tensor().clone() if isinstance(tensor, DTensor) else tensor.clone()
    return found


def main(corpus: str, kind: str, num_ranks: int, out: str, settings: str) -> None:
    torch.set_num_threads(1)
    options = json.loads(settings)
    objective = PPOClip(kl_coef=options.pop("kl_coef", 0.0))
    strategies = {
        "single": lambda: "auto",
        "fsdp2": lambda: ShardedStrategy(data_parallel_size=num_ranks),
        "ddp": lambda: "ddp_find_unused_parameters_true",
    }
    sampled = options.pop("sampled", False)
    seed_everything(2, verbose=False)  # the critic's head is drawn here
    trained = critic(lr=0.05, max_grad_norm=1e9)
    stage = build(scripted=not sampled, critic=trained, objective=objective, **options)
    sources = {"digits": Source(shards="train/documents-digits-*.tar", weight=1.0)}
    sources["sums"] = Source(shards="train/text-sums-*.tar", weight=1.0)
    fit(
        stage,
        corpus,
        num_steps=options.get("num_minibatches", 1),
        prompts=NUM_PROMPTS // num_ranks,
        sources=sources,
        strategy=strategies[kind](),
        devices=num_ranks,
    )
    weights = {"policy": whole(stage.vlm), "critic": whole(stage.critic)}
    if stage.trainer.is_global_zero:
        metrics = {name: float(value) for name, value in stage.trainer.callback_metrics.items()}
        torch.save({"weights": weights, "metrics": metrics}, Path(out))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4], sys.argv[5])
    leave(0)

"""A run of the reward model on some ranks, for test_reward_model.py: python -m tests.stages.reward_ranks ARGUMENTS."""

import sys
from pathlib import Path

import torch

from step3vl.cli import leave
from step3vl.parallel import ShardedStrategy

from .reward_run import build, fit, metrics
from .rl_ranks import whole

NUM_PAIRS = 8


def main(folder: str, kind: str, num_ranks: int, out: str) -> None:
    strategies = {
        "single": lambda: "auto",
        "fsdp2": lambda: ShardedStrategy(data_parallel_size=num_ranks),
        "ddp": lambda: "ddp_find_unused_parameters_true",
    }
    stage = fit(build(), Path(folder), 2, NUM_PAIRS // num_ranks, strategy=strategies[kind](), devices=num_ranks)
    weights = whole(stage.vlm)
    if stage.trainer.is_global_zero:
        torch.save({"weights": weights, "metrics": metrics(stage)}, Path(out))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])
    leave(0)

"""Real processes (gloo): one iteration on two ranks, sharded or not, is that of one rank on all prompts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
TIMES = ("seconds/", "lr", "critic_lr")


def run(folder, corpus, kind, num_ranks, **settings):
    out = folder / f"{kind}{num_ranks}.pt"
    command = [sys.executable, "-m", "tests.stages.rl_ranks", corpus, kind, num_ranks, out, json.dumps(settings)]
    done = subprocess.run(
        [str(word) for word in command],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(out, weights_only=True)
    found["metrics"] = {name: value for name, value in found["metrics"].items() if not name.startswith(TIMES)}
    return found


def same(one, two, tolerance):
    for module in ("policy", "critic"):
        for name, tensor in one["weights"][module].items():
            torch.testing.assert_close(tensor, two["weights"][module][name], atol=tolerance, rtol=tolerance)
    assert one["metrics"].keys() == two["metrics"].keys()
    for name, value in one["metrics"].items():
        assert value == pytest.approx(two["metrics"][name], rel=1e-3, abs=1e-4), name


def test_two_sharded_ranks_take_the_step_of_one(tmp_path, small_corpus):
    """With a reference, a critic, and packs of unequal number."""
    settings = dict(kl_coef=0.1, pack_tokens=192)
    one = run(tmp_path, small_corpus, "single", 1, **settings)
    two = run(tmp_path, small_corpus, "fsdp2", 2, **settings)
    same(one, two, 1e-5)


@pytest.mark.slow
def test_two_replicated_ranks_take_the_step_of_one(tmp_path, small_corpus):
    one = run(tmp_path, small_corpus, "single", 1)
    same(one, run(tmp_path, small_corpus, "ddp", 2), 1e-5)


def test_two_sharded_ranks_generate_for_themselves(tmp_path, small_corpus):
    """Each rank samples from the sharded policy; answers differ in length, and no rank waits for ever."""
    found = run(tmp_path, small_corpus, "fsdp2", 2, sampled=True)
    assert found["metrics"]["length"] > 1
    assert found["metrics"]["engine_mismatch_max"] < 1e-3

"""Real processes behind the command line: killed in any phase of an iteration, a run goes on as if it had not been."""

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from step3vl.weights.pieces import Pieces
from step3vl.weights.runs import saved_steps

FIT = "-c experiments/step3vl_10b/5_rlvr.yaml --scale tiny --trainer.max_steps=4 --trainer.precision=32-true"
FIT += " --model.init_from=null --model.critic.warmup_iterations=0 --model.filters=[] --data.prompts_per_step=6"
FIT += " --model.group_size=3 --trainer.log_every_n_steps=1"
SAVES = "--trainer.callbacks=[{class_path: step3vl.callbacks.Checkpoints, init_args: {every_n_steps: 1, keep_last: 9}}]"
KILL = """
import os, sys
from step3vl.{module} import {owner}
from step3vl.cli import main
whole = {owner}.{method}
calls = [0]
def dies(*args, **kwargs):
    calls[0] += 1
    if calls[0] == {call}:
        os.kill(os.getpid(), 9)
    return whole(*args, **kwargs)
{owner}.{method} = dies
sys.exit(main(sys.argv[1:]))
"""
PHASES = {
    "rollout": ("generation.sampler", "Sampler", "generate", 3),
    "reward": ("rewards", "Rubric", "__call__", 3),
    "critic": ("stages.rl", "RLStage", "train_critic", 3),
    "update": ("stages.rl", "RLStage", "take_step", 8),
}


def step3vl(*words, program=None, status=0):
    command = [sys.executable, *(["-c", program] if program else ["-m", "step3vl"]), "fit", *words]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == status, done.stderr[-3000:]


def words(folder, *more):
    return [*FIT.split(), SAVES, f"--trainer.default_root_dir={folder}", *more]


def tensors(run):
    source = Pieces(saved_steps(Path(run) / "checkpoints")[0])
    return {name: source.read(name) for name in list(source.keys())}


def curve(run):
    found = {}
    for file in Path(run).glob("csv/version_*/metrics.csv"):
        for row in csv.DictReader(file.open()):
            if row["iteration"]:
                keep = {
                    k: v for k, v in row.items() if v and not k.startswith("seconds") and k not in ("step", "epoch")
                }
                found.setdefault(row["iteration"], []).append(keep)
    return found


def equal(one, two):
    a, b = tensors(one), tensors(two)
    assert a.keys() == b.keys() and any(name.startswith("optimizer/1/") for name in a)
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name
    first, second = curve(one), curve(two)
    assert first.keys() == second.keys()
    for number, rows in second.items():
        for row in rows:
            assert row == first[number][0], number


@pytest.fixture
def shifted(workplace):
    """The small corpus has no shifted digits: plain ones stand for them."""
    data = workplace / "step3vl_data.yaml"
    data.write_text(
        "class_path: step3vl.data.PromptData\ninit_args:\n  root: corpus\n  prompts_per_step: 6\n  num_steps: 9\n"
        "  max_prompt_tokens: 256\n  seed: 0\n  sources:\n"
        "    digits: {shards: train/documents-digits-level0-*.tar, weight: 1}\n"
        "    sums: {shards: train/text-sums-level0-*.tar, weight: 1}\n"
    )
    return workplace


@pytest.mark.parametrize(
    "phase", [pytest.param(name, marks=[pytest.mark.slow] * (name != "update")) for name in PHASES]
)
def test_killed_in_a_phase_and_started_again(shifted, phase):
    module, owner, method, call = PHASES[phase]
    data = "--data=step3vl_data.yaml"
    step3vl(*words("whole", data))
    program = KILL.format(module=module, owner=owner, method=method, call=call)
    step3vl(*words("killed", data), program=program, status=-signal.SIGKILL)
    num_before = len(saved_steps(Path("killed/checkpoints")))
    assert 0 < num_before < 4
    step3vl(*words("killed", data, "--ckpt_path=last"))
    equal("whole", "killed")


@pytest.mark.slow
def test_unfinished_rollouts_go_on_after_a_restart(shifted):
    more = ["--data=step3vl_data.yaml", "--model.partial_tokens=3", "--model.rollout.max_new_tokens=9"]
    step3vl(*words("whole", *more))
    step3vl(*words("parts", *more, "--trainer.max_steps=2"))
    step3vl(*words("parts", *more, "--ckpt_path=last"))
    equal("whole", "parts")
    assert any(float(row["waiting"]) > 0 for rows in curve("whole").values() for row in rows)

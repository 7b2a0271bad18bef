"""Real processes: the trainer is killed while it gives a server its weights, and goes on as if it had not been.

The server is `step3vl serve --exact-seeds`: what it answers is a function of the request's seed and of its weights.
Every run notes what it learnt from, at which step of the policy, and which policy the server had.
"""

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from step3vl.checkpoints import export_model, make_tiny
from step3vl.stages import Refresh
from step3vl.types import Sampling
from step3vl.weights.runs import saved_steps

from .rl_run import distance, fit, sgd, weights
from .test_rl_refresh import Served, policy
from .test_rl_resume import SAVES, curve, equal

pytest.importorskip("openai")
ROOT = Path(__file__).parents[2]
NUM_STEPS = 4
FIT = f"-c {ROOT}/experiments/step3vl_10b/5_rlvr.yaml --scale tiny --trainer.max_steps={NUM_STEPS}"
FIT += " --trainer.precision=32-true --model.critic.warmup_iterations=0 --model.filters=[] --model.group_size=3"
FIT += " --model.rollout.max_new_tokens=8 --trainer.log_every_n_steps=1 --data=data.yaml"
DATA = """
class_path: step3vl.data.PromptData
init_args:
  root: {root}
  prompts_per_step: 4
  num_steps: 9
  max_prompt_tokens: 256
  seed: 0
  sources:
    digits: {{shards: train/documents-digits-level0-*.tar, weight: 1}}
    sums: {{shards: train/text-sums-level0-*.tar, weight: 1}}
"""
PROGRAM = """
import json, os, sys
from step3vl.stages import RLStage
learn = RLStage.learn
def notes(self, rollouts):
    said = [rollout.ids.tolist() for rollout in rollouts]
    asked = [rollout.case.id for rollout in rollouts]
    row = {"process": os.getpid(), "iteration": self.iteration, "step": self.trainer.global_step, "asked": asked,
           "said": said, "served": os.path.basename(self.generator.served())}
    with open(os.path.join(self.trainer.default_root_dir, "used.jsonl"), "a") as file:
        file.write(json.dumps(row) + "\\n")
    return learn(self, rollouts)
RLStage.learn = notes
KILL
from step3vl.cli import main
sys.exit(main(sys.argv[1:]))
"""
KILL = """
import {module} as module
owner = {owner}
whole, calls = owner.{method}, [0]
def dies(*args, **kwargs):
    calls[0] += 1
    if calls[0] < 3:
        return whole(*args, **kwargs)
    if {after}:
        whole(*args, **kwargs)
    os.kill(os.getpid(), 9)
owner.{method} = dies
"""


@dataclass(frozen=True)
class Place:
    """Where the trainer dies in a function's third call, before or after it; and what is there then."""

    module: str
    owner: str
    method: str
    after: bool
    folder: str
    """Of the third refresh."""
    served: str

    @property
    def kill(self):
        return KILL.format(module=self.module, owner=self.owner, method=self.method, after=self.after)


REFRESH, CLIENT, SAVE = "step3vl.stages.rl_refresh", "step3vl.generation.client", "step3vl.callbacks.checkpoints"
PLACES = {
    "folder half written": Place(REFRESH, "module", "save_sharded", True, "policy-00000002.part", "policy-00000001"),
    "server not told": Place(CLIENT, "module.ChatClient", "load_weights", False, "policy-00000002", "policy-00000001"),
    "server told": Place(CLIENT, "module.ChatClient", "load_weights", True, "policy-00000002", "policy-00000002"),
    "step not saved": Place(SAVE, "module.Checkpoints", "save", False, "policy-00000002", "policy-00000002"),
}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """What the run begins from, in the layout of `step3vl export`."""
    folder = tmp_path_factory.mktemp("start")
    make_tiny("step3vl", folder / "made")
    export_model(folder / "made", folder / "policy", "fp32")
    return folder / "policy"


@pytest.fixture(scope="module")
def server(start, tmp_path_factory):
    server = Served(start, tmp_path_factory.mktemp("policies"))
    server.words.append("--exact-seeds")
    yield server.start()
    server.kill()


@pytest.fixture(scope="module")
def run(start, server, small_corpus, tmp_path_factory):
    """A function that runs the command in one folder for all tests."""
    place = tmp_path_factory.mktemp("runs")
    (place / "data.yaml").write_text(DATA.format(root=small_corpus))

    def run(name, *more, kill="", status=0):
        client = {"url": f"http://127.0.0.1:{server.port}/v1", "model": "m", "tell_tokens": True, "max_concurrent": 4}
        refresh = {"like": str(start), "folder": str(server.folder / name)}
        words = [*FIT.split(), SAVES, f"--trainer.default_root_dir={name}", f"--model.init_from={start}"]
        for key, path, settings in (
            ("generator", "step3vl.generation.client.ChatClient", client),
            ("refresh", "step3vl.stages.Refresh", refresh),
        ):
            words.append(f"--model.{key}={json.dumps({'class_path': path, 'init_args': settings})}")
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM.replace("KILL", kill), "fit", *words, *more],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            cwd=place,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == status, done.stderr[-3000:]
        return place / name

    return run


@pytest.fixture(scope="module")
def whole(run):
    """A run that nothing happened to."""
    return run("whole")


def used(folder, *keys):
    rows = [json.loads(line) for line in (folder / "used.jsonl").read_text().splitlines()]
    return [tuple(row[key] for key in keys) for row in rows]


@pytest.mark.parametrize("place", [pytest.param(name, marks=pytest.mark.slow) for name in PLACES])
def test_killed_in_a_weight_sync_and_started_again(run, whole, server, place):
    name, where = place.replace(" ", "-"), PLACES[place]
    folder = run(name, kill=where.kill, status=-signal.SIGKILL)
    assert [path.name for path in saved_steps(folder / "checkpoints")] == ["step-00000002", "step-00000001"]
    assert (server.folder / name / where.folder).is_dir()
    assert server.client().served() == str(server.folder / name / where.served)
    if place == "server not told":  # it dies too, and comes back with the weights that it was started from
        server.kill()
        server.start()
    run(name, "--ckpt_path=last")
    equal(whole, folder)
    left = sorted(path.name for path in (server.folder / name).iterdir())
    assert left == ["policy-00000003", "policy-00000004"]
    # every iteration was learnt from once, but for what was lost with its step: it is made again, and is the same
    lost = [2] if place == "step not saved" else []
    assert used(folder, "iteration") == [(k,) for k in [0, 1, *lost, 2, 3]]
    assert len(set(used(folder, "process"))) == 2
    wanted = used(whole, "iteration", "step", "asked", "said", "served")
    assert used(folder, "iteration", "step", "asked", "said", "served") == [wanted[k] for k in [0, 1, *lost, 2, 3]]


@pytest.mark.slow
def test_an_uninterrupted_run_learns_from_fresh_rollouts_alone(whole):
    """Each iteration has responses of its own, drawn from the policy of the step before; they do move the weights."""
    rows = used(whole, "iteration", "step", "served")
    assert rows == [(k, k, f"policy-{k:08d}") for k in range(NUM_STEPS)]
    said = [json.dumps(ids) for (ids,) in used(whole, "said")]
    assert len(set(said)) == NUM_STEPS
    log = [row[0] for row in curve(whole).values()]
    assert all(abs(float(row["engine_mismatch"])) < 1e-4 and float(row["grad_norm"]) > 0 for row in log)


# ------------------------------------------------------------------------------------------------ staleness


@pytest.mark.parametrize(("every_n_steps", "num_minibatches"), [(2, 1), (3, 2)])
def test_responses_are_never_staler_than_the_setting(
    start, server, small_corpus, tmp_path, every_n_steps, num_minibatches
):
    """Steps of the policy since the one that answered: below `every_n_steps`, before and after a restart."""
    found = []

    class Noted:
        def __init__(self, inner):
            self.inner, self.served, self.load_weights = inner, inner.served, inner.load_weights

        def generate(self, prompts, sampling, n=1):
            answered_by = int(Path(self.served()).name.removeprefix("policy-"))
            found.append((stage.trainer.global_step, answered_by))
            return self.inner.generate(prompts, sampling, n)

    place = server.folder / f"every-{every_n_steps}-{num_minibatches}"

    def staged():
        refresh = Refresh(str(start), str(place), every_n_steps)
        changes = {"refresh": refresh, "num_minibatches": num_minibatches, "optimizer": sgd(0.1)}
        made = policy(start, server, place, rollout=Sampling(max_new_tokens=4, temperature=1.0), **changes)
        made.generator = Noted(made.generator)
        return made

    num_steps = 3 * num_minibatches
    stage = staged()
    fit(stage, small_corpus, num_steps=num_steps, prompts=2)
    stage.trainer.save_checkpoint(tmp_path / "last.ckpt")
    before, saved = list(found), weights(stage.vlm)
    stage = staged()
    fit(stage, small_corpus, num_steps=2 * num_steps, prompts=2, ckpt_path=tmp_path / "last.ckpt")
    assert distance(saved, weights(stage.vlm)) > 0
    assert [step for step, _ in found] == list(range(0, 2 * num_steps, num_minibatches))
    stale = [step - answered_by for step, answered_by in found]
    assert min(stale) == 0 and max(stale) == (every_n_steps - 1) // num_minibatches * num_minibatches
    assert found[len(before)] == (num_steps, num_steps)  # a run that goes on begins with its own policy


def test_what_a_kill_left_of_a_folder_is_no_hindrance(start, server, tmp_path):
    """Also where it died between the last file and the folder's name, or while it removed an older rest."""
    folder = server.folder / "rests"
    for name in ("policy-00000000.part", "policy-00000007.part", "policy-00000000"):
        (folder / name).mkdir(parents=True)
        (folder / name / "model.safetensors").write_bytes(b"half of it")
    stage = policy(start, server, folder)
    stage.refresh.push(stage.vlm, stage.generator, 0)
    assert [path.name for path in folder.iterdir()] == ["policy-00000000"]
    assert stage.generator.served() == str(stage.refresh.place)

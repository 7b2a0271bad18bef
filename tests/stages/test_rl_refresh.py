"""A real tiny checkpoint: exported, served by `step3vl serve` in a child process, learnt from through the client."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from dataclasses import replace

import pytest
from lightning.pytorch import seed_everything

from step3vl.checkpoints import export_model, make_tiny, open_model
from step3vl.generation.client import ChatClient
from step3vl.generation.sampler import Sampler
from step3vl.pacore import estimated
from step3vl.rewards import Rubric, Weighted
from step3vl.rl import GroupRelative
from step3vl.serving import Batcher, ChatServer, Plain
from step3vl.stages import Refresh, RLStage
from step3vl.types import Message, Prompt, Sampling

from .rl_run import Scripted, build, distance, fit, sgd, weights

pytest.importorskip("openai")
GREEDY = Sampling(max_new_tokens=8, temperature=0.0)
QUESTIONS = [Prompt(messages=[Message(role="user", content=text)]) for text in ("3 + 4 =", "Count to five.", "Why?")]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A tiny model in the released layout, written by `step3vl export`, in fp32: what is served is what is trained."""
    folder = tmp_path_factory.mktemp("served")
    make_tiny("step3vl", folder / "made")
    export_model(folder / "made", folder / "policy", "fp32")
    return folder / "policy"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Served:
    """`step3vl serve` in a child process, on one port for all its lives."""

    def __init__(self, model, folder):
        self.port, self.folder = free_port(), folder
        self.words = [str(model), "--name=m", "--quiet", "--batch=8", "--scale=tiny", f"--port={self.port}"]
        self.words += [f"--weights-from={folder}", "--max-new-tokens=16"]
        self.process = None

    def start(self):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "step3vl", "serve", *self.words],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        line = self.process.stdout.readline()
        assert line.startswith("serving "), line + self.process.stdout.read()
        return self

    def kill(self):
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process.stdout.close()

    def client(self, **more):
        settings = {"num_retries": 12, "timeout_s": 60.0, "max_concurrent": 8, "tell_tokens": True, **more}
        return ChatClient(f"http://127.0.0.1:{self.port}/v1", "m", **settings)


@pytest.fixture(scope="module")
def served(exported, tmp_path_factory):
    """Lives through all tests but the last one, with a death in between."""
    server = Served(exported, tmp_path_factory.mktemp("policies")).start()
    yield server
    server.kill()


class Even:
    """Share of a response's tokens that have an even id: every response earns something, and not the same."""

    name, bounds = "even", (0.0, 1.0)

    def __call__(self, rollouts):
        found = [r.completion.token_ids for r in rollouts]
        return [sum(id % 2 == 0 for id in ids) / len(ids) if ids else None for ids in found]


def policy(exported, server, folder, **changes):
    """An RLStage around the exported model; no critic, plain SGD with large steps so that answers change."""
    seed_everything(1, verbose=False)
    vlm, processor = open_model(exported)
    stage = RLStage(
        **{
            "vlm": vlm,
            "processor": processor,
            "optimizer": sgd(3.0),
            "rubric": Rubric({"otherwise": {"even": Weighted(reward=Even())}}, truncated="score"),
            "rollout": Sampling(max_new_tokens=6, temperature=1.0),
            "group_size": 4,
            "advantage": GroupRelative(),
            "objective": build(scripted=False, critic=None).objective,
            "pack_tokens": 512,
            "max_grad_norm": 1e9,
            "generator": server.client(),
            "refresh": Refresh(str(exported), str(folder)),
            **changes,
        }
    )
    return stage


def texts(generator, sampling=GREEDY):
    return [(one.text, one.token_ids) for (one,) in generator.generate(QUESTIONS, sampling)]


def test_after_a_refresh_the_server_answers_as_the_policy(exported, served, small_corpus):
    """Trained for three steps, the policy has moved; the server's greedy answers and log-probabilities follow it."""
    stage = policy(exported, served, served.folder / "run")
    before, start = texts(stage.generator), weights(stage.vlm)
    fit(stage, small_corpus, num_steps=3)
    assert stage.trainer.global_step == 3 and stage.trainer.callback_metrics["failed"] == 0
    assert distance(start, weights(stage.vlm)) > 1e-3
    assert abs(float(stage.trainer.callback_metrics["engine_mismatch"])) < 1e-4
    assert abs(float(stage.trainer.callback_metrics["engine_kl"])) < 1e-4
    assert stage.refresh.num_told == 4 and stage.generator.served() == str(stage.refresh.place)
    after = texts(stage.generator)
    assert after == texts(Sampler(stage.vlm, stage.processor)) and after != before
    kept = sorted(path.name for path in (served.folder / "run").iterdir())
    assert kept == ["policy-00000002", "policy-00000003"]
    again, _ = open_model(stage.refresh.place)  # a whole exported folder, with its tokenizer and configuration
    assert distance(weights(again), weights(stage.vlm)) == 0.0


def test_without_a_refresh_the_mismatch_grows(exported, served, small_corpus):
    """The statistic is not blind: a server that keeps its weights falls behind the policy."""
    stage = policy(exported, served, served.folder / "stale")
    stage.refresh.push(stage.vlm, stage.generator, 0)
    stage.refresh = None
    fit(stage, small_corpus, num_steps=3)
    assert float(stage.trainer.callback_metrics["engine_mismatch"]) > 1e-3


class Killing:
    """A generator that kills the server when a number of calls have begun, and starts it again, or does not."""

    def __init__(self, inner, server, call, returns):
        self.inner, self.server, self.call, self.returns, self.num_calls = inner, server, call, returns, 0
        self.served, self.load_weights = inner.served, inner.load_weights

    def generate(self, prompts, sampling, n=1):
        self.num_calls += 1
        if self.num_calls != self.call:
            return self.inner.generate(prompts, sampling, n)

        def strike():
            time.sleep(0.15)
            self.server.kill()
            if self.returns:
                self.server.start()

        thread = threading.Thread(target=strike)
        thread.start()
        try:
            return self.inner.generate(prompts, sampling, n)
        finally:
            thread.join()


def test_a_server_killed_in_an_iteration_and_started_again_is_given_the_policy_again(exported, served, small_corpus):
    """It comes back with the weights it was started from: the iteration's responses are asked for once more."""
    stage = policy(exported, served, served.folder / "killed")
    stage.generator = killing = Killing(served.client(num_retries=30), served, call=2, returns=True)
    fit(stage, small_corpus, num_steps=2)
    assert stage.trainer.global_step == 2 and killing.num_calls == 3  # the second was asked twice
    assert stage.trainer.callback_metrics["failed"] == 0
    assert abs(float(stage.trainer.callback_metrics["engine_mismatch"])) < 1e-4
    assert texts(served.client()) == texts(Sampler(stage.vlm, stage.processor))


# ------------------------------------------------------------------------------------------------ refusals


def post(server, body, path="/update_weights_from_disk"):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    address = f"http://127.0.0.1:{server.port}{path}"
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())["error"]["message"]


@pytest.mark.parametrize(
    "body, status, said",
    [
        (b"{", 400, "not JSON"),
        ([1], 400, "model_path"),
        ({"model_path": 3}, 400, "model_path"),
        ({"model_path": "x\0y"}, 400, "model_path"),
        ({"model_path": "/etc"}, 403, "alone (--weights-from)"),
        ({"model_path": "IN/../../.."}, 403, "alone (--weights-from)"),
        ({"model_path": "IN/nothing"}, 400, "stay those of"),
        ({"model_path": "IN", "why": 1}, 400, "unknown field 'why'"),
    ],
)
def test_a_wrong_update_is_refused_and_the_weights_stay(served, body, status, said):
    before = texts(served.client())
    if isinstance(body, dict) and isinstance(body.get("model_path"), str):
        body = {**body, "model_path": body["model_path"].replace("IN", str(served.folder))}
    code, sentence = post(served, body)
    assert code == status and said in sentence
    assert texts(served.client()) == before


def test_a_model_of_another_size_is_refused_and_the_weights_stay(exported, served):
    from safetensors.torch import load_file, save_file

    before, other = texts(served.client()), served.folder / "other"
    other.mkdir()
    tensors = load_file(next(exported.glob("*.safetensors")))
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-8].contiguous()
    save_file(tensors, other / "model.safetensors")
    (other / "config.json").write_text((exported / "config.json").read_text())
    with pytest.raises(ValueError, match=r"did not take the weights .* \(400\): .*stay those of"):
        served.client().load_weights(other)
    assert texts(served.client()) == before


def test_a_server_that_keeps_its_weights_gets_one_sentence(exported, small_corpus, tmp_path):
    stage = policy(exported, Served(exported, tmp_path), tmp_path / "run")
    server = ChatServer(("127.0.0.1", 0), Batcher({"m": Plain(Scripted(stage.processor), estimated())}), GREEDY)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    stage.generator = ChatClient(f"http://127.0.0.1:{server.server_port}/v1", "m", num_retries=0)
    start = weights(stage.vlm)
    try:
        with pytest.raises(ValueError, match=r"\(403\): .*start it with --weights-from FOLDER"):
            fit(stage, small_corpus, num_steps=2)
    finally:
        server.shutdown()
        server.server_close()
    assert distance(start, weights(stage.vlm)) == 0.0


def test_a_server_without_the_endpoint_gets_one_sentence():
    from http.server import BaseHTTPRequestHandler, HTTPServer

    class Other(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_error(404)

        def do_GET(self):
            self.send_error(404)

        def log_message(self, *words):
            pass

    server = HTTPServer(("127.0.0.1", 0), Other)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    client = ChatClient(f"http://127.0.0.1:{server.server_port}/v1", "m", num_retries=0)
    try:
        with pytest.raises(
            ValueError, match="has no /update_weights_from_disk, so that its weights cannot be refreshed"
        ):
            client.load_weights("x")
        assert client.served() is None
    finally:
        server.shutdown()
        server.server_close()


def test_what_cannot_be_refreshed_is_refused_before_the_first_step(exported, tmp_path):
    with pytest.raises(ValueError, match=r"model.refresh.like is .*, which is no folder"):
        Refresh(str(tmp_path / "nothing"), str(tmp_path))
    with pytest.raises(ValueError, match="every_n_steps is 0"):
        Refresh(str(exported), str(tmp_path), 0)
    with pytest.raises(ValueError, match=r"model.refresh needs a model.generator whose weights can be exchanged"):
        policy(exported, Served(exported, tmp_path), tmp_path, generator=None)
    begun = replace(QUESTIONS[0], begun_ids=[5])
    with pytest.raises(ValueError, match="partial_tokens must be null"):
        Served(exported, tmp_path).client().generate([begun], GREEDY)


def test_updates_wait_for_calls_and_calls_for_updates():
    """While weights are exchanged no call to the model runs; what comes meanwhile is answered after it."""
    from step3vl.serving.batching import Job

    running, log = threading.Event(), []

    class Slow:
        def generate(self, prompts, sampling, n=1):
            log.append("call begins")
            running.set()
            time.sleep(0.1)
            log.append("call ends")
            return Scripted(build(scripted=False, critic=None).processor).generate(prompts, sampling, n)

    batcher = Batcher({"m": Plain(Slow(), estimated())}, wait_s=0.0)

    def update():
        log.append("update begins")
        time.sleep(0.1)
        log.append("update ends")

    first = batcher.submit(Job(model="m", prompt=QUESTIONS[0], sampling=GREEDY))
    assert running.wait(5)
    thread = threading.Thread(target=batcher.alone, args=(update,))
    thread.start()
    while "update begins" not in log:
        time.sleep(0.005)
    second = batcher.submit(Job(model="m", prompt=QUESTIONS[1], sampling=GREEDY))
    thread.join(5)
    assert first.events.get(timeout=10) and second.events.get(timeout=10)
    one = ["call begins", "call ends"]
    assert log == [*one, "update begins", "update ends", *one]
    batcher.close()
    assert batcher.join(5)


def test_a_server_that_stays_away_ends_the_run_with_one_sentence_and_a_whole_policy(exported, served, small_corpus):
    """The last test of this file: the server does not come back."""
    folder = served.folder / "gone"
    stage = policy(exported, served, folder)
    stage.generator = Killing(served.client(num_retries=1, timeout_s=5.0), served, call=2, returns=False)
    with pytest.raises(ValueError, match=r"^step 1: the server at http://127.* cannot be reached for the weights"):
        fit(stage, small_corpus, num_steps=5)
    assert stage.trainer.global_step == 1  # the step before stands, nothing of the second was learnt
    saved, _ = open_model(folder / "policy-00000001")
    assert distance(weights(saved), weights(stage.vlm)) == 0.0

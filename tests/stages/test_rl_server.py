"""Rollouts from a real server on loopback, through the client: learnt from while it lives, and nothing learnt after."""

import threading

import pytest

from step3vl.generation.client import ChatClient
from step3vl.pacore import estimated
from step3vl.rl import GroupRelative
from step3vl.serving import Batcher, ChatServer, Plain
from step3vl.types import Sampling

from .rl_run import Scripted, build, distance, fit, weights

pytest.importorskip("openai")


class Dying(Scripted):
    """Answers some prompts, then takes its server down."""

    lives = 10**9
    stop = staticmethod(lambda: None)

    def say(self, prompt, k, sampling):
        return super().say(prompt, sampling.seed, sampling)  # every request asks for one answer

    def generate(self, prompts, sampling, n=1):
        found = super().generate(prompts, sampling, n)
        if self.num_asked > self.lives:
            threading.Thread(target=self.stop, daemon=True).start()
            raise RuntimeError("the server is going down")
        return found


@pytest.fixture
def served():
    stage = build(scripted=False, critic=None, advantage=GroupRelative())
    model = Dying(stage.processor)
    sampling = Sampling(max_new_tokens=8, temperature=1.0)
    server = ChatServer(("127.0.0.1", 0), Batcher({"m": Plain(model, estimated())}), sampling)

    def stop():
        server.shutdown()
        server.server_close()

    model.stop = stop
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}/v1"
    stage.generator = ChatClient(address, "m", num_retries=1, timeout_s=5.0, max_concurrent=8)
    yield stage, model
    stop()
    thread.join(5)


def test_a_served_policy_is_learnt_from(served, small_corpus):
    stage, model = served
    start = weights(stage.vlm)
    fit(stage, small_corpus, num_steps=2)
    assert stage.trainer.global_step == 2 and model.num_asked >= 2 * 6 * 4
    assert stage.trainer.callback_metrics["failed"] == 0
    assert distance(start, weights(stage.vlm)) > 1e-4
    rollouts = [rollout for group in stage.groups for rollout in group]
    assert all(
        rollout.ids[-1] == stage.processor.turn_end_id and rollout.engine_logp.isnan().all() for rollout in rollouts
    )


def test_a_server_that_dies_in_an_iteration_leaves_the_policy_whole(served, small_corpus):
    """What it answered before is learnt from; then the run ends with one sentence."""
    stage, model = served
    model.lives = 30
    with pytest.raises(ValueError, match=r"all 24 responses failed, the first with: .*nothing was learnt"):
        fit(stage, small_corpus, num_steps=50)
    assert stage.trainer.global_step <= 2
    assert stage.generator.num_failures > 0
    assert all(bool(p.isfinite().all()) for p in stage.vlm.parameters())

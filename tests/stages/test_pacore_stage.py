"""What PaCoRe training watches, on scripted answers; its runs, and that a run goes on exactly in the middle."""

import json
import random

import pytest
import torch
from lightning.pytorch import Trainer

from step3vl.data import Processor
from step3vl.evaluation.scorers import score_answer
from step3vl.pacore.pool_data import PoolData, PoolSource
from step3vl.stages import PaCoReStage
from step3vl.stages.pacore import bucket
from step3vl.types import Completion
from tests.pacore.test_pool_data import pool
from tests.stages.rl_run import SOURCES, build, distance, weights
from tests.stages.rl_run import fit as fit_prompts


class Reader:
    """Says the gold answer to every other question and otherwise nonsense, once with cross-checking words."""

    def __init__(self, processor: Processor, golds):
        self.processor, self.golds = processor, golds

    def generate(self, prompts, sampling, n=1):
        return [[self.say(prompt, k) for k in range(n)] for prompt in prompts]

    def say(self, prompt, k):
        text = self.golds[prompt.messages[-1].content] if k % 2 else "the reference and ref 3"
        ids = [*self.processor.tokenizer.text(text), self.processor.turn_end_id]
        return Completion(text=text, token_ids=ids, truncated=False, num_tokens=len(ids), logprobs=[-1.0] * len(ids))


def pacore_stage(scripted=True, **changes):
    """The small stage of the other tests as PaCoReStage."""
    stage = build(scripted=scripted, **changes)
    stage.__class__ = PaCoReStage
    return stage


def data(folder, processor, num_steps=4, low="-1", high="2", prompts=4):
    made = PoolData(
        str(folder), {"d": PoolSource(pool="pool.jsonl", low=low, high=high)}, prompts, num_steps, 400, 3, 5, "short"
    )
    made.connect(processor)
    return made


def fit(stage, folder, num_steps=2, **more):
    ckpt = more.pop("ckpt_path", None)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        max_steps=num_steps,
        max_epochs=-1,
        use_distributed_sampler=False,
        **more,
    )
    trainer.fit(stage, data(folder, stage.processor, num_steps=9), ckpt_path=ckpt)
    return trainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory, small_corpus):
    made = tmp_path_factory.mktemp("pools")
    pool(made, small_corpus)
    return made


def test_the_stage_watches_what_the_messages_and_the_answers_say(folder):
    stage = pacore_stage()
    made = data(folder, stage.processor)
    made.setup("fit")
    batches = [next(iter(made.train_dataloader()))]
    golds = {s.asked.messages[-1].content: s.answer for batch in batches for s in batch.samples}
    (batch,) = batches
    stage.groups = stage.collector.collect(batch, Reader(stage.processor, golds), 0)
    stage.watch({})
    found = stage.tally.total()
    accuracy = [[m.score for m in s.shown] for s in batch.samples]
    means = [sum(own) / len(own) for own in accuracy]
    assert found["synthesis/score"] == 0.5  # two of four responses each
    assert found["synthesis/messages"] == pytest.approx(sum(means) / len(means))
    assert found["synthesis/gain"] == pytest.approx(0.5 - sum(means) / len(means))
    assert found["synthesis/num_messages"] == sum(map(len, accuracy)) / len(accuracy)
    assert found["synthesis/cross_checks"] == 1.0  # two words in every other response
    none, every = sum(not any(own) for own in accuracy), sum(all(own) for own in accuracy)
    assert found["prompts/none_right"] == none / 4 and found["prompts/all_right"] == every / 4
    assert ("synthesis/emergent" in found) == bool(none) and ("synthesis/kept" in found) == bool(every)
    assert sum(v for k, v in found.items() if k.startswith("prompts/")) == pytest.approx(1.0)
    assert all(found.get(name, 0.5) == 0.5 for name in ("synthesis/emergent", "synthesis/kept"))
    votes = []
    for sample in batch.samples:
        texts = [m.text for m in sample.shown]
        best = max(dict.fromkeys(texts), key=texts.count)
        votes.append(score_answer(best, next(g[0].case for g in stage.groups if g[0].case.id == sample.id)))
    assert found["synthesis/voted"] == sum(votes) / len(votes)
    for group in stage.groups:  # rewards judge the problem, the model is asked with messages
        assert (
            "\nRefs\n" in group[0].prompt.messages[-1].content
            and "\nRefs\n" not in group[0].case.prompt.messages[-1].content
        )
        expected = group[0].sample.asked
        assert group[0].prompt == expected


def test_buckets_of_message_accuracy():
    names = [bucket(k, 8) for k in range(9)]
    assert names == [
        "none_right",
        "below_25",
        "below_50",
        "below_50",
        "below_75",
        "below_75",
        "below_100",
        "below_100",
        "all_right",
    ]


def test_prompts_without_messages_are_refused(small_corpus):
    with pytest.raises(ValueError, match="this stage needs data of the class PoolData"):
        fit_prompts(pacore_stage(), small_corpus, 1, sources=SOURCES)


def test_two_steps_train_policy_and_critic_with_images(folder):
    stage = pacore_stage(scripted=False)
    before, critic = weights(stage.vlm), weights(stage.critic)
    trainer = fit(stage, folder, 2)
    logged = trainer.callback_metrics
    assert stage.iteration == 2 and {"synthesis/score", "synthesis/gain", "synthesis/voted", "reward"} <= logged.keys()
    assert distance(before, weights(stage.vlm)) > 0 and distance(critic, weights(stage.critic)) > 0
    assert any(rollout.example.views for group in stage.groups for rollout in group)


@pytest.mark.parametrize("partial", [None, 2])
def test_a_run_goes_on_exactly_in_the_middle(folder, tmp_path, partial):
    def run(num_steps, **more):
        stage = pacore_stage(partial_tokens=partial)
        torch.manual_seed(3)
        random.seed(3)
        trainer = fit(stage, folder, num_steps, **more)
        return stage, trainer

    whole, _ = run(4)
    half, trainer = run(2)
    if partial:
        assert half.collector.waiting, "nothing waits: the test says nothing of partial rollouts"
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    rest, _ = run(4, ckpt_path=str(tmp_path / "half.ckpt"))
    assert rest.iteration == whole.iteration >= 4
    assert distance(weights(whole.vlm), weights(rest.vlm)) == 0.0
    asked = [[g[0].prompt.messages[-1].content for g in stage.groups] for stage in (whole, rest)]
    assert asked[0] == asked[1] and asked[0]
    assert json.dumps(whole.collector.state_dict()) == json.dumps(rest.collector.state_dict())

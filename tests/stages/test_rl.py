"""The RL stage: what must not change its result, what must, and what it does when rollouts or rewards fail."""

from dataclasses import replace

import pytest
import torch

from step3vl.losses.policy import GSPO, SAPO, PPOClip, Reinforce
from step3vl.losses.policy_engine import EngineCorrection
from step3vl.rewards import Rubric, Weighted
from step3vl.rl import GAE, GroupRelative, LeaveOneOut
from step3vl.rl.filters import SameReward
from step3vl.types import Sampling

from .rl_run import Scripted, build, critic, distance, fit, rubric, weights


def after(corpus, num_steps=1, prompts=6, **changes):
    stage = fit(build(**changes), corpus, num_steps, prompts)
    return weights(stage.vlm), weights(stage.critic) if stage.critic else {}


def test_how_rollouts_are_packed_changes_nothing(small_corpus):
    """Prompts shared or not, packs small or large: policy and critic take the same step."""
    policy, values = after(small_corpus)
    start = weights(build().vlm)
    assert distance(policy, start) > 1e-3
    for changes in (dict(share_prompts=False), dict(pack_tokens=128), dict(pack_tokens=128, share_prompts=False)):
        other_policy, other_values = after(small_corpus, **changes)
        assert distance(policy, other_policy) < 2e-6, changes
        assert distance(values, other_values) < 2e-6, changes


@pytest.mark.parametrize(
    "objective",
    [
        GSPO(),
        SAPO(),
        PPOClip(aggregation="seq-mean-token-mean"),
        Reinforce(correction=EngineCorrection(cap=8.0)),
        PPOClip(kl_coef=0.1),
    ],
    ids=["gspo", "sapo", "ppo-seq", "reinforce-tis", "ppo-kl"],
)
def test_objectives_run_without_a_critic(small_corpus, objective):
    changes = dict(objective=objective, advantage=GroupRelative(), critic=None, num_minibatches=2)
    one, _ = after(small_corpus, 4, **changes)
    two, _ = after(small_corpus, 4, pack_tokens=128, **changes)
    assert distance(one, two) < 1e-5
    assert distance(one, weights(build(**changes).vlm)) > 1e-4


def test_advantages_differ(small_corpus):
    found = [after(small_corpus, advantage=a, critic=None)[0] for a in (GroupRelative(), LeaveOneOut())]
    assert distance(*found) > 1e-4


def test_mini_batches_count_as_steps_and_the_critics_do_not(small_corpus):
    stage = fit(build(num_minibatches=3, critic=critic(num_minibatches=4)), small_corpus, num_steps=6)
    assert stage.trainer.global_step == 6 and stage.iteration == 2


def test_a_critic_that_warms_up_leaves_the_policy_alone(small_corpus):
    stage = build(critic=critic(warmup_iterations=2))
    seen = []

    def note(trainer, module, *rest):
        seen.append((trainer.global_step, weights(module.vlm), weights(module.critic)))

    from lightning.pytorch.callbacks import LambdaCallback

    fit(stage, small_corpus, num_steps=1, callbacks=[LambdaCallback(on_train_batch_end=note)])
    assert [step for step, _, _ in seen] == [0, 0, 1]
    assert distance(seen[0][1], seen[1][1]) == 0 and distance(seen[1][1], seen[2][1]) > 1e-4
    assert distance(seen[0][2], seen[1][2]) > 0


def test_the_critic_starts_as_the_policy_with_a_head_of_its_own(small_corpus):
    stage = build(critic=critic(lr=0.0), optimizer=lambda groups: torch.optim.SGD(groups, lr=0.0))
    fit(stage, small_corpus, num_steps=1)
    own, other = weights(stage.vlm), weights(stage.critic.vlm)
    assert own.keys() == other.keys()
    assert {n for n in own if own[n].shape != other[n].shape} == {"decoder.lm_head.weight"}
    assert all(torch.equal(own[n], other[n]) for n in own if n != "decoder.lm_head.weight")
    assert not any(a is b for a, b in zip(stage.vlm.parameters(), stage.critic.parameters()))


class Negated(Rubric):
    """Gives what the rubric gives, with the other sign."""

    def __call__(self, rollouts):
        return [replace(s, total=None if s.total is None else -s.total) for s in super().__call__(rollouts)]


def test_a_negated_reward_turns_the_step_round(small_corpus):
    """Without a critic advantages are odd in the reward, so a step of SGD goes the other way."""
    start = weights(build().vlm)
    changes = dict(critic=None, advantage=GroupRelative())
    plus, _ = after(small_corpus, **changes)
    minus, _ = after(small_corpus, rubric=Negated(rubric().answers), **changes)
    moved = {n: plus[n] - start[n] for n in start}
    assert distance(moved, {n: start[n] - minus[n] for n in start}) < 1e-5
    assert max(float(d.abs().max()) for d in moved.values()) > 1e-4


class Zero:
    """An advantage that says nothing."""

    def __call__(self, scored, reduce=None):
        from step3vl.rl import Advantages

        return Advantages(torch.zeros(len(scored.sequence)))


def test_a_zeroed_advantage_teaches_nothing(small_corpus):
    assert distance(after(small_corpus, critic=None, advantage=Zero())[0], weights(build().vlm)) == 0


def test_gae_without_a_critic_is_refused(small_corpus):
    with pytest.raises(ValueError, match="GAE needs values, so a critic; GroupRelative does without"):
        fit(build(critic=None, advantage=GAE()), small_corpus, 1)


def test_log_probabilities_of_our_sampler_are_those_of_a_forward(small_corpus):
    stage = build(scripted=False)
    fit(stage, small_corpus, 1)  # its groups come from the weights before the step
    fresh = build(scripted=False)
    fit(fresh, small_corpus, 1)
    stage = build(scripted=False, optimizer=lambda groups: torch.optim.SGD(groups, lr=0.0))
    fit(stage, small_corpus, 1)
    from step3vl.rl.rollout import packs

    rollouts = [r for group in stage.groups for r in group]
    for pack in packs(rollouts, 512, stage.processor.pad_id):
        logp, entropy = stage.logprobs(stage.vlm, pack)
        assert (logp - pack.gather("engine_logp")).abs().max() < 1e-4
        assert (entropy > 0).all()


def test_unjudged_and_failed_rollouts_teach_nothing_and_are_counted(small_corpus):
    class Failing(Scripted):
        def say(self, prompt, k, sampling):
            said = super().say(prompt, k, sampling)
            said.error = "TimeoutError: the server" if k == 1 else None
            return replace(said, text="", token_ids=[], logprobs=[]) if k == 1 else said

    class Unsure:
        name, bounds = "unsure", (0.0, 1.0)

        def __call__(self, rollouts):
            return [None if len(r.text) == 3 else float(len(r.text)) / 10 for r in rollouts]

    stage = build(rubric=Rubric({"otherwise": {"unsure": Weighted(reward=Unsure())}}), critic=None)
    stage.advantage = GroupRelative()
    stage.generator = Failing(stage.processor)
    fit(stage, small_corpus, 1)
    outcomes = [r.score.outcome for group in stage.groups for r in group]
    assert outcomes.count("error") == len(stage.groups) and outcomes.count("unjudged") > 0
    metrics = stage.trainer.callback_metrics
    assert metrics["failed"] == pytest.approx(0.25)
    assert metrics["unjudged"] == pytest.approx(outcomes.count("unjudged") / len(outcomes))
    used = {id(r) for group in stage.groups for r in group if r.advantages is not None}
    judged = {id(r) for group in stage.groups for r in group if r.score.total is not None}
    assert used == judged


def test_groups_of_equal_rewards_are_left_out(small_corpus):
    stage = fit(build(filters=[SameReward()], critic=None, advantage=GroupRelative()), small_corpus, 1, prompts=12)
    equal = [g for g in stage.groups if len({r.score.total for r in g}) == 1]
    assert equal and stage.trainer.callback_metrics["dropped/same_reward"] == pytest.approx(len(equal) / 12)
    assert all(r.advantages is None for g in equal for r in g)


def test_a_run_with_nothing_to_learn_from_ends(small_corpus):
    stage = build(critic=None, advantage=GroupRelative(), filters=[SameReward()])
    stage.generator = Scripted(stage.processor, texts=("same",))
    with pytest.raises(ValueError, match="20 iterations in a row gave nothing to learn from"):
        fit(stage, small_corpus, 1)
    assert stage.trainer.global_step == 0


def test_partial_rollouts_wait_and_become_the_whole_ones(small_corpus):
    whole = build(critic=None, advantage=GroupRelative())
    fit(whole, small_corpus, 1)
    stage = build(critic=None, advantage=GroupRelative(), partial_tokens=2)
    fit(stage, small_corpus, 3)
    texts = {r.case.id: r.completion.text for group in whole.groups for r in group}
    assert any(len(r.ids) > 2 for g in stage.groups for r in g)
    for group in stage.groups:
        assert not any(r.completion.truncated for r in group)
    waits = [group.num_waits for group in stage.collector.waiting]
    assert all(1 <= w <= 3 for w in waits)  # 6 tokens in stretches of 2
    assert texts


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (dict(group_size=0), "model.group_size is 0; accepted is 1 or more"),
        (dict(rollout=Sampling(max_new_tokens=4)), "model.rollout.temperature is 0.0; accepted is above 0"),
        (dict(partial_tokens=99), "model.partial_tokens is 99; accepted is 1 to model.rollout.max_new_tokens, 6"),
        (dict(num_minibatches=0), "model.num_minibatches must be at least 1, got 0"),
    ],
)
def test_wrong_settings(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        build(**changes)


def test_a_pack_that_is_too_small(small_corpus):
    with pytest.raises(ValueError, match=r"tokens and model.pack_tokens is 16; raise it"):
        fit(build(pack_tokens=16), small_corpus, 1)

"""Policy objectives against loops over tokens in fp64, against TRL, and against what must not change them."""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from jsonargparse import ArgumentParser

from step3vl.losses.policy import (
    CISPO,
    DAPO,
    GRPO,
    GSPO,
    SAPO,
    DrGRPO,
    Objective,
    PolicyObjective,
    PPOClip,
    Reinforce,
)
from step3vl.losses.policy_aggregate import Totals, aggregate
from step3vl.losses.policy_engine import EngineCorrection
from step3vl.losses.policy_kl import entropy_from_logits, kl_estimate
from step3vl.losses.policy_statistics import policy_statistics
from step3vl.losses.policy_tokens import PolicyTokens

LENGTHS = (5, 1, 9, 3, 1, 7)
TIS = EngineCorrection(cap=1.3)
OBJECTIVES = {
    "ppo": PPOClip(),
    "ppo-dual": PPOClip(dual_clip=1.5),
    "ppo-product": PPOClip(ratio_level="sequence-product", aggregation="seq-mean-token-mean"),
    "grpo": GRPO(kl_coef=0.1),
    "dr-grpo": DrGRPO(max_length=20),
    "sum": PPOClip(aggregation="seq-mean-token-sum", kl_coef=0.05, kl_estimator="k2"),
    "dapo": DAPO(correction=TIS),
    "gspo": GSPO(clip_low=0.03, clip_high=0.04),
    "sapo": SAPO(),
    "cispo": CISPO(max_ratio=1.2),
    "reinforce": Reinforce(correction=EngineCorrection(cap=1.5, level="sequence")),
    "kl-ratio": GRPO(kl_coef=0.1, kl_times_ratio=True),
}


def make(seed=0, lengths=LENGTHS, spread=0.4, dtype=torch.float64, **changes):
    torch.manual_seed(seed)
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    old = -torch.rand(len(sequence), dtype=torch.float64) * 3 - 0.1
    noise = [torch.randn(len(sequence), dtype=torch.float64) * spread for _ in range(3)]
    values = dict(
        logp=(old + noise[0]).to(dtype).requires_grad_(),
        old_logp=old.to(dtype),
        engine_logp=(old + noise[1]).to(dtype),
        ref_logp=(old + noise[2]).to(dtype),
        advantages=torch.randn(len(lengths), dtype=torch.float64)[sequence].to(dtype),
        sequence=sequence,
        num_sequences=len(lengths),
    )
    return PolicyTokens(**(values | changes))


def part(tokens, members):
    """The responses `members` as a batch of their own."""
    keep = torch.isin(tokens.sequence, torch.tensor(members))
    number = {member: k for k, member in enumerate(members)}
    names = ("logp", "old_logp", "engine_logp", "ref_logp", "advantages")
    return PolicyTokens(
        **{name: getattr(tokens, name)[keep] for name in names},
        sequence=torch.tensor([number[int(k)] for k in tokens.sequence[keep]], dtype=torch.long),
        num_sequences=len(members),
    )


# ------------------------------------------------------------------------------------------------ by hand


def loop(tokens, objective):
    """The loss, with Python numbers, response by response."""
    sums, means, num_tokens, num = 0.0, 0.0, 0, 0
    for s in range(tokens.num_sequences):
        at = [k for k in range(len(tokens.sequence)) if tokens.sequence[k] == s]
        if not at:
            continue
        log_ratios = [float(tokens.log_ratio.detach()[k]) for k in at]
        engine = [float(tokens.old_logp[k] - tokens.engine_logp[k]) for k in at]
        engine = [0.0 if math.isnan(e) else e for e in engine]
        losses = []
        for k, log_ratio, off in zip(at, log_ratios, engine):
            loss = by_hand(objective, tokens.logp[k].item(), float(tokens.advantages[k]), log_ratio, log_ratios)
            if objective.correction is not None:
                loss *= engine_by_hand(objective.correction, sum(engine) if is_whole(objective) else off)
            d = float(tokens.ref_logp[k]) - tokens.logp[k].item()
            kl = {"k1": -d, "k2": d * d / 2, "k3": math.exp(d) - d - 1}[objective.kl_estimator]
            kl *= math.exp(log_ratio) if objective.kl_times_ratio else 1
            losses.append(loss + objective.kl_coef * kl)
        sums, means, num_tokens, num = sums + sum(losses), means + sum(losses) / len(at), num_tokens + len(at), num + 1
    return {
        "token-mean": sums / num_tokens,
        "seq-mean-token-mean": means / num,
        "seq-mean-token-sum": sums / num,
        "seq-mean-token-sum-norm": sums / num / (objective.max_length or 1),
    }[objective.aggregation]


def is_whole(objective):
    return objective.correction.level == "sequence"


def engine_by_hand(correction, log_ratio):
    ratio = math.exp(log_ratio)
    if correction.mode == "truncate":
        return max(correction.floor or 0.0, min(correction.cap, ratio))
    return 0.0 if ratio > correction.cap or ratio < (correction.floor or 0.0) else ratio


def by_hand(objective, logp, advantage, log_ratio, log_ratios):
    r = math.exp(log_ratio)
    if isinstance(objective, Reinforce):
        return -advantage * logp
    if isinstance(objective, CISPO):
        return -min(r, objective.max_ratio) * advantage * logp
    if isinstance(objective, SAPO):
        tau = objective.tau_positive if advantage > 0 else objective.tau_negative
        return -4 / tau / (1 + math.exp(-tau * (r - 1))) * advantage
    if objective.ratio_level != "token":
        r = math.exp(sum(log_ratios) / (len(log_ratios) if objective.ratio_level == "sequence-mean" else 1))
    inner = min(r * advantage, max(1 - objective.clip_low, min(1 + objective.clip_high, r)) * advantage)
    if objective.dual_clip is not None and advantage < 0:
        inner = max(inner, objective.dual_clip * advantage)
    return -inner


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_loss_is_that_of_a_loop_over_tokens(name):
    objective = OBJECTIVES[name]
    for seed in range(3):
        tokens = make(seed)
        assert objective(tokens).mean().item() == pytest.approx(loop(tokens, objective), abs=1e-12)


@pytest.mark.parametrize("name", sorted(set(OBJECTIVES) - {"cispo"}))
def test_gradients_are_finite_differences(name):
    objective, step = OBJECTIVES[name], 1e-6
    tokens = make(seed=3)
    (gradient,) = torch.autograd.grad(objective(tokens).mean(), tokens.logp)
    for k in range(len(tokens.sequence)):
        shift = torch.zeros_like(gradient)
        shift[k] = step
        sides = [make(seed=3, logp=(tokens.logp + sign * shift).detach()) for sign in (1, -1)]
        up, down = (float(objective(side).mean()) for side in sides)
        assert float(gradient[k]) == pytest.approx((up - down) / (2 * step), abs=1e-6)


def test_gradient_of_cispo_does_not_go_through_the_ratio():
    tokens = make()
    (gradient,) = torch.autograd.grad(CISPO(max_ratio=1.2)(tokens).mean(), tokens.logp)
    expected = -(tokens.logp - tokens.old_logp).exp().clamp(max=1.2) * tokens.advantages / len(tokens.logp)
    torch.testing.assert_close(gradient, expected.detach(), rtol=1e-12, atol=1e-14)


def test_published_numbers_are_the_defaults():
    assert (PPOClip().clip_low, PPOClip().clip_high, PPOClip().aggregation) == (0.2, 0.2, "token-mean")
    assert (DAPO().clip_low, DAPO().clip_high, DAPO().aggregation) == (0.2, 0.28, "token-mean")
    assert (GSPO().clip_low, GSPO().clip_high, GSPO().aggregation) == (3e-4, 4e-4, "seq-mean-token-mean")
    assert GSPO().ratio_level == "sequence-mean" and GRPO().aggregation == "seq-mean-token-mean"
    assert (SAPO().tau_positive, SAPO().tau_negative, SAPO().aggregation) == (1.0, 1.05, "seq-mean-token-mean")
    assert CISPO().max_ratio == 5.0 and DrGRPO(max_length=8).aggregation == "seq-mean-token-sum-norm"


# ------------------------------------------------------------------------------------------------ identities


def test_gspo_in_the_token_form_has_the_same_gradient():
    """The ratio of the response without gradient, times pi / pi without gradient below the line."""
    tokens = make()
    wide = GSPO(clip_low=1.0, clip_high=1e6)
    (gradient,) = torch.autograd.grad(wide(tokens).mean(), tokens.logp)
    lengths = torch.tensor(LENGTHS, dtype=torch.float64)[tokens.sequence]
    ratio = torch.zeros(len(LENGTHS), dtype=torch.float64).index_add(0, tokens.sequence, tokens.log_ratio.detach())
    ratio = (ratio / torch.tensor(LENGTHS)).exp()[tokens.sequence]
    losses = -ratio * (tokens.logp - tokens.logp.detach()).exp() * tokens.advantages
    (token_form,) = torch.autograd.grad((losses / lengths).sum() / len(LENGTHS), tokens.logp)
    torch.testing.assert_close(gradient, token_form, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradient, -ratio * tokens.advantages / lengths / len(LENGTHS), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("objective", [PPOClip(), DAPO(), SAPO(aggregation="token-mean"), CISPO(), Reinforce()])
def test_on_policy_all_objectives_have_the_gradient_of_reinforce(objective):
    tokens = make(old_logp=None)
    (gradient,) = torch.autograd.grad(objective(tokens).mean(), tokens.logp)
    torch.testing.assert_close(gradient, -tokens.advantages / len(tokens.logp), rtol=1e-12, atol=1e-14)


def test_sapo_is_worth_two_over_tau_on_policy():
    tokens = make(old_logp=None)
    losses = SAPO(aggregation="token-mean", tau_positive=0.7, tau_negative=1.3).token_losses(tokens)
    tau = torch.where(tokens.advantages > 0, 0.7, 1.3).double()
    torch.testing.assert_close(losses, -2 / tau * tokens.advantages)


def test_kl_estimators():
    torch.manual_seed(0)
    policy, reference = (torch.randn(50, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    exact = (policy.exp() * (policy - reference)).sum()
    for name in ("k1", "k3"):  # both unbiased
        torch.testing.assert_close((policy.exp() * kl_estimate(policy, reference, name)).sum(), exact)
    assert (kl_estimate(policy, reference, "k3") >= 0).all()
    # the expected gradient of k2, sampling not differentiated, is the gradient of the KL divergence itself
    logits = torch.randn(50, dtype=torch.float64, requires_grad=True)
    logp = logits.log_softmax(-1)
    (wanted,) = torch.autograd.grad((logp.exp() * (logp - reference)).sum(), logits, retain_graph=True)
    (k2,) = torch.autograd.grad(
        (logp.exp().detach() * kl_estimate(logp, reference, "k2")).sum(), logits, retain_graph=True
    )
    torch.testing.assert_close(k2, wanted)
    (k1,) = torch.autograd.grad((logp.exp().detach() * kl_estimate(logp, reference, "k1")).sum(), logits)
    torch.testing.assert_close(k1, torch.zeros_like(k1), atol=1e-12, rtol=0)


# ------------------------------------------------------------------------------------------------ what changes nothing


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("is_total_given", [False, True])
def test_micro_batches_and_ranks_change_nothing(name, is_total_given):
    objective = OBJECTIVES[name]
    totals = Totals(sum(LENGTHS), len(LENGTHS)) if is_total_given else None
    tokens = make(seed=1)
    whole = objective(tokens, totals)
    (wanted,) = torch.autograd.grad(whole.mean(), tokens.logp)
    parts = [objective(part(tokens, members), totals) for members in ([0, 1, 2], [3], [], [4, 5])]
    weight = torch.stack([p.weight for p in parts]).sum()
    loss = torch.stack([p.value for p in parts]).sum() / weight
    torch.testing.assert_close(loss, whole.mean(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(torch.autograd.grad(loss, tokens.logp)[0], wanted, rtol=1e-12, atol=1e-14)
    if is_total_given:
        assert float(weight) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_order_of_tokens_changes_nothing(name):
    tokens, order = make(seed=2), torch.randperm(sum(LENGTHS))
    names = ("logp", "old_logp", "engine_logp", "ref_logp", "advantages", "sequence")
    mixed = PolicyTokens(**{n: getattr(tokens, n)[order] for n in names}, num_sequences=len(LENGTHS))
    torch.testing.assert_close(OBJECTIVES[name](mixed).value, OBJECTIVES[name](tokens).value, rtol=1e-12, atol=1e-14)


def test_a_response_without_tokens_counts_for_nothing():
    losses, sequence = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 0, 2])
    for aggregation, expected in (("token-mean", 2.0), ("seq-mean-token-mean", 2.25), ("seq-mean-token-sum", 3.0)):
        assert float(aggregate(losses, sequence, 4, aggregation).mean()) == expected
    assert float(aggregate(losses, sequence, 4, "seq-mean-token-sum-norm", max_length=4).mean()) == 0.75


def test_an_empty_micro_batch_is_zero_with_a_gradient():
    for objective in OBJECTIVES.values():
        empty = part(make(), [])
        result = objective(empty)
        assert result.value.item() == 0 and result.weight.item() == 0
        result.value.backward()
        found = policy_statistics(empty, objective)
        assert all(float(mean.weight) == 0 for mean in found.means.values())


# ------------------------------------------------------------------------------------------------ numbers


@pytest.mark.parametrize("name", OBJECTIVES)
def test_16_bit_inputs_are_computed_in_fp32(name):
    tokens = make(dtype=torch.bfloat16)
    exact = make(**{n: getattr(tokens, n).double() for n in ("logp", "old_logp", "engine_logp", "ref_logp")})
    exact.advantages = tokens.advantages.double()
    result = OBJECTIVES[name](tokens)
    assert result.value.dtype == torch.float32 and tokens.logp.dtype == torch.float32
    assert result.mean().item() == pytest.approx(OBJECTIVES[name](exact).mean().item(), rel=2e-6, abs=1e-6)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("gap", [1e3, -1e3, 88.8, float("inf")])
def test_extreme_log_ratios_stay_finite(name, gap):
    tokens = make(dtype=torch.float32)
    changes = {"old_logp": tokens.old_logp - gap, "engine_logp": tokens.old_logp}
    if math.isfinite(gap):
        changes["ref_logp"] = tokens.old_logp + gap
    tokens = make(dtype=torch.float32, **changes)
    value = OBJECTIVES[name](tokens).value
    (gradient,) = torch.autograd.grad(value, tokens.logp)
    assert value.isfinite() and gradient.isfinite().all()
    found = policy_statistics(tokens, OBJECTIVES[name])
    assert all(mean.value.isfinite() for key, mean in found.means.items() if key != "engine_mismatch" or gap < 1e9)
    assert found.maxima["ratio_max"].isfinite()


def test_only_the_policy_in_training_gets_a_gradient():
    names = ("old_logp", "engine_logp", "ref_logp", "advantages")
    others = {n: getattr(make(), n).clone().requires_grad_() for n in names}
    tokens = make(**others)
    GRPO(kl_coef=0.1, correction=TIS)(tokens).value.backward()
    assert all(tensor.grad is None for tensor in others.values())


# ------------------------------------------------------------------------------------------------ the engine


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("mode", ["truncate", "mask"])
@pytest.mark.parametrize("floor", [None, 0.8])
def test_engine_weights(level, mode, floor):
    correction = EngineCorrection(cap=1.25, floor=floor, level=level, mode=mode)
    tokens = make(seed=4)
    tokens.engine_logp[3] = float("nan")
    got = tokens.engine_weights(correction)
    off = [float(d) if not d.isnan() else 0.0 for d in tokens.old_logp - tokens.engine_logp]
    groups = [[o for o, s in zip(off, tokens.sequence) if s == k] for k in range(len(LENGTHS))]
    logs = off if level == "token" else [sum(groups[k]) for k in tokens.sequence]
    expected = torch.tensor([engine_by_hand(correction, log) for log in logs], dtype=torch.float64)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    if level == "token":
        assert float(got[3]) == 1.0


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_no_engine_weight_is_infinite(level):
    tokens = make(dtype=torch.float32, engine_logp=make(dtype=torch.float32).old_logp - 1e3)
    weights = tokens.engine_weights(EngineCorrection(cap=1e30, level=level))
    torch.testing.assert_close(weights, torch.full_like(weights, math.exp(20)))


def test_the_untruncated_sequence_weight_is_unbiased():
    """Expectation under the engine of weight x reward is the expectation under the policy, by enumeration."""
    torch.manual_seed(0)
    old, engine = (torch.randn(3, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    pairs = torch.cartesian_prod(torch.arange(3), torch.arange(3))  # all responses of two tokens
    reward = torch.randn(9, dtype=torch.float64)
    sequence = torch.arange(9).repeat_interleave(2)
    packed = (old[pairs].flatten(), engine[pairs].flatten(), sequence, 9)
    weights = EngineCorrection(cap=1e9, level="sequence")(*packed).view(9, 2)[:, 0]
    torch.testing.assert_close(
        (engine[pairs].sum(-1).exp() * weights * reward).sum(), (old[pairs].sum(-1).exp() * reward).sum()
    )


# ------------------------------------------------------------------------------------------------ statistics, entropy


def test_statistics_by_hand():
    objective = PPOClip(correction=EngineCorrection(cap=1.3))
    tokens = make(seed=5)
    tokens.engine_logp[0] = float("nan")
    found = policy_statistics(tokens, objective)
    ratio = (tokens.logp - tokens.old_logp).exp().detach()
    low = (ratio < 0.8) & (tokens.advantages < 0)
    high = (ratio > 1.2) & (tokens.advantages > 0)
    off = (tokens.old_logp - tokens.engine_logp)[1:]
    expected = {
        "ratio": ratio.mean(),
        "approx_kl": (ratio - 1 - ratio.log()).mean(),
        "clip_low": low.double().mean(),
        "clip_high": high.double().mean(),
        "clip_fraction": (low.double() + high.double()).mean(),
        "kl": (tokens.ref_logp - tokens.logp).expm1().sub(tokens.ref_logp - tokens.logp).mean().detach(),
        "engine_mismatch": off.abs().mean(),
        "engine_kl": (off.exp() - 1 - off).mean(),
        "engine_weight": torch.cat([off.exp().clamp(max=1.3), torch.ones(1)]).mean(),
        "engine_capped": (off.exp() > 1.3).double().sum() / len(ratio),
    }
    assert found.means.keys() == expected.keys()
    for name, value in expected.items():
        assert float(found.means[name].mean()) == pytest.approx(float(value), abs=1e-12), name
    assert float(found.maxima["ratio_max"]) == float(ratio.max())
    assert float(found.maxima["engine_mismatch_max"]) == float(off.abs().max())
    assert float(low.sum()) > 0 and float(high.sum()) > 0
    assert not any(mean.value.requires_grad for mean in found.means.values())


@pytest.mark.parametrize("objective", [PPOClip(), PPOClip(dual_clip=1.5), GSPO(clip_low=0.01, clip_high=0.01)])
def test_what_counts_as_clipped_has_no_gradient_and_the_rest_has(objective):
    tokens = make(seed=6)
    low, high = objective.clipped(tokens)
    (gradient,) = torch.autograd.grad(objective(tokens).value, tokens.logp)
    assert torch.equal(gradient == 0, low | high)
    assert bool((low | high).any()) and not bool((low | high).all())


@pytest.mark.parametrize("chunk_size", [1, 4, None])
def test_entropy_and_its_gradient(chunk_size):
    torch.manual_seed(0)
    logits = (torch.randn(3, 5, 11, dtype=torch.float64) * 3).requires_grad_()
    upstream = torch.rand(3, 5)
    wanted = torch.distributions.Categorical(logits=logits).entropy()
    got = entropy_from_logits(logits, chunk_size)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    pair = [torch.autograd.grad((e * upstream).sum(), logits)[0] for e in (got, wanted)]
    torch.testing.assert_close(*pair, rtol=1e-10, atol=1e-12)


def test_entropy_with_tokens_that_cannot_be_and_in_16_bit():
    logits = torch.tensor([[0.0, 0.0, -math.inf, -math.inf], [1e4, 0.0, 0.0, -math.inf]], requires_grad=True)
    entropy = entropy_from_logits(logits)
    torch.testing.assert_close(entropy, torch.tensor([math.log(2), 0.0]))
    assert torch.autograd.grad(entropy.sum(), logits)[0].isfinite().all()
    low = torch.randn(4, 64).bfloat16()
    assert entropy_from_logits(low).dtype == torch.float32
    torch.testing.assert_close(entropy_from_logits(low), entropy_from_logits(low.float()))
    assert entropy_from_logits(torch.zeros(0, 7)).shape == (0,)


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    "build",
    [
        lambda: PPOClip(aggregation="mean"),
        lambda: PPOClip(aggregation="token-mean", max_length=3),
        lambda: DrGRPO(),
        lambda: DrGRPO(max_length=0),
        lambda: PPOClip(clip_low=1.5),
        lambda: PPOClip(dual_clip=1.1),
        lambda: PPOClip(ratio_level="batch"),
        lambda: GRPO(kl_coef=-1.0),
        lambda: SAPO(tau_positive=0.0),
        lambda: CISPO(max_ratio=0.0),
        lambda: EngineCorrection(cap=0.0),
        lambda: EngineCorrection(cap=2.0, floor=3.0),
        lambda: EngineCorrection(level="batch"),
        lambda: EngineCorrection(mode="drop"),
        lambda: make(advantages=torch.zeros(3)),
        lambda: GRPO(kl_coef=0.1)(make(ref_logp=None)),
        lambda: DAPO(correction=TIS)(make(engine_logp=None)),
        lambda: kl_estimate(torch.zeros(1), torch.zeros(1), "k4"),
        lambda: entropy_from_logits(torch.zeros(2, 3), chunk_size=0),
    ],
)
def test_bad_input_is_refused(build):
    with pytest.raises(ValueError):
        build()


def test_an_objective_must_define_its_losses():
    with pytest.raises(TypeError, match="token_losses"):
        Objective()(make())


def test_an_experiment_file_can_name_an_objective():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--objective", type=PolicyObjective)
    card = {"clip_high": 0.3, "correction": {"cap": 8.0, "level": "sequence"}}
    given = parser.parse_object({"objective": {"class_path": "step3vl.losses.policy.DAPO", "init_args": card}})
    correction = EngineCorrection(cap=8.0, level="sequence")
    assert parser.instantiate(given).objective == DAPO(clip_high=0.3, correction=correction)


# ------------------------------------------------------------------------------------------------ TRL


class Padded:
    """The part of a GRPOTrainer that its `_compute_loss` looks at, with given log-probabilities in place of a model."""

    def __init__(self, tokens, lengths, **settings):
        self.lengths, self.width = lengths, max(lengths)
        self.logp = self.pad(tokens.logp)
        self.loss_type, self.importance_sampling_level = settings.pop("loss_type"), settings.pop("level", "token")
        self.epsilon_low, self.epsilon_high = settings.pop("epsilon", 0.2), settings.pop("epsilon_high", 0.2)
        self.beta, self.use_vllm = settings.pop("beta", 0.0), settings.pop("use_vllm", False)
        defaults = dict(delta=None, use_bias_correction_kl=False, steps_per_generation=1)
        temperatures = dict(sapo_temperature_pos=1.0, sapo_temperature_neg=1.05)
        self.args = SimpleNamespace(**(defaults | temperatures | settings))
        self.vllm_importance_sampling_correction = True
        self.aux_loss_enabled = self._entropy_bonus_enabled = False
        self.top_entropy_quantile, self.off_policy_mask_threshold = 1.0, None
        self.current_gradient_accumulation_steps, self.max_completion_length = 1, 20
        self.model = SimpleNamespace(training=True)
        self.accelerator = SimpleNamespace(
            num_processes=1, reduce=lambda x, reduction: x, gather=lambda x: x, gather_for_metrics=lambda x: x
        )
        self._metrics = {"train": defaultdict(list)}

    def pad(self, x):
        rows = list(x.split(self.lengths))
        return torch.stack([torch.cat([row, row.new_zeros(self.width - len(row))]) for row in rows])

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        return self.logp, torch.zeros_like(self.logp), None

    def inputs(self, tokens, weights=None):
        mask = self.pad(torch.ones(sum(self.lengths), dtype=torch.float64))
        ids = torch.zeros_like(mask, dtype=torch.long)
        first = [sum(self.lengths[:k]) for k in range(len(self.lengths))]
        found = dict(
            prompt_ids=ids[:, :1],
            prompt_mask=mask[:, :1],
            completion_ids=ids,
            completion_mask=mask,
            advantages=tokens.advantages[first],
            old_per_token_logps=self.pad(tokens.old_logp),
            ref_per_token_logps=self.pad(tokens.ref_logp),
            num_items_in_batch=torch.tensor(float(sum(self.lengths))),
        )
        return found if weights is None else found | {"importance_sampling_ratio": self.pad(weights)}


TRL = {
    "grpo": (GRPO(), dict(loss_type="grpo")),
    "grpo-kl": (GRPO(kl_coef=0.1), dict(loss_type="grpo", beta=0.1)),
    "grpo-kl-ratio": (
        GRPO(kl_coef=0.1, kl_times_ratio=True),
        dict(loss_type="grpo", beta=0.1, use_bias_correction_kl=True),
    ),
    "two-sided": (GRPO(dual_clip=1.5), dict(loss_type="grpo", delta=1.5)),
    "bnpo": (PPOClip(), dict(loss_type="bnpo")),
    "dr_grpo": (DrGRPO(max_length=20), dict(loss_type="dr_grpo")),
    "dapo": (DAPO(), dict(loss_type="dapo", epsilon_high=0.28)),
    "dapo-tis": (DAPO(correction=TIS), dict(loss_type="dapo", epsilon_high=0.28, use_vllm=True)),
    "gspo": (
        GSPO(clip_low=0.03, clip_high=0.04),
        dict(loss_type="grpo", level="sequence", epsilon=0.03, epsilon_high=0.04),
    ),
    "sapo": (SAPO(), dict(loss_type="sapo")),
    "cispo": (CISPO(max_ratio=1.2), dict(loss_type="cispo", epsilon_high=1.2)),
}


@pytest.mark.parametrize("name", TRL)
def test_value_and_gradient_are_those_of_trl(name):
    pytest.importorskip("trl")
    from trl.trainer.grpo_trainer import GRPOTrainer

    objective, settings = TRL[name]
    for seed in range(3):
        tokens = make(seed)
        trainer = Padded(tokens, LENGTHS, **settings)
        weights = tokens.engine_weights(TIS) if "tis" in name else None
        theirs = GRPOTrainer._compute_loss(trainer, None, trainer.inputs(tokens, weights))
        ours = objective(tokens).mean()
        exact = 1e-6 if name == "sapo" else 1e-12  # its temperatures are fp32 there
        assert ours.item() == pytest.approx(theirs.item(), abs=exact)
        pair = [torch.autograd.grad(loss, tokens.logp, retain_graph=True)[0] for loss in (ours, theirs)]
        torch.testing.assert_close(*pair, rtol=exact, atol=exact)

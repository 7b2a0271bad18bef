"""Advantages against loops in fp64, the published identities, and responses spread over ranks."""

import math

import pytest
import torch
from jsonargparse import ArgumentParser

import step3vl.rl
from step3vl.rl import (
    GAE,
    GDPO,
    Estimator,
    GroupRelative,
    LeaveOneOut,
    ReinforcePlusPlus,
    ReinforcePlusPlusBaseline,
    Scored,
    discounted_sums,
    gae,
    gdpo,
    group_relative,
    leave_one_out,
    moments,
    weighted_reward,
    whiten,
)

LENGTHS = (6, 1, 17, 4, 1, 9, 33, 2)
NAN = float("nan")


def tokens_of(lengths):
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))


def make(lengths=LENGTHS, seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return torch.randn(sum(lengths), dtype=dtype), torch.randn(len(lengths), dtype=dtype), tokens_of(lengths)


def gae_by_hand(values, rewards, lengths, gamma, lam, token_rewards=None, bootstrap=None):
    advantages, start = [], 0
    for s, length in enumerate(lengths):
        part, running = [], 0.0
        after = 0.0 if bootstrap is None else float(bootstrap[s])
        for t in reversed(range(start, start + length)):
            reward = (float(rewards[s]) if t == start + length - 1 else 0.0) + (
                0.0 if token_rewards is None else float(token_rewards[t])
            )
            running = reward + gamma * after - float(values[t]) + gamma * lam * running
            after = float(values[t])
            part.append(running)
        advantages, start = advantages + part[::-1], start + length
    return torch.tensor(advantages, dtype=torch.float64)


# ------------------------------------------------------------------------------------------------ GAE


@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (0.99, 0.95), (1.0, 0.95), (0.9, 1.0), (0.9, 0.0), (0.0, 1.0)])
@pytest.mark.parametrize("is_full", [False, True])
def test_gae_is_that_of_a_loop(gamma, lam, is_full):
    values, rewards, sequence = make()
    more = dict(token_rewards=torch.randn_like(values), bootstrap=torch.randn_like(rewards)) if is_full else {}
    advantages, returns = gae(values, rewards, sequence, gamma, lam, **more)
    wanted = gae_by_hand(values, rewards, LENGTHS, gamma, lam, **more)
    torch.testing.assert_close(advantages, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(returns, wanted + values, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 8, 9, 1000])
def test_gae_at_every_kind_of_length(length):
    values, rewards, sequence = make((length, 1, length))
    advantages, _ = gae(values, rewards, sequence, 0.99, 0.97)
    wanted = gae_by_hand(values, rewards, (length, 1, length), 0.99, 0.97)
    torch.testing.assert_close(advantages, wanted, rtol=1e-12, atol=1e-12)


def test_without_discount_the_advantage_is_reward_minus_value_and_the_return_the_reward():
    values, rewards, sequence = make(dtype=torch.float32)
    advantages, returns = gae(values, rewards, sequence)
    assert advantages.dtype == torch.float32
    torch.testing.assert_close(advantages, rewards[sequence] - values, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(returns, rewards[sequence], rtol=1e-6, atol=1e-6)


def test_gae_over_a_long_response_keeps_its_digits():
    values, rewards, sequence = make((65536, 3), dtype=torch.float32)
    advantages, _ = gae(values, rewards, sequence)
    torch.testing.assert_close(advantages, rewards[sequence] - values, rtol=1e-6, atol=1e-6)


def test_a_response_that_cannot_be_judged_has_no_advantage_and_no_return():
    values, rewards, sequence = make()
    rewards[2], values[sequence == 2] = NAN, NAN
    advantages, returns = gae(values, rewards, sequence, 0.9, 0.9)
    there = sequence == 2
    assert (advantages[there] == 0).all() and returns[there].isnan().all()
    wanted = gae_by_hand(values, rewards, LENGTHS, 0.9, 0.9)
    torch.testing.assert_close(advantages[~there], wanted[~there], rtol=1e-12, atol=1e-12)


def test_discounted_sums_of_nothing_and_of_bf16():
    assert discounted_sums(torch.zeros(0), torch.zeros(0, dtype=torch.long)).shape == (0,)
    values, rewards, sequence = make(dtype=torch.bfloat16)
    advantages, _ = gae(values, rewards, sequence, 0.99, 0.95)
    assert advantages.dtype == torch.float32
    torch.testing.assert_close(
        advantages.double(), gae_by_hand(values, rewards, LENGTHS, 0.99, 0.95), rtol=1e-6, atol=1e-6
    )


# ------------------------------------------------------------------------------------------------ whitening


def test_whitening_over_ranks_is_whitening_of_all():
    x, keep = torch.randn(50, dtype=torch.float64) * 3 + 100, torch.rand(50) > 0.3
    x[4] = NAN
    inside = keep & ~x.isnan()
    sums = moments(x[:20], keep[:20]) + moments(x[20:20], keep[20:20]) + moments(x[20:], keep[20:])
    got = torch.cat([whiten(x[:20], sums, keep[:20]), whiten(x[20:], sums, keep[20:])])
    kept = x[inside]
    torch.testing.assert_close(got[inside], (kept - kept.mean()) / kept.std(correction=0), rtol=1e-9, atol=1e-9)
    assert (got[~inside] == 0).all()
    unbiased = whiten(x, sums, keep, shift=False, unbiased=True)[inside]
    torch.testing.assert_close(unbiased, kept / kept.std(), rtol=1e-9, atol=1e-9)


def test_whitening_of_equal_or_no_values_is_finite():
    for x in (torch.full((5,), 0.1), torch.zeros(0), torch.full((2,), NAN), torch.tensor([3.0])):
        assert torch.equal(whiten(x, moments(x)).abs() < 1e-3, torch.ones_like(x, dtype=torch.bool))


# ------------------------------------------------------------------------------------------------ groups


def grouped(seed=0, num_groups=6, size=4, holes=True):
    torch.manual_seed(seed)
    rewards = torch.randn(num_groups * size, dtype=torch.float64)
    if holes:
        rewards[[1, 5, 6, 8, 9, 10]] = NAN  # group 2 is left with one, group 1 with two
        rewards[12:16] = NAN  # group 3 with none
    return rewards, torch.arange(num_groups).repeat_interleave(size), num_groups


def trl_std(x):
    """Bessel's correction, over what is not NaN; NaN for one value: the formula of TRL's nanstd."""
    x = x[~x.isnan()]
    return x.std() if len(x) > 1 else torch.tensor(NAN)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_group_relative_is_trls_formula(scale):
    """Transcribed: TRL computes it inside a method that also generates, so it cannot be called."""
    rewards, group, num_groups = grouped()
    rows = rewards.view(num_groups, -1)
    wanted = rows - rows.nanmean(1, keepdim=True)
    if scale == "group":
        wanted = wanted / (torch.stack([trl_std(row) for row in rows])[:, None] + 1e-4)
    elif scale == "batch":
        wanted = wanted / (trl_std(rewards) + 1e-4)
    got = group_relative(rewards, group, num_groups, scale)
    torch.testing.assert_close(got, wanted.flatten().nan_to_num(nan=0.0), rtol=1e-12, atol=1e-12)


def test_group_relative_with_trls_own_nanstd():
    pytest.importorskip("trl")
    from trl.trainer.utils import nanstd

    rewards, group, num_groups = grouped()
    rows = rewards.view(num_groups, -1)
    wanted = (rows - rows.nanmean(1, keepdim=True)) / (nanstd(rows, dim=1, keepdim=True) + 1e-4)
    got = group_relative(rewards, group, num_groups)
    # theirs takes n / (n - 1) in fp32
    torch.testing.assert_close(got, wanted.flatten().nan_to_num(nan=0.0), rtol=1e-6, atol=1e-6)


def test_group_relative_with_the_std_of_a_population():
    rewards, group, num_groups = grouped(holes=False)
    rows = rewards.view(num_groups, -1)
    wanted = (rows - rows.mean(1, keepdim=True)) / (rows.std(1, correction=0, keepdim=True) + 1e-6)
    got = group_relative(rewards, group, num_groups, unbiased=False, epsilon=1e-6)
    torch.testing.assert_close(got, wanted.flatten(), rtol=1e-12, atol=1e-12)


def test_scale_batch_takes_its_deviation_from_all_ranks():
    rewards, group, num_groups = grouped()
    whole = group_relative(rewards, group, num_groups, "batch")
    for part in (slice(0, 8), slice(8, 24)):
        rest = torch.cat([rewards[: part.start], rewards[part.stop :]])
        got = group_relative(
            rewards[part], group[part], num_groups, "batch", reduce=lambda sums, rest=rest: sums + moments(rest)
        )
        torch.testing.assert_close(got, whole[part], rtol=1e-12, atol=1e-12)


def test_leave_one_out_by_hand_and_by_its_identity():
    rewards, group, num_groups = grouped()
    wanted = []
    for k, reward in enumerate(rewards.tolist()):
        others = [r for j, r in enumerate(rewards.tolist()) if group[j] == group[k] and j != k and not math.isnan(r)]
        wanted.append(reward - sum(others) / len(others) if others and not math.isnan(reward) else 0.0)
    got = leave_one_out(rewards, group, num_groups)
    torch.testing.assert_close(got, torch.tensor(wanted, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    rewards, group, num_groups = grouped(holes=False)
    centred = group_relative(rewards, group, num_groups, "none")
    torch.testing.assert_close(leave_one_out(rewards, group, num_groups), centred * 4 / 3, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("weights", [None, (1.0, 0.3, 2.0)])
def test_gdpo_is_trls_formula(weights):
    """Transcribed, as above: multi_objective_aggregation = normalize_then_sum."""
    columns = torch.stack([grouped(seed)[0] if seed else grouped(holes=False)[0] for seed in range(3)], -1)
    columns[4:8, 1] = 0.1  # all equal
    columns[20] = NAN  # nobody could judge it
    _, group, num_groups = grouped()
    rows = columns.view(num_groups, 4, 3)
    std = torch.stack([torch.stack([trl_std(row[:, k]) for k in range(3)]) for row in rows])[:, None]
    each = (rows - rows.nanmean(1, keepdim=True)) / (std + 1e-4)
    total = (each.view(-1, 3) * torch.tensor(weights or (1.0, 1.0, 1.0))).nansum(1)
    total[columns.isnan().all(1)] = NAN
    wanted = ((total - total.nanmean()) / (trl_std(total) + 1e-4)).nan_to_num(nan=0.0)
    got = gdpo(columns, group, num_groups, weights)
    # one value has no deviation: TRL drops it, here it is 0
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)
    assert got[20] == 0 and (columns[:20].isnan().any(1) & (got[:20] != 0)).any()


def test_weighted_reward():
    rows = [[1.0, None], [None, None], [0.5, 2.0]]
    torch.testing.assert_close(
        weighted_reward(rows, [1.0, 0.25]), torch.tensor([1.0, NAN, 1.0]), equal_nan=True, rtol=0, atol=0
    )
    torch.testing.assert_close(weighted_reward(torch.tensor([[1.0, 2.0]])), torch.tensor([3.0]))


@pytest.mark.parametrize("size", [1, 3, 7])
@pytest.mark.parametrize("reward", [0.1, 1.0, 1e8, NAN])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_singletons_and_equal_rewards_have_no_advantage_at_all(size, reward, dtype):
    rewards, group = torch.full((2 * size,), reward, dtype=dtype), torch.arange(2).repeat_interleave(size)
    for scale in ("group", "batch", "none"):
        assert (group_relative(rewards, group, 2, scale) == 0).all()
    assert (leave_one_out(rewards, group, 2) == 0).all()
    assert (gdpo(rewards[:, None], group, 2) == 0).all()


def test_16_bit_rewards_and_shuffled_groups():
    rewards, group, num_groups = grouped(holes=False)
    low = rewards.bfloat16()
    got = group_relative(low, group, num_groups)
    assert got.dtype == torch.float32
    wanted = group_relative(low.double(), group, num_groups)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-6, atol=1e-6)
    order = torch.randperm(len(rewards))
    torch.testing.assert_close(group_relative(low[order], group[order], num_groups), got[order])


# ------------------------------------------------------------------------------------------------ estimators


def scored(seed=0, columns=1, **changes):
    torch.manual_seed(seed)
    sequence = tokens_of(LENGTHS)
    rewards = torch.randn(len(LENGTHS), columns, dtype=torch.float64)
    rewards[5] = NAN
    values = torch.randn(len(sequence), dtype=torch.float64)
    found = dict(
        rewards=rewards, group=torch.tensor([0, 0, 0, 1, 1, 1, 1, 0]), num_groups=2, sequence=sequence, values=values
    )
    return Scored(**(found | changes))


ALL = [
    GAE(gamma=0.99, lam=0.95),
    GAE(whiten=False),
    GroupRelative(),
    GroupRelative(scale="batch", unbiased=False),
    LeaveOneOut(),
    GDPO(),
    ReinforcePlusPlus(gamma=0.98),
    ReinforcePlusPlusBaseline(),
]


@pytest.mark.parametrize("estimator", ALL)
def test_every_estimator_gives_one_advantage_a_token_and_none_where_it_cannot_be_judged(estimator):
    batch = scored(columns=2, weights=[1.0, 0.5])
    result = estimator(batch)
    assert result.advantages.shape == batch.sequence.shape and result.advantages.isfinite().all()
    assert (result.advantages[batch.sequence == 5] == 0).all()
    assert (result.advantages[batch.sequence != 5] != 0).all()
    assert (result.returns is not None) == isinstance(estimator, GAE)


@pytest.mark.parametrize("estimator", ALL)
def test_ranks_change_nothing(estimator):
    """Two ranks in step: each sum is exchanged when both have theirs, as an all-reduce does."""
    torch.manual_seed(1)
    whole = scored(group=torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]))
    expected = estimator(whole).advantages
    cuts = []
    for responses in (slice(0, 4), slice(4, 8)):
        keep = (whole.sequence >= responses.start) & (whole.sequence < responses.stop)
        cuts.append((whole, responses, keep))
    halves = [
        Scored(
            rewards=batch.rewards[responses],
            group=batch.group[responses] - batch.group[responses][0],
            num_groups=1,
            sequence=batch.sequence[keep] - responses.start,
            values=batch.values[keep],
        )
        for batch, responses, keep in cuts
    ]
    sums = []
    for half in halves:
        estimator(half, lambda local: sums.append(local) or local)
    total = sum(sums) if sums else None
    got = torch.cat([estimator(half, lambda local: total).advantages for half in halves])
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_reinforce_plus_plus_by_hand():
    batch = scored(token_rewards=torch.randn(sum(LENGTHS), dtype=torch.float64) * 0.1)
    zeros = torch.zeros(sum(LENGTHS))
    sums = gae_by_hand(zeros, batch.total, LENGTHS, 0.98, 1.0, batch.token_rewards)
    judged = batch.sequence != 5
    wanted = (sums - sums[judged].mean()) / sums[judged].std(correction=0)
    torch.testing.assert_close(
        ReinforcePlusPlus(gamma=0.98)(batch).advantages[judged], wanted[judged], rtol=1e-9, atol=1e-9
    )
    batch = scored()
    sums = group_relative(batch.total, batch.group, 2, "none")[batch.sequence]
    wanted = (sums - sums[judged].mean()) / sums[judged].std(correction=0)
    torch.testing.assert_close(
        ReinforcePlusPlusBaseline()(batch).advantages[judged], wanted[judged], rtol=1e-9, atol=1e-9
    )


def test_gae_whitens_what_it_returns_but_not_the_returns():
    batch = scored()
    plain, white = GAE(whiten=False)(batch), GAE()(batch)
    torch.testing.assert_close(plain.returns, white.returns, equal_nan=True)
    kept = plain.advantages[batch.sequence != 5]
    torch.testing.assert_close(
        white.advantages[batch.sequence != 5], (kept - kept.mean()) / kept.std(correction=0), rtol=1e-9, atol=1e-9
    )


def test_an_experiment_file_can_name_an_estimator():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--advantage", type=Estimator)
    for name, card in (("GAE", {"lam": 0.95}), ("GroupRelative", {"scale": "none"}), ("GDPO", {})):
        given = parser.parse_object({"advantage": {"class_path": f"step3vl.rl.{name}", "init_args": card}})
        assert parser.instantiate(given).advantage == getattr(step3vl.rl, name)(**card)


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    "build, match",
    [
        (lambda: discounted_sums(torch.zeros(3), torch.tensor([0, 1, 0])), "must not fall"),
        (lambda: discounted_sums(torch.zeros(3), torch.tensor([0, 1])), "shape"),
        (lambda: discounted_sums(torch.zeros(1), torch.tensor([0]), 1.1), "0..1"),
        (lambda: gae(torch.zeros(1), torch.zeros(1), torch.tensor([0]), lam=2.0), "lam"),
        (lambda: gae(torch.tensor([NAN]), torch.zeros(1), torch.tensor([0])), "finite"),
        (lambda: group_relative(torch.zeros(2), torch.zeros(2, dtype=torch.long), 1, "all"), "scale"),
        (lambda: group_relative(torch.zeros(2), torch.zeros(3, dtype=torch.long), 1), "one axis"),
        (lambda: leave_one_out(torch.tensor([math.inf]), torch.zeros(1, dtype=torch.long), 1), "infinite"),
        (lambda: gdpo(torch.zeros(2), torch.zeros(2, dtype=torch.long), 1), "column"),
        (lambda: weighted_reward(torch.zeros(2, 3), [1.0]), "1 weights for 3"),
        (lambda: GAE(gamma=1.5), "gamma"),
        (lambda: GAE()(scored(values=None)), "critic"),
        (lambda: GroupRelative(scale="rank"), "scale"),
        (lambda: GroupRelative()(scored(token_rewards=torch.zeros(sum(LENGTHS)))), "token_rewards"),
        (lambda: ReinforcePlusPlus(gamma=-0.1), "gamma"),
    ],
)
def test_bad_input_is_refused(build, match):
    with pytest.raises(ValueError, match=match):
        build()

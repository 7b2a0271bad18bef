"""The next token: log-probabilities, what top-k and top-p leave, and draws by one uniform number a row."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from step3vl.generation.logits import draw, log_probabilities, probabilities, scaled_logits
from step3vl.generation.randomness import stream_key, uniforms


@pytest.fixture
def logits():
    torch.manual_seed(0)
    return 2 * torch.randn(6, 1500)


def test_scaled_logits():
    torch.manual_seed(0)
    head, hidden = nn.Linear(8, 11, bias=False), torch.randn(3, 8, requires_grad=True)
    plain = head(hidden)
    for temperature, factor in ((0, 1.0), (1, 1.0), (0.5, 2.0)):
        found = scaled_logits(hidden, head, temperature, 4)
        assert found.dtype == torch.float32 and (found[:, 4] == float("-inf")).all()
        torch.testing.assert_close(found[:, [0, 3, 5, 10]], factor * plain[:, [0, 3, 5, 10]])
    assert torch.equal(scaled_logits(hidden, head, 1, None), plain)
    assert scaled_logits(hidden.bfloat16(), head.bfloat16(), 1, 4).dtype == torch.float32


def test_log_probabilities_are_those_of_log_softmax_with_its_gradient():
    torch.manual_seed(0)
    head, hidden, tokens = nn.Linear(8, 11, bias=False), torch.randn(3, 8), torch.tensor([0, 7, 10])
    found = log_probabilities(scaled_logits(hidden, head, 0.7, 4), tokens)
    plain = head(hidden)[:, [k for k in range(11) if k != 4]] / 0.7
    wanted = plain.log_softmax(-1)[torch.arange(3), tokens - (tokens > 4).long()]
    torch.testing.assert_close(found, wanted)
    gradients = [torch.autograd.grad(value.sum(), head.weight, retain_graph=True)[0] for value in (found, wanted)]
    torch.testing.assert_close(*gradients)
    assert gradients[0].isfinite().all() and not gradients[0][4].any()


@pytest.mark.parametrize(("top_p", "top_k"), [(1.0, 7), (0.5, None), (0.9, None), (0.999, None), (0.8, 50), (1e-9, 3)])
def test_what_is_cut_off_is_what_transformers_cuts_off(logits, top_p, top_k):
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    wanted = logits
    if top_k is not None:
        wanted = TopKLogitsWarper(top_k)(None, wanted)
    if top_p < 1:
        wanted = TopPLogitsWarper(top_p)(None, wanted)
    found = probabilities(logits, top_p, top_k)
    assert torch.equal(found > 0, wanted > float("-inf"))
    assert (found > 0).any(-1).all() and (found == 0).any()
    torch.testing.assert_close(found / found.sum(-1, keepdim=True), wanted.softmax(-1))


def test_a_share_that_the_likeliest_do_not_hold_is_looked_for_among_all():
    flat = torch.linspace(0, 0.1, 3000)[None]
    kept = (probabilities(flat, 0.9) > 0).sum()
    assert 2600 < kept < 2800
    assert (probabilities(flat, 0.01) > 0).sum() < 40


def test_nothing_is_cut_off_by_default_and_equals_stay_together(logits):
    assert torch.equal(probabilities(logits), logits.softmax(-1))
    assert torch.equal(probabilities(logits, 1.0, 5000), logits.softmax(-1))
    assert torch.equal(probabilities(torch.tensor([[1.0, 3, 3, 0]]), 1.0, 1) > 0, torch.tensor([[False, 1, 1, 0]]))


@pytest.mark.parametrize("num_tokens", [1, 2, 5, 24, 25, 1000])
def test_draws_have_the_shares_of_the_tokens(num_tokens):
    torch.manual_seed(1)
    shares = torch.rand(num_tokens).masked_fill_(torch.rand(num_tokens) < 0.4, 0.0)
    shares[-1] = 0.3 if num_tokens < 25 else 0.0
    num_draws = 20_000
    evenly = (torch.arange(num_draws, dtype=torch.float64) + 0.5) / num_draws
    counts = torch.bincount(draw(shares.expand(num_draws, -1), evenly), minlength=num_tokens)
    assert (counts / num_draws - shares / shares.sum()).abs().max() < 2 / num_draws
    assert not counts[shares == 0].any()


def test_no_number_draws_a_token_without_a_share():
    torch.manual_seed(2)
    for _ in range(200):
        num_tokens = int(torch.randint(1, 40, ()))
        shares = 10 ** (8 * torch.rand(2, num_tokens) - 8)
        shares[:, torch.rand(num_tokens) < 0.7] = 0.0
        shares[:, int(torch.randint(num_tokens, ()))] = 1e-20
        tokens = draw(shares, torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64))
        first, last = (shares[0] > 0).nonzero()[0], (shares[1] > 0).nonzero()[-1]
        assert shares[torch.arange(2), tokens].all() and tokens[0] == first
        assert tokens[1] <= last


def test_a_draw_depends_on_its_own_row_alone(logits):
    uniform = torch.rand(6, dtype=torch.float64)
    shares = probabilities(logits, 0.9, 40)
    together = draw(shares, uniform)
    assert together.tolist() == [int(draw(shares[k : k + 1], uniform[k : k + 1])) for k in range(6)]


def test_random_numbers_belong_to_their_place():
    keys = [stream_key(0, call, prompt, sample) for call in range(3) for prompt in range(20) for sample in range(5)]
    assert len(set(keys)) == len(keys)
    table = torch.stack([uniforms(keys, [step] * len(keys)) for step in range(50)])  # [steps, streams]
    assert table.dtype == torch.float64 and table.min() >= 0 and table.max() < 1
    assert float(uniforms([keys[7]], [31])) == float(table[31, 7])
    assert uniforms(keys[:3], [0, 4, 2]).tolist() == [float(table[step, k]) for k, step in enumerate((0, 4, 2))]
    counts = torch.histc(table.flatten().float(), 10, 0, 1) / table.numel()
    assert (counts - 0.1).abs().max() < 0.008
    for pairs in (table[:-1] * table[1:], table[:, :-1] * table[:, 1:]):  # next step, next stream
        assert pairs.mean().item() == pytest.approx(0.25, abs=0.005)

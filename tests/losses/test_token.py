"""Chunked, row-dropping cross-entropy equals the plain formula, in value and gradient."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from step3vl.losses import CrossEntropy
from step3vl.types import IGNORE_INDEX, Batch


@pytest.fixture
def problem():
    torch.manual_seed(0)
    hidden = torch.randn(2, 9, 8, dtype=torch.float64, requires_grad=True)
    head = nn.Linear(8, 11, bias=False).double()
    labels = torch.randint(0, 11, (2, 9))
    labels[:, ::3] = IGNORE_INDEX
    weights = torch.rand(2, 9)
    zeros = torch.zeros(2, 9, dtype=torch.long)
    return hidden, head, Batch(input_ids=zeros, labels=labels, loss_weights=weights, position_ids=zeros)


def plain(hidden, head, batch, z_loss=0.0):
    logits = head(hidden).float()
    nll = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORE_INDEX, reduction="none")
    nll = nll + z_loss * logits.logsumexp(-1).square().flatten()
    mask = (batch.labels != IGNORE_INDEX).flatten()
    return (nll * batch.loss_weights.flatten() * mask).sum()


@pytest.mark.parametrize("chunk_size", [1, 3, 4096])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_equals_the_plain_formula(problem, chunk_size, z_loss):
    hidden, head, batch = problem
    expected = plain(hidden, head, batch, z_loss)
    wanted = torch.autograd.grad(expected, [hidden, head.weight])
    loss = CrossEntropy(chunk_size=chunk_size, z_loss=z_loss)(hidden, head, batch)
    got = torch.autograd.grad(loss.value, [hidden, head.weight])
    torch.testing.assert_close(loss.value, expected)
    mask = batch.labels != IGNORE_INDEX
    torch.testing.assert_close(loss.weight, batch.loss_weights[mask].sum())
    for a, b in zip(got, wanted):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


def test_no_label_gives_a_zero_with_a_gradient(problem):
    hidden, head, batch = problem
    batch.labels.fill_(IGNORE_INDEX)
    loss = CrossEntropy()(hidden, head, batch)
    assert loss.value == 0 and loss.weight == 0
    loss.value.backward()
    assert hidden.grad is not None and not hidden.grad.any()


def test_chunk_size_must_be_positive():
    with pytest.raises(ValueError, match="chunk_size must be at least 1 token, got 0"):
        CrossEntropy(chunk_size=0)

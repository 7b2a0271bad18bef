"""CrossEntropy over a batch: the plain formula in value and gradient, dropped rows, weights, heads, kernels."""

import sys
import types
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from step3vl.losses import CrossEntropy, token
from step3vl.types import IGNORE_INDEX, Batch

WEIGHTS = {"token": lambda n: 1.0, "sample": lambda n: 1.0 / n, "sqrt": lambda n: n**-0.5}


def make(loss_weight="token", bias=False, seed=0):
    """Two rows of nine tokens, documents of 5, 4 and 9, every third label missing."""
    torch.manual_seed(seed)
    hidden = torch.randn(2, 9, 8, requires_grad=True)
    head = nn.Linear(8, 11, bias=bias)
    labels = torch.randint(0, 11, (2, 9))
    labels[:, ::3] = IGNORE_INDEX
    weights = torch.zeros(2, 9)
    for row, start, stop in ((0, 0, 5), (0, 5, 9), (1, 0, 9)):
        num_labels = int((labels[row, start:stop] != IGNORE_INDEX).sum())
        weights[row, start:stop] = WEIGHTS[loss_weight](num_labels)
    zeros = torch.zeros(2, 9, dtype=torch.long)
    return hidden, head, Batch(input_ids=zeros, labels=labels, loss_weights=weights, position_ids=zeros)


def plain(hidden, head, batch, z_loss=0.0):
    """All logits at once; a row without a label is masked, not dropped."""
    logits = head(hidden).float()
    losses = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORE_INDEX, reduction="none")
    losses = losses + z_loss * logits.logsumexp(-1).square().flatten()
    return (losses * batch.loss_weights.flatten() * (batch.labels != IGNORE_INDEX).flatten()).sum()


def gradients(value, *tensors):
    return torch.autograd.grad(value, tensors, allow_unused=True)


@pytest.mark.parametrize("loss_weight", list(WEIGHTS))
@pytest.mark.parametrize("chunk_size", [1, 7, 12, 4096, None])  # 12 tokens carry a label
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_the_plain_formula(loss_weight, chunk_size, z_loss, bias):
    hidden, head, batch = make(loss_weight, bias)
    expected = plain(hidden, head, batch, z_loss)
    wanted = gradients(expected, hidden, *head.parameters())
    loss = CrossEntropy(chunk_size=chunk_size, z_loss=z_loss)(hidden, head, batch)
    got = gradients(loss.value, hidden, *head.parameters())
    torch.testing.assert_close(loss.value, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(loss.weight, batch.loss_weights[batch.labels != IGNORE_INDEX].sum())
    for a, b in zip(got, wanted):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 * float(b.abs().max()))


def test_a_batch_in_which_every_token_is_labelled():
    hidden, head, batch = make()
    batch.labels.clamp_(min=0)
    batch.loss_weights.fill_(0.5)
    loss = CrossEntropy()(hidden, head, batch)
    expected = plain(hidden, head, batch)
    torch.testing.assert_close(gradients(loss.value, hidden)[0], gradients(expected, hidden)[0])
    torch.testing.assert_close(loss.value, expected)


def test_no_label_gives_a_zero_with_a_gradient_for_every_part():
    hidden, head, batch = make(bias=True)
    batch.labels.fill_(IGNORE_INDEX)
    loss = CrossEntropy()(hidden, head, batch)
    assert loss.value == 0 and loss.weight == 0
    loss.value.backward()
    for tensor in (hidden, head.weight, head.bias):  # under sharding a missing gradient would stop the other ranks
        assert tensor.grad is not None and not tensor.grad.any()


def test_a_tied_head_adds_to_the_embedding_s_gradient():
    torch.manual_seed(0)
    embedding = nn.Embedding(11, 8)
    head = nn.Linear(8, 11, bias=False)
    head.weight = embedding.weight
    _, _, batch = make()
    batch.input_ids = torch.randint(0, 11, (2, 9))
    wanted = gradients(plain(embedding(batch.input_ids).tanh(), head, batch), embedding.weight)[0]
    CrossEntropy(chunk_size=5)(embedding(batch.input_ids).tanh(), head, batch).value.backward()
    torch.testing.assert_close(embedding.weight.grad, wanted)


@pytest.mark.parametrize("frozen", ["head", "hidden", "weight only"])
def test_what_is_frozen_gets_no_gradient_and_the_rest_does(frozen):
    hidden, head, batch = make(bias=True)
    hidden.requires_grad_(frozen != "hidden")
    head.weight.requires_grad_(frozen == "hidden")
    head.bias.requires_grad_(frozen != "head")
    trained = [t for t in (hidden, head.weight, head.bias) if t.requires_grad]
    wanted = gradients(plain(hidden, head, batch), *trained)
    CrossEntropy(chunk_size=5)(hidden, head, batch).value.backward()
    for tensor, gradient in zip(trained, wanted):
        torch.testing.assert_close(tensor.grad, gradient)
    assert all(t.grad is None for t in (hidden, head.weight, head.bias) if not t.requires_grad)


def test_a_head_that_must_be_called_is_called():
    """An adapter on the head, and a forward hook: neither may be skipped."""
    hidden, head, batch = make()
    adapted = nn.Sequential(head, nn.Tanh())
    loss = CrossEntropy(chunk_size=5, z_loss=1e-2)(hidden, adapted, batch)
    expected = plain(hidden, adapted, batch, 1e-2)
    torch.testing.assert_close(loss.value, expected)
    for a, b in zip(gradients(loss.value, hidden, head.weight), gradients(expected, hidden, head.weight)):
        torch.testing.assert_close(a, b)
    head.register_forward_hook(lambda module, inputs, output: output * 2)
    torch.testing.assert_close(CrossEntropy()(hidden, head, batch).value, plain(hidden, head, batch))
    batch.labels.fill_(IGNORE_INDEX)
    CrossEntropy()(hidden, adapted, batch).value.backward()
    assert not head.weight.grad.any()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (dict(chunk_size=0), "chunk_size must be at least 1 token, got 0"),
        (dict(z_loss=-1.0), "z_loss must be at least 0, got -1.0"),
        (dict(kernel="fast"), "kernel must be auto, chunked or liger, got 'fast'"),
    ],
)
def test_impossible_arguments_are_refused(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        CrossEntropy(**arguments)


# ------------------------------------------------------------------------------------------------ Liger


@pytest.fixture
def liger(monkeypatch):
    """A stand-in with the signature of liger-kernel 0.8; records its calls. The real one is tested on a GPU."""
    calls = []

    def fused(input, weight, target, bias=None, ce_weight=None, ignore_index=-100, lse_square_scale=0.0,
              label_smoothing=0.0, reduction="mean", softcap=None, return_z_loss=False, accum_dtype=None):  # fmt: skip
        calls.append((reduction, accum_dtype))
        logits = F.linear(input, weight, bias).float()
        z = lse_square_scale * logits.logsumexp(-1).square().sum()
        return F.cross_entropy(logits, target, reduction=reduction) + z

    functional = types.ModuleType("liger_kernel.transformers.functional")
    functional.liger_fused_linear_cross_entropy = fused
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.functional", functional)
    monkeypatch.setattr(token, "is_installed", lambda: True)
    return calls


@pytest.fixture
def on_a_gpu(monkeypatch):
    monkeypatch.setattr(CrossEntropy, "_wants_liger", lambda self, device: self.kernel != "chunked")


def test_liger_without_its_package_or_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(token, "is_installed", lambda: False)
    with pytest.raises(ValueError, match="kernel: liger needs the package liger-kernel, which is not installed"):
        CrossEntropy(kernel="liger")
    monkeypatch.setattr(token, "is_installed", lambda: True)
    with pytest.raises(ValueError, match="kernel: liger needs a GPU, but the model is on cpu"):
        CrossEntropy(kernel="liger")(*make())


def test_which_kernel_is_wanted(monkeypatch):
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    for installed in (True, False):
        monkeypatch.setattr(token, "is_installed", [lambda: False, lambda: True][installed])
        assert CrossEntropy()._wants_liger(gpu) is installed and not CrossEntropy()._wants_liger(cpu)
        assert not CrossEntropy(kernel="chunked")._wants_liger(gpu)


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_liger_takes_batches_of_equal_weights(liger, on_a_gpu, z_loss):
    hidden, head, batch = make(bias=True)
    batch.loss_weights.fill_(0.3)
    loss = CrossEntropy(z_loss=z_loss)(hidden, head, batch)
    expected = plain(hidden, head, batch, z_loss)
    torch.testing.assert_close(loss.value, expected)
    for a, b in zip(gradients(loss.value, hidden, head.weight), gradients(expected, hidden, head.weight)):
        torch.testing.assert_close(a, b)
    assert liger == [("sum", torch.float32)]


def test_what_liger_cannot_do_goes_to_ours_and_is_said_once(liger, on_a_gpu):
    hidden, head, batch = make("sqrt")
    loss = CrossEntropy(kernel="liger")
    with pytest.warns(UserWarning, match="Liger's kernel does not apply here: tokens differ in weight"):
        torch.testing.assert_close(loss(hidden, head, batch).value, plain(hidden, head, batch))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(hidden, head, batch)
    with pytest.warns(UserWarning, match="the hidden states need no gradient"):
        equal = make()
        CrossEntropy()(equal[0].detach(), *equal[1:]).value.backward()
    assert equal[1].weight.grad.any()
    with pytest.warns(UserWarning, match="the head is more than a linear layer"):
        CrossEntropy()(hidden, nn.Sequential(head), batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batch.labels.fill_(IGNORE_INDEX)
        assert CrossEntropy()(hidden, head, batch).value == 0
    assert liger == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("kernel", ["chunked", "liger"])
def test_kernels_agree_on_a_gpu(kernel):
    pytest.importorskip("liger_kernel") if kernel == "liger" else None
    hidden, head, batch = make()
    hidden, head, batch = hidden.detach().cuda().requires_grad_(), head.cuda(), batch.to("cuda")
    expected = plain(hidden, head, batch, 1e-3)
    wanted = gradients(expected, hidden, head.weight)
    loss = CrossEntropy(kernel=kernel, z_loss=1e-3)(hidden, head, batch)
    torch.testing.assert_close(loss.value, expected, rtol=1e-5, atol=0)
    for a, b in zip(gradients(loss.value, hidden, head.weight), wanted):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

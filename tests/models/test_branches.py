"""A document with branches gives what its branches give as documents of their own: outputs and gradients."""

import pytest
import torch

from step3vl.models import Qwen3Decoder
from step3vl.models.attention import attend
from step3vl.models.branches import attend_branches, branch_masks, branch_parts
from step3vl.types import Batch

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8}


def decoder(**changes) -> Qwen3Decoder:
    torch.manual_seed(0)
    return Qwen3Decoder(**SIZES, vocab_size=64, **changes)


def rows(prompt: torch.Tensor, answers: list[torch.Tensor], shared: bool):
    """Ids, positions, branches and the places of the answers' tokens."""
    p = len(prompt)
    if not shared:
        ids = torch.cat([torch.cat([prompt, a]) for a in answers])
        places = torch.cat([torch.arange(p + len(a)) for a in answers])
        own = torch.cat([torch.cat([torch.zeros(p), torch.ones(len(a))]) for a in answers]).bool()
        return ids[None], places[None], None, own
    ids = torch.cat([prompt, *answers])
    places = torch.cat([torch.arange(p), *(p + torch.arange(len(a)) for a in answers)])
    branches = torch.cat([torch.zeros(p), *(torch.full((len(a),), k + 1.0) for k, a in enumerate(answers))]).long()
    return ids[None], places[None], branches[None], branches > 0


@pytest.mark.parametrize("zero", [False, True])
def test_branches_equal_documents_of_their_own(zero):
    model = decoder(zero_init_outputs=zero)
    prompt = torch.randint(0, 64, (11,))
    answers = [torch.randint(0, 64, (n,)) for n in (3, 1, 7)]
    found = {}
    for shared in (True, False):
        model.zero_grad()
        ids, places, branches, own = rows(prompt, answers, shared)
        hidden = model(model.embed(ids), places, branches=branches)[0, own]
        hidden.square().sum().backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found[shared] = (hidden.detach(), grads)
    assert torch.allclose(found[True][0], found[False][0], atol=1e-5)
    assert found[True][1].keys() == found[False][1].keys()
    for name, grad in found[True][1].items():
        other = found[False][1][name]
        assert (grad - other).norm() <= 1e-4 * other.norm() + 1e-9, name


def test_a_plain_document_beside_one_with_branches():
    model = decoder()
    a, b = torch.randint(0, 64, (5,)), torch.randint(0, 64, (9,))
    ids, places, branches, _ = rows(a, [a[:2], a[:3]], True)
    both = torch.cat([ids[0], b])[None], torch.cat([places[0], torch.arange(9)])[None]
    mixed = model(model.embed(both[0]), both[1], branches=torch.cat([branches[0], torch.zeros(9).long()])[None])
    alone = model(model.embed(b[None]), torch.arange(9)[None])
    assert torch.allclose(mixed[0, -9:], alone[0], atol=1e-6)


def test_masks():
    masks = branch_masks([2, 5], torch.tensor([0, 0, 0, 1, 1, 2, 2]))
    assert masks[0] is None
    expected = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 0, 0, 1, 0], [1, 0, 0, 1, 1]]
    assert masks[1].int().tolist() == expected


def test_parts_give_what_masks_give():
    """Also for a document whose branches begin at once, and beside a plain one."""
    torch.manual_seed(0)
    lengths, branches = [4, 9, 3], torch.tensor([0] * 4 + [0] * 3 + [1] * 2 + [2] * 4 + [1, 2, 2])
    parts = branch_parts(lengths, branches)
    assert parts == [None, [3, 2, 4], [0, 1, 2]]
    found = []
    for seen in (parts, branch_masks(lengths, branches)):
        torch.manual_seed(1)
        q, k, v = (torch.randn(1, heads, 16, 8, requires_grad=True) for heads in (4, 2, 2))
        mixed = attend_branches(lambda *x: attend(*x, is_causal=True), q, k, v, lengths, seen, None)
        mixed.square().sum().backward()
        found.append([mixed.detach(), q.grad, k.grad, v.grad])
    assert all(torch.allclose(one, two, atol=1e-5) for one, two in zip(*found))


def test_other_kernels_refuse_branches():
    model = decoder(attention="sdpa")
    with pytest.raises(ValueError, match=r"decoder.attention is 'sdpa'; documents with branches need 'per_document'"):
        model(model.embed(torch.zeros(1, 3).long()), torch.arange(3)[None], branches=torch.tensor([[0, 1, 2]]))


def test_a_batch_has_no_branches_unless_it_says_so():
    empty = torch.zeros(1, 2, dtype=torch.long)
    batch = Batch(input_ids=empty, labels=empty, loss_weights=empty.float(), position_ids=empty)
    assert batch.branches is None and batch.to("cpu").branches is None

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from step3vl.models import Qwen3Decoder
from step3vl.models.attention import document_lengths

LENGTHS = [7, 1, 12, 4]


def decoder(**options) -> Qwen3Decoder:
    torch.manual_seed(0)
    return Qwen3Decoder(64, 160, 2, 4, 2, 16, 128, **options)


def packed_positions(lengths: list[int]) -> Tensor:
    return torch.cat([torch.arange(length) for length in lengths])[None]


def test_equals_transformers_qwen3() -> None:
    from transformers import Qwen3Config, Qwen3Model

    ours = decoder()
    config = Qwen3Config(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=128,
        max_position_embeddings=40960,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        attn_implementation="sdpa",
    )
    theirs = Qwen3Model(config)
    theirs.load_state_dict(ours.model.state_dict())
    ids = torch.randint(128, (3, 20))
    positions = torch.arange(20).expand(3, -1)
    hidden = ours(ours.embed(ids), positions, attention_mask=torch.ones(3, 20, dtype=torch.bool))
    assert torch.equal(hidden, theirs(input_ids=ids).last_hidden_state)


def test_full_size_has_the_published_number_of_parameters(card) -> None:
    with torch.device("meta"):
        assert sum(weight.numel() for weight in card("decoder/qwen3_8b.yaml").parameters()) == 8_190_735_360


@pytest.mark.parametrize("attention", ["per_document", "sdpa"])
def test_packed_equals_separate(attention: str) -> None:
    ours = decoder(attention=attention)
    ids = torch.randint(128, (1, sum(LENGTHS)))
    hidden = ours(ours.embed(ids), packed_positions(LENGTHS)).split(LENGTHS, dim=1)
    for document, alone in zip(ids.split(LENGTHS, dim=1), hidden):
        expected = ours(ours.embed(document), torch.arange(document.shape[1])[None])
        torch.testing.assert_close(alone, expected, rtol=0, atol=1e-5)


def test_rows_do_not_join() -> None:
    ours = decoder()
    ids, positions = torch.randint(128, (2, 9)), torch.stack([packed_positions([4, 5])[0], packed_positions([9])[0]])
    hidden = ours(ours.embed(ids), positions)
    for row in range(2):
        alone = ours(ours.embed(ids[row : row + 1]), positions[row : row + 1])
        torch.testing.assert_close(hidden[row : row + 1], alone, rtol=0, atol=1e-5)


def test_no_gradient_leaks_between_documents() -> None:
    ours = decoder()
    embeds = ours.embed(torch.randint(128, (1, sum(LENGTHS)))).detach().requires_grad_()
    hidden = ours(embeds, packed_positions(LENGTHS))
    hidden[:, 8:20].square().sum().backward()
    assert embeds.grad is not None
    outside = torch.cat([embeds.grad[:, :8], embeds.grad[:, 20:]], dim=1)
    assert not outside.any() and (embeds.grad[:, 8:20].abs().sum(-1) > 0).all()


def test_packed_gradients_equal_separate() -> None:
    ours = decoder()
    ids = torch.randint(128, (1, sum(LENGTHS)))

    def gradients(losses: list[Tensor]) -> list[Tensor]:
        return list(torch.autograd.grad(torch.stack(losses).sum(), list(ours.model.parameters())))

    packed = gradients([ours(ours.embed(ids), packed_positions(LENGTHS)).square().sum()])
    separate = gradients(
        [ours(ours.embed(part), torch.arange(part.shape[1])[None]).square().sum() for part in ids.split(LENGTHS, dim=1)]
    )
    for one, other in zip(packed, separate):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_no_mask_is_built_for_packed_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    from step3vl.models import attention

    ours = decoder()
    shapes = []
    inner = attention.per_document_attention

    def watch(module, query, key, value, attention_mask, **kwargs):
        shapes.append(None if attention_mask is None else tuple(attention_mask.shape))
        return inner(module, query, key, value, attention_mask, **kwargs)

    monkeypatch.setattr(attention, "per_document_attention", watch)
    attention.register()
    ours(ours.embed(torch.randint(128, (1, sum(LENGTHS)))), packed_positions(LENGTHS))
    monkeypatch.undo()
    attention.register()
    assert shapes == [(1, 1, 1, 1)] * 2


def test_document_lengths() -> None:
    assert document_lengths(packed_positions(LENGTHS)) == LENGTHS
    assert document_lengths(torch.tensor([[0, 1, 0], [5, 6, 0]])) == [2, 1, 2, 1]  # a row starts a document


def test_cached_equals_whole() -> None:
    from transformers import DynamicCache

    ours = decoder().eval()
    ids, mask = torch.randint(128, (2, 10)), torch.ones(2, 10, dtype=torch.bool)
    positions = torch.arange(10).expand(2, -1)
    whole = ours(ours.embed(ids), positions, attention_mask=mask)
    cache = DynamicCache()
    parts = [ours(ours.embed(ids[:, :6]), positions[:, :6], cache, mask[:, :6])]
    for k in range(6, 10):
        parts.append(ours(ours.embed(ids[:, k : k + 1]), positions[:, k : k + 1], cache, mask[:, : k + 1]))
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("tie", [False, True])
def test_meta_construction_then_init(tie: bool) -> None:
    with torch.device("meta"):
        made = decoder(tie_embeddings=tie)
    made.to_empty(device="cpu")
    for tensor in [*made.parameters(), *made.buffers()]:
        torch.nn.init.constant_(tensor, float("nan"))
    made.init_weights()
    direct = decoder(tie_embeddings=tie)
    assert (made.lm_head.weight is made.model.embed_tokens.weight) == tie
    assert made.lm_head.weight.std().item() == pytest.approx(0.02, rel=0.1)
    made.load_state_dict(direct.state_dict())
    ids = torch.randint(128, (1, 6))
    assert torch.equal(made(made.embed(ids), torch.arange(6)[None]), direct(direct.embed(ids), torch.arange(6)[None]))


def test_zero_outputs_start_as_the_identity() -> None:
    ours = decoder(zero_init_outputs=True)
    ids = torch.randint(128, (1, 6))
    hidden = ours(ours.embed(ids), torch.arange(6)[None])
    assert torch.equal(hidden, ours.model.norm(ours.embed(ids)))
    assert not ours.lm_head(hidden).any()


@pytest.mark.parametrize("meta", [False, True])
def test_zero_outputs_leave_a_tied_embedding_alone(meta: bool) -> None:
    with torch.device("meta" if meta else "cpu"):
        ours = decoder(tie_embeddings=True, zero_init_outputs=True)
    if meta:
        ours.to_empty(device="cpu")
    for _ in range(2):
        ours.init_weights()
        assert ours.lm_head.weight is ours.model.embed_tokens.weight
        assert ours.lm_head.weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert not ours.blocks()[0].mlp.down_proj.weight.any()


def test_bfloat16_autocast_stays_close() -> None:
    ours = decoder()
    embeds = ours.embed(torch.randint(128, (1, sum(LENGTHS))))
    exact = ours(embeds, packed_positions(LENGTHS))
    with torch.autocast("cpu", torch.bfloat16):
        near = ours(embeds, packed_positions(LENGTHS))
    assert (near - exact).abs().mean() < 0.01


def test_refuses_uneven_heads() -> None:
    with pytest.raises(ValueError, match=r"num_heads 4 .* num_kv_heads 3"):
        Qwen3Decoder(64, 160, 2, 4, 3, 16, 128)

"""Streamed text is the text of the whole, and no character is shown in halves."""

from __future__ import annotations

import random

import pytest
import torch

from step3vl.data.processor import Processor
from step3vl.data.tokenizer import load_tokenizer
from step3vl.generation.sampler import Sampler
from step3vl.generation.streaming import UNFINISHED, TextStream
from step3vl.models import ConvProjector, Qwen3Decoder, VisionLanguageModel
from step3vl.models.vision import PELang
from step3vl.types import Message, MultiCrop, Prompt, Sampling

TOKENIZER = load_tokenizer()
LAYOUT = MultiCrop(global_size=32, crop_size=16, max_side=128, min_side=4)


def streamed(ids: list[int]) -> list[str]:
    text = TextStream(TOKENIZER.decode)
    return [*(text.feed(id) for id in ids), text.rest()]


@pytest.mark.parametrize("text", ["row 2 is 471", "é", "日本語の文", "a🙂b👩‍👩‍👧c", "ß" * 20, "", "end🙂"])
def test_pieces_are_whole_characters_and_add_up(text):
    ids = TOKENIZER.text(text)
    pieces = streamed(ids)
    assert "".join(pieces) == text
    assert not any(UNFINISHED in piece for piece in pieces)
    assert pieces[-1] == ""  # nothing is held back at the end of a whole text


def test_characters_are_spread_over_tokens_here():
    ids = TOKENIZER.text("🙂")
    assert len(ids) == 4, "the test needs a tokenizer that knows no emoji"
    assert streamed(ids) == ["", "", "", "🙂", ""]


def test_text_is_shown_as_soon_as_it_is_certain():
    ids = TOKENIZER.text("no 7") + TOKENIZER.text("🙂")[:2]
    pieces = streamed(ids)
    assert "".join(pieces[:-3]) == "no 7" and pieces[-3:] == ["", "", UNFINISHED]  # cut short by the length limit


def test_any_ids_add_up_to_the_text_of_the_whole():
    rng = random.Random(0)
    for _ in range(300):
        ids = [rng.randrange(TOKENIZER.vocab_size if rng.random() < 0.5 else 256) for _ in range(rng.randrange(12))]
        assert "".join(streamed(ids)) == TOKENIZER.decode(ids), ids


def test_a_stray_byte_does_not_hold_back_what_follows():
    half = TOKENIZER.text("é")[:1]
    assert len(TOKENIZER.text("é")) == 2
    pieces = streamed([*half, *half, *TOKENIZER.text("a")])
    assert pieces == ["", UNFINISHED, UNFINISHED + "a", ""]


# ------------------------------------------------------------------------------------------------ through a model


def sampler(seed: int = 0) -> Sampler:
    torch.manual_seed(0)
    vision = PELang(32, 1, 2, 64, patch_size=4, grid_size=8, layout=LAYOUT)
    decoder = Qwen3Decoder(48, 96, 2, 4, 2, 16, TOKENIZER.vocab_size, init_std=0.3)
    vlm = VisionLanguageModel(vision, ConvProjector, decoder).train()
    processor = Processor().bind(vlm.image_spec, vlm.projector.grid)
    vlm.bind(processor.image_token_id)
    return Sampler(vlm, processor, seed=seed)


def prompt(text: str) -> Prompt:
    return Prompt(messages=[Message(role="user", content=text)])


def drain(stream):
    pieces = []
    while True:
        try:
            pieces.append(next(stream))
        except StopIteration as end:
            return pieces, end.value


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_streaming_says_what_generate_says(temperature):
    sampling = Sampling(max_new_tokens=24, temperature=temperature)
    for text in ("What is it?", "7 + 5", "row"):
        pieces, completion = drain(sampler().stream(prompt(text), sampling))
        assert completion == sampler().generate([prompt(text)], sampling)[0][0]
        assert "".join(pieces) == completion.text and all(pieces) and len(pieces) > 3


def test_a_stop_token_ends_the_stream_and_is_not_shown():
    one = sampler()
    (whole,) = one.generate([prompt("row")], Sampling(max_new_tokens=8))[0]
    one.processor.stop_ids = {whole.token_ids[3]}
    pieces, completion = drain(one.stream(prompt("row"), Sampling(max_new_tokens=8)))
    first = whole.token_ids.index(whole.token_ids[3])
    assert completion.token_ids == whole.token_ids[: first + 1] and not completion.truncated
    assert "".join(pieces) == completion.text == TOKENIZER.decode(whole.token_ids[:first])


def test_tokens_are_made_as_they_are_asked_for_and_closing_restores_the_mode(monkeypatch):
    one = sampler()
    steps = []
    inner = one._choose
    monkeypatch.setattr(one, "_choose", lambda *args: steps.append(1) or inner(*args))
    stream = one.stream(prompt("row"), Sampling(max_new_tokens=500))
    assert one.vlm.training and not steps
    next(stream)
    assert 1 <= len(steps) <= 4 and not one.vlm.training
    assert not torch.is_inference_mode_enabled()
    stream.close()
    assert one.vlm.training


def test_mistakes_arise_at_the_call():
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        sampler().stream(prompt("row"), Sampling(max_new_tokens=0))
    with pytest.raises(ValueError, match="temperature is -1"):
        sampler().stream(prompt("row"), Sampling(max_new_tokens=3, temperature=-1))


# ------------------------------------------------------------------------------------------------ stop texts


def test_a_stop_text_ends_the_answer_and_is_not_shown():
    plain = Sampling(max_new_tokens=24)
    (whole,) = sampler().generate([prompt("row")], plain)[0]
    text = whole.text
    assert len(text) > 12
    for end in (text[5:6], text[4:9], text[8:]):
        cut = Sampling(max_new_tokens=24, stop=("not there", end))
        (found,) = sampler().generate([prompt("row")], cut)[0]
        assert found.text == text[: text.find(end)] and not found.truncated
        assert found.token_ids == whole.token_ids[: found.num_tokens]
        assert end in TOKENIZER.decode(found.token_ids) and end not in TOKENIZER.decode(found.token_ids[:-1])
        assert len(found.logprobs) == found.num_tokens
        pieces, completion = drain(sampler().stream(prompt("row"), cut))
        assert completion == found and "".join(pieces) == found.text and all(pieces)
    (found,) = sampler().generate([prompt("row")], Sampling(max_new_tokens=24, stop=("not there",)))[0]
    assert found == whole and found.truncated


def test_a_stop_text_ends_an_answer_also_where_it_began_before():
    (whole,) = sampler().generate([prompt("row")], Sampling(max_new_tokens=24))[0]
    count = next(k for k in range(5, 24) if len(TOKENIZER.decode(whole.token_ids[:k])) > 8)
    stop = TOKENIZER.decode(whole.token_ids[:count])[-4:]
    assert stop not in TOKENIZER.decode(whole.token_ids[count - 1 : count])
    cut = Sampling(max_new_tokens=9, stop=(stop,))
    begun = Prompt(messages=prompt("row").messages, begun_ids=whole.token_ids[: count - 1])
    (found,) = sampler().generate([begun], cut)[0]
    assert found.token_ids == whole.token_ids[count - 1 : count] and not found.truncated
    assert found.text == ""
    pieces, completion = drain(sampler().stream(begun, cut))
    assert completion == found and pieces == []

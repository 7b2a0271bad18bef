"""The contract of any Qwen3 tokenizer with STEP3-VL's image tokens, tried on the packaged one and on its folder."""

from __future__ import annotations

import pickle

import pytest

from step3vl.data.tokenizer import (
    FOLDER,
    IMAGE_TOKENS,
    SPECIAL_TOKENS,
    TEXT_TOKENS,
    Tokenizer,
    build,
    load_tokenizer,
    train_tokenizer,
)

TEXTS = [
    "Read row 2.",
    "The quick brown fox; don't panic!",
    "(375, 625)",
    "caf\u00e9 na\u00efve \u4f60\u597d \u0440\u0443\u0441\u0441\u043a\u0438\u0439 \u0639\u0631\u0628\u0649",
    "emoji \U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 end",
    "def f(x):\n    return {'a': [x ** 2]}\n\n\tprint(f(3))  # done\n",
    "\\frac{a}{b} <svg width=\"64\"/> | a | b |\r\n| --- | --- |",
    "   leading and trailing   \n\n\n",
    "<|im_end|> <im_patch> <|endoftext|>",
    "",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("tokenizer")
    load_tokenizer().save(path, chat_template="{{ messages }}")
    return str(path)


@pytest.fixture(params=["packaged", "folder"])
def tokenizer(request, folder) -> Tokenizer:
    return load_tokenizer(None if request.param == "packaged" else folder)


class TestContract:
    @pytest.mark.parametrize("token", SPECIAL_TOKENS + TEXT_TOKENS)
    def test_added_tokens_are_single(self, tokenizer, token):
        assert tokenizer.markup(token) == [tokenizer.token_id(token)]
        assert (tokenizer.token_id(token) in tokenizer.special_ids) == (token in SPECIAL_TOKENS)

    def test_digits_stand_alone(self, tokenizer):
        pieces = [tokenizer.decode([i], skip_special=False) for i in tokenizer.text("471 12,500.25")]
        assert pieces == [*"471", " ", *"12", ",", *"500", ".", *"25"]

    @pytest.mark.parametrize("text", TEXTS)
    def test_lossless(self, tokenizer, text):
        assert tokenizer.decode(tokenizer.text(text)) == text

    def test_text_never_gives_special_ids(self, tokenizer):
        ids = tokenizer.text("".join(SPECIAL_TOKENS))
        assert not set(ids) & tokenizer.special_ids
        assert tokenizer.decode(ids) == "".join(SPECIAL_TOKENS)

    def test_thinking_is_one_token_both_ways_and_is_decoded(self, tokenizer):
        assert tokenizer.text("<think>") == tokenizer.markup("<think>") == [tokenizer.token_id("<think>")]
        assert tokenizer.decode(tokenizer.markup("<think>a</think><|im_end|>")) == "<think>a</think>"

    def test_pickled_copies_behave_the_same(self, tokenizer):
        copy = pickle.loads(pickle.dumps(tokenizer))
        assert copy.text("<im_patch> 12") == tokenizer.text("<im_patch> 12")
        assert copy.pad_id == tokenizer.pad_id == tokenizer.token_id("<|endoftext|>")


def test_packaged_size_and_order():
    tokenizer = load_tokenizer()
    assert tokenizer.vocab_size == 1024
    assert tokenizer.token_id("</think>") == 1023
    assert len(tokenizer.text("How many red shapes?")) == 5
    assert set(IMAGE_TOKENS) <= set(SPECIAL_TOKENS)


def test_building_again_gives_the_packaged_file():
    assert build() == (FOLDER / "tokenizer.json").read_text(encoding="utf-8")


def test_folder_is_an_ordinary_hugging_face_tokenizer(folder, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from transformers import AutoTokenizer

    wrapped = AutoTokenizer.from_pretrained(folder)
    assert wrapped.eos_token == "<|im_end|>" and wrapped.pad_token == "<|endoftext|>"
    assert wrapped.chat_template == "{{ messages }}"
    assert wrapped("Read row 2.")["input_ids"] == load_tokenizer().text("Read row 2.")
    assert len(wrapped) == 1024


def test_errors():
    with pytest.raises(ValueError, match=r"no folder 'no/such/folder'; give a local folder with tokenizer\.json"):
        load_tokenizer("no/such/folder")
    with pytest.raises(ValueError, match="has no token '<nope>'"):
        load_tokenizer().token_id("<nope>")
    with pytest.raises(ValueError, match="add text"):
        train_tokenizer(["too little"], 1024)
    with pytest.raises(ValueError, match="vocab_size must be at least 275, got 100"):
        train_tokenizer(["text"], 100)

"""When answers end: stop tokens, stop texts and the length."""

from __future__ import annotations

import random

import pytest
import torch

from step3vl.data.tokenizer import load_tokenizer
from step3vl.generation.stopping import StopRule, StopTexts

TOKENIZER = load_tokenizer()


def test_stop_rule() -> None:
    rule = StopRule.of([2, 9], 4)
    assert rule.stops(torch.tensor([1, 2, 9])).tolist() == [False, True, True]
    assert rule.cut([5, 9]) == ([5], False) and rule.cut([5, 6]) == ([5, 6], True) and rule.cut([]) == ([], True)
    with pytest.raises(ValueError, match="stop_ids is empty"):
        StopRule.of([], 4)
    with pytest.raises(ValueError, match=r"stop is \('a', ''\); accepted is a tuple of texts"):
        StopRule.of([2], 4, ("a", ""))
    with pytest.raises(ValueError, match="stop is 'end'; accepted is a tuple"):
        StopRule.of([2], 4, "end")


def watched(ids: list[int], stop: tuple[str, ...], begun: list[int] | None = None) -> tuple[str, bool, int]:
    """The text let through, whether a stop text came, and after how many ids."""
    watch, text = StopTexts(TOKENIZER.decode, stop, begun or []), ""
    for count, id in enumerate(ids, 1):
        text += watch.feed(id)
        if watch.found:
            return text + watch.rest(), True, count
    return text + watch.rest(), False, len(ids)


@pytest.mark.parametrize("stop", [("</a>",), ("ab", "ba"), ("aab",), ("a", "aa"), ("é",), ("🙂b", "b🙂🙂")])
def test_text_ends_before_the_first_stop_text_and_nothing_else_is_lost(stop):
    rng = random.Random(0)
    num_found = 0
    for _ in range(400):
        text = "".join(rng.choice(["a", "a", "b", "<", "</a", ">", "é", "🙂"]) for _ in range(rng.randrange(14)))
        ids = [id for letter in text for id in TOKENIZER.text(letter)]
        places = [place for s in stop if (place := text.find(s)) >= 0]
        found, is_over, _ = watched(ids, stop)
        assert is_over == bool(places)
        assert found == (text[: min(places)] if places else text), (text, stop)
        num_found += is_over
    assert 10 < num_found < 400


def test_an_answer_ends_with_the_token_that_completes_the_stop_text():
    ids = [id for letter in "x</a>yz" for id in TOKENIZER.text(letter)]
    assert watched(ids, ("</a>",)) == ("x", True, 5)


def test_a_stop_text_may_begin_in_what_was_begun():
    def ids(text):
        return [id for letter in text for id in TOKENIZER.text(letter)]

    assert watched(ids("a>yz"), ("</a>",), ids("x</")) == ("", True, 2)
    assert watched(ids("b>yz"), ("</a>",), ids("x</")) == ("b>yz", False, 4)
    assert watched(ids("<</a>"), ("</a>",), ids("x<")) == ("<", True, 5)
    assert watched(ids("y"), ("x",), ids("x")) == ("y", False, 1), "what was begun is not looked through again"


def test_without_stop_texts_all_is_let_through():
    ids = TOKENIZER.text("a🙂b")
    assert watched(ids, ()) == ("a🙂b", False, len(ids))

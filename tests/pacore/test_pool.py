"""Pools: every problem once, the same after an interruption, scored, filtered by band; the published layout."""

import json
from dataclasses import replace

import pytest

from step3vl.data.shards import ShardReader
from step3vl.evaluation.answers import prompt_hash
from step3vl.pacore.pool import (
    CODE_BAND,
    MATH_BAND,
    Cases,
    PooledMessage,
    PooledProblem,
    append,
    build_pool,
    fraction,
    in_band,
    prompt_of,
    read_pool,
)
from step3vl.pacore.released import read_released
from step3vl.types import Sampling
from tests.pacore.answering import Notes
from tests.pacore.test_measures import Ones

SAMPLING = Sampling(max_new_tokens=20, temperature=1.0, seed=3)


def digits(prompt, sampling, k):
    return f"<think>{'t ' * k}</think>{(sampling.seed + k) % 3}"


def shards(corpus):
    return f"{corpus}/test/text-sums-level0-*.tar"


def test_a_pool_holds_scored_messages_and_where_problems_are(tmp_path, small_corpus):
    file = tmp_path / "pools" / "sums.jsonl"
    notes = Notes(lambda prompt, sampling, k: f"<think>hm</think>{'5' if k % 2 else 'no number'}")
    built = build_pool(file, Cases.of_shards(shards(small_corpus)), notes, SAMPLING, "weights", 6, 3)
    problems = list(read_pool(file))
    assert (built.num_problems, built.num_new, built.num_failed) == (4, 4, 0) and len(problems) == 4
    for problem in problems:
        reader = ShardReader(problem.source["shard"])
        sample = next(reader.read(i) for i in range(len(reader)) if reader.key(i) == problem.source["key"])
        assert sample.id == problem.id and problem.answer == sample.answer
        assert prompt_hash(prompt_of(problem, sample.images)) == problem.prompt
        assert [m.text for m in problem.messages] == ["no number", "5"] * 3 and problem.messages[1].num_tokens == 1
        right = float(sample.answer == "5")
        assert problem.accuracy == pytest.approx(right / 2) and problem.messages[1].score == right
    with pytest.raises(ValueError, match="1 images for a problem with 0"):
        prompt_of(problems[0], [None])


def test_images_are_found_again(tmp_path, small_corpus):
    file = tmp_path / "pool.jsonl"
    pattern = f"{small_corpus}/test/grounding-point-level0-*.tar"
    build_pool(file, Cases.of_shards(pattern, 2), Notes(lambda *_: "(1, 2)"), SAMPLING, "w", 2)
    for problem in read_pool(file):
        reader = ShardReader(problem.source["shard"])
        (sample,) = [reader.read(i) for i in range(len(reader)) if reader.key(i) == problem.source["key"]]
        assert problem.num_images == 1 and prompt_hash(prompt_of(problem, sample.images)) == problem.prompt


@pytest.mark.parametrize("stop_at", [0, 1, 2])
def test_going_on_after_an_interruption_gives_the_same_pool(tmp_path, stop_at):
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"

    def build(file, say):
        return build_pool(file, Cases.of_benchmark("ones", Ones()), Notes(say), SAMPLING, "w", 4, 2)

    build(whole, digits)
    calls = []

    def stops(prompt, sampling, k):
        calls.append(sampling.seed)
        if sampling.seed == 3 + stop_at:
            raise KeyboardInterrupt
        return digits(prompt, sampling, k)

    with pytest.raises(KeyboardInterrupt):
        build(parts, stops)
    if parts.exists():
        text = parts.read_text()
        parts.write_text(text[: len(text) - 40])  # and its last line is torn
    built = build(parts, digits)
    lines = [line for line in parts.read_text().splitlines() if _is_json(line)]
    assert sorted(lines) == sorted(whole.read_text().splitlines()) and built.num_problems == 5
    again = Notes(lambda *_: pytest.fail("asked again"))
    assert build_pool(parts, Cases.of_benchmark("ones", Ones()), again, SAMPLING, "w", 4, 2).num_new == 0


def _is_json(line):
    try:
        return bool(json.loads(line))
    except ValueError:
        return False


def test_failures_are_counted_and_what_has_no_answer_is_asked_again(tmp_path):
    file = tmp_path / "pool.jsonl"

    def broken(prompt, sampling, k):
        text = prompt.messages[-1].content
        return TimeoutError("late") if text == "q0" or (text == "q1" and k == 2) else "1"

    built = build_pool(file, Cases.of_benchmark("ones", Ones(), 3), Notes(broken), SAMPLING, "w", 4, 3)
    assert (built.num_new, built.num_failed, built.num_without_any, built.num_problems) == (2, 5, 1, 2)
    assert [(p.id, len(p.messages), p.num_failed) for p in read_pool(file)] == [("q1", 3, 1), ("q2", 4, 0)]
    built = build_pool(file, Cases.of_benchmark("ones", Ones(), 3), Notes(lambda *_: "1"), SAMPLING, "w", 4, 3)
    assert built.num_new == 1 and [p.id for p in read_pool(file)] == ["q1", "q2", "q0"]


def test_a_pool_is_of_one_model_and_one_sampling(tmp_path):
    file = tmp_path / "pool.jsonl"
    say = Notes(lambda *_: "1")
    build_pool(file, Cases.of_benchmark("ones", Ones(), 1), say, SAMPLING, "w", 2)
    for model, sampling in (("v", SAMPLING), ("w", replace(SAMPLING, temperature=0.5))):
        with pytest.raises(ValueError, match="give another file"):
            build_pool(file, Cases.of_benchmark("ones", Ones(), 1), say, sampling, model, 2)
    with pytest.raises(ValueError, match="num_messages is 0"):
        build_pool(file, Cases.of_benchmark("ones", Ones()), say, SAMPLING, "w", 0)


# ------------------------------------------------------------------------------------------------ bands


def problem(name, scores):
    messages = [PooledMessage(text=str(k), score=s) for k, s in enumerate(scores)]
    return PooledProblem(
        id=name, source={}, conversation=[], prompt="", num_images=0, answer="", answer_type="math", messages=messages
    )


def test_bands_are_open_at_both_ends():
    pool = [problem(str(num), [1.0] * num + [0.0] * (24 - num)) for num in range(25)]
    assert [p.id for p in in_band(pool, *MATH_BAND)] == [str(num) for num in range(1, 9)]
    assert [p.id for p in in_band(pool, *CODE_BAND)] == [str(num) for num in range(1, 15)]
    assert [p.id for p in in_band(pool, 0, 1)] == [str(num) for num in range(1, 24)]
    with pytest.raises(ValueError, match="is empty"):
        list(in_band(pool, 0.5, 0.5))
    with pytest.raises(ValueError, match="x has messages without a score"):
        list(in_band([problem("x", [None, 1.0])], 0, 1))


def test_shares_are_read():
    assert fraction("9/24") == 0.375 and fraction("0.5") == 0.5
    for text in ("nine", "1/0", ""):
        with pytest.raises(ValueError, match="accepted are"):
            fraction(text)


# ------------------------------------------------------------------------------------------------ published


def test_the_published_layout_becomes_a_pool(tmp_path):
    file = tmp_path / "stage1.json"
    rows = [
        {
            "conversation": [{"role": "user", "content": "What is 3 * 4?"}],
            "responses": ["<think>x</think>\\boxed{12}", "It is 13"],
            "ground_truth": "12",
        },
        {"conversation": "2 + 2?", "responses": ["4"], "ground_truth": 4},
        {
            "conversation": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
            "responses": [],
            "ground_truth": "c",
        },
    ]
    file.write_text(json.dumps(rows))
    one, two, three = read_released(file)
    assert [(m.text, m.score) for m in one.messages] == [("\\boxed{12}", 1.0), ("It is 13", 0.0)]
    assert one.accuracy == 0.5 and two.accuracy == 1.0 and three.accuracy is None
    assert three.conversation == [["user", "a"]] and one.source == {"released": "stage1.json"}
    append(tmp_path / "pool.jsonl", one)
    assert list(read_pool(tmp_path / "pool.jsonl")) == [one]
    assert next(read_released(file, score=False)).accuracy is None


@pytest.mark.parametrize(
    "content, said",
    [
        ({}, "must hold a list"),
        ([{"conversation": "x"}], "row 0: must hold conversation"),
        ([{"conversation": 7, "responses": [], "ground_truth": "x"}], "row 0: conversation must be"),
        ([{"conversation": "x", "responses": [7], "ground_truth": "x"}], "responses must be texts"),
        ([{"conversation": [], "responses": [], "ground_truth": "x"}], "no user's turn"),
    ],
)
def test_another_layout_is_named(content, said, tmp_path):
    file = tmp_path / "x.json"
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=said):
        list(read_released(file))


def test_a_pool_that_is_missing_or_something_else_is_named(tmp_path):
    with pytest.raises(ValueError, match="there is no pool"):
        list(read_pool(tmp_path / "none.jsonl"))
    (tmp_path / "x.jsonl").write_text('{"id": "x"}\n')
    with pytest.raises(ValueError, match="line 1: not a problem"):
        list(read_pool(tmp_path / "x.jsonl"))

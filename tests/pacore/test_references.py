"""The warm start's lists: what they hold, in which form, and that the same arguments give the same bytes."""

from collections import Counter

import pytest

from step3vl.pacore import SynthesisTemplate
from step3vl.pacore.references import known_references, known_samples, references, write_references
from step3vl.types import Message, Prompt


def test_lists_are_said_or_asked_for_their_commonest_message():
    template = SynthesisTemplate("short")
    samples = list(references(template, ["Read row 1."], 300, 10, seed=3))
    assert samples == list(references(template, ["Read row 1."], 300, 10, seed=3))
    said = [sample for sample in samples if sample.messages[0].content == "Read row 1.\nRefs"]
    asked = [sample for sample in samples if sample not in said]
    assert 170 < len(said) < 230
    assert {len(sample.answer.split("\n")) for sample in said} == set(range(5, 11))
    sizes = set()
    for sample in asked:
        question, answer = sample.messages
        head, mark, *listed = question.content.split("\n")
        assert (head, mark) == ("Read row 1.", "Refs") and answer.content == sample.answer
        (best, count), *rest = Counter(listed).most_common(2)
        assert best == sample.answer and (not rest or rest[0][1] < count)
        sizes.add(len(listed))
    assert sizes == set(range(1, 11))


def test_a_said_list_goes_on_as_the_prompt_would():
    template = SynthesisTemplate("short")
    samples = list(references(template, ["Q?"], 50, 6))
    for sample in samples:
        if sample.messages[0].content == "Q?\nRefs":
            whole = template.prompt(Prompt(messages=[Message(role="user", content="Q?")]), sample.answer.split("\n"))
            assert whole.messages[0].content == f"Q?\nRefs\n{sample.answer}"
    with pytest.raises(ValueError, match="one message a line, such as short"):
        list(references(SynthesisTemplate(), ["Q?"], 20, 6))


def test_with_rivals_an_error_recurs_and_no_list_is_said():
    samples = list(references(SynthesisTemplate("short"), ["Q?"], 300, 24, rivals=True))
    seconds = []
    for sample in samples:
        _, mark, *listed = sample.messages[0].content.split("\n")
        assert mark == "Refs" and listed and "\n" not in sample.answer
        (best, count), *rest = Counter(listed).most_common(2)
        assert best == sample.answer and (not rest or rest[0][1] < count)
        seconds.append(rest[0][1] / len(listed) if rest and len(listed) > 8 else None)
    shares = [share for share in seconds if share is not None]
    assert sum(share > 0.2 for share in shares) > len(shares) / 4, "a second message is often nearly as common"
    plain = [
        sample.messages[0].content.split("\n")[2:] for sample in references(SynthesisTemplate("short"), ["Q?"], 300, 24)
    ]
    counts = [Counter(listed).most_common(2) for listed in plain if len(listed) > 8]
    recur = [len(found) > 1 and found[1][1] > 0.2 * sum(n for _, n in found) for found in counts]
    assert sum(recur) < len(recur) / 4


def test_references_of_known_samples_keep_image_and_answer(small_corpus):
    known = known_samples(f"{small_corpus}/train/documents-digits-level0-*.tar", 5)
    assert len(known) == 5 and all(sample.messages[-1].content == sample.answer for sample in known)
    made = list(known_references(SynthesisTemplate("short"), known, 100, 24))
    turns = {
        (id(one.images[0]), one.messages[k].content.replace("<image>", "")): one.messages[k + 1].content
        for one in known
        for k in range(0, len(one.messages), 2)
    }
    seen = set()
    for sample in made:
        question, answer = sample.messages
        head, mark, *listed = question.content.split("\n")
        assert head.startswith("<image>Read row") and head.count("<image>") == 1 and mark == "Refs"
        key = (id(sample.images[0]), head.replace("<image>", ""))
        assert turns[key] == answer.content == sample.answer and 1 <= len(listed) <= 24
        seen.add(key)
    assert len(seen) > 10, "questions are drawn from all turns"


def test_shards_of_lists_have_their_name_and_are_repeatable(tmp_path):
    for folder in ("a", "b"):
        write_references(tmp_path / folder, "short", SynthesisTemplate("short"), ["Q?"], 7, 4)
    (shard,) = (tmp_path / "a").glob("*.tar")
    assert shard.name == "short-000000.tar" and shard.read_bytes() == (tmp_path / "b" / shard.name).read_bytes()

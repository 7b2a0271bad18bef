"""Preferences from what is at hand: a corpus with its gold answers, and answers that were given and scored.

Without given answers a wrong one is made by rule: the gold answer of another sample of the same kind, or the own one
with a digit changed. With them (`cases.jsonl` of a run, or a pool) it is a real mistake of the model.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from step3vl.data.preferences import Preference
from step3vl.data.shards import ShardInfo, ShardReader, find_shards, write_shards
from step3vl.types import IMAGE_MARK, Message, Sample

STEM = "preferences"
PAIRS_PER_SHARD = 1000
RIGHT = 0.5
"""An answer with a higher score is right, one with this or less is wrong."""
DIGIT_SHARE = 0.5
"""Share of the answers with digits whose wrong answer is the right one with another digit."""
NUM_DRAWS = 20
"""How often another sample's answer is drawn before a kind counts as one in which all answers are the same."""


@dataclass(frozen=True, slots=True)
class Given:
    """An answer that a model gave to a sample."""

    text: str
    score: float


def write_preferences(
    shards: str | Path, out: str | Path, answers: str | Path | None = None, limit: int | None = None, seed: int = 0
) -> list[ShardInfo]:
    """Preferences of the samples in `shards` as shards in `out`; the same arguments give the same bytes.

    Args:
        shards: a folder, or a pattern, of samples whose last turn is the gold answer.
        out: folder; must hold no such shards.
        answers: `cases.jsonl` of a run, or a pool; samples without a wrong answer in it are left out. None: by rule.
        limit: at most so many pairs.
        seed: of the wrong answers that are made.

    Raises:
        ValueError: nothing to read, `out` in use, a line of `answers` that cannot be read, or no pair at all.
    """
    paths, out = find_shards(shards), Path(out)
    if limit is not None and limit < 1:
        raise ValueError(f"--limit must be at least 1, got {limit}")
    if found := sorted(out.glob(f"{STEM}-*.tar")):
        raise ValueError(f"{out} already holds {found[0].name}; give another folder or remove it")
    pairs = by_rule(paths, seed) if answers is None else from_answers(paths, read_answers(Path(answers)))
    counted = (pair for k, pair in enumerate(pairs) if limit is None or k < limit)
    infos = write_shards(counted, out, STEM, PAIRS_PER_SHARD)
    if not infos:
        raise ValueError(f"{shards} gave no preference: no sample in it has a right and a wrong answer")
    return infos


def by_rule(paths: Sequence[Path], seed: int = 0) -> Iterator[Preference]:
    """The gold answer of each sample against a wrong one. Images of one shard's samples are read one by one."""
    for path in paths:
        reader = ShardReader(path)
        golds = [gold_of(reader.row(k)) for k in range(len(reader))]
        for k in range(len(reader)):
            rng = random.Random(f"{seed}/{reader.key(k)}")
            wrong = wrong_answer(golds[k], golds, rng)
            if wrong is None:
                continue
            sample = reader.read(k)
            if not isinstance(sample, Preference):
                yield preference(sample, golds[k], wrong)


def wrong_answer(gold: str, others: Sequence[str], rng: random.Random) -> str | None:
    """A wrong answer that looks like the right one; None where the rules find none.

    Args:
        gold: the right one; empty: there is none.
        others: right answers to questions of the kind; those that say the same are not taken.
        rng: draws.
    """
    if not gold:
        return None
    digits = [match.start() for match in re.finditer(r"\d", gold)]
    drawn = (rng.choice(others) for _ in range(NUM_DRAWS if others else 0))
    other = next((text for text in drawn if text and not same(text, gold)), None)
    if digits and (other is None or rng.random() < DIGIT_SHARE):
        place = rng.choice(digits)
        digit = rng.choice([d for d in "0123456789" if d != gold[place]])
        return gold[:place] + digit + gold[place + 1 :]
    return other


def from_answers(paths: Sequence[Path], answers: Mapping[str, Sequence[Given]]) -> Iterator[Preference]:
    """A right against a wrong answer of each sample that has a wrong one; where no given one is right, the gold is."""
    for path in paths:
        reader = ShardReader(path)
        for k in range(len(reader)):
            given = answers.get(reader.key(k), ())
            gold = gold_of(reader.row(k))
            wrong = {one.text: None for one in given if one.score <= RIGHT and one.text.strip()}
            right = [one.text for one in given if one.score > RIGHT and one.text.strip()] or [gold]
            wrong_texts = [text for text in wrong if right[0] and not same(text, right[0]) and IMAGE_MARK not in text]
            if not wrong_texts or IMAGE_MARK in right[0]:
                continue
            sample = reader.read(k)
            for number, text in enumerate(wrong_texts):
                yield preference(sample, right[min(number, len(right) - 1)], text, number)


def preference(sample: Sample, chosen: str, rejected: str, number: int = 0) -> Preference:
    """A sample as a preference; `number` tells several of one sample apart."""
    values: dict[str, Any] = {field.name: getattr(sample, field.name) for field in fields(Sample)}
    values["messages"] = [*sample.conversation, Message(role="assistant", content=chosen)]
    if number:
        values["id"] = f"{sample.id[:70]}-{number}"
    return Preference(**values, rejected=rejected)


def read_answers(path: Path) -> dict[str, list[Given]]:
    """Answers by the key of their sample, from `cases.jsonl` of a run or from a pool.

    Raises ValueError with the line that cannot be read.
    """
    if not path.is_file():
        raise ValueError(f"there is no {path}; give cases.jsonl of a run that was tested, or a pool")
    found: dict[str, list[Given]] = {}
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                if "messages" in row:
                    key = str(row["source"].get("key", row["id"]))
                    rows = [(m["text"], m["score"]) for m in row["messages"] if m["score"] is not None]
                else:
                    key, rows = str(row["id"]), [] if row.get("error") else [(row["said"], row["score"])]
                found.setdefault(key, []).extend(Given(str(text), float(score)) for text, score in rows)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"{path}:{number} is no answer: needed are 'id', 'said' and 'score' (cases.jsonl), or 'id', "
                    f"'source' and 'messages' (a pool); {type(error).__name__}: {error}"
                ) from None
    return found


def gold_of(row: Mapping[str, Any]) -> str:
    """The last answer of a stored row; "" where it ends otherwise, or holds an image mark."""
    messages = row.get("messages") or [{}]
    text = messages[-1].get("content", "") if messages[-1].get("role") == "assistant" else ""
    return text if isinstance(text, str) and IMAGE_MARK not in text else ""


def same(one: str, other: str) -> bool:
    """Whether two answers say the same, by their letters and digits."""

    def plain(text: str) -> str:
        return re.sub(r"[\W_]+", " ", text.casefold()).strip() or text.strip()

    return plain(one) == plain(other)

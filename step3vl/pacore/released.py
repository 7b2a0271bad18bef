"""The published layout of PaCoRe's training data as problems of a pool.

The layout is known from the description of PaCoRe-Train-8k alone: a list of {conversation, responses, ground_truth}.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from step3vl.evaluation import Case, HeldOut
from step3vl.evaluation.answers import prompt_hash
from step3vl.types import Message, Prompt

from .messages import compact
from .pool import PooledMessage, PooledProblem


def read_released(file: str | Path, answer_type: str = "math", score: bool = True) -> Iterator[PooledProblem]:
    """Problems in the published layout, a JSON list of {conversation, responses, ground_truth}.

    `conversation` is a text or a list of {role, content} or {from, value}; a conversation with images has no place in
    this layout. Raises ValueError with the row's number for anything else.
    """
    try:
        rows = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as JSON ({error})") from None
    if not isinstance(rows, list):
        raise ValueError(f"{file} must hold a list, it holds a {type(rows).__name__}")
    scorer = HeldOut("")
    for number, row in enumerate(rows):
        where = f"{file}, row {number}"
        if not isinstance(row, Mapping) or not {"conversation", "responses", "ground_truth"} <= row.keys():
            raise ValueError(f"{where}: must hold conversation, responses and ground_truth")
        turns = _turns(row["conversation"], where)
        case = Case(
            id=f"released-{number:06d}",
            prompt=Prompt(messages=[Message(role=r, content=c) for r, c in turns]),  # type: ignore[arg-type]
            answer=str(row["ground_truth"]),
            answer_type=answer_type,
        )
        texts = [text for text in row["responses"] if isinstance(text, str)]
        if len(texts) != len(row["responses"]):
            raise ValueError(f"{where}: responses must be texts")
        scores = scorer.scores([(case, text) for text in texts]) if score else [None] * len(texts)
        yield PooledProblem(
            id=case.id,
            source={"released": Path(file).name},
            conversation=turns,
            prompt=prompt_hash(case.prompt),
            num_images=0,
            answer=case.answer,
            answer_type=answer_type,
            messages=[PooledMessage(text=compact(text), score=s) for text, s in zip(texts, scores)],
            model="released",
        )


def _turns(conversation: Any, where: str) -> list[list[str]]:
    if isinstance(conversation, str):
        return [["user", conversation]]
    roles = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
    turns: list[list[str]] = []
    for turn in conversation if isinstance(conversation, list) else [None]:
        role = turn.get("role", turn.get("from")) if isinstance(turn, Mapping) else None
        content = turn.get("content", turn.get("value")) if isinstance(turn, Mapping) else None
        if role not in roles or not isinstance(content, str):
            raise ValueError(f"{where}: conversation must be a text, or turns with a role and a text")
        turns.append([roles[role], content])
    while turns and turns[-1][0] == "assistant":
        turns.pop()
    if not turns:
        raise ValueError(f"{where}: conversation has no user's turn")
    return turns

"""The synthesis prompt: a problem and the messages of a round become the next round's question (PaCoRe, Table 6).

Only text is replaced: images stay where the problem has them, earlier turns stay as they are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from step3vl.types import IMAGE_MARK, Message, Prompt

PUBLISHED = Path(__file__).with_name("synthesis.jinja")
PACKAGED = {"published": PUBLISHED, "short": Path(__file__).with_name("short.jinja")}
"""By name. The short one is for models so small that they have to learn what a list of messages is; ours."""
SAID_MARK = "[image]"
"""Stands for an image mark that a model wrote itself: no image belongs to it."""


class SynthesisTemplate:
    """A Jinja template of `original_prompt` and `ref_responses`: published, short, or a file; null: the published one.

    Raises ValueError for a file that is missing, is no template, or leaves the problem or a message out.
    """

    def __init__(self, file: str | Path | None = None):
        from jinja2.exceptions import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        path = PACKAGED.get(str(file), Path(file)) if file is not None else PUBLISHED
        try:
            source = path.read_text(encoding="utf-8")
            self._template = ImmutableSandboxedEnvironment().from_string(source)
            probe = self.render("a problem", ["message 1", "message 2"])
        except OSError as error:
            raise ValueError(f"template {path} cannot be read: {error.strerror or error}") from None
        except TemplateError as error:
            raise ValueError(f"template {path} is no Jinja template: {error}") from None
        for part in ("a problem", "message 1", "message 2"):
            if part not in probe:
                raise ValueError(f"template {path} must hold original_prompt and every one of ref_responses")
        self.hash = hashlib.sha256(source.encode()).hexdigest()[:16]
        """Names the template's source in traces and in results."""

    def render(self, problem: str, messages: Sequence[str]) -> str:
        """The text of a synthesis question."""
        return self._template.render(original_prompt=problem, ref_responses=list(messages))

    def prompt(self, original: Prompt, messages: Sequence[str]) -> Prompt:
        """`original` with its last user turn replaced by a synthesis question; without messages, `original` itself.

        Image marks of the problem stay where they are. Those that stand in messages were written by a model, and
        become `[image]`.
        """
        if not messages:
            return original
        turns = list(original.messages)
        for place in range(len(turns) - 1, -1, -1):
            if turns[place].role == "user":
                said = [message.replace(IMAGE_MARK, SAID_MARK) for message in messages]
                turns[place] = Message(role="user", content=self.render(turns[place].content, said))
                return Prompt(messages=turns, images=original.images)
        raise ValueError("a prompt without a user's turn has no problem to be solved again")

"""A chat template as the fixed markup around message contents.

A Jinja template is rendered once for each sequence of roles, with stand-ins for the contents, and cut at them. What
a model learns (the contents of assistant turns) is then known exactly, and no sample has to be rendered again.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from step3vl.data.template_worker import MEGABYTES, SECONDS, render
from step3vl.data.tokenizer import FOLDER

TEMPLATES = FOLDER / "templates"

_ROLES = ("system", "user", "assistant", "user", "assistant")
_PROBE = "\n <think>\na\n</think>\n\n<tool_call>b</tool_call> \n"
"""Content that templates are known to strip or take apart."""


class ChatTemplate:
    """`name` is a packaged template (chat, plain) or the path of a .jinja file.

    Raises ValueError when there is no such template, or when it rewrites, drops or reorders contents.
    """

    def __init__(self, name: str):
        path = Path(name) if name.endswith(".jinja") else TEMPLATES / f"{name}.jinja"
        if not path.is_file():
            packaged = ", ".join(sorted(p.stem for p in TEMPLATES.glob("*.jinja")))
            raise ValueError(f"template: {name!r} is neither one of {packaged} nor the path of a .jinja file")
        self.name, self.is_packaged = name, path.parent == TEMPLATES
        self.source = path.read_text(encoding="utf-8")
        contents = [f"{i}{_PROBE}" for i in range(len(_ROLES))]
        pieces = self.pieces(_ROLES)
        filled = "".join(piece + content for piece, content in zip(pieces, [*contents, ""]))
        if filled != self._render(_ROLES, contents, False):
            raise ValueError(
                f"template {name!r} rewrites the contents of messages (it strips them, or takes thinking apart); "
                "a training template must copy each content as it is"
            )

    def pieces(self, roles: Sequence[str], for_generation: bool = False) -> list[str]:
        """The markup before each content, and after the last: one more than there are roles."""
        marks = [f"\x02{i}\x03" for i in range(len(roles))]
        rest = self._render(roles, marks, for_generation)
        pieces: list[str] = []
        for mark in marks:
            if rest.count(mark) != 1:
                raise ValueError(
                    f"template {self.name!r} must show each message once and in order; for the roles {list(roles)} "
                    f"message {len(pieces)} is missing, repeated or out of place"
                )
            piece, rest = rest.split(mark)
            pieces.append(piece)
        return [*pieces, rest]

    def _render(self, roles: Sequence[str], contents: Sequence[str], for_generation: bool) -> str:
        messages = [{"role": role, "content": content} for role, content in zip(roles, contents)]
        render_it = render if self.is_packaged else render_apart
        found = render_it(self.source, messages, for_generation)
        if "text" in found:
            return found["text"]
        if "refusal" in found:
            raise ValueError(f"template {self.name!r} refuses the roles {list(roles)}: {found['refusal']}")
        raise ValueError(f"template {self.name!r} cannot be rendered: {' '.join(found['error'].split())}")


def render_apart(source: str, messages: list[dict[str, str]], for_generation: bool) -> dict[str, str]:
    """As `render`, in a process of its own: what a template of somebody else does without end, ends with it."""
    worker = Path(__file__).with_name("template_worker.py")
    try:
        done = subprocess.run(
            [sys.executable, "-I", str(worker)],
            input=json.dumps([source, messages, for_generation]),
            capture_output=True,
            text=True,
            timeout=2 * SECONDS,
        )
        return json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        return {"error": f"it was not done after {2 * SECONDS} seconds"}
    except ValueError:
        return {"error": f"it took more than {SECONDS} seconds of processor time, or {MEGABYTES} MB"}

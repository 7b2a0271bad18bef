"""Programming: a program is right when it passes all tests, run in a sandbox (`step3vl.evaluation.sandbox`).

Expected values never meet a program: outputs and return values come out of its sandbox and are compared elsewhere. So
a program cannot pass by ending early, printing "passed", or lying in an `__eq__`.
"""

from __future__ import annotations

import base64
import io
import json
import pickle
import re
import zlib
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal, InvalidOperation
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from step3vl.evaluation.benchmark import Case
from step3vl.evaluation.extract import code_block
from step3vl.evaluation.sandbox import PACKAGES, Limits, call, missing_isolation, run, same_value
from step3vl.types import Message

from .hub import HubBenchmark, Row, asked

SYSTEM = (
    "You are an expert Python programmer. You will be given a question (problem specification) and will generate a "
    "correct Python program that matches the specification and passes all tests."
)
FUNCTION = (
    "### Format: You will use the following starter code to write the solution to the problem and enclose your code "
    "within delimiters.\n```python\n{starter}\n```\n\n### Answer: (use the provided format with backticks)\n"
)
STDIN = (
    "### Format: Read the inputs from stdin solve the problem and write the answer to stdout (do not directly test on "
    "the sample inputs). Enclose your code within delimiters as follows.\n```python\n# YOUR CODE HERE\n```\n\n"
    "### Answer: (use the provided format with backticks)\n"
)
SITE_MODULES = ("string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random", "statistics",
                "itertools", "functools", "operator", "io", "sys", "json")  # fmt: skip
SITE_PRELUDE = "\n".join(
    [f"from {name} import *" for name in [*SITE_MODULES, "builtins", "typing"]]
    + [f"import {name}" for name in SITE_MODULES]
    + ["sys.setrecursionlimit(50000)\n"]
)
"""What a solution of LiveCodeBench may use without importing it: the names, and the order, of its own checker."""


class Programs(HubBenchmark):
    """Scores programs, several at a time. They have numpy where it is installed, as with the released checkers.

    Args:
        data_root, num_cases: as in HubBenchmark.
        num_processes: programs that run at once.
        wall_s: seconds that a program has for one test.
        memory_mb: memory that it has.
    """

    def __init__(
        self,
        data_root: str,
        num_cases: int | None = None,
        num_processes: int = 2,
        wall_s: float = 12.0,
        memory_mb: int = 1024,
    ):
        super().__init__(data_root, num_cases)
        self.num_processes = num_processes
        self.limits = Limits(cpu_s=wall_s, wall_s=wall_s, memory_mb=memory_mb)
        self.packages = [name for name in PACKAGES if find_spec(name) is not None]

    def stream(self, limit: int | None = None) -> Iterator[Case]:
        if missing := missing_isolation():
            raise ValueError(
                f"{type(self).__name__} runs programs that a model wrote, and this machine cannot isolate them: "
                f"{'; '.join(missing)}; leave it out with --only, or use a machine with user namespaces"
            )
        return super().stream(limit)

    def score(self, case: Case, text: str) -> float:
        code = self.program(case, text)
        return float(code is not None and self.passes(case, code))

    def scores(self, pairs: Sequence[tuple[Case, str]]) -> list[float]:
        with ThreadPoolExecutor(self.num_processes) as pool:
            return list(pool.map(lambda pair: self.score(*pair), pairs))

    def is_readable(self, case: Case, text: str) -> bool:
        return self.program(case, text) is not None

    def program(self, case: Case, text: str) -> str | None:
        """The program in an answer; None: there is none."""
        return code_block(text)

    @abstractmethod
    def passes(self, case: Case, code: str) -> bool:
        """Whether a program passes all tests of a case."""

    def printed(self, code: str, stdin: str = "") -> str | None:
        """What a program prints; None: it did not end well."""
        outcome = run(code, stdin, self.limits, packages=self.packages)
        return outcome.stdout if outcome.status == "ok" else None

    def values(self, code: str, function: str, arguments: Sequence[Sequence[Any]]) -> list[Any] | None:
        """What a program's function returns for each row of arguments; None: one of the calls did not end well."""
        values = []
        for row in arguments:  # the first failure ends it: a program that hangs would hang every time
            (outcome,) = call(code, function, [row], self.limits, packages=self.packages)
            if outcome.status != "ok":
                return None
            values.append(outcome.value)
        return values


class LiveCodeBench(Programs):
    """LiveCodeBench, code generation: programs for stdin, or a method of a class; public and hidden tests.

    Args:
        data_root, num_cases, num_processes, wall_s, memory_mb: as in Programs.
        first_date, last_date: contests of this window, e.g. "2024-08-01"; None: all. The window must be told beside
            the score.
    """

    repo, split = "livecodebench/code_generation_lite", "test"
    columns = ("question_id", "question_content", "starter_code", "public_test_cases", "private_test_cases", "metadata")

    def __init__(
        self,
        data_root: str,
        num_cases: int | None = None,
        num_processes: int = 2,
        wall_s: float = 12.0,
        memory_mb: int = 1024,
        first_date: str | None = None,
        last_date: str | None = None,
    ):
        super().__init__(data_root, num_cases, num_processes, wall_s, memory_mb)
        self.first_date, self.last_date = first_date, last_date

    def files(self) -> list[Path]:
        """test.jsonl and what later releases added: test2.jsonl, test3.jsonl, ..., in this order."""
        named = [(re.fullmatch(r"test(\d*)\.jsonl", path.name), path) for path in self.folder().rglob("test*.jsonl")]
        releases = sorted((int(match[1] or 1), path) for match, path in named if match)
        return [path for _, path in releases] or super().files()

    def keeps(self, row: Row) -> bool:
        date = str(row.get("contest_date", ""))[:10]
        return (self.first_date or "") <= date and (self.last_date is None or date <= self.last_date)

    def read(self, row: Row, number: int) -> Case:
        tests = [*json.loads(row["public_test_cases"]), *hidden_tests(row["private_test_cases"])]
        name = json.loads(row["metadata"] or "{}").get("func_name")
        starter = row["starter_code"] or ""
        text = f"### Question:\n{row['question_content']}\n\n"
        prompt = asked(text + (FUNCTION.format(starter=starter) if starter else STDIN), [])
        prompt.messages.insert(0, Message(role="system", content=SYSTEM))
        return Case(
            id=str(row["question_id"]),
            prompt=prompt,
            answer=f"{len(tests)} tests",
            answer_type="program",
            group=str(row.get("difficulty", "")),
            gold={
                "function": name,
                "tests": [_functional(test) if name else (test["input"], test["output"]) for test in tests],
            },
        )

    def passes(self, case: Case, code: str) -> bool:
        """A program prints what is expected; a method, or a function where there is no class Solution, returns it."""
        function, tests = case.gold["function"], case.gold["tests"]
        whole = with_prelude(code, SITE_PRELUDE)
        if function is None:
            return all(
                (said := self.printed(whole, given)) is not None and same_output(said, gold) for given, gold in tests
            )
        name = f"Solution.{function}" if "class Solution" in code else function
        values = self.values(whole, name, [given for given, _ in tests])
        return values is not None and all(
            same_value(list(said) if isinstance(said, tuple) else said, gold)  # not punished for a tuple
            for said, (_, gold) in zip(values, tests)
        )


# ------------------------------------------------------------------------------------------------ tests


def with_prelude(code: str, prelude: str) -> str:
    """A program behind what it may use; its imports from __future__ must stay first."""
    first = re.compile(r"^from __future__ import .*$", re.MULTILINE)
    return "\n".join([*first.findall(code), prelude, first.sub("", code)])


def same_output(said: str, gold: str) -> bool:
    """Equal line by line but for spaces at the ends; numbers in equal places may be written in another way."""
    lines = [[line.strip() for line in text.strip().split("\n")] for text in (said, gold)]
    if len(lines[0]) != len(lines[1]):
        return False
    return all(a == b or _numbers(a) == _numbers(b) is not None for a, b in zip(*lines))


def _numbers(line: str) -> list[Decimal] | None:
    """Exact ones: as floats, 10**17 and 10**17 + 1 are the same."""
    try:
        return [Decimal(word) for word in line.split()]
    except InvalidOperation:
        return None


def _functional(test: dict[str, Any]) -> tuple[list[Any], Any]:
    """Arguments, one a line, and the value that is expected; both are JSON."""
    return [json.loads(line) for line in test["input"].splitlines()], json.loads(test["output"])


def hidden_tests(text: str) -> list[dict[str, Any]]:
    """The hidden tests: JSON, or base64 of a compressed pickle of JSON, of which nothing but its text is read."""
    try:
        return json.loads(text)
    except ValueError:
        return json.loads(_TextOnly(io.BytesIO(zlib.decompress(base64.b64decode(text)))).load())


class _TextOnly(pickle.Unpickler):
    """Reads a pickle that holds text; one that names anything that could run is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise ValueError(f"hidden tests name {module}.{name}; they may hold text only")

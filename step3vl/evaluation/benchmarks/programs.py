"""Programming: a program is right when it passes all tests, run in a sandbox (`step3vl.evaluation.sandbox`).

Expected values never enter the sandbox: outputs and return values come out of it and are compared here. So a program
cannot pass by ending early, printing "passed", or lying in an `__eq__`.
"""

from __future__ import annotations

import ast
import base64
import io
import json
import pickle
import re
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from step3vl.evaluation.benchmark import Case
from step3vl.evaluation.extract import code_block
from step3vl.evaluation.sandbox import Limits, call, missing_isolation, run, same_value
from step3vl.types import Message

from .hub import HubBenchmark, Row, asked, picture

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
DIAGRAM = (
    "Complete the following Python function so that it does what the diagram shows. Put the whole function into one "
    "```python block.\n\n```python\n{signature}\n```"
)
PRELUDE = """from typing import *
import bisect, collections, functools, heapq, itertools, math, operator, re, string, sys
from collections import Counter, OrderedDict, defaultdict, deque
from functools import cache, cmp_to_key, lru_cache, reduce
from heapq import heapify, heappop, heappush
from itertools import accumulate, combinations, permutations, product
from math import ceil, comb, floor, gcd, inf, sqrt
sys.setrecursionlimit(50000)
"""
"""What a solution may use without importing it, as on the sites that its tasks come from."""


class Programs(HubBenchmark):
    """Scores programs, several at a time.

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

    def stream(self, limit: int | None = None) -> Iterator[Case]:
        if missing := missing_isolation():
            raise ValueError(
                f"{type(self).__name__} runs programs that a model wrote, and this machine cannot isolate them: "
                f"{'; '.join(missing)}; leave it out with --only, or use a machine with user namespaces"
            )
        return super().stream(limit)

    def score(self, case: Case, text: str) -> float:
        code = code_block(text)
        return float(code is not None and self.passes(case, code))

    def scores(self, pairs: Sequence[tuple[Case, str]]) -> list[float]:
        with ThreadPoolExecutor(self.num_processes) as pool:
            return list(pool.map(lambda pair: self.score(*pair), pairs))

    def is_readable(self, case: Case, text: str) -> bool:
        return code_block(text) is not None

    def passes(self, case: Case, code: str) -> bool:
        """Whether a program passes all tests of a case."""
        function, tests, code = case.gold["function"], case.gold["tests"], with_prelude(code)
        if function is None:
            outcomes = (run(code, given, self.limits) for given, _ in tests)
            return all(o.status == "ok" and same_output(o.stdout, gold) for o, (_, gold) in zip(outcomes, tests))
        found = call(code, function, [given for given, _ in tests], self.limits)
        return all(o.status == "ok" and same_value(o.value, gold) for o, (_, gold) in zip(found, tests))


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
                "function": f"Solution.{name}" if name else None,
                "tests": [_functional(test) if name else (test["input"], test["output"]) for test in tests],
            },
        )


class HumanEvalV(Programs):
    """HumanEval-V (253 functions that a diagram explains). Tests are the `assert f(...) == value` of a test script."""

    repo, split = "HumanEval-V/HumanEval-V-Benchmark", "test"
    columns = ("qid", "diagram", "function_signature", "test_script")

    def read(self, row: Row, number: int) -> Case:
        name, tests = asserted(row["test_script"])
        text = DIAGRAM.format(signature=row["function_signature"].strip())
        return Case(
            id=str(row["qid"]),
            prompt=asked(text, [picture(row["diagram"], row, "diagram")]),
            answer=f"{len(tests)} tests",
            answer_type="program",
            gold={"function": name, "tests": tests},
        )


# ------------------------------------------------------------------------------------------------ tests


def with_prelude(code: str) -> str:
    """A program behind PRELUDE; its imports from __future__ must stay first."""
    first = re.compile(r"^from __future__ import .*$", re.MULTILINE)
    return "\n".join([*first.findall(code), PRELUDE, first.sub("", code)])


def same_output(said: str, gold: str) -> bool:
    """Equal line by line but for spaces at the ends; numbers in equal places may be written in another way."""
    lines = [[line.strip() for line in text.strip().splitlines()] for text in (said, gold)]
    if len(lines[0]) != len(lines[1]):
        return False
    return all(a == b or _numbers(a) == _numbers(b) is not None for a, b in zip(*lines))


def _numbers(line: str) -> list[float] | None:
    try:
        return [float(word) for word in line.split()]
    except ValueError:
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


def asserted(script: str) -> tuple[str, list[tuple[list[Any], Any]]]:
    """The function under test, and (arguments, expected value) of each assertion of a test script.

    Raises:
        ValueError: an assertion is of another form than `assert f(literals) == literal`.
    """
    names, tests = set(), []
    for node in ast.walk(ast.parse(script)):
        if not isinstance(node, ast.Assert):
            continue
        test = node.test
        if not (
            isinstance(test, ast.Compare)
            and isinstance(test.left, ast.Call)
            and isinstance(test.left.func, ast.Name)
            and not test.left.keywords
            and [type(op) for op in test.ops] == [ast.Eq]
        ):
            raise ValueError(
                f"the assertion {ast.unparse(node)[:80]!r} is not of the form assert f(literals) == literal"
            )
        names.add(test.left.func.id)
        tests.append(([ast.literal_eval(arg) for arg in test.left.args], ast.literal_eval(test.comparators[0])))
    if len(names) != 1:
        raise ValueError(f"a test script must test one function, this one tests {sorted(names) or 'none'}")
    return names.pop(), tests

"""HumanEval-V: a function that a diagram explains, judged by the released test script.

A model's function never sees the script: its values are computed first, for the arguments that the script names, and
the script is then run with a function that only repeats them.
"""

from __future__ import annotations

import ast
from typing import Any

from step3vl.evaluation.benchmark import Case
from step3vl.evaluation.extract import code_block

from .hub import Row, asked, picture
from .programs import Programs, with_prelude

DIAGRAM = (
    "Complete the following Python function so that it does what the diagram shows. Put the whole function into one "
    "```python block.\n\n```python\n{signature}\n```"
)
REPEAT = """
inf, nan = float("inf"), float("nan")
def {function}(*given):
    for arguments, value in {answers!r}:
        if arguments == list(given):
            return __import__("copy").deepcopy(value)
    raise LookupError(f"{{given}} was not asked")

"""
"""A function that gives the recorded values again."""


class HumanEvalV(Programs):
    """HumanEval-V (253 functions that a diagram explains), directly from the diagram to the program ("V2C")."""

    repo, split = "HumanEval-V/HumanEval-V-Benchmark", "test"
    columns = ("qid", "diagram", "function_signature", "test_script")

    def read(self, row: Row, number: int) -> Case:
        signature, script = row["function_signature"].rstrip(), row["test_script"]
        function, calls = calls_of(script, signature)
        return Case(
            id=str(row["qid"]),
            prompt=asked(DIAGRAM.format(signature=signature), [picture(row["diagram"], row, "diagram")]),
            answer=f"{len(calls)} calls",
            answer_type="program",
            group=str(row.get("task_type") or ""),
            gold={"function": function, "calls": calls, "signature": signature, "script": called(script)},
        )

    def program(self, case: Case, text: str) -> str | None:
        code = code_block(text, holding=f"def {case.gold['function']}")
        if code is not None and code.lstrip("\n").startswith("  "):  # the body alone
            code = f"{case.gold['signature']}\n{code}"
        return code

    def passes(self, case: Case, code: str) -> bool:
        gold = case.gold
        frame = f"{gold['signature']}\n    pass\n\n"
        values = self.values(with_prelude(code, frame), gold["function"], gold["calls"])
        if values is None:
            return False
        answers = list(zip(gold["calls"], values))
        script = frame + REPEAT.format(function=gold["function"], answers=answers) + gold["script"]
        return self.printed(script) is not None


def calls_of(script: str, signature: str) -> tuple[str, list[list[Any]]]:
    """The function under test, and the arguments of each of its calls in a test script, in order.

    Raises:
        ValueError: a call whose arguments are no literals, or a script without calls.
    """
    ways = [node for node in ast.walk(ast.parse(f"{signature}\n    pass")) if isinstance(node, ast.FunctionDef)]
    if not ways:
        raise ValueError(f"the signature defines no function: {signature[:80]!r}")
    function, names = ways[-1].name, [argument.arg for argument in ways[-1].args.args]
    calls: list[list[Any]] = []
    for node in ast.walk(ast.parse(script)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == function:
            if node.keywords:
                raise ValueError(f"{ast.unparse(node)[:80]!r} names arguments; they must be given in the order {names}")
            calls.append([ast.literal_eval(argument) for argument in node.args])
    if not calls:
        raise ValueError(f"the test script never calls {function}")
    return function, calls


def called(script: str) -> str:
    """A test script whose test functions are called, as is where it calls them itself."""
    tree = ast.parse(script)
    tests = [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test")]
    used = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    return script + "".join(f"\n{name}()" for name in tests if name not in used) + "\n"

"""Text only: sums, word problems, what a program prints, ways through a graph, instructions that can be checked.

Held out: pairs of operands, and for graphs and instructions one draw in five by a hash of the question.
"""

from __future__ import annotations

import random

import networkx as nx

from step3vl.data.corpus.draft import Draft, Subset, Turn, draw_operands, held_out_layout, held_out_operands
from step3vl.data.corpus.words import WORDS


def _distinct(make, turns: int) -> Draft:  # type: ignore[no-untyped-def]
    """Up to `turns` turns with different questions."""
    found: dict[str, Turn] = {}
    for _ in range(8 * turns):
        turn = make()
        found.setdefault(turn.question, turn)
        if len(found) == turns:
            break
    return Draft(turns=list(found.values()))


def sums(rng: random.Random, level: int, held_out: bool, turns: int) -> Draft:
    """3+4=? (0), two digits (1), brackets (2), large products (3), powers modulo a number (4); steps at 2 and 3."""

    def make() -> Turn:
        if level <= 1:
            a, b = draw_operands(rng, 0, 9 if level == 0 else 99, held_out)
            if rng.random() < 0.5:
                return _number(f"{a}+{b}=?", a + b)
            while a < b:
                a, b = draw_operands(rng, 0, 9 if level == 0 else 99, held_out)
            return _number(f"{a}-{b}=?", a - b)
        if level == 2:
            a, b = draw_operands(rng, 2, 20, held_out)
            c = rng.randint(2, 9)
            return _number(f"({a}+{b})*{c}=?", (a + b) * c, f"{a}+{b}={a + b}")
        if level == 3:
            a, b = draw_operands(rng, 100, 9999, held_out)
            tens, ones = b // 10 * 10, b % 10
            steps = f"{a}*{tens}={a * tens}\n{a}*{ones}={a * ones}"
            return _number(f"{a}*{b}=?", a * b, steps)
        a, b = draw_operands(rng, 3, 60, held_out)
        n = rng.randint(50, 999)
        return _number(f"What is {a}^{b} modulo {n}?", pow(a, b, n))

    return _distinct(make, turns)


def _number(question: str, answer: int, steps: str = "") -> Turn:
    text = f"{steps}\n{answer}" if steps else str(answer)
    return Turn(question=question, answer_text=text, answer=str(answer), answer_type="number")


NAMES = ("Ana", "Ben", "Cem", "Dia", "Eli", "Fay", "Gus", "Hana", "Ivo", "Jun", "Kai", "Lea")
THINGS = ("apples", "books", "coins", "eggs", "cards", "pens", "stamps", "shells")


def problems(rng: random.Random, level: int, held_out: bool, turns: int) -> Draft:
    """Word problems of one step (1) to a system of two equations solved by sympy (4)."""

    def make() -> Turn:
        one, two = rng.sample(NAMES, 2)
        thing = rng.choice(THINGS)
        a, b = draw_operands(rng, 2, 30, held_out)
        if level == 1:
            if rng.random() < 0.5:
                question = f"{one} has {a} {thing} and gets {b} more. How many {thing} has {one} now?"
                return _number(question, a + b, f"{a} + {b} = {a + b}")
            a, b = max(a, b), min(a, b)
            if held_out_operands(a, b) != held_out:
                return make()
            question = f"{one} has {a} {thing} and gives {b} to {two}. How many {thing} has {one} left?"
            return _number(question, a - b, f"{a} - {b} = {a - b}")
        if level == 2:
            c = rng.randint(2, 9)
            question = f"{one} buys {a} boxes of {c} {thing} and finds {b} more. How many {thing} has {one}?"
            return _number(question, a * c + b, f"{a} * {c} = {a * c}\n{a * c} + {b} = {a * c + b}")
        if level == 3:
            c = rng.randint(2, 6)
            total = a * (c + 1) + b
            question = (
                f"{one} has {c} times as many {thing} as {two}, and there are {b} more in a box. "
                f"Altogether there are {total}. How many has {two}?"
            )
            return _number(question, a, f"{c}x + x + {b} = {total}\n{c + 1}x = {total - b}")
        import sympy

        x, y = sympy.symbols("x y")
        heads, legs = a + b, 2 * a + 4 * b
        solution = sympy.solve([x + y - heads, 2 * x + 4 * y - legs], [x, y])
        question = f"A farm has hens and cows. There are {heads} heads and {legs} legs. How many cows are there?"
        return _number(question, int(solution[y]), f"x + y = {heads}\n2x + 4y = {legs}\n2y = {legs - 2 * heads}")

    return _distinct(make, turns)


def python(rng: random.Random, level: int, held_out: bool, turns: int) -> Draft:
    """What a short program prints; every program is run by hand in the generator, and by Python in the tests."""

    def make() -> Turn:
        a, b = draw_operands(rng, 2, 9 if level == 0 else 20, held_out)
        if level == 0:
            code, output = f"print({a} * {b})", str(a * b)
        elif level == 1:
            word = rng.choice(WORDS)
            code, output = rng.choice(
                [
                    (f"x = {a}\nx += {b}\nprint(x)", str(a + b)),
                    (f'print(len("{word}") + {a} * {b})', str(len(word) + a * b)),
                    (f'print("{word}"[0] * {a} + "{b}")', word[0] * a + str(b)),
                ]
            )
        elif level == 2:
            code = f"t = 0\nfor i in range({a}):\n    t += i * {b}\nprint(t)"
            output = str(b * a * (a - 1) // 2)
        elif level == 3:
            words = rng.sample(WORDS, 4)
            n = rng.randint(0, 3)
            code = f"w = {words}\nw.sort()\nprint(w[{n}], {a} // {b}, {a} % {b})"
            output = f"{sorted(words)[n]} {a // b} {a % b}"
        else:
            code = f"def f(n):\n    return n if n < 2 else f(n - 1) + {a} * f(n - 2)\nprint(f({min(b, 9)}))"
            low, high = 0, 1
            for _ in range(min(b, 9)):
                low, high = high, high + a * low
            output = str(low)
        return Turn(question=f"What does this print?\n{code}", answer_text=output, answer_type="exact")

    return _distinct(make, turns)


def graph(rng: random.Random, level: int, held_out: bool, turns: int) -> Draft:
    """Roads between towns: is there a way, how long is the shortest."""
    num = {1: 4, 2: 6, 3: 8, 4: 12}[level]

    def make() -> Turn:
        wanted = rng.random() < 0.5
        while True:
            towns = rng.sample("ABCDEFGHJKLMNPQRSTUV", num)
            roads: nx.Graph = nx.Graph()
            roads.add_nodes_from(towns)
            for a, b in rng.sample([(a, b) for k, a in enumerate(towns) for b in towns[:k]], num + level - 2):
                roads.add_edge(a, b, weight=rng.randint(1, 9))
            a, b = rng.sample(towns, 2)
            lines = [f"{u}-{v} {data['weight']}" for u, v, data in roads.edges(data=True)]
            if level <= 2:
                told = "Roads: " + ", ".join(line.split()[0] for line in lines) + "."
                way = nx.has_path(roads, a, b)
                question = f"{told} Is there a way from {a} to {b}?"
                answer, text = ("yes", "yes") if way else ("no", "no")
                kind = "exact"
            else:
                told = "Roads and their lengths: " + ", ".join(lines) + "."
                question = f"{told} How long is the shortest way from {a} to {b}? Say none if there is no way."
                if nx.has_path(roads, a, b):
                    path = nx.shortest_path(roads, a, b, weight="weight")
                    answer = str(nx.path_weight(roads, path, "weight"))
                    text, kind = f"{'-'.join(path)}\n{answer}", "number"
                else:
                    answer, text, kind = "none", "none", "exact"
            if held_out_layout(question) == held_out and (level > 2 or wanted == (answer == "yes")):
                return Turn(question=question, answer_text=text, answer=answer, answer_type=kind)

    return _distinct(make, turns)


def instructions(rng: random.Random, level: int, held_out: bool, turns: int) -> Draft:
    """Do exactly as told: copy, capitals, backwards, sort, count letters."""

    def make() -> Turn:
        while True:
            words = rng.sample(WORDS, 1 if level == 0 else level + 2)
            line = " ".join(words)
            tasks = [(f"Copy: {line}", line), (f"Write in capitals: {line}", line.upper())]
            if level >= 1:
                tasks += [
                    (f"Write the words in reverse order: {line}", " ".join(reversed(words))),
                    (f"Write the last word: {line}", words[-1]),
                ]
            if level >= 2:
                tasks += [
                    (f"Sort the words by the alphabet: {line}", " ".join(sorted(words))),
                    (f"Join the first letters: {line}", "".join(word[0] for word in words)),
                ]
            if level >= 3:
                long = [word for word in words if len(word) > 4]
                tasks += [(f"How many words have more than four letters? {line}", str(len(long)))]
            question, answer = rng.choice(tasks)
            if held_out_layout(question) == held_out:
                return Turn(question=question, answer_text=answer, answer_type="exact")

    return _distinct(make, turns)


SUBSETS = {
    "sums": Subset(sums, (0, 1, 2, 3, 4)),
    "problems": Subset(problems, (1, 2, 3, 4)),
    "python": Subset(python, (0, 1, 2, 3, 4)),
    "graph": Subset(graph, (1, 2, 3, 4)),
    "instructions": Subset(instructions, (0, 1, 2, 3)),
}

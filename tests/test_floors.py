"""Imports go down only, rooms on floor 1 never import one another, and there is no cycle (docs/tour.md)."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1] / "step3vl"
FLOORS = {
    0: {"types", "config", "precision", "parallel", "saving", "signals", "weights"},
    1: {"models", "data", "losses", "optim"},
    2: {"generation", "evaluation", "rewards", "rl"},
    3: {"stages", "callbacks", "pacore", "serving"},
    4: {
        "ablation",
        "answering",
        "ask",
        "chain",
        "checkpoints",
        "compare",
        "coordinate",
        "diagnose",
        "evaluate",
        "harness",
        "lightning_cli",
        "plan",
        "pools",
        "serve",
        "slurm",
        "synthesis",
    },
    5: {"cli", "__main__"},
}
FLOOR = {room: floor for floor, rooms in FLOORS.items() for room in rooms}


def imports(path: Path) -> set[str]:
    """Dotted step3vl modules that a file imports, at any depth, relative ones resolved."""
    package = ("step3vl", *path.relative_to(ROOT).parent.parts)
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            found.add(".".join([*base, node.module] if node.module else base))
    return {name for name in found if name.split(".")[0] == "step3vl"}


def edges() -> list[tuple[str, str, str]]:
    out = []
    for path in ROOT.rglob("*.py"):
        room = path.relative_to(ROOT).parts[0].removesuffix(".py")
        for name in imports(path):
            target = name.split(".")[1] if "." in name else "__init__"
            out.append((room, target, str(path.relative_to(ROOT))))
    return out


def test_every_room_has_a_floor():
    rooms = {p.name.removesuffix(".py") for p in ROOT.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert rooms - {"__init__"} == set(FLOOR)


def test_imports_go_down():
    found = edges()
    assert len(found) > 50, "the walk found almost nothing: it is broken"
    wrong = [
        f"{file}: {room} -> {target}"
        for room, target, file in found
        if target in FLOOR and room in FLOOR and room != target and FLOOR[target] >= FLOOR[room] >= 0
        if not (FLOOR[room] == FLOOR[target] and FLOOR[room] not in (1,))
    ]
    assert not wrong, wrong


def test_no_cycle_between_rooms():
    graph: dict[str, set[str]] = {}
    for room, target, _ in edges():
        if room != target and target in FLOOR:
            graph.setdefault(room, set()).add(target)

    def reaches(start: str, goal: str, seen: set[str]) -> bool:
        return any(n == goal or (n not in seen and reaches(n, goal, seen | {n})) for n in graph.get(start, ()))

    assert not [room for room in graph if reaches(room, room, {room})]

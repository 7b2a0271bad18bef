"""What the README tells people to type exists: verbs, files, cards, keys, make targets, links."""

import re
import shlex
from pathlib import Path

import pytest

from step3vl.cli import USAGE
from step3vl.config import compose
from step3vl.lightning_cli import VERBS, read_command

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
BLOCKS = "\n".join(re.findall(r"```bash\n(.*?)```", TEXT, re.S)).replace("\\\n", " ")
COMMANDS = [line.split("  #")[0].strip() for line in BLOCKS.splitlines() if line.strip() and not line.startswith("#")]


def test_commands_are_found():
    assert (
        sum(c.startswith("step3vl") for c in COMMANDS) >= 7 and "make test" in COMMANDS and "make reproduce" in COMMANDS
    )


@pytest.mark.parametrize("command", [c for c in COMMANDS if "step3vl " in c])
def test_command_makes_sense(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(re.sub(r"\$\(\(.*?\)\)|\$\w+", "8", command[command.index("step3vl ") :]))[1:]
    if words[0] in VERBS and "FILE" not in words:
        read = read_command(words[0], words[1:])
        assert compose(read.files, read.overrides, read.scale).config["model"]
    else:
        pattern = f"  {words[0]} {words[1]}" if words[0] in ("data", "ablate") else f"  {words[0]}"
        assert pattern in USAGE
        for word in words:
            assert not word.endswith(".yaml") or "OUT/" in word or (ROOT / word).is_file()


def test_make_targets_and_links_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    assert {c.split()[1] for c in COMMANDS if c.startswith("make ")} <= targets
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_ci_runs_the_test_command_of_the_readme():
    assert "make test" in (ROOT / ".ci/run").read_text()

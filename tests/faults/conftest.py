"""Uninterrupted runs, on one rank and on two, and one that was killed half-way, for all tests of a session."""

import contextlib
import shutil
from pathlib import Path

import pytest

from .processes import FSDP2, Run

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def made(tmp_path_factory, small_corpus):
    """An empty checkout for runs that several tests look at."""
    folder = tmp_path_factory.mktemp("made")
    shutil.copytree(ROOT / "experiments", folder / "experiments")
    (folder / "corpus").symlink_to(small_corpus)
    return folder


@pytest.fixture(scope="session")
def whole(made):
    """A run of one rank that nothing befell."""
    with contextlib.chdir(made):
        Run("whole").finish()
    return made / "whole"


@pytest.fixture(scope="session")
def two(made):
    """One of two sharded ranks."""
    with contextlib.chdir(made):
        Run("two", *FSDP2, num_ranks=2).finish()
    return made / "two"


@pytest.fixture(scope="session")
def half(made):
    """One that was killed after some checkpoints."""
    with contextlib.chdir(made):
        run = Run("half")
        assert run.until(lambda: run.newest() >= 4)
        run.kill()
    return made / "half"


@pytest.fixture
def begun(half, workplace):
    """The killed run in a workplace of its own; its checkpoints lie at about step 4."""
    shutil.copytree(half, workplace / "begun")
    return workplace / "begun"


def pytest_terminal_summary(terminalreporter):
    """After `pytest -m slow`, a table of what was reached, from tests that call `record_property("figure", ...)`."""
    rows = [
        (value, report.nodeid, f"{report.duration:,.0f} s")
        for report in terminalreporter.stats.get("passed", [])
        for name, value in report.user_properties
        if name == "figure"
    ]
    if rows and terminalreporter.config.option.markexpr == "slow":
        terminalreporter.section("figures reached")
        for figure, test, seconds in sorted(rows):
            terminalreporter.write_line(f"{figure}  [{seconds}, {test}]")

"""The examples and the commands of docs/data_format.md, "Bringing your own data", do what the page says."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from step3vl.cli import main
from step3vl.data.shards import ShardReader
from tests.data.importers.drawn import encoded, llava, turns, write_json

PAGE = (Path(__file__).parents[3] / "docs/data_format.md").read_text()
SECTION = PAGE[PAGE.index("## Bringing your own data") : PAGE.index("## Answer types")]
EXAMPLES = dict(re.findall(r"^`(\w+)`: .*?\n\n```jsonl?\n(.*?)```", SECTION, re.S | re.M))


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("coco/000000033471.jpg", "cat.png", "a.png", "b.png", "c.png"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).write_bytes(encoded("JPEG" if name.endswith("jpg") else "PNG"))
    return tmp_path


@pytest.mark.parametrize(
    ("format", "num_images"), [("llava", [1]), ("sharegpt", [0, 1]), ("qwenvl", [2, 1]), ("preference", [1, 0, 0])]
)
@pytest.mark.parametrize("named", [True, False])
def test_each_example_is_imported(place, capsys, format, num_images, named):
    assert len(EXAMPLES) == 4 and len(EXAMPLES[format].strip().splitlines()) <= 7
    (place / "mine.json").write_text(EXAMPLES[format])
    words = ["--format", format] if named else []
    assert main(["data", "import", "mine.json", "--images", "photos", "--out", "o", "--domain", "vqa", *words]) == 0
    assert f"imported {len(num_images)} of {len(num_images)} records\n" in capsys.readouterr().out
    samples = list(ShardReader("o/vqa-mine-level0-000000.tar"))
    assert [len(sample.images) for sample in samples] == num_images


def test_the_commands_run_in_order(place, capsys):
    commands = re.search(r"```bash\n(.*?)```", SECTION, re.S)[1].replace("\\\n", " ").splitlines()
    write_json(place / "mine.json", [llava(image="a.png"), {"conversations": turns("q", "a")}])
    for command in commands:
        words = shlex.split(command, comments=True)
        if words[:2] == ["step3vl", "data"]:
            assert main(words[1:]) == 0, command
    assert "imported 2 of 2 records" in capsys.readouterr().out and (place / "shards/mine").is_dir()


def test_the_options_of_the_table_are_those_of_the_commands(capsys):
    text = ""
    for verb in ("import", "validate"):
        with pytest.raises(SystemExit):
            main(["data", verb, "--help"])
        text += capsys.readouterr().out
    table = SECTION[SECTION.index("| option |") : SECTION.index("Beside the shards")]
    assert set(re.findall(r"--\w+", table)) == set(re.findall(r"^  (--\w+)", text, re.M))

"""lmms-eval: what it asks becomes our prompt, what we say is read as meant, and its tasks run on local data."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from step3vl.harness.adapter import prompt_of, readable

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "task, said, read",
    [
        ("screenspot_v2_local", "[125, 220]", "[0.1250, 0.2200]"),
        ("screenspot_v2", "<think>[9, 9]</think>[0.12, 0.22]", "[0.12, 0.22]"),
        ("osworld_g", "[-1, -1]", "[-1, -1]"),
        ("blink_counting", "It must be **B**", "B"),
        ("mmstar_local", "A man is seen. The answer is \\boxed{C}", "C"),
        ("ai2d", "no letter at all", "no letter at all"),
        ("ocrbench", "<think>Was it FOREST?</think>Forest", "Forest"),
    ],
)
def test_answers_are_read_as_meant(task, said, read):
    assert readable(said, task) == read


def test_messages_become_a_prompt_in_reading_order(tmp_path):
    red, file = Image.new("RGB", (3, 2), "red"), tmp_path / "blue.png"
    Image.new("RGB", (5, 4), "blue").save(file)
    parts = [
        {"type": "text", "text": "First "},
        {"type": "image", "url": red},
        {"type": "text", "text": ", <image>then "},
        {"type": "image", "url": str(file)},
    ]
    prompt = prompt_of([{"role": "system", "content": "Be short."}, {"role": "user", "content": parts}])
    assert [m.role for m in prompt.messages] == ["system", "user"]
    assert prompt.messages[1].content == "First <image>, then <image>"
    assert [image.size for image in prompt.images] == [(3, 2), (5, 4)]
    with pytest.raises(ValueError, match="holds video; accepted are text and images"):
        prompt_of([{"role": "user", "content": [{"type": "video", "url": "x"}]}])


def test_without_lmms_eval_the_command_says_how_to_install_it(capsys, tmp_path):
    from importlib.util import find_spec

    from step3vl.cli import main

    if find_spec("lmms_eval") is not None:
        pytest.skip("lmms-eval is installed")
    assert main(["eval", str(tmp_path), "--harness=lmms", "--tasks=mmstar"]) == 2
    assert "pip install --no-deps lmms-eval" in capsys.readouterr().err
    assert main(["eval", str(tmp_path), "--harness=lmms"]) == 2
    assert "needs --tasks" in capsys.readouterr().err


TASKS = ("mmstar", "ocrbench", "screenspot_v2", "ai2d", "osworld_g", "countbenchqa")


def test_six_tasks_of_lmms_eval_run_offline(tmp_path, twins):
    pytest.importorskip("lmms_eval", reason="lmms-eval is not installed")
    from step3vl.cli import main

    assert main(["make-tiny", "step3vl", str(tmp_path / "model")]) == 0
    command = [sys.executable, "-m", "step3vl", "eval", "model", "--harness=lmms", f"--tasks={','.join(TASKS)}"]
    done = subprocess.run(
        [*command, f"--data-root={twins}", "--limit=2", "--max-new-tokens=4", "--out=out"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert all(f"{task}_local" in done.stdout for task in TASKS)

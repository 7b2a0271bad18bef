"""VLMEvalKit: its messages become our prompts, our answers are read as meant there, and its own loop runs on a twin."""

import base64
import io
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image

from step3vl.harness.adapter import chat_of, choice_text, prompt_of, readable_there

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "kind, said, read",
    [
        ("MCQ", "It must be **B**", "B"),
        ("MCQ", "<think>A? No.</think>A man is seen. The answer is \\boxed{C}", "C"),
        ("MCQ", "no letter at all", "no letter at all"),
        ("MCQ", "<think>A, I th", ""),
        ("MCQ_MMMU_Pro", "(b)", "B"),
        ("GUI", "[125, 220]", "pyautogui.click(x=0.1250, y=0.2200)"),
        ("GUI", "<think>[9, 9]</think>[0.12, 0.22]", "pyautogui.click(x=0.1200, y=0.2200)"),
        ("GUI", "pyautogui.click(x=500, y=1000)", "pyautogui.click(x=0.5000, y=1.0000)"),
        ("GUI", "[-1, -1]", "[-1, -1]"),
        ("GUI", "nowhere", "nowhere"),
        ("VQA", "<think>12?</think>It is 13 cm.", "It is 13 cm."),
        ("Y/N", "Yes, B is there.", "Yes, B is there."),
        ("GROUNDING", "[100, 200, 300, 400]", "[100, 200, 300, 400]"),
        ("", "Answer: B", "Answer: B"),
    ],
)
def test_answers_are_read_as_meant(kind, said, read):
    assert readable_there(said, kind) == read


def test_a_message_becomes_a_prompt_with_its_images_in_order(tmp_path):
    sizes = [(3, 2), (5, 4), (7, 6)]
    for k, size in enumerate(sizes):
        Image.new("RGB", size, "blue").save(tmp_path / f"{k}.png")
    stream = io.BytesIO()
    Image.new("RGB", (9, 8), "red").save(stream, "PNG")
    message = [
        {"type": "text", "value": "You click.", "role": "system"},
        {"type": "image", "value": str(tmp_path / "2.png")},
        {"type": "text", "value": "First <image>"},
        {"type": "image", "value": str(tmp_path / "0.png")},
        {"type": "text", "value": ", then "},
        {"type": "image", "value": str(tmp_path / "1.png")},
        {"type": "image", "value": "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()},
        {"type": "text", "value": "?"},
    ]
    prompt = prompt_of(chat_of(message, "Be short."))
    assert [(m.role, m.content) for m in prompt.messages] == [
        ("system", "Be short.\nYou click."),
        ("user", "<image>First <image>, then <image><image>?"),
    ]
    assert [image.size for image in prompt.images] == [(7, 6), (3, 2), (5, 4), (9, 8)]
    turns = [
        {"type": "text", "value": word, "role": role}
        for role, word in (("user", "1"), ("assistant", "2"), ("user", "3"))
    ]
    assert [(m.role, m.content) for m in prompt_of(chat_of(turns)).messages] == [
        ("user", "1"),
        ("assistant", "2"),
        ("user", "3"),
    ]
    with pytest.raises(ValueError, match="holds video; accepted are text and images"):
        prompt_of(chat_of([{"type": "video", "value": "x.mp4"}]))
    with pytest.raises(ValueError, match="an image of a message is not base64"):
        prompt_of(chat_of([{"type": "image", "value": "data:image/png;base64,###"}]))
    with pytest.raises(ValueError, match=r"https://example.org/x.png"):
        prompt_of(chat_of([{"type": "image", "value": "https://example.org/x.png"}]))


def test_own_questions_hold_the_options_that_are_given():
    line = {"question": "How many?", "hint": float("nan"), "A": "one", "B": 2, "C": float("nan"), "answer": "A"}
    assert choice_text(line).startswith("How many?\nA. one\nB. 2\nAnswer with the option's letter")
    assert choice_text({**line, "hint": "Look."}).startswith("Look.\nHow many?")
    assert choice_text({"question": "Why?"}) == "Why?\n"


LOOP = """
import sys
from pathlib import Path
from vlmeval.dataset.image_mcq import CustomMCQDataset
from vlmeval.inference import infer_data_job
from vlmeval.smp import load
from step3vl.harness.vlmeval_model import Step3VL
seen = []
class Watched(Step3VL):
    def answer(self, chat, dataset):
        seen.append([part["type"] for turn in chat for part in turn["content"]])
        return super().answer(chat, dataset)
for name, custom in (("theirs", False), ("ours", True)):
    model = Watched(sys.argv[1], max_new_tokens=4, custom_prompt=custom, system_prompt="Be short.")
    data = CustomMCQDataset("twin_mcq")
    infer_data_job(model, work_dir=".", model_name=name, dataset=data)
    found = load(next(str(path) for path in sorted(Path(".").glob(f"{name}_twin_mcq.*"))))
    assert len(found) == len(data.data) == len(seen), (len(found), len(data.data), len(seen))
    assert all(kinds == ["text", "image", "text"] for kinds in seen), seen
    seen.clear()
    print(name, list(found["prediction"]))
"""


def test_its_own_loop_runs_on_a_twin(tmp_path, twins):
    if find_spec("vlmeval") is None:
        pytest.skip("VLMEvalKit is not installed")
    pandas = pytest.importorskip("pandas", reason="VLMEvalKit needs pandas")
    from step3vl.cli import main

    assert main(["make-tiny", "step3vl", str(tmp_path / "model")]) == 0
    rows = pandas.read_parquet(next((twins / "lmms-lab-encoder/MMBench").rglob("*.parquet"))).head(4)
    rows["image"] = [base64.b64encode(image["bytes"]).decode() for image in rows["image"]]
    (tmp_path / "LMUData").mkdir()
    columns = ["index", "image", "question", "A", "B", "C", "D", "answer", "category"]
    rows[columns].to_csv(tmp_path / "LMUData/twin_mcq.tsv", sep="\t", index=False)
    done = subprocess.run(
        [sys.executable, "-c", LOOP, "model"],
        cwd=tmp_path,
        env={**os.environ, "LMUData": str(tmp_path / "LMUData"), "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "theirs [" in done.stdout and "ours [" in done.stdout

"""`step3vl ask`: from a folder and a question to words on the terminal, or one sentence."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from step3vl.ask import THINK, ThinkingProcessor, load_model, question_of
from step3vl.checkpoints import export_model, import_model, make_tiny
from step3vl.cli import main
from step3vl.data.decode import open_image
from step3vl.data.processor import Processor
from step3vl.generation.sampler import Sampler
from step3vl.types import Message, Prompt, Sampling
from tests.data.test_reference_images import photo

ROW = ["fit", "-c", "ablations/table4_vision_encoder/random.yaml", "--scale", "tiny"]
RUN = "runs/tiny/ablations/table4_vision_encoder/random"


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ask") / "released"
    make_tiny("step3vl", folder)
    return folder


@pytest.fixture
def images(tmp_path):
    photo(100, 60).save(tmp_path / "a.png")
    photo(40, 40).convert("CMYK").save(tmp_path / "b.jpg", quality=95)
    return [str(tmp_path / "a.png"), str(tmp_path / "b.jpg")]


def said(capsys, *args) -> tuple[str, str]:
    capsys.readouterr()
    assert main(["ask", *map(str, args)]) == 0
    captured = capsys.readouterr()
    return captured.out, captured.err


def sentence(capsys, *args) -> str:
    capsys.readouterr()
    assert main(["ask", *map(str, args)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1, captured
    return captured.err


def generated(folder, question: str, images, **sampling) -> str:
    vlm, processor = load_model(folder)
    prompt = question_of(question, [open_image(Path(path), path) for path in images])
    return Sampler(vlm, processor).generate([prompt], Sampling(**sampling))[0][0].text


def test_a_trained_run_answers_what_generate_answers(workplace, images, capsys):
    short = ["--trainer.max_steps=1", "--data.samples_per_step=4", "--trainer.logger=false"]
    assert main([*ROW, *short]) == 0
    out, err = said(capsys, RUN, "Which number is it?", "--image", images[0], "--max-new-tokens", 12)
    assert out == generated(RUN, "Which number is it?", images[:1], max_new_tokens=12) + "\n"
    assert ("reached the limit of 12 tokens" in err) == (err != "")
    text, _ = said(capsys, RUN, "2 + 3 =", "--max-new-tokens", 4)
    assert text == generated(RUN, "2 + 3 =", [], max_new_tokens=4) + "\n"


def test_a_released_folder_sees_every_image_in_its_place(released, images, capsys):
    out, err = said(capsys, released, "é?", "--image", images[0], "--image", images[1], "--max-new-tokens", 16)
    assert len(out) > 10 and out == generated(released, "é?", images, max_new_tokens=16) + "\n"
    assert "limit of 16 tokens" in err
    marked, _ = said(
        capsys, released, "<image>é?<image>", "--image", images[0], "--image", images[1], "--max-new-tokens", 16
    )
    swapped, _ = said(capsys, released, "é?", "--image", images[1], "--image", images[0], "--max-new-tokens", 16)
    assert len({out, marked, swapped}) == 3
    assert swapped == generated(released, "é?", images[::-1], max_new_tokens=16) + "\n"


def test_imported_and_exported_folders_answer_the_same(released, images, tmp_path, capsys):
    import_model(released, tmp_path / "imported")
    export_model(tmp_path / "imported", tmp_path / "exported")
    answers = {
        said(capsys, folder, "What?", "--image", images[0], "--max-new-tokens", 12)[0]
        for folder in (released, tmp_path / "imported", tmp_path / "exported")
    }
    assert len(answers) == 1 and len(answers.pop()) > 10


def test_temperature_and_seed(released, capsys):
    def hot(seed):
        return said(capsys, released, "x", "--max-new-tokens", 12, "--temperature", 1.5, "--seed", seed)[0]

    assert hot(1) == hot(1) != hot(2)


def test_crops_are_drawn_and_counted(released, images, tmp_path, capsys):
    out = tmp_path / "deep" / "crops.png"
    _, err = said(
        capsys, released, "?", "--image", images[0], "--image", images[1], "--max-new-tokens", 1, "--show-crops", out
    )
    assert Image.open(out).mode == "RGB" and np.asarray(Image.open(out)).std() > 20
    vlm, processor = load_model(released)
    for path in images:
        image = open_image(Path(path), path)
        example = processor.encode_prompt(question_of("?", [image]))
        assert f"{Path(path).name}: {image.width}x{image.height}, " in err
        assert f"{example.num_visual_tokens} visual tokens" in err
    assert sum(vlm.num_visual_tokens(view.shape[1]) for view in example.views) == example.num_visual_tokens


def test_think_opens_the_answer(released, capsys, tmp_path):
    plain, _ = said(capsys, released, "Why?", "--max-new-tokens", 6)
    thought, _ = said(capsys, released, "Why?", "--max-new-tokens", 6, "--think")
    assert thought.startswith(THINK) and not plain.startswith(THINK)
    processor = load_model(released)[1]
    prompt = question_of("Why?", [])
    example, opened = processor.encode_prompt(prompt), ThinkingProcessor(processor).encode_prompt(prompt)
    assert processor.tokenizer.decode(opened.input_ids.tolist(), skip_special=False) == (
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n<think>\n"
    )
    assert torch.equal(opened.input_ids[: len(example.input_ids)], example.input_ids)
    assert len(opened.labels) == len(opened.position_ids) == len(opened.input_ids)
    own = tmp_path / "own.jinja"  # a template that opens the thinking itself is left alone
    own.write_text(
        "{% for m in messages %}{{ m.content }}{{ '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<think>\\n' }}{% endif %}"
    )
    once = Processor(template=str(own))
    assert torch.equal(ThinkingProcessor(once).encode_prompt(prompt).input_ids, once.encode_prompt(prompt).input_ids)


def test_words_come_before_the_answer_is_done(released, monkeypatch):
    """What is written is flushed piece by piece: the pieces of the answer reach a pipe one at a time."""
    read, write = os.pipe()
    with os.fdopen(read, "rb", buffering=0) as reader, os.fdopen(write, "w") as writer:
        monkeypatch.setattr("sys.stdout", writer)
        sizes = []
        inner = Sampler._choose

        def watched(self, *args):
            os.set_blocking(reader.fileno(), False)
            sizes.append(len(reader.read() or b""))
            return inner(self, *args)

        monkeypatch.setattr(Sampler, "_choose", watched)
        assert main(["ask", str(released), "Tell me.", "--max-new-tokens", "10"]) == 0
    assert len(sizes) == 10 and sum(size > 0 for size in sizes) >= 5


def test_mistakes_are_one_sentence(released, images, tmp_path, capsys):
    text = tmp_path / "text.png"
    text.write_text("hello")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "nowhere.png cannot be opened: No such file" in sentence(capsys, released, "?", "--image", "nowhere.png")
    message = sentence(capsys, released, "?", "--image", text)
    assert str(text) in message and "hello" in message and "JPEG" in message
    Image.new("L", (1, 20000)).save(text, "PNG")
    assert "1x20000 is too thin" in sentence(capsys, released, "?", "--image", text)
    assert "nowhere" in sentence(capsys, tmp_path / "nowhere", "?")
    message = sentence(capsys, empty, "?")
    assert all(word in message for word in (str(empty), "config.yaml", "config.json"))
    make_tiny("dinov3", tmp_path / "tower")
    assert "dinov3" in sentence(capsys, tmp_path / "tower", "?")
    assert "is empty" in sentence(capsys, released, " ")
    assert "2 <image> marks, but 1 images" in sentence(capsys, released, "<image><image>?", "--image", images[0])
    assert "needs an --image" in sentence(capsys, released, "?", "--show-crops", tmp_path / "x.png")
    assert "max_new_tokens is 0" in sentence(capsys, released, "?", "--max-new-tokens", 0)
    assert "temperature is -1" in sentence(capsys, released, "?", "--temperature", -1)


def test_a_damaged_released_folder_is_named(released, tmp_path, capsys):
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in released.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    shard = sorted(copy.glob("*.safetensors"))[0]
    shard.unlink()
    assert shard.name in sentence(capsys, copy, "?")


def test_help_shows_the_verb(capsys):
    assert main([]) == 0
    assert "ask CKPT" in capsys.readouterr().out


def test_question_of_places_images():
    picture = Image.new("RGB", (4, 4))
    assert question_of("What?", [picture, picture]).messages == [Message(role="user", content="<image><image>What?")]
    assert question_of("A <image> b", [picture]) == Prompt(
        messages=[Message(role="user", content="A <image> b")], images=[picture]
    )

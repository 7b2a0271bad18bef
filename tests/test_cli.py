"""What a person meets: verbs, help, and one sentence for every mistake."""

from pathlib import Path

import pytest

from step3vl.cli import main

ROW = ["fit", "-c", "ablations/table4_vision_encoder/random.yaml", "--scale", "tiny"]
ENCODER = "--model.vlm.vision_encoder"


def sentence(capsys, *args):
    """Run a command that must fail; its whole message."""
    assert main(list(args)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


@pytest.mark.parametrize(
    "mistake, words",
    [
        (f"{ENCODER}.hiden_size=3", ["model.vlm.vision_encoder", "PELang", "'hiden_size'", "hidden_size"]),
        (f"{ENCODER}=vision/dinov4.yaml", ["vision/dinov4.yaml", "vision/dinov3_vitl16.yaml"]),
        (f"{ENCODER}.class_path=step3vl.models.vision.PELong", ["no class 'PELong'", "PELang"]),
        (f"{ENCODER}.class_path=step3vl.modls.PE", ["no module 'step3vl.modls'"]),
        (f"{ENCODER}.layout.crop=3", ["layout", "MultiCrop", "'crop'", "crop_size"]),
        (f"{ENCODER}.hidden_size=62", ["hidden_size 62", "num_heads 2"]),
        ("--model.vlm.projector.class_path=step3vl.models.Qwen3Decoder", ["Qwen3Decoder is not a Projector"]),
        ("--model.optimizer.lr=fast", ["model.optimizer.lr", "expected float", "'fast'"]),
        ("--model.param_groups=[{patern: x}]", ["model.param_groups[0]", "'patern'", "pattern"]),
        ("--model.param_groups=[{pattern: towr}]", ["param_groups", "'towr'", "matches no parameter"]),
        ("--model.sampling.max_new_tokens=null", ["model.sampling.max_new_tokens", "expected int", "null"]),
        ("--data.seq_len=long", ["data.seq_len", "expected int", "'long'"]),
        ("--data.loss_weight=words", ["data.loss_weight", "'token' | 'sample' | 'sqrt'", "'words'"]),
        ("--data.sources.digits.wight=3", ["data.sources.digits", "'wight'", "weight"]),
        ("--data.sources.digits.shards=train/nothing-*.tar", ["nothing-*.tar"]),
        ("--suite.readin.num_cases=2", ["suite.readin"]),
        ("--suite.reading.class_path=step3vl.stages.PretrainStage", ["suite.reading", "is not a Benchmark"]),
        ("--trainer.max_stps=3", ["trainer", "'max_stps'", "max_steps"]),
        ("--trainer.callbacks=[{class_path: step3vl.callbacks.Answer}]", ["trainer.callbacks[0]", "Answers"]),
        ("--modell.x=3", ["unknown key 'modell'", "model"]),
        ("--ckpt_path=nowhere.ckpt", ["nowhere.ckpt"]),
    ],
)
def test_a_mistake_is_one_sentence(workplace, capsys, mistake, words):
    message = sentence(capsys, *ROW, "--trainer.max_steps=1", mistake)
    assert all(word in message for word in words), message


def test_commands_that_make_no_sense(workplace, capsys):
    assert "fit" in sentence(capsys, "fitt")
    assert "no file given" in sentence(capsys, "fit", "--scale", "tiny")
    assert "pe_lang.yaml" in sentence(capsys, "fit", "-c", "ablations/table4_vision_encoder/pe_long.yaml")
    assert "--scale" in sentence(capsys, *ROW[:3], "--scale", "huge")
    assert "is not an option" in sentence(capsys, "fit", "x.yaml")
    assert "needs a value" in sentence(capsys, *ROW, "--trainer.max_steps")
    assert "table4_vision_encoder" in sentence(capsys, "ablate", "run", "ablations/table4_vision_encodr")
    assert "no finished run" in sentence(capsys, "ablate", "table", "ablations/table4_vision_encoder")
    assert "nowhere.tar" in sentence(capsys, "data", "view", "nowhere.tar")
    assert "suite is empty" in sentence(capsys, "test", *ROW[1:], "--suite=null")


def test_help_names_every_verb(capsys):
    assert main([]) == 0
    text = capsys.readouterr().out
    assert all(verb in text for verb in ("fit", "validate", "test", "predict", "ablate run", "data make", "info"))
    assert main(["fit", "--help", "step3vl.stages.PretrainStage"]) == 0
    assert "freeze" in capsys.readouterr().out


def test_info_says_what_is_missing(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert ("torch" in text and "CPU only" in text) or "devices" in text
    assert "extra gpu" in text


def test_diff_prints_only_what_differs(workplace, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["ablate", "diff", *(f"ablations/table4_vision_encoder/{r}.yaml" for r in ("pe_lang", "dinov3"))]) == 0
    text = capsys.readouterr().out
    assert "model.vlm.vision_encoder.class_path" in text
    assert "max_steps" not in text and "seq_len" not in text


def test_validate_and_predict_run(workplace, capsys):
    short = ["--trainer.max_steps=1", "--data.samples_per_step=4", "--model.sampling.max_new_tokens=3"]
    names = ("reading", "words", "pointing", "counting", "attributes", "spatial", "sums", "common", "rare")
    few = [f"--suite.{n}.num_cases=1" for n in names]
    assert main([*ROW, *short]) == 0
    assert main(["predict", *ROW[1:], *short, *few, "--ckpt_path=last"]) == 0
    lines = Path("runs/tiny/ablations/table4_vision_encoder/random/predictions.jsonl").read_text().splitlines()
    assert len(lines) == 9
    capsys.readouterr()
    assert main(["validate", *ROW[1:], *short, "--data.val_samples=8", "--ckpt_path=last"]) == 0
    assert "val_loss" in capsys.readouterr().out

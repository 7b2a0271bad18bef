"""The upbringing of encoders through the command line: fit, test, and into a vision-language model."""

import json
from pathlib import Path

import pytest

from step3vl.cli import main

FEW = ["--scale", "tiny", "--trainer.max_steps=2", "--data.samples_per_step=4"]
CONTRAST = "experiments/encoders/pe_lang/1_contrastive.yaml"
DISTIL = "experiments/encoders/dinov3/1_self_distillation.yaml"


@pytest.mark.parametrize("file", [CONTRAST, DISTIL])
def test_fit_and_test_write_what_was_seen_and_learnt(file, workplace, capsys):
    more = ["--data.held_out_every=3"] if file == CONTRAST else []
    assert main(["fit", "-c", file, *FEW, *more]) == 0
    printed = capsys.readouterr().out
    run = Path("runs/tiny") / Path(file).with_suffix("")
    assert "images seen" in printed and "Linear probes" in printed and "vision_encoder" in printed
    facts = json.loads((run / "encoder.json").read_text())
    assert 0 < facts["encoder_images_seen"] <= 8 and facts["encoder_flops"] > 1e8 and len(facts["probes"]) == 5

    assert main(["test", "-c", file, *FEW, *more, "--ckpt_path=last"]) == 0
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["provenance"]["encoder_images_seen"] == facts["encoder_images_seen"]
    assert metrics["provenance"]["num_parameters"] < 200_000
    names = set(metrics["scores"])
    assert {"probe: digit, in its cell", "probe: colour, in its cell"} <= names
    assert ("digits: image to text R@1" in names) == (file == CONTRAST)
    assert metrics["scores"]["probe: digit, in its cell"]["num_cases"] > 0


def test_what_an_encoder_cannot_do_is_said(workplace, capsys):
    for verb, words in (("validate", "no losses on held-out data"), ("predict", "answers no questions")):
        assert main([verb, "-c", DISTIL, *FEW]) != 0
        assert words in capsys.readouterr().err
    assert main(["fit", "-c", DISTIL, *FEW, "--suite=suite/held_out.yaml"]) != 0
    assert "suite: an encoder alone answers no questions" in capsys.readouterr().err
    assert main(["fit", "-c", DISTIL, *FEW, "--data=data/corpus.yaml"]) != 0
    assert "accepted are step3vl.data.PairData" in capsys.readouterr().err


def test_the_encoder_goes_into_language_alignment_and_the_model(workplace, capsys):
    assert main(["fit", "-c", CONTRAST, *FEW]) == 0
    language = "experiments/encoders/pe_lang/2_language.yaml"
    assert main(["fit", "-c", language, *FEW]) == 0
    printed = capsys.readouterr().out
    assert "init_from runs/tiny/experiments/encoders/pe_lang/1_contrastive" in printed and "Linear probes" in printed
    assert json.loads(Path("runs/tiny/experiments/encoders/pe_lang/2_language/encoder.json").read_text())
    run = "runs/tiny/experiments/encoders/pe_lang/2_language"
    row = ["fit", "-c", "experiments/step3vl_10b/1_pretrain_phase1.yaml", *FEW]
    assert main([*row, f"--model.init_from={{vision_encoder: {run}}}"]) == 0
    assert "tensors (ours)" in capsys.readouterr().out

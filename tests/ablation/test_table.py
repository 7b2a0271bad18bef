"""A table is run row by row, kept when finished, run again when its row changed, and drawn from metrics alone."""

import csv
import json
from pathlib import Path

import pytest

from step3vl.ablation import read_rows
from step3vl.ablation.run import Job
from step3vl.cli import main

FOLDER = "ablations/table4_vision_encoder"
SHORT = ["--trainer.max_steps=2", "--data.samples_per_step=4", "--model.sampling.max_new_tokens=3"]
SUITE = ("reading", "pointing", "counting", "attributes", "words", "spatial", "sums", "common", "rare")
SHORT += [f"--suite.{n}.num_cases=2" for n in SUITE]


def fake_run(row, seed, scores):
    """What a finished run leaves behind."""
    folder = row.run_folder(seed)
    (folder / "csv/version_0").mkdir(parents=True)
    entry = dict(low=0, high=1, blind=0.1, majority=0.2, num_cases=50, truncated_rate=0, unreadable_rate=0)
    metrics = {"scores": {k: {"score": v, **entry} for k, v in scores.items()}}
    metrics["provenance"] = {"num_parameters": 2_000_000, "optimizer": "step3vl.optim.MuonAdamW"}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "row.json").write_text(json.dumps({"fingerprint": row.fingerprint, "seed": seed}))
    lines = "step,loss\n" + "".join(f"{s},{5 / (s + 1)}\n" for s in range(0, 40, 5))
    (folder / "csv/version_0/metrics.csv").write_text(lines)


def test_table_says_what_the_runs_say(workplace, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    pe, dino = read_rows(Path(FOLDER), "tiny")[:2]
    assert [pe.file.stem, dino.file.stem] == ["pe_lang", "dinov3"]
    fake_run(pe, 0, {"reading": 0.8, "pointing": 0.4})
    fake_run(pe, 1, {"reading": 0.6, "pointing": 0.4})
    fake_run(dino, 0, {"reading": 0.5, "pointing": 0.3})
    assert main(["ablate", "table", FOLDER]) == 0
    text = capsys.readouterr().out
    assert "TINY SCALE" in text and "0.700 ±0.100" in text and "0.500" in text and "mean of 2 seeds" in text
    assert "+12.5 %" in text and "not given" in text
    out = Path("runs/tiny") / FOLDER
    rows = list(csv.DictReader((out / "table.csv").open()))
    reading = next(r for r in rows if r["row"] == "pe_lang" and r["capability"] == "reading")
    assert float(reading["mean"]) == pytest.approx(0.7) and reading["num_seeds"] == "2" and reading["blind"] == "0.1"
    assert "| PE-lang G/14 |" in (out / "table.md").read_text()
    assert (out / "table.png").read_bytes()[:4] == b"\x89PNG"


def test_a_changed_row_is_not_finished(workplace):
    row = read_rows(Path(FOLDER), "tiny")[0]
    fake_run(row, 0, {"reading": 0.8})
    assert row.metrics(0)
    changed = read_rows(Path(FOLDER), "tiny", ["trainer.max_steps=3"])[0]
    assert changed.fingerprint != row.fingerprint and changed.metrics(0) is None


def test_a_row_whose_starting_weights_changed_is_not_finished(workplace):
    row = read_rows(Path(FOLDER), "tiny")[0]
    start = Path(row.config["model"]["init_args"]["init_from"]["vision_encoder"])
    before = row.fingerprint
    for step, mark in ((100, "a"), (200, "b")):
        (start / f"checkpoints/step-{step:08d}").mkdir(parents=True)
        files = {"x.safetensors": {"xxh3_128": mark}, "state.pt": {"xxh3_128": "z"}}
        (start / f"checkpoints/step-{step:08d}/manifest.json").write_text(json.dumps({"files": files}))
        if step == 100:
            fake_run(row, 0, {"reading": 0.8})
            assert row.metrics(0) and row.fingerprint != before
    assert row.metrics(0) is None


def test_run_finishes_keeps_and_reruns(workplace, capsys):
    few = ["ablate", "run", FOLDER, "--scale", "tiny", "--seeds", "1", "--only", "random", "--only", "noise", *SHORT]
    assert main(few) == 0
    assert "2 runs: 0 finished, 2 to do" in capsys.readouterr().out
    folder = Path("runs/tiny") / FOLDER / "random/seed_0"
    first = (folder / "metrics.json").stat().st_mtime_ns
    assert json.loads((folder / "metrics.json").read_text())["provenance"]["label"] == "PE-lang's shape, random weights"
    assert main(few) == 0
    assert "2 finished, 0 to do" in capsys.readouterr().out
    assert (folder / "metrics.json").stat().st_mtime_ns == first


def test_a_run_that_another_row_has_made_is_taken_over(workplace, capsys):
    """Table 6's row without DeepStack is Table 4's PE-lang row, key by key."""
    made, same = read_rows(Path(FOLDER), "tiny")[0], read_rows(Path("ablations/table6_deepstack"), "tiny")[0]
    assert (made.file.stem, same.file.stem) == ("pe_lang", "off") and made.fingerprint == same.fingerprint
    fake_run(made, 0, {"reading": 0.8})
    assert main(["ablate", "run", "ablations/table6_deepstack", "--scale", "tiny", "--only", "off"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "off seed 0: the same run as runs/tiny/ablations/table4_vision_encoder/pe_lang/seed_0" in text
    assert same.metrics(0) == made.metrics(0) and same.metrics(1) is None
    other = read_rows(Path("ablations/table6_deepstack"), "tiny", ["trainer.max_steps=3"])[0]
    assert Job(other, 0).take_over() is None and Job(same, 1).take_over() is None


def test_a_failing_row_is_reported_and_the_rest_goes_on(workplace, capsys):
    broken = Path(FOLDER) / "broken.yaml"
    broken.write_text(
        "base: ./random.yaml\nrow: {label: broken}\noverride: {data.sources.digits.shards: train/none-*.tar}\n"
    )
    assert main(["ablate", "run", FOLDER, "--scale", "tiny", "--only", "broken", "--only", "random", *SHORT]) == 1
    text = capsys.readouterr().out
    assert "broken seed 0 failed in fit" in text and "none-*.tar" in text
    assert (Path("runs/tiny") / FOLDER / "random/seed_0/metrics.json").is_file()


def test_list_shows_rows(workplace, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    assert main(["ablate", "list"]) == 0
    text = capsys.readouterr().out
    assert "table4_vision_encoder" in text and "dinov3" in text and "none" in text

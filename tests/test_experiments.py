"""Every experiment and row takes two steps and is scored at tiny scale, through the real command line."""

import json
from pathlib import Path

import pytest

from step3vl.cli import main
from step3vl.config import compose

from .test_configs import RUNS

SHORT = ["--trainer.max_steps=2", "--model.sampling.max_new_tokens=4"]
SUMS = "text-sums-level0-*.tar"
RL = ["--model.filters=[]", "--model.group_size=2", "--data.prompts_per_step=3", "--suite.shifted.num_cases=2"]
RL += [f"--suite.{name}.shards=corpus/test/{SUMS}" for name in ("shifted", "instructions")]  # the small corpus has few
PREFERENCE = [f"--suite.preference.shards=corpus/test/{SUMS}", "--suite.preference.num_cases=2"]
PREFERENCE += [f"--data.sources.instructions.shards=train/{SUMS}", "--suite.preference.rival=rival.jsonl"]


def options(run):
    """What makes a run short, by its kind."""
    if "sft" in run:
        return ["--data.rows_per_step=1"]
    if "rlvr" in run:
        return [*RL, "--data.sources.shifted.shards=train/documents-digits-*.tar"]
    if "rlhf" in run:
        rows = [{"benchmark": "instructions", "id": f"test-text-sums-0-{k:06d}", "said": "x"} for k in range(9)]
        Path("rival.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return [*RL, *PREFERENCE]
    if "shuffled" in run:
        return ["--data.samples_per_step=4", "--data.root=corpus"]
    return ["--data.samples_per_step=4"]


ELSEWHERE = ("pacore", "encoders/dinov3", "encoders/siglip2", "pe_lang/1_contrastive")
"""tests/pacore/test_train.py and tests/test_encoders.py run these."""


@pytest.mark.parametrize("run", [run for run in RUNS if not any(name in run for name in ELSEWHERE)])
def test_two_steps_then_scores(run, workplace, capsys):
    cases = [f"--suite.{name}.num_cases=2" for name in ("reading", "pointing", "counting")]
    start = compose([run], scale="tiny").config["model"]["init_args"].get("init_from")
    chained = ["--model.init_from=null"] if start else []  # its run is not made here
    short = [*SHORT, *options(run), *cases, *chained, "--scale=tiny"]
    assert main(["fit", "-c", run, *short]) == 0
    folder = Path("runs/tiny", run).with_suffix("")
    assert (folder / "checkpoints/step-00000002/manifest.json").is_file() and (folder / "config.yaml").is_file()
    out = capsys.readouterr().out
    assert "Optimizer groups" in out and "Mixture" in out
    assert main(["test", "-c", run, *short, "--ckpt_path=last"]) == 0
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["provenance"]["scale"] == "tiny" and metrics["scores"]["reading"]["num_cases"] == 2
    assert 0 <= metrics["scores"]["reading"]["score"] <= 1
    assert main(["test", "-c", str(folder / "config.yaml"), *short[:-1], "--ckpt_path=last"]) == 0
    again = json.loads((folder / "metrics.json").read_text())
    assert again["scores"] == metrics["scores"] and again["provenance"]["scale"] == "tiny"
    assert len((folder / "cases.jsonl").read_text().splitlines()) == sum(
        s["num_cases"] for s in metrics["scores"].values()
    )


def test_a_missing_run_is_named_with_the_file_that_makes_it(workplace, capsys):
    second = "experiments/step3vl_10b/2_pretrain_phase2.yaml"
    assert main(["fit", "-c", second, *SHORT, "--scale=tiny"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: model.init_from: there is no run at runs/tiny/experiments/step3vl_10b/1_pretrain")
    assert "step3vl fit -c experiments/step3vl_10b/1_pretrain_phase1.yaml --scale tiny" in error
    assert main(["fit", "-c", second, *SHORT, "--scale=tiny", "--model.init_from=elsewhere"]) == 2
    assert "error: model.init_from: nothing is at elsewhere" in capsys.readouterr().err

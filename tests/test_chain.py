"""The chain of stages: each starts from the last, finished ones are kept, a change runs again what follows."""

import json
from pathlib import Path

import pytest

from step3vl.chain import read_links, verdict
from step3vl.cli import main

CHAIN = Path("experiments/step3vl_10b")
STAGES = ["1_pretrain_phase1", "2_pretrain_phase2", "3_sft_stage1", "4_sft_stage2", "5_rlvr", "6_rlhf"]
READING = (
    "{class_path: step3vl.evaluation.HeldOut, init_args: {shards: corpus/test/documents-digits-*.tar, num_cases: 2}}"
)
SHORT = [
    "--trainer.max_steps=1",
    "--trainer.log_every_n_steps=1",
    "--data.samples_per_step=4",
    "--model.sampling.max_new_tokens=2",
    f"--suite={{reading: {READING}}}",
]


@pytest.mark.parametrize("scale", ["paper", "tiny"])
def test_stages_are_in_order_and_each_starts_from_the_run_before(scale, workplace):
    links = read_links(CHAIN, scale)
    assert [link.file.stem for link in links] == STAGES
    assert links[0].config["model"]["init_args"].get("init_from") is None
    for before, link in zip(links, links[1:]):
        assert link.config["model"]["init_args"]["init_from"] == str(before.run_folder(0))
    assert len({link.seed for link in links}) == len(STAGES) and "not finished" in verdict(links[0])


def test_ratios_and_steps_follow_from_the_report(workplace):
    links = read_links(CHAIN, "paper")
    data = [link.config["data"]["init_args"] for link in links]
    assert [link.config["trainer"]["max_steps"] for link in links[:2]] == [277_500, 92_500]
    for link, own, tokens in zip(links[2:4], data[2:4], (190e9, 36e9)):
        num_ranks = link.config["trainer"]["num_nodes"] * link.config["trainer"]["devices"]
        assert num_ranks == link.config["trainer"]["strategy"]["init_args"]["data_parallel_size"] == 32
        assert link.config["trainer"]["max_steps"] == pytest.approx(tokens / (num_ranks * own["seq_len"]), rel=1e-3)
    for scale in ("paper", "tiny"):
        for link, ratio in zip(read_links(CHAIN, scale)[2:4], (9, 1)):
            weights = {name: source["weight"] for name, source in link.config["data"]["init_args"]["sources"].items()}
            assert weights.pop("text") == pytest.approx(ratio * sum(weights.values()))


def test_chain_runs_once_and_again_after_a_change(workplace, capfd):
    for stage in [*STAGES[2:], "7_pacore"]:  # two stages are a chain, and a stage is two processes
        (CHAIN / f"{stage}.yaml").unlink()
    command = ["chain", str(CHAIN), "--scale", "tiny", *SHORT]
    assert main(command) == 0
    verdicts = [line for line in capfd.readouterr().out.splitlines() if "1 steps" in line]
    assert [line.split()[0] for line in verdicts] == STAGES[:2] and all("reading 0" in line for line in verdicts)
    runs = Path("runs/tiny") / CHAIN
    assert (runs / "chain.png").is_file()
    logs = [(runs / stage / "log.txt").read_text() for stage in STAGES[:2]]
    assert "init_from" not in logs[0] and f"init_from {runs}/{STAGES[0]}/checkpoints/step-00000001:" in logs[1]
    facts = [json.loads((runs / stage / "metrics.json").read_text())["provenance"] for stage in STAGES[:2]]
    assert [(fact["scale"], fact["seed"]) for fact in facts] == [("tiny", 0), ("tiny", 1)]
    assert main(command) == 0
    assert capfd.readouterr().out.count("finished before, kept") == 2
    changed = [word[2:] for word in [*SHORT, "--trainer.gradient_clip_val=0.5"]]
    assert [link.metrics(link.seed) for link in read_links(CHAIN, "tiny", changed)] == [None, None]


def test_a_stage_is_stale_when_only_one_before_it_changed(workplace):
    before = read_links(CHAIN, "tiny")
    first = CHAIN / "1_pretrain_phase1.yaml"
    first.write_text(first.read_text().replace("freeze: []", "freeze: [projector]"))
    after = read_links(CHAIN, "tiny")
    assert before[2].config == after[2].config and before[2].fingerprint != after[2].fingerprint


def test_a_folder_without_stages_is_named(workplace, capsys):
    assert main(["chain", "experiments/step3vl_10", "--scale", "tiny"]) == 2
    assert "holds no numbered stage" in (error := capsys.readouterr().err) and str(CHAIN) in error

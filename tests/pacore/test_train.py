"""`step3vl pacore train`: parts in order, each kept once it is there, gone on with where it was cut."""

import json
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from step3vl.cli import main
from step3vl.config import ConfigError
from step3vl.data.shards import ShardReader
from step3vl.pacore.pool import read_pool
from step3vl.synthesis import Stage, make_pools, pipeline, warm_start

FILE = Path("experiments/step3vl_10b/7_pacore.yaml")
SMALL = """class_path: step3vl.pacore.pool_data.PoolData
init_args:
  root: pools
  sources:
    words: {pool: words.jsonl, shards: train/documents-words-level0-*.tar, num_problems: 4, low: "-1", high: "2"}
  prompts_per_step: 2
  num_steps: 2
  max_prompt_tokens: 512
  least_messages: 2
  most_messages: 3
  template: short
"""
SUITE = """words:
  class_path: step3vl.evaluation.HeldOut
  init_args: {shards: corpus/test/documents-words-level0-*.tar, num_cases: 3}
"""


@pytest.fixture(scope="module")
def start(tmp_path_factory, small_corpus):
    """A run of one step, to start from."""
    folder = tmp_path_factory.mktemp("start")
    words = "fit -c experiments/step3vl_10b/4_sft_stage2.yaml --scale tiny --trainer.max_steps=1 --model.init_from=null"
    words += f" --vars.data_root={small_corpus} --trainer.default_root_dir={folder} --data.rows_per_step=1"
    words += " --data.sources={words: {shards: train/documents-words-level0-*.tar, weight: 1}} --data.val_sources=null"
    return words, folder


@pytest.fixture
def overrides(workplace, start):
    words, folder = start
    if not (folder / "checkpoints").is_dir():
        head, _, tail = words.partition(" --data.sources=")
        sources, _, rest = tail.partition("}} ")
        assert main([*head.split(), f"--data.sources={sources}}}}}", *rest.split()]) == 0
    (workplace / "data.yaml").write_text(SMALL)
    (workplace / "suite.yaml").write_text(SUITE)
    return [
        "data=data.yaml",
        "suite=suite.yaml",
        f"model.init_from={folder}",
        "vars.warm_start=null",
        "vars.num_messages=3",
        "vars.curve=[1,2]",
        "vars.max_steps=2",
        "model.group_size=2",
        "model.filters=[]",
        "model.critic.warmup_iterations=0",
        "trainer.precision=32-true",
    ]


def test_pools_and_curve_are_made_once_and_go_on(overrides, capsys):
    console = Console(width=200)
    stage = Stage.read(FILE, "tiny", overrides)
    assert make_pools(stage, console) == 0
    whole = {name: (stage.pools / name).read_bytes() for name in ("words.jsonl", "held-out-words.jsonl")}
    problems = list(read_pool(stage.pools / "words.jsonl"))
    assert len(problems) == 4 and all(len(p.messages) == 3 for p in problems)
    assert all(p.source.keys() == {"shard", "key"} for p in problems)
    assert make_pools(stage, console) == 0 and capsys.readouterr().out.count("made before, kept") == 2
    cut = stage.pools / "words.jsonl"  # as a process leaves it that ends in mid-line
    cut.write_bytes(whole["words.jsonl"][:-700])
    cut.with_suffix(".made.json").unlink()
    make_pools(stage, console)
    assert sorted(p.id for p in read_pool(cut)) == sorted(p.id for p in problems)
    assert {p.id: p for p in read_pool(cut)} == {p.id: p for p in problems}
    other = Stage.read(FILE, "tiny", [*overrides, "model.rollout.max_new_tokens=5"])
    make_pools(other, console)
    assert [p.name for p in stage.pools.glob("*.before-*")] and all(
        p.sampling["max_new_tokens"] == 5 for p in read_pool(cut)
    )


def test_the_whole_stage_runs_and_is_kept(overrides, capsys):
    words = ["pacore", "train", str(FILE), "--scale", "tiny", *[f"--{text}" for text in overrides]]
    assert main(words) == 0
    stage = Stage.read(FILE, "tiny", overrides)
    found = json.loads((stage.folder / "pacore" / "scaling.json").read_text())
    curves = found["curves"]["words"]
    assert list(curves) == [
        "trained",
        "untrained",
        "trained, of its own rollouts",
        "trained, of another problem's rollouts",
    ]
    assert [p["num_rollouts"] for p in curves["trained"]["points"]] == [1, 2]
    assert curves["trained"]["num_cases"] == 3 and (stage.folder / "pacore" / "words.png").is_file()
    same = ("mean", "voted", "covered")  # the same rollouts, whoever coordinates them
    for label in ("untrained", "trained, of another problem's rollouts"):
        for a, b in zip(curves["trained"]["points"], curves[label]["points"], strict=True):
            assert [a[key] for key in same] == [b[key] for key in same]
    assert (stage.folder / "metrics.json").is_file()
    capsys.readouterr()
    assert main(words) == 0
    out = capsys.readouterr().out
    assert out.count("kept") == 4  # two pools, the run, the curve


def test_a_stage_without_pools_is_refused(workplace):
    with pytest.raises(ConfigError, match=r"5_rlvr.yaml: data is step3vl.data.PromptData"):
        Stage.read(Path("experiments/step3vl_10b/5_rlvr.yaml"), "tiny")
    assert main(["pacore", "train", str(FILE), "nonsense"]) == 2


def test_the_warm_start_writes_its_lists_once_and_fits_in_order(overrides, monkeypatch, small_corpus):
    fitted = []

    def fit(stage, file, phases, console, own):
        fitted.append((file.name, tuple(phases), [word.split("=")[0] for word in own]))
        return 0

    monkeypatch.setattr(pipeline, "_fit", fit)
    known = "train/documents-words-level0-*.tar"
    words = [word for word in overrides if "warm_start" not in word]
    stage = Stage.read(FILE, "tiny", [*words, f"vars.data_root={small_corpus}", f"vars.warm_start_known=[{known}]"])
    folder = stage.pools / "references"
    monkeypatch.setattr(pipeline, "SAMPLES", {"short": 30, "known": 10, "long": 20, "rivals": 10})
    assert warm_start(stage, Console(quiet=True)) == 0
    assert fitted == [
        (f"{name}.yaml", ("fit",), ["vars.data_root", "vars.references"])
        for name in ("_references", "_references_long")
    ]
    shards = {path.name: path.read_bytes() for path in folder.glob("*.tar")}
    assert sorted(shards) == [f"{name}-000000.tar" for name in ("known", "long", "rivals", "short")]
    long = ShardReader(folder / "long-000000.tar")
    assert len(long) == 20 and not any("\n" in long.read(i).answer for i in range(20)), "no list is said"
    assert warm_start(stage, Console(quiet=True)) == 0 and len(fitted) == 4
    assert {path.name: path.read_bytes() for path in folder.glob("*.tar")} == shards


def test_paper_scale_needs_no_warm_start_and_names_every_pool(workplace):
    stage = Stage.read(FILE, "paper")
    assert warm_start(stage, Console()) == 0 and stage.composed.vars["warm_start"] is None
    assert stage.composed.config["trainer"]["max_steps"] == 500
    assert stage.composed.vars["prompts_per_step"] * 32 == 64 and stage.sampling.max_new_tokens == 65536
    assert stage.sources.keys() == {"mathematics", "documents", "general"} and stage.suite() == {}
    tiny = Stage.read(FILE, "tiny")
    assert tiny.suite().keys() == {"words", "shifted"} == tiny.sources.keys()
    assert yaml.safe_load(Path("experiments/step3vl_10b/_references.yaml").read_text())["base"] == "./4_sft_stage2.yaml"

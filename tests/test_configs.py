"""Every YAML that ships composes; every card has a tiny twin; every run prints at both scales and runs again."""

from pathlib import Path

import pytest
import yaml

from step3vl.cli import main
from step3vl.config import CONFIGS, compose

ROOT = Path(__file__).parents[1]
CARDS = sorted(
    str(p.relative_to(CONFIGS)) for p in CONFIGS.rglob("*.yaml") if "tiny" not in p.relative_to(CONFIGS).parts
)
RUNS = sorted(
    str(p.relative_to(ROOT))
    for f in ("experiments", "ablations")
    for p in (ROOT / f).rglob("*.yaml")
    if p.name[0] != "_"
)
OTHER_CLASS = {
    "optimizer/ablation.yaml",
    "optimizer/stages.yaml",
}  # Muon + AdamW when tiny (docs/decisions.md)


ONE_SIZE = {"suite/report.yaml", "suite/ablations.yaml"}
"""Published data have one size: --limit shortens them."""


def shape(node):
    """Class names and the names of sub-parts, without numbers."""
    if not isinstance(node, dict):
        return None
    return {
        k: v if k == "class_path" else shape(v) for k, v in node.items() if k == "class_path" or isinstance(v, dict)
    }


def composed(card, scale, folder):
    """A card as a part of a run, because cards may refer to the run's vars."""
    names = "{warmup_steps: 1, min_lr_ratio: 1, corpus: c, lr: 1, adamw_lr: 1, data_root: d, runs: r, critic_lr: 1, "
    names += "critic_minibatches: 1, critic_warmup: 0, kl_coef: 0, prompts_per_step: 1, max_prompt_tokens: 9}"
    (folder / "one.yaml").write_text(
        f"vars: {names}\ntrainer: {{max_steps: 1, devices: 1, num_nodes: 1}}\nseed_everything: 0\ncard: {card}\n"
    )
    return compose([folder / "one.yaml"], scale=scale).config["card"]


def test_something_is_found():
    assert len(CARDS) >= 12 and len(RUNS) >= 3


@pytest.mark.parametrize("card", [card for card in CARDS if card not in ONE_SIZE])
def test_card_composes_and_has_a_tiny_twin(card, tmp_path):
    assert (CONFIGS / "tiny" / card).is_file(), f"configs/tiny/{card} is missing"
    full, tiny = (composed(card, scale, tmp_path) for scale in ("paper", "tiny"))
    if card in OTHER_CLASS:
        return
    assert full.get("class_path") == tiny.get("class_path")
    if card.startswith(("vlm/", "vision/", "projector/", "decoder/")):
        assert shape(full) == shape(tiny)


def test_no_tiny_card_without_a_full_one():
    tiny = {str(p.relative_to(CONFIGS / "tiny")) for p in (CONFIGS / "tiny").rglob("*.yaml")}
    assert tiny == set(CARDS) - ONE_SIZE


@pytest.mark.parametrize("scale", ["paper", "tiny"])
@pytest.mark.parametrize("run", RUNS)
def test_run_prints_and_its_output_runs_again(run, scale, workplace, capsys):
    def printed(file, *more):
        with pytest.raises(SystemExit) as stop:
            main(["fit", "-c", file, "--print_config", *more])
        assert stop.value.code == 0
        return capsys.readouterr().out

    first = printed(run, "--scale", scale)
    Path("again.yaml").write_text(first)
    strip = [line.split("  # ")[0] for line in printed("again.yaml").splitlines()]
    assert strip == [line.split("  # ")[0] for line in first.splitlines()]
    if scale == "paper":
        assert "# report" in first and "not given in the report" in first


@pytest.mark.parametrize("run", [r for r in RUNS if r.startswith("ablations")])
def test_a_row_differs_only_where_it_says(run):
    base = (ROOT / run).parent / yaml.safe_load((ROOT / run).read_text())["base"]
    for scale in ("paper", "tiny"):
        row, ground = (flat(compose([f], scale=scale).config) for f in (ROOT / run, base))
        declared = tuple(declared_keys(ROOT / run))
        changed = [k for k in row | ground if row.get(k) != ground.get(k)]
        assert declared and all(k.startswith(declared) for k in changed), changed


def flat(node, path=""):
    if not isinstance(node, dict):
        return {path: node}
    return {
        k: v
        for key, item in node.items()
        for k, v in flat(item, path if key == "init_args" else f"{path}.{key}".strip(".")).items()
    }


def declared_keys(path):
    return list(yaml.safe_load(path.read_text())["override"])

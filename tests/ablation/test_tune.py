"""The grid of rates is run once, kept, and written down; rows read the rate of their card."""

import json
from pathlib import Path

from step3vl.ablation.tune import read_grid
from step3vl.cli import main

FOLDER = "ablations/table6_deepstack"
SHORT = """vars:
  base: budget/table6.yaml
  starts: {pe_lang: null}
  grid: {"off": [0.001, 0.002], "on": []}
  samples_per_step: 2
"""


def test_grid_is_run_kept_and_written_down(workplace, capsys):
    base = Path(FOLDER) / "_base.yaml"
    base.write_text(base.read_text().replace("vars: budget/table6.yaml\n", SHORT))
    tune = ["ablate", "tune", FOLDER, "--scale", "tiny", "--steps", "10"]
    assert main(tune) == 0
    assert "2 runs: 0 finished, 2 to do" in capsys.readouterr().out
    out = Path("runs/tiny") / FOLDER
    found = json.loads((out / "tuning.json").read_text())
    entry = found["rows"]["off"]
    assert found["max_steps"] == 10 and set(entry["losses"]) == {"0.001", "0.002"}
    assert entry["best"] == min(entry["losses"], key=entry["losses"].get) and entry["used"] == 0.004
    assert not list(out.glob("*/seed_*")) and not list(out.glob("off/tune_*/metrics.json"))
    assert main(tune) == 0
    assert "2 runs: 2 finished, 0 to do" in capsys.readouterr().out


def test_mistakes_are_one_sentence(workplace, capsys):
    assert main(["ablate", "tune", FOLDER, "--scale", "paper", "--steps", "10"]) == 2
    assert "has no `grid` at paper scale" in capsys.readouterr().err
    assert main(["ablate", "tune", FOLDER, "--scale", "tiny", "--steps", "10", "--only", "onn"]) == 2
    assert "no row 'onn'; did you mean on" in capsys.readouterr().err


def test_every_rate_of_a_grid_belongs_to_a_row():
    for table in sorted(Path("ablations").glob("table*")):
        grid, used = read_grid(table, "tiny")
        rows = {p.stem for p in table.glob("[!_]*.yaml")}
        assert set(grid) <= rows and rows <= set(used)
        assert all(used[name] in rates for name, rates in grid.items())

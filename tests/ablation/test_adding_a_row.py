"""What docs/adding_a_part.md says works as it is written there: its files are taken from the page and run."""

import os
import re
import subprocess
import sys
from pathlib import Path

from step3vl.ablation import read_rows
from step3vl.cli import main

ROOT = Path(__file__).parents[2]
TABLE = "ablations/table4_vision_encoder"
SUITE = ("reading", "words", "pointing", "counting", "attributes", "spatial", "sums", "common", "rare")
SHORT = ["--trainer.max_steps=2", "--data.samples_per_step=4", "--model.sampling.max_new_tokens=3"]
SHORT += [f"--suite.{name}.num_cases=2" for name in SUITE]


def write_from_the_page(*names):
    """Write the blocks of the page whose first line is a comment with a file's name."""
    page = (ROOT / "docs/adding_a_part.md").read_text()
    blocks = dict(re.findall(r"```(?:yaml|python)\n# (\S+)\n(.*?)```", page, re.DOTALL))
    for name in names:
        Path(name).write_text(blocks[name])


def test_a_fourth_encoder_is_one_file(workplace, capsys):
    before = {row.file.stem for row in read_rows(Path(TABLE), "tiny")}
    write_from_the_page(f"{TABLE}/siglip2.yaml")
    for scale in ("tiny", "paper"):
        rows = {row.file.stem: row for row in read_rows(Path(TABLE), scale)}
        assert set(rows) == before | {"siglip2"}
        found = rows["siglip2"].config["model"]["init_args"]
        assert found["vlm"]["init_args"]["vision_encoder"]["class_path"].endswith("SigLIP2")
        assert "siglip2" in found["init_from"]["vision_encoder"]
    command = ["ablate", "run", TABLE, "--scale", "tiny", "--only", "siglip2", "--vars.starts.siglip2=null", *SHORT]
    assert main(command) == 0
    assert "siglip2 seed 0: reading" in capsys.readouterr().out


def test_a_new_encoder_is_one_class_and_one_card(workplace):
    write_from_the_page("my_encoder.py", "patch_mlp.yaml", f"{TABLE}/siglip2.yaml")
    row = Path(TABLE, "siglip2.yaml").read_text()
    row = row.replace("vision/siglip2_so400m.yaml", "patch_mlp.yaml").replace("${vars.starts.siglip2}", "null")
    Path(TABLE, "siglip2.yaml").unlink()
    Path(TABLE, "patch_mlp.yaml").write_text(row.replace("${vars.rates.siglip2}", "0.016"))
    words = ["ablate", "run", TABLE, "--scale", "tiny", "--only", "patch_mlp", *SHORT]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([".", str(ROOT)])}
    done = subprocess.run([sys.executable, "-m", "step3vl", *words], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    log = Path("runs/tiny", TABLE, "patch_mlp/seed_0/log.txt").read_text()
    assert "PatchMLP" in log and "11,456" in log

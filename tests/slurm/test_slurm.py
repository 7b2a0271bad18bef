"""A run becomes a job: sizes that do not agree are refused, and what the script runs is the run that was asked for."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from step3vl.ablation import read_rows
from step3vl.cli import main
from step3vl.config import ConfigError, compose
from step3vl.lightning_cli import read_command
from step3vl.slurm.check import check_sizes
from step3vl.slurm.request import Request, seconds
from tests.ablation.test_table import fake_run

RUN = "experiments/step3vl_10b/1_pretrain_phase1.yaml"
FITS = ["--trainer.num_nodes=4", "--trainer.strategy.data_parallel_size=32"]
JOB = ["slurm", RUN, "--nodes", "4", "--dry-run", *FITS]
TABLE = "ablations/table4_vision_encoder"


def stub(folder, name, text):
    """A program on PATH."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/bash\n{text}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def programs(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    return tmp_path / "bin"


def request(nodes=4, gpus=8):
    return Request(nodes, gpus, "1:00:00", 300)


def refused(trainer, **sizes):
    with pytest.raises(ConfigError) as error:
        check_sizes({"trainer": trainer}, request(**sizes), "FILE")
    return str(error.value)


def strategy(name="ModelParallelStrategy", **arguments):
    return {"class_path": f"lightning.pytorch.strategies.{name}", "init_args": arguments}


def test_sizes_that_agree():
    good = {"num_nodes": 4, "devices": 8}
    for given in (
        "ddp",
        "auto",
        strategy(data_parallel_size=32, tensor_parallel_size=1),
        strategy(data_parallel_size=4, tensor_parallel_size=8),
        strategy(),  # Lightning's own meaning: nodes x devices
        strategy("FSDPStrategy", device_mesh=[4, 8]),
        strategy("FSDPStrategy"),
    ):
        check_sizes({"trainer": {**good, "strategy": given}}, request())
    for devices in ("auto", -1, "0,1,2,3,4,5,6,7", "8", list(range(8))):
        check_sizes({"trainer": {"num_nodes": 4, "devices": devices}}, request())
    check_sizes({"trainer": {"accelerator": "cpu", "devices": 1}}, request(nodes=1, gpus=0))


def test_sizes_that_do_not_agree_are_named_with_the_overrides_that_fix_them():
    said = refused({"num_nodes": 32, "devices": 8})
    assert "--nodes 4 x --gpus 8 does not fit FILE" in said
    assert "trainer.num_nodes is 32, not 4; add --trainer.num_nodes=4" in said
    assert "trainer.devices is 2, not 8" in refused({"num_nodes": 4, "devices": 2})
    assert "trainer.num_nodes is 1, not 4" in refused({"devices": 8})
    agree = {"num_nodes": 4, "devices": 8}
    said = refused({**agree, "strategy": strategy(data_parallel_size=256, tensor_parallel_size=2)})
    assert "data_parallel_size x trainer.strategy.tensor_parallel_size is 256 x 2 = 512, not 32" in said
    assert said.endswith("add --trainer.strategy.data_parallel_size=16")
    said = refused({**agree, "strategy": strategy(data_parallel_size=2, tensor_parallel_size=3)})
    assert said.endswith("--trainer.strategy.data_parallel_size=32 --trainer.strategy.tensor_parallel_size=1")
    said = refused({**agree, "strategy": strategy("FSDPStrategy", device_mesh=[2, 8])})
    assert "is 2 x 8 = 16, not 32" in said and said.endswith("--trainer.strategy.device_mesh=[4,8]")
    assert "trainer.accelerator of FILE is cpu: give --gpus 0" in refused({"accelerator": "cpu"})


@pytest.mark.parametrize("run", [RUN, "experiments/step3vl_10b/3_sft_stage1.yaml"])
def test_the_shipped_runs_fit_their_own_numbers(workplace, run):
    config = compose([run]).config
    nodes = config["trainer"]["num_nodes"]
    check_sizes(config, request(nodes=nodes))
    with pytest.raises(ConfigError):
        check_sizes(config, request(nodes=nodes + 1))


def test_times_are_read_as_slurm_reads_them():
    given = ["90", "90:30", "24:00:00", "2-0", "1-12:30", "1-0:0:5"]
    assert [seconds(time) for time in given] == [5400, 5430, 86400, 172800, 131400, 86405]
    for time in ("24h", "1:2:3:4", ""):
        with pytest.raises(ConfigError, match="is no time of SLURM"):
            seconds(time)
    with pytest.raises(ConfigError, match=r"--notice is 300 s, but must be above 0 and below --time 5 \(300 s\)"):
        Request(1, 8, "5", 300)
    with pytest.raises(ConfigError, match="--nodes must be at least 1"):
        Request(0, 8, "60", 300)
    with pytest.raises(ConfigError, match="--sbatch_nodes: use --nodes"):
        Request(1, 8, "60", 300, extra={"nodes": "2"})


def test_the_script_runs_what_was_asked(workplace, programs, capfd):
    stub(programs, "srun", 'printf "%s\\n" "$@" > called; echo "$SRUN_CPUS_PER_TASK" >> called')
    more = ["--partition=a100", "--sbatch_account=my lab", "--sbatch_exclusive=", "--sbatch_mem=500G", "--time=2-0"]
    assert main([*JOB, *more, "--model.optimizer.lr=1e-4"]) == 0
    script, notes = capfd.readouterr()
    lines = script.splitlines()
    for line in (
        "--nodes=4",
        "--ntasks-per-node=8",
        "--gpus-per-node=8",
        "--time=2-0",
        "--partition=a100",
        "--account='my lab'",
        "--exclusive",
        "--mem=500G",
        "--signal=USR1@300",
        "--requeue",
        "--open-mode=append",
        "--cpus-per-task=10",
    ):
        assert lines.count(f"#SBATCH {line}") == 1, line
    assert not any("--mem=0" in line for line in lines)
    assert "a step is 1,024 samples: 32 a rank x 32 ranks" in notes
    Path("job.sh").write_text(script)
    env = {**os.environ, "SLURM_CPUS_PER_TASK": "10"}
    subprocess.run(["bash", workplace / "job.sh"], check=True, env=env, cwd="/")  # it goes to the folder it was made in
    option, *words, cpus = Path("called").read_text().splitlines()
    assert (option, words[:4], cpus) == ("--kill-on-bad-exit=1", [sys.executable, "-u", "-m", "step3vl"], "10")
    command = read_command(words[4], words[5:])
    assert command.verb == "fit" and "ckpt_path=last" in command.overrides
    asked = [word.removeprefix("--") for word in [*FITS, "--model.optimizer.lr=1e-4", "--ckpt_path=last"]]
    config = compose(command.files, command.overrides, command.scale).config
    assert config == compose([RUN], asked, "paper").config


@pytest.mark.parametrize(
    "words, said",
    [
        (["--nodes", "4", "--dry-run"], "trainer.num_nodes is 32, not 4"),
        (["--nodes", "4", *FITS], "say --dry-run (print the script) or --submit"),
        (["--nodes", "4", "--dry-run", *FITS, "--model.optimizer.lrr=1"], "'lrr'"),
        (["--nodes", "4", "--dry-run", *FITS, "--ckpt_path"], "'--ckpt_path' is not an option"),
        (["--nodes", "4", "--dry-run", *FITS, "--sbatch_time=3"], "use --time"),
    ],
)
def test_mistakes_are_one_sentence(workplace, capsys, words, said):
    assert main(["slurm", RUN, *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and said in error, error


def test_a_run_that_does_not_save_itself_is_noted(workplace, capsys):
    """Also: one task without GPU, and a checkpoint that was named stays."""
    words = ["--scale", "tiny", "--nodes", "1", "--gpus", "0", "--dry-run", "--ckpt_path=other.ckpt"]
    assert main(["slurm", RUN, *words, "--trainer.callbacks=null"]) == 0
    script, notes = capsys.readouterr()
    assert "has no step3vl.callbacks.Requeue" in notes
    assert "gpus-per-node" not in script and "--ntasks-per-node=1\n" in script
    assert "ckpt_path=last" not in script and "--ckpt_path=other.ckpt" in script


def test_without_submitit_the_way_by_hand_is_named(workplace, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert main(["--submit" if word == "--dry-run" else word for word in JOB]) == 2
    error = capsys.readouterr().err
    assert "pip install -e '.[slurm]'" in error and "--dry-run > job.sbatch" in error


def test_what_is_submitted_is_what_a_dry_run_prints(workplace, programs, capsys):
    pytest.importorskip("submitit", reason="the extra slurm is not installed")
    submitted = ["--submit" if word == "--dry-run" else word for word in JOB]
    if subprocess.run(["which", "srun"], capture_output=True, check=False).returncode:
        assert main(submitted) == 2 and "no srun on this machine" in capsys.readouterr().err
    assert main(JOB) == 0
    script = capsys.readouterr().out
    stub(programs, "srun", "")
    stub(programs, "sbatch", 'cat "$1" > submitted; echo Submitted batch job 42')
    assert main(submitted) == 0
    assert "submitted job 42" in capsys.readouterr().out
    assert Path("submitted").read_text() == script
    stub(programs, "sbatch", "echo Invalid account >&2; exit 1")
    assert main(submitted) == 2
    assert "sbatch refused the job" in (error := capsys.readouterr().err) and "Invalid account" in error


def test_the_template_follows_the_job(workplace, programs):
    """experiments/slurm.sbatch passes the job's own numbers to the run."""
    stub(programs, "srun", 'printf "%s\\n" "$@" > called')
    job = {"SLURM_NNODES": "3", "SLURM_NTASKS_PER_NODE": "4", "SLURM_CPUS_PER_TASK": "10"}
    command = ["bash", "experiments/slurm.sbatch", RUN, "--model.optimizer.lr=1e-4"]
    subprocess.run(command, check=True, env={**os.environ, **job})
    words = Path("called").read_text().splitlines()
    assert words[:5] == ["--kill-on-bad-exit=1", "python", "-u", "-m", "step3vl"]
    run = read_command(words[5], words[6:])
    config = compose(run.files, run.overrides).config
    check_sizes(config, request(nodes=3, gpus=4))
    assert config["ckpt_path"] == "last" and config["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 1e-4
    text = Path("experiments/slurm.sbatch").read_text()
    for option in ("ntasks-per-node=8", "gpus-per-node=8", "signal=USR1@300", "requeue", "open-mode=append"):
        assert f"\n#SBATCH --{option}\n" in text, option


def test_a_table_is_an_array_of_what_is_not_finished(workplace, capsys):
    fake_run(read_rows(Path(TABLE), "tiny", ["trainer.max_steps=2"])[0], 0, {"reading": 0.8})
    words = ["ablate", "run", TABLE, "--scale", "tiny", "--seeds", "2", "--trainer.max_steps=2"]
    words += ["--only", "pe_lang", "--only", "dinov3"]
    job = ["--slurm", "--nodes", "1", "--gpus", "0", "--dry-run", "-j", "2", "--sbatch_account=lab"]
    assert main([*words, *job]) == 0
    script, notes = capsys.readouterr()
    assert "4 runs: 1 finished, 3 to do" in notes
    assert "#SBATCH --array=0-2%2\n" in script and "#SBATCH --account=lab\n" in script
    elements = [shlex.split(line) for line in script.splitlines() if line.strip()[:2] in ("0)", "1)", "2)")]
    found = [(e[e.index("--only") + 1], e[e.index("--seed") + 1]) for e in elements]
    assert found == [("dinov3", "0"), ("pe_lang", "1"), ("dinov3", "1")]
    assert all(e[4:8] == ["step3vl", "ablate", "run", TABLE] and "--trainer.max_steps=2" in e for e in elements)
    assert main([*words, "--slurm", "--nodes", "2", "--gpus", "0", "--dry-run"]) == 2
    assert "dinov3.yaml: trainer.num_nodes is 1, not 2" in capsys.readouterr().err
    assert main([*words, "--dry-run"]) == 2
    capsys.readouterr()
    assert main([*words, *job[:5], "--dry-run", "--model.optimizer.lrr=1"]) == 2
    assert "'lrr'" in capsys.readouterr().err

"""What `ablate run` and `chain` start ends with them, saved if it can, killed with all its own children if not."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from step3vl.ablation import children
from step3vl.cli import main
from step3vl.signals import EXIT_UNFINISHED

TABLE = "ablations/table4_vision_encoder"
RUN = ["ablate", "run", TABLE, "--scale", "tiny", "--only", "pe_lang"]
POLITE = """trap 'echo saved > saved; exit 85' TERM
sleep 100 & echo $! > pids; echo $$ >> pids
while true; do sleep 0.05; done"""
STUBBORN = POLITE.replace("'echo saved > saved; exit 85'", "'echo ignored > ignored'")


def program(text):
    """Stands in for python, or for srun."""
    path = Path("program").absolute()
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)
    return str(path)


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def signal_once_it_runs(*numbers, every_s=0.5):
    """From a thread: wait for the child, then signal this process."""

    def act():
        for _ in range(400):
            if Path("pids").exists() and len(Path("pids").read_text().split()) == 2:
                break
            time.sleep(0.05)
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(every_s)

    threading.Thread(target=act, daemon=True).start()


def nothing_is_left():
    pids = Path("pids").read_text().split()
    end_s = time.monotonic() + 5
    while any(is_alive(pid) for pid in pids) and time.monotonic() < end_s:
        time.sleep(0.05)
    return len(pids) == 2 and not any(is_alive(pid) for pid in pids)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_signalled_table_lets_its_runs_save(workplace, capsys, number):
    before = signal.getsignal(number)
    signal_once_it_runs(number)
    assert main([*RUN, "--launcher", program(POLITE)]) == EXIT_UNFINISHED
    assert Path("saved").exists() and nothing_is_left(), "a child, or what it had started, is orphaned"
    said = capsys.readouterr().out
    assert "the same command goes on" in said and ("not a SLURM job" in said) == (number == signal.SIGUSR1)
    assert signal.getsignal(number) == before


def test_ctrl_c_is_passed_on_and_a_second_one_ends_at_once(workplace, capsys):
    signal_once_it_runs(signal.SIGINT, signal.SIGINT)
    start_s = time.monotonic()
    assert main([*RUN, "--launcher", program(STUBBORN)]) == 130
    assert Path("ignored").exists() and nothing_is_left()
    assert time.monotonic() - start_s < children.GRACE_S / 4


def test_a_signalled_chain_lets_its_stage_save(workplace, capsys, monkeypatch):
    monkeypatch.setattr(sys, "executable", program(POLITE))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    signal_once_it_runs(signal.SIGTERM)
    assert main(["chain", "experiments/step3vl_10b", "--scale", "tiny"]) == EXIT_UNFINISHED
    assert Path("saved").exists() and nothing_is_left()
    assert "phase2" not in capsys.readouterr().out, "the next stage was started"


def test_a_run_that_was_stopped_by_itself_is_not_a_failure(workplace, capsys):
    assert main([*RUN, "--launcher", program("exit 85")]) == EXIT_UNFINISHED
    assert "pe_lang seed 0 was stopped by a signal and has saved" in " ".join(capsys.readouterr().out.split())
    assert main([*RUN, "--launcher", program("echo broken; exit 3")]) == 1
    assert "failed in fit" in capsys.readouterr().out


def test_a_launcher_starts_both_phases_with_slurms_variables(workplace, capsys, monkeypatch):
    """Without one the variables are left out: a run on this machine must not take itself for a task of the job."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    metrics = json.dumps({"scores": {"reading": {"score": 0.5}}})
    folder = Path("runs/tiny") / TABLE / "pe_lang/seed_3"
    text = f"echo \"$SLURM_JOB_ID $1 $5 $@\" >> calls; mkdir -p {folder}; echo '{metrics}' > {folder}/metrics.json"
    words = [*RUN, "--seed", "3", "--trainer.max_steps=2"]
    assert main([*words, "--launcher", f"{program(text)} --flag"]) == 0
    fit, test = Path("calls").read_text().splitlines()
    assert fit.startswith("7 --flag fit ") and test.startswith("7 --flag test ")
    assert "--seed_everything=3" in fit and fit.endswith("--ckpt_path=last") and "--trainer.max_steps=2" in fit
    assert main([*words, "--launcher", "false"]) == 0, "a finished run was started again"
    assert "SLURM_JOB_ID" not in children.local_env(2) and children.local_env(2)["OMP_NUM_THREADS"] == "2"


def test_a_row_that_is_not_there_is_named(workplace, capsys):
    assert main(["ablate", "run", TABLE, "--scale", "tiny", "--only", "pe_long"]) == 2
    assert "no row 'pe_long'; did you mean pe_lang?" in capsys.readouterr().err


def test_children_are_killed_after_the_grace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    child = children.start([program(STUBBORN)], tmp_path / "log", dict(os.environ))
    while not Path("pids").exists() or len(Path("pids").read_text().split()) < 2:
        time.sleep(0.05)
    with children.note_stops() as note:
        children.end([child], note, Console(quiet=True), grace_s=0.5)
    assert child.returncode == -signal.SIGKILL and nothing_is_left()


def test_nohup_stays_in_force():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert signal.SIGHUP not in children.note_stops().signals
    finally:
        signal.signal(signal.SIGHUP, before)
    assert {signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP} <= set(children.note_stops().signals)

"""A page says what the runs say: intervals, differences and verdicts follow from scores that we know."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from step3vl.ablation import read_rows
from step3vl.ablation.claims import Claim, judge
from step3vl.ablation.runs import read_runs
from step3vl.cli import main
from step3vl.config import ConfigError

FOLDER = "ablations/table4_vision_encoder"
NAMES = ("reading", "words", "attributes", "counting")


def fake_run(row, seed, right, speed, blind=0.1):
    """A finished run: `right` of 100 cases of each capability, and a loss that falls with `speed`."""
    folder = row.run_folder(seed)
    (folder / "csv/version_0").mkdir(parents=True)
    rng = np.random.default_rng([seed, int(100 * right)])
    lines, scores = [], {}
    for name in NAMES:
        hits = rng.random(100) < right
        for k, hit in enumerate(hits):
            seen = {"benchmark": name, "id": f"{name}-{k}", "score": float(hit)}
            lines.append(json.dumps({**seen, "blind_score": float(k < 100 * blind)}) + "\n")
        scores[name] = dict(score=float(hits.mean()), blind=blind, majority=0.2, num_cases=100)
    (folder / "cases.jsonl").write_text("".join(lines))
    facts = {"num_parameters": 2_000_000, "optimizer": "x.MuonAdamW", "commit": "abc", "time": "2026-01-02T00:00:00"}
    provenance = {**facts, "device": "CPU", "evaluation_cpu_s": 6.0}
    (folder / "metrics.json").write_text(json.dumps({"scores": scores, "provenance": provenance}))
    (folder / "row.json").write_text(json.dumps({"fingerprint": row.fingerprint, "seed": seed}))
    points = [f"{s},{0.5 + 4 * np.exp(-speed * s) + 0.01 * seed},{s * 10},{s}\n" for s in range(4, 300, 5)]
    (folder / "csv/version_0/metrics.csv").write_text("step,loss,tokens,cpu_s\n" + "".join(points))


@pytest.fixture
def rows(workplace):
    found = {row.file.stem: row for row in read_rows(Path(FOLDER), "tiny")}
    for seed in range(3):
        fake_run(found["pe_lang"], seed, 0.8, 0.05)
        fake_run(found["dinov3"], seed, 0.5, 0.02)
        fake_run(found["noise"], seed, 0.1, 0.01)
    return found


def test_page_says_what_the_runs_say(rows, capsys):
    assert main(["ablate", "report", FOLDER]) == 0
    assert "wrote docs/results/table4.md and table4.png" in capsys.readouterr().out
    page = Path("docs/results/table4.md").read_text()
    assert "TINY SCALE" in page and "from 9 finished runs, seeds 0, 1, 2" in page and "commit abc" in page
    ours = next(line for line in page.splitlines() if line.startswith("| PE-lang G/14 | 3 |"))
    mean, low, high = map(float, re.findall(r"\d\.\d+", ours.split("|")[3]))
    scores = read_runs(rows["pe_lang"]).scores("reading")
    assert mean == pytest.approx(scores.mean(), abs=5e-4) and low < mean < high
    assert "| random weights, frozen | not run |" in page
    verdicts = {line.split("|")[1].strip(): line for line in page.splitlines() if "**" in line and "|" in line}
    assert "**agrees**" in verdicts["The loss falls faster with PE-lang than with DINOv3"]
    assert "3 of 3 (p = 0.125)" in verdicts["OCR gains (12.5 % in the paper)"]
    assert "**undecided**" in verdicts["An encoder of noise is blind"], "400 cases do not decide a margin of 0.03"
    assert "**not run**" in verdicts["A random encoder that stays frozen is near blind"]
    assert "+12.5 %" in page and "not given" in page and "random" not in page.split("## The paper's numbers")[1][:400]
    assert "`model.init_from.vision_encoder`" in page and "Everything else is equal" in page
    assert Path("docs/results/table4.png").read_bytes()[:4] == b"\x89PNG"


def test_verdicts_follow_from_intervals(rows):
    runs = {name: read_runs(row) for name, row in rows.items()}

    def word(**changed):
        data = dict(text="t", of="pe_lang", against="dinov3", measure="reading", direction="higher") | changed
        return judge(Claim.read(data, "here"), runs, level=1.0).word

    assert word() == "agrees"
    assert word(direction="lower") == "contradicts"
    assert word(direction="none", margin=0.02) == "contradicts"
    assert word(direction="none", margin=0.9) == "agrees"
    assert word(of="pe_lang", against="pe_lang") == "undecided"
    assert word(measure=["reading", "words"]) == "agrees" and word(measure="all") == "agrees"
    assert word(of="noise", against="blind", measure="all", direction="none", margin=0.06) == "agrees"
    assert word(measure="steps_to_loss", direction="lower") == "agrees"
    assert word(of="random") == "not run"


def test_steps_that_were_never_reached_count_as_the_whole_run(rows):
    runs = {name: read_runs(row) for name, row in rows.items()}
    claim = Claim("t", "noise", "pe_lang", "steps_to_loss", "higher")
    verdict = judge(claim, runs, level=0.55)
    assert verdict.censored == 3 and verdict.word == "agrees"
    assert max(verdict.gaps) <= 300


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"of": "pe_lamg"}, "no row 'pe_lamg'; did you mean pe_lang"),
        ({"measure": "readin"}, "no measure 'readin'; did you mean reading"),
        ({"direction": "up"}, "direction is 'up'; accepted: higher, lower, none"),
        ({"margins": 1}, "the key 'margins'; did you mean margin"),
    ],
)
def test_bad_claims_are_one_sentence(rows, changed, words):
    runs = {name: read_runs(row) for name, row in rows.items()}
    data = dict(text="t", of="pe_lang", against="dinov3", measure="reading", direction="higher") | changed
    with pytest.raises(ConfigError, match=words):
        judge(Claim.read(data, "here"), runs, level=1.0)
    with pytest.raises(ConfigError, match="lacks 'of'"):
        Claim.read({"text": "t"}, "here")


def test_a_table_without_runs_says_how_to_make_them(workplace, capsys):
    assert main(["ablate", "report", FOLDER]) == 2
    assert "step3vl ablate run ablations/table4_vision_encoder --scale tiny" in capsys.readouterr().err


def test_every_table_makes_claims_that_can_be_judged():
    for table in sorted(Path("ablations").glob("table*")):
        for scale in ("tiny", "paper"):
            rows = read_rows(table, scale)
            names = {row.file.stem for row in rows}
            claims = [Claim.read(data, str(table)) for data in rows[0].info["claims"]]
            assert claims and all(claim.of in names for claim in claims)
            assert all(claim.against in names | {"blind"} for claim in claims)
            suite = set(rows[0].config["suite"])
            for claim in claims:
                assert isinstance(claim.measure, str) or set(claim.measure) <= suite

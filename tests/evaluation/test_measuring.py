"""Blind and majority baselines, intervals and provenance, with a generator that really looks at pixels."""

import json
import math

import pytest
from PIL import Image

from step3vl.evaluation import Benchmark, Case, HeldOut, bootstrap, majority_score, measure, summarise
from step3vl.evaluation.report import write_report
from step3vl.types import Completion, Message, Prompt, Sampling

COLOURS = {"red": (255, 0, 0), "blue": (0, 0, 255)}


class Looker:
    """Says the colour of the image's first pixel; anything else is 'grey'."""

    def generate(self, prompts, sampling, n=1):
        names = {colour: name for name, colour in COLOURS.items()}
        words = [names.get(prompt.images[0].getpixel((0, 0)), "grey") for prompt in prompts]
        return [[Completion(text=word, token_ids=[0], truncated=False)] * n for word in words]


class Colours(Benchmark):
    def cases(self, limit=None):
        golds = ["red", "red", "red", "blue"]
        prompts = [
            Prompt(messages=[Message(role="user", content="<image>?")], images=[Image.new("RGB", (4, 4), COLOURS[g])])
            for g in golds
        ]
        return [
            Case(id=str(i), prompt=p, answer=g, answer_type="exact") for i, (p, g) in enumerate(zip(prompts, golds))
        ][:limit]


def test_seeing_beats_blind_and_majority():
    benchmark = Colours()
    records = measure("colours", benchmark, benchmark.cases(), Looker(), Sampling(max_new_tokens=1))
    score = summarise(records, majority_score(benchmark, benchmark.cases()))
    assert (score.score, score.blind, score.majority, score.num_cases) == (1.0, 0.0, 0.75, 4)
    assert (score.low, score.high) == (1.0, 1.0)
    assert [r.said_blind for r in records] == ["grey"] * 4


def test_bootstrap_interval_covers_the_mean_and_shrinks():
    wide, narrow = bootstrap([0, 1] * 10), bootstrap([0, 1] * 1000)
    assert wide[0] < 0.5 < wide[1] and narrow[1] - narrow[0] < (wide[1] - wide[0]) / 5
    assert wide == bootstrap([0, 1] * 10)
    assert narrow[1] - narrow[0] == pytest.approx(2 * 1.96 * 0.5 / math.sqrt(2000), rel=0.15)
    with pytest.raises(ValueError, match="at least one value"):
        bootstrap([])


def test_held_out_reads_shards_and_hides_the_gold(small_corpus):
    benchmark = HeldOut(f"{small_corpus}/test/documents-digits-level0-*.tar", num_cases=12)
    cases = benchmark.cases()
    assert len(cases) == 12 and len(benchmark.cases(limit=3)) == 3
    assert all(case.prompt.messages[-1].role == "user" and case.answer for case in cases)
    assert all(benchmark.score(case, case.answer) == 1 for case in cases)
    with pytest.raises(ValueError, match="nothing-"):
        HeldOut(f"{small_corpus}/test/nothing-*.tar").cases()


def test_report_has_scores_and_provenance(tmp_path):
    benchmark = Colours()
    records = measure("colours", benchmark, benchmark.cases(), Looker(), Sampling(max_new_tokens=1))
    write_report(tmp_path, {"colours": benchmark}, records, {"seed": 3, "scale": "tiny"})
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["scores"]["colours"]["score"] == 1.0
    assert {"seed", "scale", "commit", "device", "versions"} <= set(metrics["provenance"])
    assert [json.loads(line)["said"] for line in (tmp_path / "cases.jsonl").read_text().splitlines()][-1] == "blue"
    assert not list(tmp_path.glob("*.part"))

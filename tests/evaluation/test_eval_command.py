"""`step3vl eval` and `compare` from the command line, on twins and a tiny random model."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from step3vl.cli import main
from step3vl.evaluation import KeptAnswers, difference, evaluate, summarise
from step3vl.evaluation.benchmarks import MMStar
from step3vl.evaluation.gallery import difference as marked
from step3vl.evaluation.statistics import voted
from step3vl.types import Completion, Sampling

from .answering import Says, records

EVAL = ["--scale=tiny", "--only=mmstar,screenspot_v2,ocrbench", "--limit=6", "--batch=2", "--max-new-tokens=6"]


@pytest.fixture
def model(workplace, capsys):
    assert main(["make-tiny", "step3vl", "model"]) == 0
    return "model"


def test_same_seed_same_numbers_also_after_an_interruption(model, twins, capsys, monkeypatch):
    run = ["eval", model, f"--data-root={twins}", *EVAL, "--preset=sere", "--samples=2"]
    assert main([*run, "--out=whole"]) == 0
    whole = Path("whole/cases.jsonl").read_text()
    assert len(whole.splitlines()) == 3 * 6 * 2
    metrics = json.loads(Path("whole/metrics.json").read_text())
    facts = metrics["provenance"]
    wanted = {"command", "model_hash", "data_hashes", "sampling", "harness", "commit", "device", "limit", "preset"}
    assert wanted <= facts.keys()
    assert facts["sampling"]["seed"] == 0 and set(facts["data_hashes"]) == {"mmstar", "screenspot_v2", "ocrbench"}
    assert metrics["scores"]["mmstar"]["num_samples"] == 2 and metrics["scores"]["mmstar"]["covered"] is not None
    page = Path("whole/report.html").read_text()
    assert page.count("<div class='case'>") >= 6 and "data:image/jpeg;base64," in page and "<script" not in page

    from step3vl.generation.sampler import Sampler

    calls, generate = [], Sampler.generate

    def stops(self, *arguments, **more):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return generate(self, *arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Sampler, "generate", stops)
        assert main([*run, "--out=parts"]) == 130
    lines = Path("parts/answers/mmstar.jsonl").read_text()
    Path("parts/answers/mmstar.jsonl").write_text(lines + '{"key": "torn by the en')
    capsys.readouterr()
    assert main([*run, "--out=parts"]) == 0
    assert "of the answers were kept from before" in capsys.readouterr().out
    assert Path("parts/cases.jsonl").read_text() == whole
    with monkeypatch.context() as patch:
        patch.setattr(Sampler, "generate", lambda *a, **k: pytest.fail("asked again"))
        assert main([*run, "--out=parts"]) == 0
    assert Path("parts/cases.jsonl").read_text() == whole
    assert main(["compare", "whole", "parts", "--cases=both.csv"]) == 0
    out = capsys.readouterr().out
    assert "+0.000" in out and len(Path("both.csv").read_text().splitlines()) >= 1 + 3 * 6


@pytest.mark.parametrize(
    "words, said",
    [
        (["--suite=reports"], ["no suite 'reports'", "report"]),
        (["--only=mmstr"], ["no benchmark 'mmstr'", "mmstar"]),
        (["--preset=seri"], ["no preset 'seri'", "sere"]),
        (["--samples=0"], ["--samples is 0; accepted is 1 or more"]),
        (["--data-root=nothing"], ["there is no nothing/", "--data-root"]),
    ],
)
def test_wrong_words_get_one_sentence(words, said, model, twins, capsys):
    assert main(["eval", model, f"--data-root={twins}", *EVAL, *words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(text in error for text in said), error


def test_compare_names_what_is_missing(tmp_path, capsys):
    assert main(["compare", str(tmp_path), str(tmp_path)]) == 2
    assert "step3vl eval" in capsys.readouterr().err
    for name, row in (
        ("a", {"benchmark": "x", "id": "1", "score": 1}),
        ("b", {"benchmark": "y", "id": "1", "score": 1}),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "cases.jsonl").write_text(json.dumps(row) + "\n")
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 2
    assert "share no benchmark" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ parts


def test_kept_answers_depend_on_model_prompt_sampling_and_number(tmp_path, twins):
    prompts = [case.prompt for case in MMStar(str(twins)).cases(3)]
    greedy = Sampling(max_new_tokens=4)
    first = KeptAnswers(Says(iter("abcdefgh")), tmp_path / "kept.jsonl", "one")
    assert [g[0].text for g in first.generate(prompts, greedy)] == ["a", "b", "c"]
    again = KeptAnswers(Says(iter("ABCDEFGH")), tmp_path / "kept.jsonl", "one")
    assert [g[0].text for g in again.generate(prompts, greedy)] == ["a", "b", "c"] and again.num_asked == 0
    assert again.generate(prompts[:1], replace(greedy, seed=1))[0][0].text == "A"
    assert [c.text for c in again.generate(prompts[:1], greedy, 2)[0]] == ["B", "C"]
    twice = [prompts[0], prompts[0]]
    assert [g[0].text for g in again.generate(twice, greedy)] == ["D", "E"], "two answers to one prompt are two"
    assert [g[0].text for g in again.generate(twice, greedy)] == ["D", "E"] and again.num_asked == 5
    other = KeptAnswers(Says(iter("XYZ")), tmp_path / "kept.jsonl", "two")
    assert other.generate(prompts[:1], greedy)[0][0].text == "X"


def test_votes_and_cover(twins):
    made = MMStar(str(twins))
    case = made.cases(1)[0]
    wrong = "B" if case.answer != "B" else "C"
    texts = [wrong, f"({case.answer})", f"The answer is {case.answer}."]
    found = evaluate("mmstar", made, Says(iter(texts)), Sampling(max_new_tokens=4), n=3, limit=1, blind=False)
    score = summarise(found, 0.0, made)
    assert (score.score, score.voted, score.covered, score.num_samples) == (pytest.approx(2 / 3), 1.0, 1.0, 3)
    assert voted(found[:2]) == 0.0, "of two votes the first given wins"


def test_a_difference_is_paired():
    a = {str(i): float(i % 2) for i in range(200)}
    same, better = difference(a, a), difference(a, dict.fromkeys(a, 1.0))
    assert same.difference == 0 and same.p_value == 1 and (same.num_better, same.num_worse) == (0, 0)
    assert better.difference == 0.5 and better.low > 0.4 and better.p_value < 0.001 and better.num_better == 100
    noisy = difference(a, {k: float((int(k) + 1) % 2) for k in a})
    assert noisy.low < 0 < noisy.high and noisy.p_value > 0.5
    with pytest.raises(ValueError, match="no case in common"):
        difference({"1": 1.0}, {"2": 1.0})


def test_what_differs_is_marked_and_escaped():
    assert marked("Fores<", "Forest") == "Fores<del>&lt;</del><ins>t</ins>"


def test_a_torn_line_between_two_processes_is_dropped(tmp_path, twins):
    file = tmp_path / "kept.jsonl"
    file.write_text('{"key": "x", "text": "half')
    prompts = [case.prompt for case in MMStar(str(twins)).cases(1)]
    KeptAnswers(Says(iter("a")), file, "m").generate(prompts, Sampling(max_new_tokens=1))
    assert len(file.read_text().splitlines()) == 2
    kept = KeptAnswers(Says(iter("b")), file, "m").generate(prompts, Sampling(max_new_tokens=1))
    assert kept[0][0] == Completion(text="a", token_ids=[1, 2], truncated=False)
    assert records("x", [1.0], ["a"])[0].score == 1.0

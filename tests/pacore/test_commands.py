"""`step3vl pacore` and `step3vl eval --mode pacore` from the command line, on a tiny random model."""

import json
from pathlib import Path

import pytest
from PIL import Image

from step3vl.answering import default_name, label
from step3vl.cli import main
from step3vl.pacore import SynthesisTemplate, read_traces, replay
from step3vl.pacore.pool import read_pool
from tests.pacore.upstream import Upstream

EVAL = ["--scale=tiny", "--only=mmstar", "--limit=3", "--batch=2", "--max-new-tokens=6", "--no-blind"]


@pytest.fixture
def model(workplace, capsys):
    assert main(["make-tiny", "step3vl", "model"]) == 0
    Image.new("RGB", (40, 30), "red").save("red.png")
    return "model"


def output(capsys, *words):
    capsys.readouterr()
    status = main([str(word) for word in words])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_ask_shows_rounds_and_its_trace_replays(model, capsys):
    words = ["--rounds=[3, 2]", "--image=red.png", "--scale=tiny", "--max-new-tokens=8", "--trace=t.jsonl"]
    status, out, _ = output(capsys, "pacore", "ask", model, "What is it?", *words)
    assert status == 0 and "3 of 3 rounds" in out and "1 of 1" in out
    (trace,) = read_traces("t.jsonl")
    assert trace.widths == [3, 2, 1] and trace.counted_exactly and trace.images and trace.final.text.strip() in out
    assert trace.rounds[1].prompt[0][1].count("<image>") == 1 and len(trace.rounds[1].messages) <= 3
    status, out, _ = output(capsys, "pacore", "replay", "t.jsonl")
    assert status == 0 and "1 of 1 questions give the same messages and prompts to the byte" in out
    row = json.loads(Path("t.jsonl").read_text())
    row["rounds"][1]["prompt"][0][1] += "!"
    Path("t.jsonl").write_text(json.dumps(row) + "\n")
    status, out, _ = output(capsys, "pacore", "replay", "t.jsonl")
    assert status == 1 and "round 2: the prompt differs" in out and "0 of 1" in out


def test_ask_a_server(workplace, capsys):
    pytest.importorskip("openai", reason="the openai package is not installed")
    with Upstream(faults=("",)) as upstream:
        words = [upstream.url, "what is word", "--model=m", "--rounds=[4]", "--image=red.png"]
        Image.new("RGB", (40, 30), "red").save("red.png")
        status, out, _ = output(capsys, "pacore", "ask", *words)
        assert status == 0 and "<think>hm</think>4 say word" in out and "~" in out and "4 of 4" in out
        images = [
            sum(part["type"] == "image_url" for part in body["messages"][0]["content"]) for body in upstream.bodies
        ]
        assert images == [1] * 5, "the image goes into every round"
        seeds = [body["seed"] for body in upstream.bodies]
        assert sorted(seeds)[:4] == [0, 1, 2, 3] and len(set(seeds)) == 5


def test_eval_in_rounds(model, twins, capsys, monkeypatch):
    run = ["eval", model, f"--data-root={twins}", *EVAL, "--mode=pacore", "--rounds=[2]"]
    status, out, _ = output(capsys, *run)
    assert status == 0 and "Coordination" in out
    folder = Path("evals/model-pacore-2")
    facts = json.loads((folder / "metrics.json").read_text())["provenance"]
    wanted = {
        "mode": "pacore",
        "preset": "pacore",
        "rounds": [2],
        "max_context_tokens": 2048,
        "label": "model-pacore-2",
    }
    assert wanted.items() <= facts.items() and facts["template"] == SynthesisTemplate().hash
    assert facts["prompt_tokens"] == "counted" and facts["sampling"]["temperature"] == 1.0
    traces = list(read_traces(folder / "traces" / "mmstar.jsonl"))
    assert len(traces) == 3 and all(replay(trace, SynthesisTemplate()) == [] for trace in traces)
    measures = json.loads((folder / "pacore.json").read_text())["mmstar"]
    assert measures["num_questions"] == 3 and measures["num_tokens"] == sum(t.num_tokens for t in traces) / 3
    said = [json.loads(line)["said"] for line in (folder / "cases.jsonl").read_text().splitlines()]
    assert said == [trace.final.text for trace in traces]

    from step3vl.generation.sampler import Sampler

    with monkeypatch.context() as patch:
        patch.setattr(Sampler, "generate", lambda *a, **k: pytest.fail("asked again"))
        assert output(capsys, *run)[0] == 0, "answers were kept"
        with pytest.raises(pytest.fail.Exception):
            main([*run[:-1], "--rounds=[3]", f"--out={folder}"])
        with pytest.raises(pytest.fail.Exception):
            main(["eval", model, f"--data-root={twins}", *EVAL, "--preset=sere", f"--out={folder}"])
    status, out, _ = output(capsys, "eval", model, f"--data-root={twins}", *EVAL, "--preset=sere", "--out=sere")
    assert status == 0
    facts = json.loads(Path("sere/metrics.json").read_text())["provenance"]
    assert facts["mode"] == "sere" and "rounds" not in facts and not Path("sere/pacore.json").exists()


def test_measure_and_pool_and_band(model, capsys):
    shards = "corpus/test/text-sums-level0-*.tar"
    words = ["--suite=stages", "--only=arithmetic", "--data-root=corpus", "--limit=3", "--max-new-tokens=4"]
    status, out, _ = output(capsys, "pacore", "measure", model, *words, "--rollouts=1,2", "--scale=tiny", "--out=curve")
    assert status == 0 and "PaCoRe@k" in out and Path("curve/arithmetic.png").stat().st_size > 10_000
    curve = json.loads(Path("curve/scaling.json").read_text())["curves"]["arithmetic"]
    assert [point["num_rollouts"] for point in curve["points"]] == [1, 2] and curve["num_cases"] == 3
    pool = ["pacore", "pool", model, f"--shards={shards}", "--num=4", "--limit=3", "--scale=tiny", "--out=pool.jsonl"]
    status, out, _ = output(capsys, *pool)
    assert status == 0 and "3 problems in pool.jsonl, 3 of them new; 0 answers failed" in out
    assert [len(problem.messages) for problem in read_pool("pool.jsonl")] == [4] * 3
    assert "0 of them new" in output(capsys, *pool)[1]
    both = [*pool[:-1], "--out=syntheses.jsonl", "--preset=pacore", "--rounds=[2]", "--num=2", "--limit=1"]
    assert output(capsys, *both)[0] == 0
    (problem,) = read_pool("syntheses.jsonl")
    assert "pacore [2]" in problem.model and len(problem.messages) == 2
    rows = [{"conversation": "1 + 1?", "responses": ["2", "3"], "ground_truth": "2"}]
    Path("stage1.json").write_text(json.dumps(rows))
    assert output(capsys, "pacore", "pool", "--released=stage1.json", "--out=stage1.jsonl")[0] == 0
    assert [problem.accuracy for problem in read_pool("stage1.jsonl")] == [0.5]
    status, out, _ = output(capsys, "pacore", "band", "pool.jsonl", "band.jsonl")
    assert status == 0 and "of 3 problems have a mean message accuracy between 0 and 9/24" in out


@pytest.mark.parametrize(
    "words, said",
    [
        (["pacore", "aks"], "pacore has no verb 'aks'"),
        (["pacore", "ask", "model", "q", "--rounds=[0]"], "rounds is [0]"),
        (["pacore", "ask", "model", "q", "--temperature=0"], "PaCoRe at temperature 0"),
        (["pacore", "ask", "http://x/v1", "q"], "a server needs --model"),
        (["pacore", "ask", "model", "q", "--preset=greedy"], "PaCoRe at temperature 0"),
        (["pacore", "replay", "none.jsonl"], "there is no trace file none.jsonl"),
        (["pacore", "measure", "model", "--suite=report", "--rounds=[4]"], "--rounds is for ask, eval and serve"),
        (["pacore", "measure", "model", "--suite=report", "--rollouts=1,x"], "--rollouts is '1,x'"),
        (["pacore", "pool", "model", "--out=x"], "give one of --shards, --suite and --released"),
        (["pacore", "pool", "--shards=x", "--out=x"], "a pool needs a model"),
        (["pacore", "band", "none.jsonl", "out", "--high=x"], "'x' is no share"),
        (["eval", "model", "--rounds=[4]"], "--rounds, --max-context-tokens and --template are PaCoRe's"),
        (["eval", "model", "--harness=lmms", "--tasks=mmstar", "--mode=pacore"], "PaCoRe is measured by this harness"),
        (["eval", "model", "--mode=sere", "--preset=pacore"], "contradict each other"),
        (["eval", "model", "--mode=pacore", "--preset=greedy"], "PaCoRe at temperature 0"),
    ],
)
def test_wrong_words_get_one_sentence(words, said, tmp_path, monkeypatch, capsys, twins):
    monkeypatch.chdir(tmp_path)
    more = ["--scale=tiny", f"--data-root={twins}"] if words[0] == "eval" else []
    status, _, error = output(capsys, *words, *more)
    assert status == 2 and error.count("\n") == 1 and said in error, error


def test_names():
    assert label([32, 4]) == "-pacore-32-4" and default_name("runs/x/4_sft/") == "4_sft"
    assert default_name("http://x/v1", "m") == "m"

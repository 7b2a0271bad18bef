"""Preferences: their stored form, what is refused and where, and how they are made and imported."""

import json
import random

import pytest
from PIL import Image

from step3vl.cli import main
from step3vl.data.preference_make import (
    Given,
    by_rule,
    from_answers,
    gold_of,
    read_answers,
    same,
    write_preferences,
    wrong_answer,
)
from step3vl.data.preferences import Preference, from_json, to_json
from step3vl.data.shards import ShardReader, find_shards, write_shards
from step3vl.types import Message


def pair(k=0, images=1, **changes):
    question = "<image>" * images + f"Which number? {k}"
    values = {
        "id": f"p-{k}",
        "domain": "vqa",
        "subset": "pairs",
        "level": 0,
        "messages": [Message(role="user", content=question), Message(role="assistant", content=f"{k}")],
        "images": [Image.new("RGB", (40, 30), (k % 256, 5, 9)) for _ in range(images)],
        "rejected": f"not {k}",
        **changes,
    }
    return Preference(**values)


def row(**changes):
    found = {**to_json(pair()), **changes}
    return {name: value for name, value in found.items() if value is not ...}


# ------------------------------------------------------------------------------------------------ the stored form


def test_what_is_written_is_read_again(tmp_path):
    written = [pair(k, images=k % 3, margin=None if k % 2 else k / 4) for k in range(5)]
    (info,) = write_shards(written, tmp_path, "pairs", 10)
    read = list(ShardReader(tmp_path / info.file))
    assert all(isinstance(sample, Preference) for sample in read)
    for one, two in zip(written, read):
        assert (one.id, one.messages, one.rejected, one.margin) == (two.id, two.messages, two.rejected, two.margin)
        assert [image.tobytes() for image in one.images] == [image.tobytes() for image in two.images]
    stored = ShardReader(tmp_path / info.file).row(2)
    assert stored["messages"][-1]["role"] == "user" and stored["chosen"] == "2" and stored["margin"] == 0.5
    assert read[2].answered("x")[:-1] == read[2].conversation and read[2].answered("x")[-1].content == "x"


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"chosen": ...}, "'chosen' must be an answer's text that is not empty, found None"),
        ({"rejected": ""}, "'rejected' must be an answer's text that is not empty, found ''"),
        ({"rejected": "  "}, "'rejected' must be an answer's text"),
        ({"chosen": 4}, "'chosen' must be an answer's text that is not empty, found 4"),
        ({"chosen": "<image>"}, "'chosen' has an <image> mark"),
        ({"rejected": "0"}, "'chosen' and 'rejected' are the same text"),
        ({"margin": "big"}, "'margin' must be a number from 0 to 1e+06, found 'big'"),
        ({"margin": -1}, "'margin' must be a number"),
        ({"margin": float("nan")}, "'margin' must be a number"),
        ({"margin": True}, "'margin' must be a number"),
        ({"messages": []}, "'messages' of a preference must end with the user's turn, found None"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "must end with the user's turn, found 'assistant'"),
        ({"messages": "x"}, "must end with the user's turn"),
        ({"better": 1}, "unknown field 'better'"),
        ({"level": 9}, "field 'level' must be one of"),
    ],
)
def test_a_wrong_row_is_refused_with_one_sentence(changes, said):
    with pytest.raises(ValueError) as error:
        from_json(row(**changes), [Image.new("RGB", (4, 4))], "a.tar:k")
    text = str(error.value)
    assert text.startswith("a.tar:k: ") and said in text and "\n" not in text


def test_a_row_without_the_fields_is_a_sample():
    plain = {name: value for name, value in row().items() if name not in ("chosen", "rejected")}
    assert type(from_json(plain, [Image.new("RGB", (4, 4))], "x")).__name__ == "Sample"


def test_validate_names_file_and_key(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("step3vl.data.shards.from_json", lambda *_: None)  # so that a wrong one can be written
    wrong = pair(1)
    wrong.rejected = "1"
    write_shards([pair(0), wrong], tmp_path, "pairs", 10)
    monkeypatch.undo()
    assert main(["data", "validate", str(tmp_path)]) == 1
    out = capsys.readouterr().out.replace("\n", " ")
    assert "pairs-000000.tar:p-1: fields 'chosen' and 'rejected' are the same text" in out and "1 sample sound" in out


# ------------------------------------------------------------------------------------------------ other layouts


def turns(*texts):
    return [{"role": ("user", "assistant")[k % 2], "content": text} for k, text in enumerate(texts)]


LAYOUTS = {
    "texts": {"prompt": "Sky?", "chosen": "Blue.", "rejected": "Green."},
    "turns": {"prompt": turns("Sky?"), "chosen": [turns("", "Blue.")[1]], "rejected": [turns("", "Green.")[1]]},
    "implicit": {"chosen": turns("Sky?", "Blue."), "rejected": turns("Sky?", "Green.")},
    "ultrafeedback": {"prompt": "Sky?", "chosen": turns("Sky?", "Blue."), "rejected": turns("Sky?", "Green.")},
    "prompt turns, texts": {"prompt": turns("Sky?"), "chosen": "Blue.", "rejected": "Green."},
    "question": {"question": "Sky?", "chosen": "Blue.", "rejected": "Green."},
    "as text": {"prompt": "Sky?", "chosen": json.dumps(turns("Sky?", "Blue.")), "rejected": turns("Sky?", "Green.")},
}


def lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def imported(tmp_path, *rows):
    source, out = lines(tmp_path / "prefs.jsonl", *rows), tmp_path / "out"
    status = main(["data", "import", str(source), "--out", str(out), "--domain", "text"])
    return status, [sample for path in sorted(out.glob("*.tar")) for sample in ShardReader(path)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_public_layouts_become_the_same_preference(layout, tmp_path):
    status, (found,) = imported(tmp_path, {**LAYOUTS[layout], "margin": 0.5})
    assert status == 0 and [(m.role, m.content) for m in found.conversation] == [("user", "Sky?")]
    assert (found.chosen, found.rejected, found.margin) == ("Blue.", "Green.", 0.5)


def test_images_come_along_and_get_their_marks(tmp_path):
    Image.new("RGB", (20, 10), (3, 4, 5)).save(tmp_path / "a.png")
    status, (found,) = imported(tmp_path, {**LAYOUTS["question"], "image": "a.png"})
    assert status == 0 and found.conversation[0].content == "<image>Sky?" and found.images[0].size == (20, 10)
    answers = {name: turns("", text)[1:] for name, text in (("chosen", "Blue."), ("rejected", "Red."))}
    prompt = [{"role": "system", "content": "Be brief."}, *turns("Sky?", "It is.", "Colour?")]
    (tmp_path / "b").mkdir()
    status, (found,) = imported(tmp_path / "b", {"prompt": prompt, **answers})
    assert [m.role for m in found.messages] == ["system", "user", "assistant", "user", "assistant"]


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"prompt": "Sky?", "chosen": "Blue."}, "field 'rejected' is missing or empty"),
        ({"chosen": "Sky? Blue.", "rejected": "Sky? Green."}, "field 'prompt' is missing"),
        ({**LAYOUTS["texts"], "rejected": "Blue."}, "are the same text"),
        ({**LAYOUTS["texts"], "margin": "much"}, "field 'margin' must be a number"),
        ({**LAYOUTS["implicit"], "rejected": turns("Sea?", "Green.")}, "differ before their last turns"),
        ({**LAYOUTS["implicit"], "rejected": "Green."}, "must both be texts, or both turns"),
        ({**LAYOUTS["implicit"], "chosen": turns("Sky?"), "rejected": turns("Sea?")}, "ends without an answer"),
        ({**LAYOUTS["texts"], "image": "gone.png"}, "gone.png"),
    ],
)
def test_what_cannot_be_imported_is_named_with_its_line(wrong, said, tmp_path, capsys):
    source = lines(tmp_path / "prefs.jsonl", LAYOUTS["texts"], wrong)
    assert main(["data", "validate", str(source)]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "prefs.jsonl:2: " in out and said in out and "format preference: 1 of 2 records sound" in out


# ------------------------------------------------------------------------------------------------ made


def test_wrong_answers_are_wrong_and_look_right():
    rng = random.Random(0)
    others = ["471", "12", "60", "Yes."]
    made = [wrong_answer("471", others, rng) for _ in range(200)]
    assert not any(same(text, "471") for text in made)
    changed = [text for text in made if text not in others]
    assert 60 < len(changed) < 140 and all(len(text) == 3 and text.isdigit() for text in changed)
    assert wrong_answer("red", ["Red.", "red", ""], rng) is None  # all say the same
    assert wrong_answer("", others, rng) is None
    assert wrong_answer("red", ["blue"], rng) == "blue"
    assert same("Yes.", "yes") and same("(3, 4)", "3 4") and not same("34", "3 4") and not same("+", "-")


def test_a_corpus_gives_the_same_pairs_each_time(small_corpus, tmp_path):
    pattern = str(small_corpus / "train/documents-*-level0-*.tar")
    one = write_preferences(pattern, tmp_path / "one", limit=20)
    two = write_preferences(pattern, tmp_path / "two", limit=20)
    assert [info.sha256 for info in one] == [info.sha256 for info in two] and sum(i.num_samples for i in one) == 20
    other = write_preferences(pattern, tmp_path / "three", limit=20, seed=1)
    assert other[0].sha256 != one[0].sha256
    paths = find_shards(pattern)
    golds = {reader.key(k): gold_of(reader.row(k)) for reader in map(ShardReader, paths) for k in range(len(reader))}
    for made in by_rule(paths):
        assert made.chosen == golds[made.id] and not same(made.rejected, made.chosen) and made.images
    with pytest.raises(ValueError, match=r"already holds preferences-000000\.tar"):
        write_preferences(pattern, tmp_path / "one")
    with pytest.raises(ValueError, match="--limit must be at least 1"):
        write_preferences(pattern, tmp_path / "four", limit=0)


def test_answers_that_were_given_and_scored_become_pairs(small_corpus, tmp_path, capsys):
    paths = find_shards(small_corpus / "test/text-sums-*.tar")
    keys = [ShardReader(paths[0]).key(k) for k in range(4)]
    cases = lines(
        tmp_path / "cases.jsonl",
        {"id": keys[0], "said": "wrong!", "score": 0.0, "error": None},
        {"id": keys[1], "said": "right", "score": 1.0, "error": None},
        {"id": keys[2], "said": "", "score": 0.0, "error": "server gone"},
    )
    pool = lines(
        tmp_path / "pool.jsonl",
        {
            "id": "x",
            "source": {"shard": "s", "key": keys[3]},
            "messages": [
                {"text": t, "score": s} for t, s in (("good", 1.0), ("bad", 0.0), ("worse", 0.0), ("?", None))
            ],
        },
    )
    (made,) = from_answers(paths, read_answers(cases))
    assert made.id == keys[0] and made.rejected == "wrong!" and made.chosen == gold_of(ShardReader(paths[0]).row(0))
    bad, worse = from_answers(paths, read_answers(pool))
    assert [(p.chosen, p.rejected) for p in (bad, worse)] == [("good", "bad"), ("good", "worse")]
    assert bad.id == keys[3] and worse.id == f"{keys[3]}-1"
    assert read_answers(pool)[keys[3]] == [Given("good", 1.0), Given("bad", 0.0), Given("worse", 0.0)]
    words = ["data", "prefer", str(small_corpus / "test/text-sums-*.tar"), str(tmp_path / "out")]
    assert main([*words, f"--answers={pool}"]) == 0
    assert "2 preferences in 1 shards" in capsys.readouterr().out
    (tmp_path / "bad.jsonl").write_text('{"id": "a", "said": "x", "score": 1}\n{"id": "b"}\n')
    with pytest.raises(ValueError, match=r"bad.jsonl:2 is no answer: needed are 'id', 'said' and 'score'"):
        read_answers(tmp_path / "bad.jsonl")
    with pytest.raises(ValueError, match="gave no preference"):
        write_preferences(paths[0], tmp_path / "none", answers=lines(tmp_path / "empty.jsonl"))

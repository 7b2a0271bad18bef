"""Rounds, messages, their order, the context, failures, seeds and traces."""

import itertools
import json
import random
import threading
from dataclasses import asdict, replace

import pytest
from PIL import Image

from step3vl.data.processor import Processor
from step3vl.pacore import (
    Counter,
    PaCoReGenerator,
    SynthesisTemplate,
    compact,
    estimated,
    exact,
    parse_rounds,
    passed_on,
    read_traces,
    replay,
)
from step3vl.pacore.budget import fit
from step3vl.pacore.generator import round_seed
from step3vl.pacore.trace import TraceFile
from step3vl.types import Completion, ImageSpec, Message, MultiCrop, Prompt, Sampling
from tests.pacore.answering import Notes, asked

SAMPLING = Sampling(max_new_tokens=50, temperature=1.0, seed=7)
TEMPLATE = SynthesisTemplate()


def said(*texts):
    return [Completion(text=text, token_ids=[], truncated=False) for text in texts]


def published_order(texts):
    """The order of the released code, for texts of different lengths."""
    rows = sorted(texts, key=len)
    random.Random(42).shuffle(rows)
    return [text.split("</think>")[-1] for text in rows if text]


# ------------------------------------------------------------------------------------------------ messages


@pytest.mark.parametrize(
    "text, message",
    [
        ("<think>a</think>\n b ", "\n b "),
        ("a</think>b</think>c", "c"),
        ("no thoughts", "no thoughts"),
        ("<think>never closed", "<think>never closed"),
        ("<think>all</think>", ""),
    ],
)
def test_a_message_is_what_follows_the_thoughts(text, message):
    assert compact(text) == message


def test_the_order_is_the_published_one_whatever_came_first():
    texts = ["<think>x</think>" * (k % 3) + "m" * (k + 1) for k in range(15)] + [""]
    wanted = published_order(texts)
    for shuffled in (texts, texts[::-1], random.Random(1).sample(texts, 16)):
        assert [compact(shuffled[k]) for k in passed_on(said(*shuffled))] == wanted
    same = ["bb", "aa", "cc", "dd"]
    orders = {tuple(some[k] for k in passed_on(said(*some))) for some in itertools.permutations(same)}
    assert len(orders) == 1, "texts of one length too"


def test_what_is_empty_or_failed_is_no_message():
    failed = Completion(text="half an ans", token_ids=[], truncated=False, error="broken")
    group = [*said("a", "<think>only</think> \n", "ccc", ""), failed]
    assert sorted(passed_on(group)) == [0, 2]


# ------------------------------------------------------------------------------------------------ rounds


def test_each_round_is_one_call_with_the_messages_of_the_round_before():
    notes = Notes(lambda prompt, sampling, k: f"<think>t</think>{len(prompt.messages[-1].content)}-{k}")
    generator = PaCoReGenerator(notes, rounds=[4, 2])
    image = Image.new("RGB", (4, 4))
    prompts = [asked("one?"), asked("<image>two?", image)]
    out = generator.run(prompts, SAMPLING)
    assert [n for _, _, n in notes.calls] == [4, 2, 1] and all(len(call[0]) == 2 for call in notes.calls)
    assert notes.calls[0][0] == prompts
    for place, prompt in enumerate(prompts):
        for r in (1, 2):
            width = (4, 2)[r - 1]
            size = len(notes.calls[r - 1][0][place].messages[-1].content)
            texts = [f"<think>t</think>{size}-{k}" for k in range(width)]
            messages = [compact(texts[k]) for k in passed_on(said(*texts))]
            assert notes.calls[r][0][place] == TEMPLATE.prompt(prompt, messages)
        ((final, trace),) = out[place]
        assert final.text == trace.final.text and trace.widths == [4, 2, 1] and trace.num_tokens == 7
        assert notes.calls[2][0][place].images == prompt.images


def test_rounds_do_not_share_random_numbers_and_the_first_is_plain_sampling():
    notes = Notes(lambda prompt, sampling, k: f"{sampling.seed} {k}")
    PaCoReGenerator(notes, [16, 4]).generate([asked("x")], SAMPLING)
    seeds = [sampling.seed for _, sampling, _ in notes.calls]
    assert seeds[0] == SAMPLING.seed and len(set(seeds)) == 3
    assert all(replace(sampling, seed=7) == SAMPLING for _, sampling, _ in notes.calls)
    spans = [
        range(seed, seed + 64) for base in range(200) for r in range(3) if (seed := round_seed(base, r)) is not None
    ]
    later = [span.start for k, span in enumerate(spans) if k % 3]
    assert len(set(later)) == 400 and min(b - a for a, b in itertools.pairwise(sorted(later))) > 64
    assert round_seed(None, 1) is None


def test_n_answers_have_rounds_of_their_own():
    notes = Notes(lambda prompt, sampling, k: f"answer {k}" if sampling.seed == 7 else prompt.messages[-1].content)
    generator = PaCoReGenerator(notes, [3])
    ((one, two), (three, four)) = generator.generate([asked("a"), asked("b")], SAMPLING, n=2)
    assert [n for _, _, n in notes.calls] == [6, 1] and len(notes.calls[1][0]) == 4
    assert all(f"answer {k}" in one.text for k in range(3)) and "answer 3" not in one.text
    assert all(f"answer {k}" in two.text for k in range(3, 6)) and "answer 0" not in two.text
    assert "Problem:\na\n" in two.text and "Problem:\nb\n" in three.text and "Problem:\nb\n" in four.text


def test_rounds_that_are_empty_or_all_failed_ask_the_question_itself():
    notes = Notes(lambda prompt, sampling, k: ValueError("down") if sampling.seed == 7 else "final")
    ((final,),) = PaCoReGenerator(notes, [4]).generate([asked("x")], SAMPLING)
    assert final.text == "final" and notes.calls[1][0] == [asked("x")]
    single = Notes(lambda prompt, sampling, k: "once")
    assert PaCoReGenerator(single, []).generate([asked("x")], SAMPLING)[0][0].text == "once" and len(single.calls) == 1


def test_one_failure_of_sixteen_changes_nothing_in_the_others(tmp_path):
    """R18: synthesis runs with those left, and the trace says so."""
    texts = [f"<think>{'t' * k}</think>message {k}" for k in range(16)]

    def says(broken):
        def say(prompt, sampling, k):
            if sampling.seed != 7:
                return "final"
            return TimeoutError("timed out") if k == broken else texts[k]

        return Notes(say)

    whole = says(None)
    PaCoReGenerator(whole, [16]).generate([asked("q")], SAMPLING)
    assert all(f"message {k}\n" in whole.calls[1][0][0].messages[-1].content for k in range(16))
    for broken in range(16):
        notes = says(broken)
        (((final, trace),),) = PaCoReGenerator(notes, [16], trace=tmp_path / "t.jsonl").run([asked("q")], SAMPLING)
        assert final.text == "final" and final.error is None
        assert trace.rounds[1].messages and sorted(trace.rounds[1].messages) == sorted(
            f"message {k}" for k in range(16) if k != broken
        )
        assert trace.num_failed == 1 and trace.rounds[0].answers[broken].error == "timed out"
        text = notes.calls[1][0][0].messages[-1].content
        assert text.count("\nReference ") == 15 + 1  # and the heading
    assert len(list(read_traces(tmp_path / "t.jsonl"))) == 16


def test_a_final_answer_that_fails_is_an_error():
    notes = Notes(lambda prompt, sampling, k: "m" if sampling.seed == 7 else TimeoutError("late"))
    assert PaCoReGenerator(notes, [2]).generate([asked("q")], SAMPLING)[0][0].error == "late"


def test_known_first_answers_are_used():
    notes = Notes(lambda prompt, sampling, k: "final")
    first = [said("a", "bb"), said("c", "dd")]
    out = PaCoReGenerator(notes, [2]).run([asked("x"), asked("y")], SAMPLING, first=first)
    assert len(notes.calls) == 1 and sorted(out[1][0][1].rounds[1].messages) == ["c", "dd"]
    with pytest.raises(ValueError, match="first must hold 2 answers for each of 1 prompts"):
        PaCoReGenerator(notes, [2]).run([asked("x")], SAMPLING, first=[said("a")])


def test_progress_is_told_after_every_round():
    told = []
    notes = Notes(lambda prompt, sampling, k: "m")
    generator = PaCoReGenerator(notes, [3], told=lambda place, trace: told.append((place, len(trace.rounds))))
    generator.generate([asked("x"), asked("y")], SAMPLING)
    assert told == [(0, 1), (1, 1), (0, 2), (1, 2)]


# ------------------------------------------------------------------------------------------------ context


def test_the_longest_messages_go_until_the_prompt_fits():
    texts = {0: "a" * 10, 1: "b" * 500, 2: "c" * 40, 3: "d" * 300}
    counter = Counter(lambda prompt: len(prompt.messages[-1].content), is_exact=True)
    room = counter.count(TEMPLATE.prompt(asked("q"), [texts[0], texts[2], texts[3]]))
    for budget, dropped in ((10_000, []), (room, [1]), (room - 1, [1, 3]), (1, [0, 1, 2, 3])):
        notes = Notes(lambda prompt, sampling, k: texts[k] if sampling.seed == 7 else "final")
        generator = PaCoReGenerator(notes, [4], max_context_tokens=budget + 51, counter=counter)
        (((_, trace),),) = generator.run([asked("q")], replace(SAMPLING, max_new_tokens=51))
        assert sorted(trace.rounds[1].dropped) == dropped and trace.num_dropped == len(dropped)
        prompt = notes.calls[1][0][0]
        kept = [texts[k] for k in trace.rounds[1].order if k not in dropped]
        assert prompt == TEMPLATE.prompt(asked("q"), kept) and trace.rounds[1].messages == kept
        assert trace.counted_exactly and trace.num_prompt_tokens == 1 + len(prompt.messages[-1].content)


def test_of_equally_long_messages_the_last_goes_first():
    assert fit(["aa", "bb", "c"], lambda some: sum(map(len, some)), 3) == [0, 2]
    assert fit(["aa"], len, 0) == []


def test_a_context_without_room_for_a_prompt_is_refused():
    with pytest.raises(ValueError, match="max_context_tokens is 50, which leaves no room"):
        PaCoReGenerator(Notes(None), [2], max_context_tokens=50).generate([asked("x")], SAMPLING)


@pytest.mark.parametrize("size", [(100, 60), (900, 700), (1600, 400)])
def test_the_processor_counts_exactly_without_pixels(size):
    layout = MultiCrop()
    processor = Processor().bind(ImageSpec(14, (0, 0, 0), (1, 1, 1), layout), lambda grid: -(-grid // 4))
    prompt = asked(
        "Is <image> longer than this: é?",
        Image.new("RGB", size),
        before=[
            Message(role="system", content="Be short."),
            Message(role="user", content="Hi"),
            Message(role="assistant", content="Hello."),
        ],
    )
    length = len(processor.encode_prompt(prompt).input_ids)
    assert exact(processor).count(prompt) == length
    text_only = asked("word " * 400)
    assert exact(processor).count(text_only) == len(processor.encode_prompt(text_only).input_ids)
    assert abs(estimated().count(prompt) - length) < 60, "an estimate of images as STEP3-VL has them"


# ------------------------------------------------------------------------------------------------ arguments


@pytest.mark.parametrize("text, rounds", [("[16]", [16]), ("[32, 4]", [32, 4]), ("4", [4]), ("32,4", [32, 4])])
def test_rounds_are_read(text, rounds):
    assert parse_rounds(text) == rounds


@pytest.mark.parametrize("text", ["", "[]", "[0]", "[16", "x", "[1.5]", "[-4]", "[5000]", "[16]]"])
def test_wrong_rounds_get_a_sentence(text):
    with pytest.raises(ValueError, match="accepted is a list of counts"):
        parse_rounds(text)


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="n is 0"):
        PaCoReGenerator(Notes(None)).generate([asked("x")], SAMPLING, n=0)
    with pytest.raises(ValueError, match=r"rounds is \[True\]"):
        PaCoReGenerator(Notes(None), rounds=[True])

    class Short:
        def generate(self, prompts, sampling, n=1):
            return [said("a") for _ in prompts]

    with pytest.raises(ValueError, match="gave 1 answers of 4"):
        PaCoReGenerator(Short(), [4]).generate([asked("x")], SAMPLING)


def test_the_name_tells_apart_what_answers_differently():
    made = [
        PaCoReGenerator(Notes(None), [16]),
        PaCoReGenerator(Notes(None), [4]),
        PaCoReGenerator(Notes(None), [16], max_context_tokens=9),
        PaCoReGenerator(Notes(None), [16], shuffle_seed=1),
    ]
    assert len({generator.name for generator in made}) == 4
    assert PaCoReGenerator(Notes(None), [16], trace="t.jsonl").name == made[0].name


# ------------------------------------------------------------------------------------------------ traces


def wild(prompt, sampling, k):
    """Texts of every kind: thoughts, marks, markup, lone surrogates, failures, emptiness."""
    kinds = ["<think>é</think>one\n", "", "<think>open", "{{ x }} {% raw %}", "<image> 2", "\ud800 lone", "長い" * 90]
    kinds += ["a</think>b</think>\n\nc"]
    if k % 9 == 8:
        return OSError("broken pipe")
    return kinds[k % 9]


def test_a_trace_makes_prompts_and_messages_again_to_the_byte(tmp_path):
    notes = Notes(wild)
    counter = Counter(lambda prompt: sum(len(m.content) for m in prompt.messages), is_exact=False)
    file = tmp_path / "runs" / "trace.jsonl"
    generator = PaCoReGenerator(notes, [16, 9], max_context_tokens=700, counter=counter, trace=file)
    prompts = [asked(f"<image>question {k}?", Image.new("RGB", (k + 1, 2))) for k in range(5)]
    out = generator.run(prompts, SAMPLING, n=2)
    made = [trace for group in out for _, trace in group]
    read = list(read_traces(file))
    assert [asdict(trace) for trace in read] == [asdict(trace) for trace in made]
    assert len({trace.id for trace in read}) == 5 and [trace.sample for trace in read] == [0, 1] * 5
    assert read[0].num_dropped and read[0].num_failed == 1 + 1 and read[0].sampling["seed"] == 7
    for r in (1, 2):  # what the trace says was sent is what was sent
        sent = [[[m.role, m.content] for m in prompt.messages] for prompt in notes.calls[r][0]]
        assert [trace.rounds[r].prompt for trace in read] == sent
    assert all(replay(trace, TEMPLATE) == [] for trace in read)


@pytest.mark.parametrize(
    "change, said",
    [
        (
            lambda t: t.rounds[0].answers.__setitem__(0, replace(t.rounds[0].answers[0], text="other")),
            "messages differ",
        ),
        (lambda t: t.rounds[1].order.reverse(), "the order is"),
        (lambda t: t.rounds[1].prompt[-1].__setitem__(1, "tampered"), "round 2: the prompt differs"),
        (lambda t: t.rounds[1].dropped.append(min(t.rounds[1].order)), "shorter than one that was kept"),
        (lambda t: t.rounds.pop(), "1 rounds of 2"),
        (lambda t: t.rounds[0].answers.pop(), "3 answers of 4"),
        (lambda t: setattr(t, "template", "0" * 16), "the trace was made with 0000"),
    ],
)
def test_a_trace_that_was_changed_is_found_out(change, said):
    notes = Notes(lambda prompt, sampling, k: "m" * (k + 1))
    (((_, trace),),) = PaCoReGenerator(notes, [4]).run([asked("q")], SAMPLING)
    assert replay(trace, TEMPLATE) == []
    change(trace)
    assert any(said in sentence for sentence in replay(trace, TEMPLATE))


def test_threads_write_whole_lines_after_a_torn_one(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"id": "torn')
    file = TraceFile(path)
    (((_, trace),),) = PaCoReGenerator(Notes(wild), [8]).run([asked("q")], SAMPLING)
    threads = [threading.Thread(target=lambda: [file.write(trace) for _ in range(20)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    read = list(read_traces(path))
    assert read[0] is None and len(read) == 161 and all(asdict(found) == asdict(trace) for found in read[1:])


def test_what_is_no_trace_is_named(tmp_path):
    path = tmp_path / "t.jsonl"
    with pytest.raises(ValueError, match="there is no trace file"):
        next(read_traces(path))
    path.write_text(json.dumps({"id": "x"}) + "\n")
    with pytest.raises(ValueError, match="line 1: not a trace"):
        next(read_traces(path))


def test_prompt_of_types_is_accepted_as_it_is():
    prompt = Prompt(messages=[Message(role="user", content="x")])
    assert PaCoReGenerator(Notes(lambda *_: "y"), [1]).generate([prompt], SAMPLING)[0][0].text == "y"

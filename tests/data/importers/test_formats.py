"""What each format makes of one record, and the sentence for each record that cannot be imported."""

from __future__ import annotations

import json

import pytest

from step3vl.data.importers.hub import read_hub
from step3vl.data.importers.llava import read_llava
from step3vl.data.importers.qwenvl import read_qwenvl
from step3vl.data.importers.record import Refused
from step3vl.data.importers.sharegpt import read_sharegpt
from tests.data.importers.drawn import llava, messages, turns


def said(record) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in record.messages]


def refusal(read, value) -> tuple[str, str]:
    with pytest.raises(Refused) as error:
        read(value)
    assert "\n" not in str(error.value)
    return error.value.kind, str(error.value)


# ------------------------------------------------------------------------------------------------ llava


def test_llava_record():
    record = read_llava(llava(0, conversations=turns("<image>\nA?", "b", "C?", "<think>\nhm\n</think>\n\nd")))
    assert said(record) == [
        ("user", "<image>\nA?"),
        ("assistant", "b"),
        ("user", "C?"),
        ("assistant", "<think>\nhm\n</think>\n\nd"),
    ]
    assert record.images == [("image", "coco/0.jpg")] and record.id == "r0" and not record.notes


@pytest.mark.parametrize("image", ["a.jpg", ["a.jpg"]])
def test_one_image_alone_or_in_a_list(image):
    assert read_llava(llava(image=image)).images == [("image", "a.jpg")]


@pytest.mark.parametrize("image", [None, "", []])
def test_no_image(image):
    assert read_llava(llava(image=image, conversations=turns("a", "b"))).images == []


def test_several_images_keep_their_order_and_names():
    record = read_llava(llava(image=["b.jpg", "a.jpg"]))
    assert record.images == [("image[0]", "b.jpg"), ("image[1]", "a.jpg")]


def test_roles_in_any_case_and_a_system_turn():
    rows = [{"from": "System", "value": "s"}, {"from": " HUMAN", "value": "q"}, {"from": "GPT", "value": "a"}]
    assert said(read_llava({"conversations": rows})) == [("system", "s"), ("user", "q"), ("assistant", "a")]


def turn(k: int, **changes):
    rows = turns("q", "a", "q2", "a2")
    rows[k] = {name: value for name, value in (rows[k] | changes).items() if value is not ...}
    return {"id": "x", "conversations": rows}


WRONG = [
    ({"id": 1}, "field missing", "field 'conversations' is missing or empty, which a llava record needs; the record's"),
    ({"conversations": []}, "field missing", "'conversations' is missing or empty"),
    ({"conversations": "hello"}, "turn of the wrong form", "must be a list of turns, found 'hello'"),
    ({"conversations": ["hello"]}, "turn of the wrong form", "conversations[0] must be an object, found 'hello'"),
    (turn(1, value=...), "turn of the wrong form", "conversations[1] has no field 'value'; its fields are from"),
    (turn(1, **{"from": ...}), "turn of the wrong form", "conversations[1] has neither 'from' nor 'role'"),
    (turn(1, **{"from": "narrator"}), "unknown role", "has from 'narrator'; accepted are human, user, gpt"),
    (turn(1, **{"from": 3}), "unknown role", "conversations[1] has from 3"),
    (turn(1, **{"from": "function_call"}), "tool or function turn", "conversations[1] is by 'function_call'; tool"),
    (turn(1, **{"from": "observation"}), "tool or function turn", "tool and function turns cannot be imported"),
    (turn(1, tool_calls=[{"name": "f"}]), "tool or function turn", "conversations[1] has 'tool_calls'"),
    (turn(1, reasoning_content="hm"), "thinking apart from the answer", "accepted is <think>...</think> at the start"),
    (turn(1, value=None), "content is no text", "conversations[1].value must be text, found null"),
    (turn(1, value=True), "content is no text", "must be text, found true"),
    (turn(1, value=[{"type": "text", "text": "a"}]), "content is no text", "--format qwenvl reads such contents"),
    (turn(1, value=" \n"), "empty answer", "conversations[1] is an empty answer"),
    (turn(2, **{"from": "system"}), "order of turns", "conversations[2] is the system's turn where the user's is"),
    (turn(0, **{"from": "gpt"}), "order of turns", "conversations[0] is the assistant's turn where the user's"),
    ({"conversations": turns("a", "b", "c")}, "no answer at the end", "the last turn must be the assistant's"),
    ({"conversations": [{"from": "system", "value": "s"}]}, "no answer at the end", "ends without an answer"),
    (llava(video="a.mp4"), "video or audio", "field 'video' is 'a.mp4'; video and audio cannot be imported"),
    (llava(images=["a.jpg"]), "image field", "fields 'image' and 'images' are both given"),
]


@pytest.mark.parametrize(("value", "kind", "words"), WRONG)
def test_each_wrong_record_has_its_sentence(value, kind, words):
    for read in (read_llava,) if "value" in words or "qwenvl" in words else (read_llava, read_sharegpt):
        found, sentence = refusal(read, value)
        assert found == kind
        assert words.replace("llava", read.__name__.removeprefix("read_")) in sentence or "or 'messages'" in sentence


def test_fields_of_a_turn_that_are_left_out_are_counted():
    record = read_llava(turn(1, weight=0, loss=None))
    assert record.notes == {"field not imported: conversations[].weight": 1}


# ------------------------------------------------------------------------------------------------ sharegpt


def test_sharegpt_with_either_names_and_a_system_prompt():
    a = read_sharegpt({"conversations": turns("q", "a"), "system": "Be brief."})
    b = read_sharegpt({"messages": messages("q", "a"), "system": "Be brief.", "tools": "[]"})
    assert said(a) == said(b) == [("system", "Be brief."), ("user", "q"), ("assistant", "a")]
    assert b.turns_field == "messages" and "tools" in b.used


def test_sharegpt_refuses_tools_and_two_system_prompts():
    kind, sentence = refusal(read_sharegpt, {"messages": messages("q", "a"), "tools": '[{"name": "f"}]'})
    assert kind == "tool or function turn" and "field 'tools'" in sentence
    rows = [{"role": "system", "content": "s"}, *messages("q", "a")]
    assert refusal(read_sharegpt, {"messages": rows, "system": "t"})[0] == "order of turns"


# ------------------------------------------------------------------------------------------------ qwenvl


def part(**fields):
    return fields


def parts(*contents) -> dict:
    return {"messages": [{"role": "user", "content": list(contents)}, {"role": "assistant", "content": "a"}]}


@pytest.mark.parametrize(
    "image",
    [
        part(type="image", image="file:///a.jpg"),
        part(type="image_url", image_url={"url": "file:///a.jpg"}),
        part(type="image_url", image_url="file:///a.jpg"),
        part(image="file:///a.jpg"),
        part(type="image", image="file:///a.jpg", text=None),
    ],
)
def test_parts_put_marks_where_images_stand(image):
    text = part(type="text", text="B?")
    record = read_qwenvl(parts(part(type="text", text="A "), image, text, image))
    assert record.messages[0].content == "A <image>B?<image>"
    assert [reference for _, reference in record.images] == ["file:///a.jpg"] * 2


def test_parts_that_only_mark_the_place_take_the_record_s_images():
    value = parts(part(type="image"), part(type="text", text="A?")) | {"images": ["a.jpg"]}
    assert read_qwenvl(value).images == [("images", "a.jpg")]
    value = parts(part(type="image", index=1), part(type="image", index=0)) | {"images": ["a.jpg", "b.jpg"]}
    assert [image for _, image in read_qwenvl(value).images] == ["b.jpg", "a.jpg"]
    value = parts(part(type="image", index=2)) | {"images": ["a.jpg"]}
    assert refusal(read_qwenvl, value)[0] == "image marks"
    value = parts(part(type="image", image="b.jpg")) | {"images": ["a.jpg"]}
    assert "accepted is one place" in refusal(read_qwenvl, value)[1]


def test_qwen_grounding_stays_text():
    answer = '```json\n[{"bbox_2d": [135, 114, 1016, 672], "label": "cat"}]\n```'
    value = {"image": "a.jpg", "conversations": turns("<image>\nWhere is the cat?", answer)}
    assert read_qwenvl(value).messages[1].content == answer


@pytest.mark.parametrize(
    ("content", "kind", "words"),
    [
        (part(type="video", video="a.mp4"), "video or audio", "messages[0].content[0] is a part of type 'video'"),
        (part(type="input_audio", data="x"), "video or audio", "video and audio cannot be imported"),
        (part(type="table", table="x"), "content is no text", "has type 'table'; accepted are text, image, image_url"),
        (part(type="text"), "content is no text", "without a field 'text'"),
        (7, "content is no text", "messages[0].content[0] must be an object with a 'type', found 7"),
        (
            part(type="text", text="<img>a.jpg</img>A?"),
            "image marks",
            "marks an image with '<img>a.jpg</img>'; accepted",
        ),
        (part(type="text", text="<|image_pad|>"), "image marks", "accepted is <image>"),
    ],
)
def test_wrong_parts(content, kind, words):
    found, sentence = refusal(read_qwenvl, parts(content))
    assert found == kind and words in sentence


def test_other_fields_of_parts_are_counted():
    record = read_qwenvl(parts(part(type="image", image="a.jpg", max_pixels=50176), part(type="text", text="q")))
    assert record.notes == {"field not imported: messages[].content[].max_pixels": 1}


# ------------------------------------------------------------------------------------------------ hub


def test_finevision_texts():
    value = {"images": [{"bytes": b"x", "path": None}], "texts": [{"user": "q", "assistant": "a", "source": "s"}] * 2}
    record = read_hub(value)
    assert said(record) == [("user", "q"), ("assistant", "a")] * 2
    assert record.images == [("images", {"bytes": b"x", "path": None})]
    assert record.notes == {"field not imported: texts[].source": 2}


def test_question_and_answer_and_numbers():
    record = read_hub({"image": b"x", "question": "How many?", "answer": 3})
    assert said(record) == [("user", "How many?"), ("assistant", "3")]
    assert record.notes == {"numbers written as text": 1}


@pytest.mark.parametrize(
    "turned",
    [
        messages("q", "a"),
        json.dumps(messages("q", "a")),
        {"role": ["user", "assistant"], "content": ["q", "a"]},  # a sequence feature: an object of lists
    ],
)
def test_conversations_in_the_shapes_parquet_holds(turned):
    assert said(read_hub({"messages": None, "conversations": turned})) == [("user", "q"), ("assistant", "a")]


@pytest.mark.parametrize(
    ("value", "kind", "words"),
    [
        ({"prompt": "a", "label": "b"}, "field missing", "the row's columns are prompt, label (rename with --map, for"),
        ({"question": "a", "label": 1}, "field missing", "'answer' is missing, and 'question' is there"),
        (
            {"question": "a", "answer": ["b", "c"]},
            "content is no text",
            "field 'answer' must be text, found a list of 2",
        ),
        ({"question": "a", "answer": float("nan")}, "content is no text", "found nan"),
        ({"question": "a", "answer": " "}, "empty answer", "field 'answer' is empty"),
        ({"texts": [{"user": "a"}]}, "turn of the wrong form", "texts[0] must have 'user' and 'assistant'"),
        ({"texts": [{"user": "a", "assistant": ""}]}, "empty answer", "texts[1] is an empty answer"),
        ({"messages": "[{"}, "turn of the wrong form", "field 'messages' is text that is not JSON"),
    ],
)
def test_wrong_rows(value, kind, words):
    found, sentence = refusal(read_hub, value)
    assert found == kind and words in sentence

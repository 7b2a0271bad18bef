"""The synthesis prompt is the published one to the byte, and replaces text alone."""

import json
from pathlib import Path

import pytest
from PIL import Image

from step3vl.pacore import SynthesisTemplate
from step3vl.types import Message, Prompt
from tests.pacore.answering import asked

PUBLISHED = json.loads(Path(__file__).with_name("published_prompts.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", PUBLISHED, ids=["sum", "image", "unicode"])
def test_it_renders_as_published(case):
    assert SynthesisTemplate().render(case["problem"], case["messages"]).encode() == case["text"].encode()


def test_images_and_earlier_turns_stay():
    one, two = Image.new("RGB", (3, 2)), Image.new("RGB", (5, 4))
    before = [
        Message(role="system", content="Be short."),
        Message(role="user", content="<image>What is it?"),
        Message(role="assistant", content="A cat."),
    ]
    prompt = Prompt(messages=[*before, Message(role="user", content="And <image>?")], images=[one, two])
    made = SynthesisTemplate().prompt(prompt, ["a dog", "an <image> tag"])
    assert made.messages[:3] == before and made.images == [one, two]
    text = made.messages[3].content
    assert text == SynthesisTemplate().render("And <image>?", ["a dog", "an [image] tag"])
    assert sum(m.content.count("<image>") for m in made.messages) == 2, "as many marks as images"
    assert prompt.messages[3].content == "And <image>?", "the original is not touched"


def test_a_user_turn_that_is_not_the_last_message_is_found():
    prompt = asked("Why?")
    prompt.messages.append(Message(role="assistant", content="Because"))
    made = SynthesisTemplate().prompt(prompt, ["m"])
    assert made.messages[1] == prompt.messages[1] and "Original Problem:\nWhy?" in made.messages[0].content


def test_without_messages_the_prompt_is_the_original():
    prompt = asked("Why?")
    assert SynthesisTemplate().prompt(prompt, []) is prompt


def test_another_template_is_checked_and_named_by_its_hash(tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text("{{ original_prompt }}|{{ ref_responses | join(';') }}")
    mine = SynthesisTemplate(file)
    assert mine.render("P", ["a", "b"]) == "P|a;b" and mine.hash != SynthesisTemplate().hash
    for text, said in (("{{ original_prompt }}", "every one"), ("{% for %}", "no Jinja template")):
        file.write_text(text)
        with pytest.raises(ValueError, match=said):
            SynthesisTemplate(file)
    with pytest.raises(ValueError, match="cannot be read"):
        SynthesisTemplate(tmp_path / "none.jinja")


def test_a_prompt_without_a_user_has_no_problem():
    with pytest.raises(ValueError, match="no problem"):
        SynthesisTemplate().prompt(Prompt(messages=[Message(role="system", content="x")]), ["m"])

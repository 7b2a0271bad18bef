"""SFT: several turns with a system prompt teach the assistant's tokens only, and the template must mark turns."""

from types import SimpleNamespace

import pytest
import torch

from step3vl.data import Processor
from step3vl.stages import PretrainStage, SFTStage
from step3vl.types import IGNORE_INDEX, Message, Sample

TURNS = [
    ("system", "Be short."),
    ("user", "What is 2 + 2?"),
    ("assistant", "4"),
    ("user", "Think. And 3 + 3?"),
    ("assistant", "<think>\n3 + 3\n</think>\n\n6"),
]


def test_several_turns_with_a_system_prompt_teach_the_assistant_only():
    processor = Processor(template="chat")
    messages = [Message(role=role, content=text) for role, text in TURNS]
    sample = Sample(id="a", domain="text", subset="talk", level=0, messages=messages)
    example = processor.encode(sample)
    learnt = example.labels[example.labels != IGNORE_INDEX].tolist()
    end = processor.tokenizer.token_id("<|im_end|>")
    wanted = [[*processor.tokenizer.text(text), end] for role, text in TURNS if role == "assistant"]
    assert learnt == wanted[0] + wanted[1]
    text = processor.tokenizer.decode(example.input_ids.tolist(), skip_special=False)
    assert text.startswith("<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\n")
    where = torch.nonzero(example.labels != IGNORE_INDEX).flatten()
    assert torch.equal(example.labels[where], example.input_ids[where + 1])


def test_a_template_without_turns_is_refused():
    assert issubclass(SFTStage, PretrainStage)
    stage = SimpleNamespace(processor=Processor(template="plain"))
    with pytest.raises(ValueError, match=r"model\.processor\.template is 'plain'.*SFT needs 'chat'"):
        SFTStage.setup(stage, "fit")
    SFTStage.setup(SimpleNamespace(processor=Processor(template="chat")), "fit")

"""A model of ours as VLMEvalKit wants one. Register it in VLMEvalKit's config.py:

    from functools import partial
    from step3vl.harness.vlmeval_model import Step3VL

    supported_VLM["step3vl"] = partial(Step3VL, model_path="runs/...", max_new_tokens=65536)

VLMEvalKit asks one question at a time; a large model is faster behind a server (docs/evaluation.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlmeval.dataset import DATASET_TYPE
from vlmeval.vlm.base import BaseModel

from step3vl.ask import ThinkingProcessor, fast_numbers, load_model
from step3vl.generation.sampler import Sampler
from step3vl.harness.adapter import chat_of, choice_text, prompt_of, readable_there
from step3vl.types import Sampling


class Step3VL(BaseModel):
    """Answers VLMEvalKit's messages.

    Args:
        model_path: a run, or an imported, exported or released folder.
        max_new_tokens: longest answer.
        temperature, seed: of the answers; 0: the likeliest token.
        think: open the answer with <think>.
        system_prompt: stands before every question; a dataset's own follows in the same turn.
        custom_prompt: ask multiple choice questions as our own suite does, not as VLMEvalKit does.
    """

    INTERLEAVE = True
    is_api = False
    allowed_types = ["text", "image"]

    def __init__(
        self,
        model_path: str,
        max_new_tokens: int = 4096,
        temperature: float = 0.0,
        seed: int = 0,
        think: bool = False,
        system_prompt: str | None = None,
        custom_prompt: bool = False,
    ) -> None:
        super().__init__()
        self.vlm, processor = load_model(Path(model_path))
        self.sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
        self.sampler = Sampler(self.vlm, ThinkingProcessor(processor) if think else processor)
        self.system_prompt, self.custom_prompt = system_prompt, custom_prompt

    def use_custom_prompt(self, dataset: str | None) -> bool:
        """Whether VLMEvalKit asks `build_prompt` for a dataset's questions."""
        return self.custom_prompt and dataset is not None and kind_of(dataset).startswith("MCQ")

    def build_prompt(self, line: Any, dataset: str | None = None) -> list[dict[str, str]]:
        """The question of a row, its images in front."""
        paths = self.dump_image(line, dataset)
        images = [{"type": "image", "value": path} for path in (paths if isinstance(paths, list) else [paths])]
        return [*images, {"type": "text", "value": choice_text(line)}]

    def generate_inner(self, message: Sequence[dict[str, Any]], dataset: str | None = None) -> str:
        """The answer to a message, in the form that the dataset's scorer reads."""
        return self.answer(chat_of(message, self.system_prompt), dataset)

    def chat_inner(self, messages: Sequence[dict[str, Any]], dataset: str | None = None) -> str:
        """The answer to the last of several turns."""
        turns = [{**part, "role": turn["role"]} for turn in messages for part in turn["content"]]
        return self.answer(chat_of(turns, self.system_prompt), dataset)

    def answer(self, chat: Sequence[dict[str, Any]], dataset: str | None) -> str:
        """The model's answer to a chat."""
        with fast_numbers(self.vlm):
            ((completion,),) = self.sampler.generate([prompt_of(chat)], self.sampling)
        return readable_there(completion.text, kind_of(dataset) if dataset else "")


def kind_of(dataset: str) -> str:
    """VLMEvalKit's word for what a dataset asks: MCQ, Y/N, VQA, GUI, ..."""
    return str(DATASET_TYPE(dataset, default="VQA"))

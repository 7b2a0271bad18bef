"""`step3vl ask`: a question and images to a trained or imported model, answered token by token on the terminal."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Generator, Sequence
from pathlib import Path

import torch
from PIL import Image

from step3vl.checkpoints.model import open_model
from step3vl.data.crop_sheet import caption, crop_sheet
from step3vl.data.decode import open_image
from step3vl.data.processor import Processor
from step3vl.generation.sampler import Sampler
from step3vl.models import VisionLanguageModel
from step3vl.types import IGNORE_INDEX, IMAGE_MARK, Completion, Example, Message, Prompt, Sampling

THINK = "<think>\n"
"""What opens the answer of a model that is made to think first."""


class ThinkingProcessor:
    """A processor whose prompts already open the answer with `<think>`, unless the template does so itself."""

    def __init__(self, processor: Processor):
        self.processor = processor
        self.pad_id, self.stop_ids, self.decode = processor.pad_id, processor.stop_ids, processor.decode

    def encode_prompt(self, prompt: Prompt, id: str = "") -> Example:
        example = self.processor.encode_prompt(prompt, id)
        opening = torch.tensor(self.processor.tokenizer.text(THINK))  # [o]
        if torch.equal(example.input_ids[-len(opening) :], opening):
            return example
        example.input_ids = torch.cat([example.input_ids, opening])
        example.labels = torch.cat([example.labels, torch.full_like(opening, IGNORE_INDEX)])
        example.position_ids = torch.arange(len(example.input_ids))
        return example


def load_model(folder: str | Path) -> tuple[VisionLanguageModel, Processor]:
    """Model and processor of a run, an imported, an exported or a released folder, bound and on the fastest device.

    Raises ValueError with one sentence for a folder of another kind, or one whose weights do not fit.
    """
    vlm, processor = open_model(folder)
    return vlm.to("cuda" if torch.cuda.is_available() else "cpu").eval(), processor


def question_of(question: str, images: Sequence[Image.Image]) -> Prompt:
    """A user's turn: images stand before the question, or where the question has `<image>` marks.

    Raises ValueError when the question is empty or has marks for another number of images.
    """
    if not question.strip():
        raise ValueError("the question is empty; write it in quotes after the folder")
    num_marks = question.count(IMAGE_MARK)
    if num_marks and num_marks != len(images):
        raise ValueError(f"the question has {num_marks} {IMAGE_MARK} marks, but {len(images)} images are given")
    content = question if num_marks else IMAGE_MARK * len(images) + question
    return Prompt(messages=[Message(role="user", content=content)], images=list(images))


def run(args: Sequence[str]) -> int:
    """The verb. Mistakes are ValueErrors with one sentence."""
    parser = argparse.ArgumentParser(prog="step3vl ask")
    parser.add_argument("checkpoint", type=Path, help="a run (runs/...), or an imported, exported or released folder")
    parser.add_argument("question", help=f"images stand before it, or where it has {IMAGE_MARK}")
    parser.add_argument("--image", type=Path, action="append", default=[], help="an image file (repeatable)")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="longest answer (default: 256)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest answer (default)")
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers, for a temperature above 0")
    parser.add_argument("--show-crops", type=Path, default=None, metavar="PNG", help="draw what the model sees")
    parser.add_argument("--think", action="store_true", help="open the answer with <think>, so that it reasons first")
    options = parser.parse_args(args)
    images = [open_image(path, str(path)) for path in options.image]
    prompt = question_of(options.question, images)
    if options.show_crops is not None and not images:
        raise ValueError("--show-crops needs an --image to show")
    vlm, processor = load_model(options.checkpoint)
    if options.show_crops is not None:
        named = [(path.name, image) for path, image in zip(options.image, images)]
        out = crop_sheet(named, vlm.image_spec, vlm.num_visual_tokens, options.show_crops)
        for name, image in named:
            print(caption(name, image.size, vlm.image_spec, vlm.num_visual_tokens), file=sys.stderr)
        print(f"drawn: {out}", file=sys.stderr)
    sampling = Sampling(max_new_tokens=options.max_new_tokens, temperature=options.temperature)
    sampler = Sampler(vlm, ThinkingProcessor(processor) if options.think else processor, seed=options.seed)
    with fast_numbers(vlm):
        completion = speak(sampler.stream(prompt, sampling), THINK if options.think else "")
    if completion.truncated:
        print(f"(the answer reached the limit of {options.max_new_tokens} tokens)", file=sys.stderr)
    return 0


def speak(pieces: Generator[str, None, Completion], opening: str = "") -> Completion:
    """Write pieces of text to standard output as they come, and a line end after the last."""
    print(opening, end="", flush=True)
    while True:
        try:
            print(next(pieces), end="", flush=True)
        except StopIteration as end:
            print()
            return end.value


def fast_numbers(vlm: VisionLanguageModel) -> contextlib.AbstractContextManager:
    """bfloat16 arithmetic on a GPU, which is what such models are trained in; full precision on a CPU."""
    on_gpu = next(vlm.parameters()).is_cuda
    return torch.autocast("cuda", torch.bfloat16) if on_gpu else contextlib.nullcontext()

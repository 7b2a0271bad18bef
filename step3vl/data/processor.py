"""Samples to examples: template, token ids, labels, and the visual tokens that stand for each view (STEP3-VL layout).

Contents are tokenised apart from the template's markup, as plain text: a `<|im_end|>` typed by a user ends nothing. An
image becomes, crop by crop, `<patch_start>` k x `<im_patch>` `<patch_end>`, with `<patch_newline>` after every row of
crops but the last, and then `<im_start>` n x `<im_patch>` `<im_end>` for the global view.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Self

import torch
from PIL import Image
from torch import Tensor

from step3vl.data.images import CropPlan, plan, views
from step3vl.data.template import ChatTemplate
from step3vl.data.tokenizer import load_tokenizer
from step3vl.types import IGNORE_INDEX, IMAGE_MARK, Example, ImageSpec, Message, Prompt, Sample, Size

CACHED_TEXT = 96
"""Texts up to this many characters are remembered with their ids; questions and short answers recur."""
MAX_CACHED_TEXTS = 65536


class Processor:
    """Pairs a tokenizer, a chat template and an image layout.

    Args:
        tokenizer: Local folder with a Qwen3-style tokenizer.json that has STEP3-VL's image tokens; null: the small
            packaged one (1,024 tokens).
        template: `chat` (ChatML, as Qwen3), `plain` (question, space, answer, end of text: for pre-training), or the
            path of a .jinja file.
        max_tokens: Longest example accepted; a longer one is an error that names it. Null: no limit here.
        max_views: Most views (crops and global views) of one example; one with more is an error that names it. Null:
            no limit.
    """

    def __init__(
        self,
        tokenizer: str | None = None,
        template: str = "chat",
        max_tokens: int | None = None,
        max_views: int | None = None,
    ):
        self.tokenizer = load_tokenizer(tokenizer)
        self.template = ChatTemplate(template)
        self.max_tokens, self.max_views = max_tokens, max_views
        names = ("<im_patch>", "<im_start>", "<im_end>", "<patch_start>", "<patch_end>", "<patch_newline>")
        self._image_tokens = tuple(self.tokenizer.token_id(name) for name in names)
        self._markup: dict[tuple[tuple[str, ...], bool], list[list[int]]] = {}
        self._texts: dict[str, list[int]] = {}
        self.turn_end_id: int = self._markup_ids(("user", "assistant"), False)[-1][0]
        self.image_token_id: int = self._image_tokens[0]
        self.pad_id: int = self.tokenizer.pad_id
        self.vocab_size: int = self.tokenizer.vocab_size
        self.stop_ids: set[int] = {self.tokenizer.token_id("<|endoftext|>"), self.turn_end_id}
        self.spec: ImageSpec | None = None
        self._tokens_a_crop = self._tokens_a_global_view = 0

    def bind(self, spec: ImageSpec, projector_grid: Callable[[int], int]) -> Self:
        """Take over an encoder's image layout; `projector_grid` maps patches a side to visual tokens a side.

        At full size 728 px are 52 patches a side, 13 tokens a side, 169 tokens; a 504 px crop has 81.
        Raises ValueError when a view is not a whole number of patches.
        """
        counts = []
        for name, pixels in (("crop", spec.layout.crop_pixels), ("global view", spec.layout.global_pixels)):
            if pixels % spec.patch_size:
                raise ValueError(f"a {name} of {pixels} px is not a whole number of {spec.patch_size} px patches")
            counts.append(projector_grid(pixels // spec.patch_size) ** 2)
        self._tokens_a_crop, self._tokens_a_global_view = counts
        self.spec = spec
        return self

    def encode(self, sample: Sample, max_tokens: int | None = None) -> Example:
        """A training example: every assistant turn and its end token are learnt, nothing else.

        `max_tokens` stands in for the processor's own limit. Raises ValueError with the sample's id when marks and
        images differ in number, when there is no assistant turn, or when the example is too long.
        """
        check_turns(sample.messages, sample.id)
        return self._encode(sample.messages, sample.images, sample.id, False, max_tokens or self.max_tokens)

    def measure(self, messages: Sequence[Message], sizes: Sequence[tuple[int, int]], id: str) -> Size:
        """What `encode` would make of a sample, from its text and the (width, height) of its images alone.

        Raises ValueError as `encode` does, but for no limit.
        """
        check_turns(messages, id)
        plans = self._plans(sizes)
        ids, learnt = self._lay_out(messages, plans, id, False)
        num_labels = sum(stop - start for start, stop in learnt)
        return Size(len(ids), num_labels, sum(crops.num_crops for crops in plans), len(plans))

    @property
    def fingerprint(self) -> str:
        """Eight hex digits that change whenever `measure` may answer differently."""
        facts = [self.template.source, str(self.spec), str((self._tokens_a_crop, self._tokens_a_global_view))]
        facts.append(str(self.max_views))
        return hashlib.sha256("\0".join([self.tokenizer.fingerprint, *facts]).encode()).hexdigest()[:8]

    def encode_prompt(self, prompt: Prompt, id: str = "") -> Example:
        """What a model is given to answer: ends with the template's generation prompt; nothing is learnt."""
        return self._encode(prompt.messages, prompt.images, id, True, self.max_tokens)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        return self.tokenizer.decode(ids)

    # ------------------------------------------------------------------------------------------------ inside

    def _encode(
        self, messages: Sequence[Message], images: Sequence[Image.Image], id: str, prompt: bool, limit: int | None
    ) -> Example:
        sizes = [image.size for image in images]
        plans = self._plans(sizes)
        ids, learnt = self._lay_out(messages, plans, id, prompt)
        num_visual = ids.count(self.image_token_id)
        if limit is not None and len(ids) > limit:
            raise ValueError(too_long(id, len(ids), num_visual, sizes, limit))
        labels = [IGNORE_INDEX] * len(ids)
        for start, stop in learnt:
            labels[start - 1 : stop - 1] = ids[start:stop]
        pixels: list[Tensor] = []
        if self.spec is not None:
            for picture, crops in zip(images, plans):
                pixels += views(picture, self.spec, crops)
        return Example(
            id=id,
            input_ids=torch.tensor(ids, dtype=torch.long),
            labels=torch.tensor(labels, dtype=torch.long),
            position_ids=torch.arange(len(ids)),
            views=pixels,
            num_visual_tokens=num_visual,
        )

    def _lay_out(
        self, messages: Sequence[Message], plans: Sequence[CropPlan], id: str, prompt: bool
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids, and the spans of them that are to be predicted."""
        num_marks = sum(message.content.count(IMAGE_MARK) for message in messages)
        if num_marks != len(plans):
            raise ValueError(f"sample {id!r} has {num_marks} {IMAGE_MARK} marks but {len(plans)} images")
        num_views = len(plans) + sum(crops.num_crops for crops in plans)
        if self.max_views is not None and num_views > self.max_views:
            raise ValueError(
                f"sample {id!r} has {num_views} views ({num_views - len(plans)} crops of {len(plans)} images) and "
                f"max_views is {self.max_views}; raise it or use smaller or fewer images"
            )
        markup = self._markup_ids(tuple(message.role for message in messages), prompt)
        ids: list[int] = []
        learnt: list[tuple[int, int]] = []
        image = 0
        for i, message in enumerate(messages):
            ids += markup[i]
            learn = message.role == "assistant" and not prompt
            for k, text in enumerate(message.content.split(IMAGE_MARK)):
                if k:
                    ids += self._image_ids(plans[image])
                    image += 1
                start = len(ids)
                ids += self._text_ids(text)
                if learn:
                    learnt.append((start, len(ids)))
            if learn:
                learnt.append((len(ids), len(ids) + 1))  # the end token opens the markup that follows
        ids += markup[-1]
        # the very first token has nothing before it to be predicted from
        return ids, [(max(start, 1), stop) for start, stop in learnt if max(start, 1) < stop]

    def _plans(self, sizes: Sequence[tuple[int, int]]) -> list[CropPlan]:
        if not sizes:
            return []
        if self.spec is None:
            raise RuntimeError("Processor.bind(image_spec, projector_grid) must be called before images are encoded")
        return [plan(*size, self.spec.layout) for size in sizes]

    def _image_ids(self, crops: CropPlan) -> list[int]:
        patch, im_start, im_end, patch_start, patch_end, newline = self._image_tokens
        crop = [patch_start, *[patch] * self._tokens_a_crop, patch_end]
        row = crop * crops.grid[0]
        rows = [*row, newline] * crops.num_newlines + row
        return [*rows, im_start, *[patch] * self._tokens_a_global_view, im_end]

    def _text_ids(self, text: str) -> list[int]:
        found = self._texts.get(text)
        if found is None:
            found = self.tokenizer.text(text) if text else []
            if len(text) <= CACHED_TEXT and len(self._texts) < MAX_CACHED_TEXTS:
                self._texts[text] = found
        return found

    def _markup_ids(self, roles: tuple[str, ...], prompt: bool) -> list[list[int]]:
        """Ids of the markup around contents; what follows each assistant turn begins with the token that ends it."""
        key = (roles, prompt)
        if key not in self._markup:
            pieces = [self.tokenizer.markup(piece) for piece in self.template.pieces(roles, prompt)]
            ends = {tuple(pieces[i + 1][:1]) for i, role in enumerate(roles) if role == "assistant"}
            if any(len(end) != 1 or end[0] not in self.tokenizer.special_ids for end in ends) or len(ends) > 1:
                shown = sorted(self.tokenizer.decode(end, skip_special=False) for end in ends)
                raise ValueError(
                    f"template {self.template.name!r}: every assistant turn must be followed by one and the same "
                    f"special token, which ends it; for the roles {list(roles)} found {shown}"
                )
            self._markup[key] = pieces
        return self._markup[key]


def check_turns(messages: Sequence[Message], id: str) -> None:
    """Raises ValueError for a sample without an assistant turn."""
    if not any(message.role == "assistant" for message in messages):
        raise ValueError(f"sample {id!r} has no assistant turn, so there is nothing to learn from it")


def too_long(id: str, num_tokens: int, num_visual: int, sizes: Sequence[tuple[int, int]], limit: int) -> str:
    """The sentence about a sample above the limit: its counts, its images, and the fix."""
    shown = ", ".join(f"{width} x {height}" for width, height in sizes) or "none"
    return (
        f"sample {id!r} has {num_tokens} tokens ({num_visual} of them visual; images: {shown}) and the limit is "
        f"{limit}; raise seq_len to >= {num_tokens} or use smaller images"
    )

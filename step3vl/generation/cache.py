"""Keys and values of sequences in flight: those of a prompt are held once, however many answers to it are written.

A step attends twice: the answers to one prompt, together, to that prompt; and each answer to its own tokens. The two
are merged by the logarithms of their sums of weights, which gives what one attention over all tokens gives. Prompts and
answers may enter and leave at any step.

Shapes: R rows, one an answer; H query heads, K key heads, d width of a head; T tokens of all prompts of a prefill; for
a shelf, g stretches in use, m answers to a prompt at most, P tokens of its longest stretch; M = m * H / K.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor

from step3vl.generation.shelves import Shelf, Stretch, move
from step3vl.models.attention import PromptTape, StepCache

NARROWEST = 16
"""Tokens that the narrowest shelf holds of an answer."""


@dataclass(eq=False, slots=True, kw_only=True)
class Answer(Stretch):
    """The kept tokens of an answer: all but the one that was drawn last."""

    prompt: Stretch


class SharedCache(StepCache):
    """What decoding steps attend to; see the module.

    Args:
        num_layers: of the decoder.
        device: of the model.
    """

    def __init__(self, num_layers: int, device: torch.device):
        self.num_layers, self.device = num_layers, device
        self.prompts: dict[int, Shelf] = {}
        self.answers: dict[int, Shelf] = {}
        self._prompt_parts: list[PromptPart] | None = None
        """How rows find their prompts; None after answers or prompts came, went or moved."""
        self._places: Tensor | None = None
        """[R] where, among the results of all prompt parts, each row finds its own."""
        self._answer_parts: list[AnswerPart] = []

    # ------------------------------------------------------------------------------------------------ coming, going

    def tape(self, prompts: Sequence[Stretch]) -> PromptTape:
        """Takes in packed prompts, end to end in this order; their lengths are set."""
        members: dict[int, list[int]] = {}
        for k, prompt in enumerate(prompts):
            members.setdefault(prompt_width(prompt.length), []).append(k)
        starts = torch.tensor([0, *(prompt.length for prompt in prompts)]).cumsum(0)
        parts = []
        for width, numbers in members.items():
            shelf = self.prompts.setdefault(width, Shelf(width, self.num_layers))
            first = len(shelf)
            shelf.put(prompts[k] for k in numbers)
            column = torch.arange(shelf.longest)
            lengths = torch.tensor([prompts[k].length for k in numbers])
            places = starts[numbers][:, None] + torch.minimum(column, lengths[:, None] - 1)  # [g,P]
            parts.append((shelf, first, places.to(self.device)))
        self._prompt_parts = None
        return Tape(parts)

    def enter(self, answers: Iterable[Answer]) -> None:
        """Answers whose prompts are there, and of which no token is kept so far."""
        self._shelf(NARROWEST).put(answers)
        self._prompt_parts = None

    def leave(self, stretches: Iterable[Stretch]) -> None:
        """Forget answers, or prompts that no answer in flight needs."""
        found: dict[Shelf, list[Stretch]] = {}
        for stretch in stretches:
            if stretch.shelf is not None:
                found.setdefault(stretch.shelf, []).append(stretch)
        for shelf, members in found.items():
            shelf.take(members)
            self._prompt_parts = None

    def begin_step(self) -> list[Answer]:
        """The answers in flight in the order of the rows that the step must have."""
        for width in sorted(self.answers):
            shelf = self.answers[width]
            if full := [answer for answer in shelf.stretches if answer.length == width]:
                move(full, shelf, self._shelf(2 * width))
                self._prompt_parts = None
        shelves = [shelf for _, shelf in sorted(self.answers.items()) if len(shelf)]
        rows = [cast(Answer, answer) for shelf in shelves for answer in shelf.stretches]
        if self._prompt_parts is None:
            self._prompt_parts, self._places = self._find_prompts(rows)
        self._answer_parts, start = [], 0
        for shelf in shelves:
            self._answer_parts.append(AnswerPart.of(shelf, start, self.device))
            start += len(shelf)
        return rows

    def end_step(self) -> None:
        """Every row's token is kept now."""
        for shelf in self.answers.values():
            for answer in shelf.stretches:
                answer.length += 1

    def _shelf(self, width: int) -> Shelf:
        return self.answers.setdefault(width, Shelf(width, self.num_layers))

    def _find_prompts(self, rows: Sequence[Answer]) -> tuple[list[PromptPart], Tensor | None]:
        by_prompt: dict[Stretch, list[int]] = {}
        for row, answer in enumerate(rows):
            by_prompt.setdefault(answer.prompt, []).append(row)
        parts, places, start = [], [0] * len(rows), 0
        for shelf in self.prompts.values():
            members = [by_prompt.get(prompt, []) for prompt in shelf.stretches]
            most = max(map(len, members), default=0)
            if not most:
                continue
            asked: list[int] = []
            for k, numbers in enumerate(members):
                asked += numbers + [0] * (most - len(numbers))
                for j, row in enumerate(numbers):
                    places[row] = start + k * most + j
            start += len(asked)
            index = None if asked == list(range(len(rows))) else torch.tensor(asked, device=self.device)
            longest = shelf.longest
            bias = hidden_columns([prompt.length for prompt in shelf.stretches], longest, self.device)
            parts.append(PromptPart(shelf, len(shelf), longest, most, index, bias))
        return parts, None if places == list(range(start)) else torch.tensor(places, device=self.device)

    # ------------------------------------------------------------------------------------------------ attending

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        dtype = value.dtype
        with torch.autocast(value.device.type, enabled=False):
            asked = query[:, :, 0].to(dtype)  # [R,H,d]
            scale = asked.shape[-1] ** -0.5 if scale is None else scale
            own = [part.attend(layer, asked, key.to(dtype), value, scale) for part in self._answer_parts]
            given = [part.attend(layer, asked, scale) for part in self._prompt_parts or ()]
            (own_mix, own_sum), (given_mix, given_sum) = joined(own), joined(given)
            if self._places is not None:
                given_mix, given_sum = given_mix[self._places], given_sum[self._places]
            share = torch.sigmoid(given_sum - own_sum)[..., None]  # [R,H,1], of all weights those of the prompt
            return torch.lerp(own_mix.float(), given_mix.float(), share).to(dtype)[:, None]  # [R,1,H,d]


class PromptPart(NamedTuple):
    """The rows whose prompts are on one shelf."""

    shelf: Shelf
    num_prompts: int
    longest: int
    """Tokens of the longest prompt."""
    num_answers: int
    """To each prompt, the gaps counted."""
    rows: Tensor | None  # [g*m] the row that asks, 0 in gaps; None: all rows in their order
    bias: Tensor | None  # [g,1,P] 0 at tokens and -inf behind them; None: all are equally long

    def attend(self, layer: int, asked: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Rows [R,H,d] -> mixed values [g*m,H,d] and logarithms of the sums of weights [g*m,H]."""
        g, m, longest = self.num_prompts, self.num_answers, self.longest
        keys, values = self.shelf.keys[layer][:g, :, :longest], self.shelf.values[layer][:g, :, :longest]
        asked = asked if self.rows is None else asked.index_select(0, self.rows)  # [g*m,H,d]
        num_rows, num_heads, width = asked.shape
        split = (g, m, keys.shape[1], -1, width)
        q = asked.view(split).transpose(1, 2).reshape(g * keys.shape[1], -1, width)  # [gK,M,d]
        mixed, sums = attend_stretches(q, keys, values, self.bias, scale)
        mixed = mixed.view(g, keys.shape[1], m, -1, width).transpose(1, 2)  # [g,m,K,H/K,d]
        sums = sums.view(g, keys.shape[1], m, -1).transpose(1, 2)
        return mixed.reshape(num_rows, num_heads, width), sums.reshape(num_rows, num_heads)


class AnswerPart(NamedTuple):
    """The rows whose answers are on one shelf, which stand there as they stand in the batch."""

    shelf: Shelf
    start: int
    stop: int
    at: tuple[slice | Tensor, slice, int | Tensor]  # where [g,K] new tokens go; numbers [g] where their columns differ
    longest: int
    """Tokens of the longest answer, its new one counted."""
    bias: Tensor | None

    @classmethod
    def of(cls, shelf: Shelf, start: int, device: torch.device) -> AnswerPart:
        lengths = [answer.length for answer in shelf.stretches]
        longest = max(lengths)
        at: tuple[slice | Tensor, slice, int | Tensor] = (slice(0, len(shelf)), slice(None), longest)
        if min(lengths) < longest:
            numbers = torch.tensor([range(len(shelf)), lengths], device=device)
            at = (numbers[0], slice(None), numbers[1])
        bias = hidden_columns([length + 1 for length in lengths], longest + 1, device)
        return cls(shelf, start, start + len(shelf), at, longest + 1, bias)

    def attend(self, layer: int, asked: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Keep the new tokens' key and value [R,K,1,d]; rows [R,H,d] -> mixed values [g,H,d] and sums [g,H]."""
        g, rows = len(self.shelf), slice(self.start, self.stop)
        if layer == 0:
            self.shelf.allocate(value)
        keys, values = self.shelf.keys[layer], self.shelf.values[layer]
        keys[self.at], values[self.at] = key[rows, :, 0], value[rows, :, 0]
        _, num_heads, width = asked.shape
        keys, values = keys[:g, :, : self.longest], values[:g, :, : self.longest]
        q = asked[rows].reshape(g * keys.shape[1], -1, width)  # [gK,H/K,d]
        mixed, sums = attend_stretches(q, keys, values, self.bias, scale)
        return mixed.view(g, num_heads, width), sums.view(g, num_heads)


class Tape(PromptTape):
    """Puts keys and values of packed prompts on their shelves."""

    def __init__(self, parts: Sequence[tuple[Shelf, int, Tensor]]):
        self.parts = parts
        """Shelf, its first new slot, and where the tokens of each new prompt stand in the row [g,P]."""

    def record(self, layer: int, key: Tensor, value: Tensor) -> None:
        for shelf, first, places in self.parts:
            if layer == 0:
                shelf.allocate(value)
            g, longest = places.shape
            for kept, given in ((shelf.keys, key), (shelf.values, value)):
                found = given[0].index_select(1, places.flatten()).unflatten(1, (g, longest))  # [K,g,P,d]
                kept[layer][first : first + g, :, :longest] = found.transpose(0, 1)


def attend_stretches(
    query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Queries [gK,M,d] over stretches [g,K,P,d] -> mixed values [gK,M,d] and, in fp32, logarithms of sums [gK,M].

    `bias` [g,1,P] is added to the scores. Weights are computed in fp32; on a GPU scores are, too.
    """
    k, v = keys.flatten(0, 1).transpose(1, 2), values.flatten(0, 1)  # views [gK,d,P], [gK,P,d]
    if bias is not None:
        bias = bias.expand(-1, keys.shape[1], -1).reshape(len(k), 1, -1)
    if query.is_cuda and query.dtype != torch.float32:
        scores = torch.bmm(query, k, out_dtype=torch.float32).mul_(scale)  # [gK,M,P]
        scores = scores if bias is None else scores.add_(bias)
    elif bias is None:
        scores = torch.baddbmm(query.new_empty(1, 1, 1), query, k, beta=0, alpha=scale).float()
    else:
        scores = torch.baddbmm(bias.to(query.dtype), query, k, alpha=scale).float()
    weights = scores.softmax(-1)
    sums = scores.amax(-1) - weights.amax(-1).log()  # as logsumexp, at half its time
    return torch.bmm(weights.to(v.dtype), v), sums


def hidden_columns(lengths: Sequence[int], longest: int, device: torch.device) -> Tensor | None:
    """[g,1,P]: 0 at the first tokens of each stretch, -inf behind them; None if all are as long as the longest."""
    if min(lengths) == longest:
        return None
    is_behind = torch.arange(longest) >= torch.tensor(lengths)[:, None, None]  # [g,1,P]
    return torch.zeros(is_behind.shape).masked_fill_(is_behind, float("-inf")).to(device)


def joined(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Parts behind one another."""
    if len(parts) == 1:
        return parts[0]
    mixed, sums = zip(*parts)
    return torch.cat(mixed), torch.cat(sums)


def prompt_width(length: int) -> int:
    """Width of a prompt's shelf: a power of two, or one and a half of it, so that little is left empty."""
    power = 1 << max(4, (length - 1).bit_length())
    return power * 3 // 4 if length <= power * 3 // 4 else power

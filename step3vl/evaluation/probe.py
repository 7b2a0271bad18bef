"""What frozen features know: a linear classifier on them, beside the same on an encoder of random weights.

A probe reads one property of generated images, at one place or of the whole, from features that were pooled and never
trained for it. Retrieval says how well embeddings of images and captions find each other.

Shapes: n images, h/w grid cells, c pooled cells a side, D width, K classes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from step3vl.data.images import views
from step3vl.data.shards import ShardReader, find_shards
from step3vl.evaluation.statistics import bootstrap
from step3vl.models.pooling import pooled_cells
from step3vl.models.vision.base import VisionEncoder
from step3vl.types import Sample

PENALTIES = tuple(10.0**k for k in range(-3, 4))
"""Of the ridge, as a share of the mean variance; the best on a fifth of the training images is taken."""
BATCH = 100
"""Images that are encoded at a time."""
Property = Literal["character", "shape", "colour", "first_digit", "num_objects"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """One property, and the images that it is learnt from and measured on.

    character: the first character of what is asked for, in the cell where it stands. shape, colour: of an object, in
    the cell where it stands. first_digit: the first character of row 1, from the whole image. num_objects: how many
    objects there are, from the whole image.
    """

    train: str
    """Shards: a glob or a folder."""
    test: str
    """Shards that no encoder was trained on."""
    property: Property
    num_train: int = 1000
    """Images that are looked at for the property, and learnt from where they have it."""
    num_test: int = 300
    """The same of those that it is measured on."""
    num_cells: int = 4
    """Cells a side that the grid of features is pooled to, for properties of a cell."""


class Target(NamedTuple):
    """What is to be read from an image: its name, and the cell (row, column) where, or None for the whole image."""

    label: str
    cell: tuple[int, int] | None


def target_of(sample: Sample, property: Property, num_cells: int) -> Target | None:
    """The label of a sample; None when it does not have the property."""
    if len(sample.images) != 1:
        return None
    if property == "num_objects":
        return Target(str(len(sample.regions)), None) if sample.regions else None
    if property == "first_digit":
        asked = [m.content for m in sample.messages]
        answers = [answer for question, answer in zip(asked, asked[1:]) if question.endswith("row 1.")]
        return Target(answers[0][0], None) if answers and answers[0] else None
    wants_answer = property == "character"
    places = [r for r in sample.regions if (r.label == "answer") == wants_answer]
    if not places or (wants_answer and not sample.answer):
        return None
    width, height = sample.images[0].size
    x0, y0, x1, y1 = places[0].box
    x = x0 + (width / num_cells / 2 if wants_answer else (x1 - x0) / 2)
    cell = min(int((y0 + y1) / 2 / height * num_cells), num_cells - 1), min(int(x / width * num_cells), num_cells - 1)
    if wants_answer:
        return Target(str(sample.answer)[0], cell)
    words = places[0].label.split()
    return Target(words[0 if property == "colour" else -1], cell) if len(words) > 1 else None


def read_samples(shards: str, limit: int) -> list[Sample]:
    """The first `limit` samples of `shards` that have one image. Raises ValueError when there is none."""
    samples: list[Sample] = []
    for path in find_shards(shards):
        reader = ShardReader(path, strict=False)
        for i in range(min(len(reader), limit - len(samples))):
            sample = reader.read(i)
            if len(sample.images) == 1:
                samples.append(sample)
    if not samples:
        raise ValueError(f"probe: no sample of {shards} has one image")
    return samples


@torch.no_grad()
def pooled_features(encoder: VisionEncoder, samples: Sequence[Sample], num_cells: int) -> Tensor:
    """Final features of the global views, pooled to c x c cells: [n,c,c,D]."""
    device = next(encoder.parameters()).device
    rows = []
    for start in range(0, len(samples), BATCH):
        images = [sample.images[0] for sample in samples[start : start + BATCH]]
        pixels = torch.stack([views(image, encoder.image_spec)[-1] for image in images]).to(device)
        grid, _ = encoder.encode(encoder.normalised(pixels), ())  # [n,h,w,D]
        rows.append(pooled_cells(grid, num_cells).cpu())
    return torch.cat(rows)


class Images:
    """Samples of some shards and their features by encoder, read and encoded once for all probes that ask for them."""

    def __init__(self, encoders: Mapping[str, VisionEncoder]):
        self.encoders = encoders
        self._samples: dict[tuple[str, int], list[Sample]] = {}
        self._features: dict[tuple[str, int, int], dict[str, Tensor]] = {}

    def read(self, shards: str, limit: int, probe: Probe) -> tuple[list[str], dict[str, Tensor]]:
        """Labels of the samples that have the probe's property, and by encoder what it is read from [n,D].

        Raises ValueError when no sample has it.
        """
        if (shards, limit) not in self._samples:
            self._samples[shards, limit] = read_samples(shards, limit)
        samples, c = self._samples[shards, limit], probe.num_cells
        if (shards, limit, c) not in self._features:
            self._features[shards, limit, c] = {
                name: pooled_features(encoder, samples, c) for name, encoder in self.encoders.items()
            }
        targets = [target_of(sample, probe.property, c) for sample in samples]
        found = [(k, target) for k, target in enumerate(targets) if target is not None]
        if not found:
            raise ValueError(f"probe: no sample of {shards} has the property {probe.property!r}")

        def pooled(cells: Tensor) -> Tensor:
            return torch.stack(
                [cells[k].mean((0, 1)) if target.cell is None else cells[k][target.cell] for k, target in found]
            )

        features = self._features[shards, limit, c]
        return [target.label for _, target in found], {name: pooled(cells) for name, cells in features.items()}


def ridge_hits(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> Tensor:
    """Train a ridge classifier, one against all, in closed form; [n] bool, whether each test case is right.

    Args:
        train, test: features [n,D].
        train_labels, test_labels: [n] long, classes from 0.
    """
    mean, deviation = train.double().mean(0), train.double().std(0).clamp_min(1e-6)
    x, y = (train.double() - mean) / deviation, F.one_hot(train_labels).double()
    num_fit = len(x) - len(x) // 5

    def weights(x: Tensor, y: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
        centre, level = x.mean(0), y.mean(0)
        gram = (x - centre).T @ (x - centre)
        ridge = penalty * gram.diagonal().mean().clamp_min(1e-12) * torch.eye(len(gram), dtype=gram.dtype)
        solution = torch.linalg.solve(gram + ridge, (x - centre).T @ (y - level))
        return solution, level - centre @ solution

    def hits(x: Tensor, labels: Tensor, fitted: tuple[Tensor, Tensor]) -> Tensor:
        return (x @ fitted[0] + fitted[1]).argmax(1) == labels

    def on_rest(penalty: float) -> float:
        fitted = weights(x[:num_fit], y[:num_fit], penalty)
        return float(hits(x[num_fit:], train_labels[num_fit:], fitted).double().mean())

    best = max(PENALTIES, key=on_rest) if num_fit < len(x) else 1.0
    return hits((test.double() - mean) / deviation, test_labels, weights(x, y, best))


def run_probes(encoder: VisionEncoder, probes: Mapping[str, Probe], seed: int = 0) -> dict[str, dict[str, Any]]:
    """Scores by probe: held-out accuracy with its bootstrap interval; `blind` is that of an encoder of random weights.

    `majority` is always giving the commonest label. The encoder keeps its weights and its mode.
    """
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        random = copy.deepcopy(encoder)
        random.init_weights()
    was_training = encoder.training
    images = Images({"random": random.eval(), "own": encoder.eval()})
    scores = {}
    for name, probe in probes.items():
        train_labels, train = images.read(probe.train, probe.num_train, probe)
        test_labels, test = images.read(probe.test, probe.num_test, probe)
        number = {label: k for k, label in enumerate(sorted(set(train_labels)))}  # one never learnt is never right: -1
        wanted, gold = (torch.tensor([number.get(x, -1) for x in labels]) for labels in (train_labels, test_labels))
        hits = {who: ridge_hits(train[who], wanted, test[who], gold).double().tolist() for who in images.encoders}
        most = max(test_labels.count(label) for label in number)
        scores[name] = score_of(hits["own"], sum(hits["random"]) / len(gold), most / len(gold))
    encoder.train(was_training)
    return scores


def retrieval(images: Tensor, texts: Tensor, captions: Tensor) -> dict[str, dict[str, Any]]:
    """Whether the nearest caption of an image, and the nearest image of a caption, is its own (R@1, both ways).

    Another image with an equal caption counts as right. `blind` and `majority` are what chance gives.

    Args:
        images, texts: embeddings [n,D].
        captions: [n] long, equal where captions are equal.
    """
    likeness = F.normalize(images.float(), dim=-1) @ F.normalize(texts.float(), dim=-1).T  # [n,n]
    same = captions[:, None] == captions[None]
    chance = float(same.double().mean())

    def hits(found: Tensor) -> list[float]:
        return same.gather(1, found[:, None]).squeeze(1).double().tolist()

    ways: dict[str, Callable[[], Tensor]] = {
        "image to text": lambda: likeness.argmax(1),
        "text to image": lambda: likeness.T.argmax(1),
    }
    return {name: score_of(hits(find()), chance, chance) for name, find in ways.items()}


def score_of(hits: Sequence[float], blind: float, majority: float) -> dict[str, Any]:
    """A row of metrics.json, with the keys that tables read."""
    low, high = bootstrap(hits)
    score = sum(hits) / len(hits)
    return {"score": score, "low": low, "high": high, "blind": blind, "majority": majority, "num_cases": len(hits)}

"""Probes find what is in features and nothing else; retrieval counts what it should."""

import numpy as np
import pytest
import torch
from PIL import Image

from step3vl.evaluation.probe import Probe, Target, read_samples, retrieval, ridge_hits, run_probes, target_of
from step3vl.models.vision import SigLIP2
from step3vl.types import Message, MultiCrop, Region, Sample

LAYOUT = MultiCrop(global_size=64, crop_size=48, max_side=256, min_side=8)


def sample(turns, answer=None, regions=(), num_images=1):
    roles = ("user", "assistant")
    return Sample(
        id="a",
        domain="vqa",
        subset="x",
        level=0,
        messages=[Message(role=roles[k % 2], content=text) for k, text in enumerate(turns)],
        images=[Image.fromarray(np.zeros((64, 64, 3), np.uint8))] * num_images,
        answer=answer,
        regions=list(regions),
    )


def test_what_is_read_and_where():
    digits = sample(
        ["<image>Read row 1.", "797", "Read row 3.", "62"], "62", [Region(label="answer", box=(0, 32, 32, 48))]
    )
    assert target_of(digits, "character", 4) == Target("6", (2, 0))
    assert target_of(digits, "first_digit", 4) == Target("7", None)
    assert target_of(sample(["<image>Read row 3.", "62"], "62"), "first_digit", 4) is None
    places = [Region(label="answer", box=(0, 0, 16, 16)), Region(label="red ring", box=(48, 16, 64, 32))]
    shapes = sample(["<image>Point to the blue star.", "(1, 1)"], "(1, 1)", places)
    assert target_of(shapes, "shape", 4) == Target("ring", (1, 3))
    assert target_of(shapes, "colour", 4) == Target("red", (1, 3))
    assert target_of(shapes, "num_objects", 4) == Target("2", None)
    assert target_of(sample(["<image><image>a", "b"], num_images=2), "character", 4) is None
    assert target_of(sample(["<image>a", "b"], "b"), "character", 4) is None


def test_ridge_reads_a_linear_property_and_not_noise():
    torch.manual_seed(0)
    x = torch.randn(600, 12)
    labels = (x @ torch.randn(12, 4)).argmax(1)
    hits = ridge_hits(x[:500], labels[:500], x[500:], labels[500:])
    assert hits.shape == (100,) and float(hits.double().mean()) > 0.8
    noise = ridge_hits(torch.randn(500, 12), labels[:500], x[500:], labels[500:])
    assert float(noise.double().mean()) < 0.6
    moved = ridge_hits(x[:500] * 7 + 3, labels[:500], x[500:] * 7 + 3, labels[500:])
    assert torch.equal(moved, hits)
    unknown = ridge_hits(x[:500], labels[:500], x[500:], torch.full((100,), -1))
    assert not unknown.any()


def test_retrieval_counts_both_ways_and_equal_captions():
    images = torch.eye(4)
    texts = torch.eye(4)[[0, 1, 3, 2]]  # two swapped
    found = retrieval(images, texts, torch.arange(4))
    assert [found[way]["score"] for way in ("image to text", "text to image")] == [0.5, 0.5]
    assert found["image to text"]["blind"] == 0.25 and found["image to text"]["num_cases"] == 4
    same = retrieval(images, texts, torch.tensor([0, 1, 2, 2]))
    assert same["image to text"]["score"] == 1.0 and same["image to text"]["blind"] == pytest.approx(6 / 16)
    one_way = retrieval(torch.tensor([[1.0, 0], [1, 0.1]]), torch.tensor([[1.0, 0], [0, 1]]), torch.arange(2))
    assert one_way["image to text"]["score"] == 0.5 and one_way["text to image"]["score"] == 1.0


class Colours(SigLIP2):
    """An encoder that keeps each patch's mean colour when it was trained, and nothing at random."""

    is_trained = True

    def init_weights(self):
        super().init_weights()
        self.is_trained = False

    def encode(self, pixels, taps):
        patches = pixels.unflatten(2, (-1, 4)).unflatten(4, (-1, 4)).mean((3, 5)).permute(0, 2, 3, 1)
        return (patches if self.is_trained else torch.zeros_like(patches)), []


def test_probes_on_the_corpus(small_corpus):
    encoder = Colours(16, 1, 2, 32, 16, patch_size=4, layout=LAYOUT)
    place = str(small_corpus / "train/grounding-point-level0-*.tar")
    probes = {
        name: Probe(train=place, test=place, property=name, num_train=8, num_test=8) for name in ("colour", "shape")
    }
    before = torch.random.get_rng_state()
    scores = run_probes(encoder.train(), probes)
    assert torch.equal(before, torch.random.get_rng_state()) and encoder.training and encoder.is_trained
    assert scores["colour"]["score"] == 1.0 and scores["colour"]["blind"] < 0.7
    assert set(scores["shape"]) == {"score", "low", "high", "blind", "majority", "num_cases"}
    assert 0 < scores["colour"]["majority"] < 1 and scores["colour"]["num_cases"] == 8


def test_shards_without_the_property(small_corpus):
    text = str(small_corpus / "train/text-sums-level0-*.tar")
    with pytest.raises(ValueError, match="has one image"):
        read_samples(text, 5)
    digits = str(small_corpus / "train/documents-digits-level0-*.tar")
    encoder = Colours(16, 1, 2, 32, 16, patch_size=4, layout=LAYOUT)
    with pytest.raises(ValueError, match=r"no sample of .* has the property 'shape'"):
        run_probes(encoder, {"a": Probe(train=digits, test=digits, property="shape", num_train=3)})

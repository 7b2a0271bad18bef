"""Images drawn as contrast: nothing is lost, and nothing can be read from them by a linear map."""

import random

import numpy as np
import pytest
import torch
from PIL import Image

from step3vl.data.corpus.draw import glyph_mask
from step3vl.data.corpus.make import make_corpus
from step3vl.data.corpus.second_order import GREY, LEAST, second_order
from step3vl.data.shards import ShardReader, find_shards


def brightness(image):
    amount = np.abs(np.asarray(image, np.float32) - GREY) / GREY
    return 255 * (amount - LEAST) / (1 - LEAST)


@pytest.mark.parametrize(("size", "block"), [((64, 64), 4), ((30, 17), 4), ((16, 16), 1), ((20, 10), 64)])
def test_nothing_is_lost(size, block):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    drawn = second_order(Image.fromarray(pixels), random.Random(1), block)
    assert drawn.size == size
    np.testing.assert_allclose(brightness(drawn), pixels, atol=2.1)


def test_a_block_is_wholly_above_or_below_grey():
    signs = np.asarray(second_order(Image.new("RGB", (32, 16)), random.Random(0), 4), np.float32) > GREY  # [16,32,3]
    blocks = signs.reshape(4, 4, 8, 4, 3).mean((1, 3, 4))
    assert set(blocks.flatten()) == {0.0, 1.0}


def test_the_mean_over_signs_tells_nothing():
    image = Image.new("RGB", (4, 4), (255, 0, 90))
    drawn = [np.asarray(second_order(image, random.Random(k), 4), np.float32) for k in range(2000)]
    np.testing.assert_allclose(np.mean(drawn, (0, 1, 2)), GREY, atol=10)  # 127 / sqrt(2000) is 3


def explained(images, labels):
    """Share of the labels' variance that a ridge regression from pixels, fitted to one half, tells of the other."""
    inputs = torch.stack([torch.tensor(np.asarray(i, np.float32)).flatten() / 255 - 0.5 for i in images])
    half, targets = len(inputs) // 2, torch.eye(10)[labels] - 0.1
    seen, ridge = inputs[:half], 10.0 * torch.eye(inputs.shape[1])
    weights = torch.linalg.solve(seen.T @ seen + ridge, seen.T @ targets[:half])
    rest = targets[half:]
    return float(1 - (inputs[half:] @ weights - rest).square().sum() / rest.square().sum())


def test_no_linear_map_reads_glyphs():
    rng, plain, drawn, labels = random.Random(0), [], [], []
    for _ in range(3000):
        digit = rng.randrange(10)
        image = Image.new("L", (16, 16))
        image.paste(glyph_mask(str(digit), "DejaVuSans", 13), (2 + rng.randrange(2), 1 + rng.randrange(2)))
        plain.append(image)
        drawn.append(second_order(image, rng, 4).convert("L"))
        labels.append(digit)
    assert explained(plain, labels) > 0.8
    assert explained(drawn, labels) < 0
    assert explained([brightness(image) for image in drawn], labels) > 0.8


def test_a_corpus_is_drawn_so_in_every_split_and_answers_stay(tmp_path):
    recipe = {"splits": {split: {"documents/digits": {0: 6}} for split in ("train", "test")}}
    for name, block in (("plain", 0), ("drawn", 4)):
        make_corpus(tmp_path / name, recipe | {"second_order": block}, num_processes=1)
    signs = []
    for split in ("train", "test"):
        plain, drawn = (
            ShardReader(find_shards(str(tmp_path / name / split / "*.tar"))[0]) for name in ("plain", "drawn")
        )
        for k in range(6):
            one, two = plain.read(k), drawn.read(k)
            assert one.messages == two.messages and one.answer == two.answer
            np.testing.assert_allclose(brightness(two.images[0]), np.asarray(one.images[0], np.float32), atol=2.1)
            signs.append((np.asarray(two.images[0])[::4, ::4, 0] > GREY).tobytes())
    assert len(set(signs)) == 12, "images share their signs"


@pytest.mark.parametrize("block", [-1, 2.5, True, "four"])
def test_a_wrong_block_is_refused(tmp_path, block):
    recipe = {"second_order": block, "splits": {"test": {"documents/digits": {0: 1}}}}
    with pytest.raises(ValueError, match="'second_order' must be a number of pixels"):
        make_corpus(tmp_path / "bad", recipe, num_processes=1)

"""Crops for self-distillation: sizes, hidden patches, and that they follow from the seed and the place alone."""

import numpy as np
import pytest
import torch
from PIL import Image

from step3vl.data import CropData, CropRecipe, Source
from step3vl.data.crops import crops_of, generator_of, hidden_blocks
from step3vl.models.vision import DINOv3

SOURCES = {"digits": Source("train/documents-digits-level0-*.tar", 1.0)}
RECIPE = CropRecipe(global_size=32, local_size=16, num_local=3)


def make(corpus, seed=0, num_workers=0):
    data = CropData(str(corpus), SOURCES, 4, 4, RECIPE, num_workers=num_workers, seed=seed)
    data.connect(DINOv3(16, 1, 2, 32, patch_size=4).image_spec, None)
    data.setup("fit")
    return data


def image(side=64, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


def test_shapes_and_hidden_patches(small_corpus):
    batch = next(iter(make(small_corpus).train_dataloader()))
    assert batch.globals.shape == (2, 4, 3, 32, 32) and batch.locals.shape == (3, 4, 3, 16, 16)
    assert batch.globals.dtype == torch.uint8 and batch.masked.shape == (2, 4, 64)
    assert batch.num_images == 4 and not batch.skipped


def test_the_same_whatever_the_workers_and_after_a_restart(small_corpus):
    straight = list(make(small_corpus).train_dataloader())
    for other in (
        list(make(small_corpus, num_workers=1).train_dataloader()),
        list(make(small_corpus, seed=1).train_dataloader()),
    ):
        same = all(torch.equal(a.locals, b.locals) and torch.equal(a.masked, b.masked) for a, b in zip(straight, other))
        assert same == (other[0].sample_ids == straight[0].sample_ids)
    loader = make(small_corpus).train_dataloader()
    next(iter(loader))
    again = make(small_corpus).train_dataloader()
    again.load_state_dict(loader.state_dict())
    rest = list(again)
    assert len(rest) == 3 and all(torch.equal(a.globals, b.globals) for a, b in zip(rest, straight[1:]))


@pytest.mark.parametrize("num_hidden", [0, 1, 7, 30, 64])
def test_as_many_patches_are_hidden_as_asked(num_hidden):
    for seed in range(5):
        hidden = hidden_blocks(8, num_hidden, torch.Generator().manual_seed(seed))
        assert int(hidden.sum()) == num_hidden


def test_share_of_crops_with_hidden_patches():
    masks = torch.cat([crops_of(image(), RECIPE, 4, generator_of(0, ("a", k)))[2] for k in range(60)])
    shares = masks.float().mean(1)
    assert 0.3 < float((shares > 0).float().mean()) < 0.7
    assert float(shares[shares > 0].min()) >= 0.08 and float(shares.max()) <= 0.52


def test_a_whole_crop_is_the_image_and_nothing_is_mirrored():
    recipe = CropRecipe(
        global_size=32, local_size=16, num_local=0, global_scale=(1, 1), aspect=(1, 1), jitter=0, mask_probability=0
    )
    ramp = Image.fromarray(np.repeat(np.linspace(0, 255, 32, dtype=np.uint8)[None, :, None], 32, 0).repeat(3, 2))
    for k in range(8):
        (first, _), parts, masks = crops_of(ramp, recipe, 4, generator_of(0, ("a", k)))
        assert torch.equal(first, torch.from_numpy(np.asarray(ramp)).permute(2, 0, 1))
        assert parts == [] and not masks.any()


def test_colours_change_a_little():
    plain = CropRecipe(global_size=32, local_size=16, global_scale=(1, 1), aspect=(1, 1), jitter=0)
    jittered = CropRecipe(global_size=32, local_size=16, global_scale=(1, 1), aspect=(1, 1), jitter=0.2)
    grey = Image.fromarray(np.full((32, 32, 3), 100, np.uint8))
    before = crops_of(grey, plain, 4, generator_of(0, ("a", 1)))[0][0].float()
    after = crops_of(grey, jittered, 4, generator_of(0, ("a", 1)))[0][0].float()
    assert (before == 100).all() and not torch.equal(before, after) and (after - before).abs().max() <= 21


def test_bad_recipes(small_corpus):
    with pytest.raises(ValueError, match=r"crops.global_scale"):
        CropRecipe(global_scale=(0.5, 1.5))
    with pytest.raises(ValueError, match="num_local at least 0"):
        CropRecipe(num_local=-1)
    with pytest.raises(ValueError, match="jitter"):
        CropRecipe(jitter=1.0)
    data = CropData(str(small_corpus), SOURCES, 4, 4, CropRecipe(global_size=30))
    with pytest.raises(ValueError, match=r"data.crops.global_size is 30 px"):
        data.connect(DINOv3(16, 1, 2, 32, patch_size=4).image_spec, None)

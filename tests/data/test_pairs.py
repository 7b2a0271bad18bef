"""Images with captions: what a caption says, what is held out, and that the order can be resumed."""

import numpy as np
import pytest
import torch
from PIL import Image

from step3vl.data import PairData, Processor, Source
from step3vl.data.pairs import caption, held_out
from step3vl.models.vision import SigLIP2
from step3vl.types import Message, MultiCrop, Sample

SOURCES = {
    "digits": Source("train/documents-digits-level0-*.tar", 2.0),
    "point": Source("train/grounding-point-level0-*.tar", 1.0),
}
LAYOUT = MultiCrop(global_size=64, crop_size=48, max_side=256, min_side=8)


def sample(*turns, num_images=1):
    roles = ("user", "assistant")
    messages = [Message(role=roles[k % 2], content=text) for k, text in enumerate(turns)]
    images = [Image.fromarray(np.zeros((8, 8, 3), np.uint8))] * num_images
    return Sample(id="a", domain="vqa", subset="x", level=0, messages=messages, images=images)


def make(corpus, **more):
    arguments = {"samples_per_step": 8, "num_steps": 5, "max_tokens": 128, **more}
    data = PairData(str(corpus), SOURCES, **arguments)
    spec = SigLIP2(16, 1, 2, 32, 16, patch_size=4, layout=LAYOUT).image_spec
    data.connect(spec, Processor())
    data.setup("fit")
    return data


def test_a_caption_is_questions_with_answers_in_one_order():
    one = sample("<image>Read row 2.", "11", "Read row 1.", "746")
    other = sample("<image>Read row 1.", "746", "Read row 2.", "11")
    assert caption(one) == caption(other) == "Read row 1. 746 Read row 2. 11"
    with pytest.raises(ValueError, match="'a' has 2 images"):
        caption(sample("<image><image>Same?", "yes", num_images=2))
    with pytest.raises(ValueError, match="no assistant turn"):
        caption(sample("<image>What?"))


def test_batches_hold_images_and_their_captions(small_corpus):
    data = make(small_corpus)
    batch = next(iter(data.train_dataloader()))
    assert batch.pixels.shape == (8, 3, 64, 64) and batch.pixels.dtype == torch.uint8
    assert batch.ids.shape == batch.mask.shape and len(batch.captions) == batch.num_images == 8
    tokenizer = data.processor.tokenizer
    texts = [tokenizer.decode(ids[mask].tolist()) for ids, mask in zip(batch.ids, batch.mask)]
    for k, (source, text) in enumerate(zip(batch.sources, texts)):
        assert ("Read row" in text) == (source == "digits"), (source, text)
        assert (batch.captions == batch.captions[k]).tolist() == [other == text for other in texts]
    assert not batch.skipped and batch.num_cut == 0


def test_long_captions_are_cut_and_counted(small_corpus):
    batch = next(iter(make(small_corpus, max_tokens=6).train_dataloader()))
    assert batch.ids.shape[1] == 6 and batch.num_cut == 8


def test_held_out_pairs_are_never_trained_on(small_corpus):
    data = make(small_corpus, num_steps=12, held_out_every=4, test_sources=["digits"], test_samples=100)
    batches = list(data.train_dataloader())
    trained = {id for batch in batches for id in batch.sample_ids}
    kept = [batch for loader in data.test_dataloader() for batch in loader]
    measured = {id for batch in kept for id in batch.sample_ids}
    assert sum(batch.num_held_out for batch in batches) > 0
    assert measured and not measured & trained
    assert {source for batch in kept for source in batch.sources} == {"digits"}
    assert (
        len(measured) + len({id for b in batches for i, id in enumerate(b.sample_ids) if b.sources[i] == "digits"})
        <= 24
    )
    assert not held_out("a", 0) and sum(held_out(str(k), 10) for k in range(2000)) == pytest.approx(200, abs=60)


def test_a_resumed_loader_goes_on(small_corpus):
    straight = [b.sample_ids for b in make(small_corpus).train_dataloader()]
    first = make(small_corpus).train_dataloader()
    iterator = iter(first)
    begun = [next(iterator).sample_ids for _ in range(2)]
    again = make(small_corpus).train_dataloader()
    again.load_state_dict(first.state_dict())
    assert begun + [b.sample_ids for b in again] == straight


def test_bad_arguments_and_samples(small_corpus):
    with pytest.raises(ValueError, match="samples_per_step must be at least 1"):
        make(small_corpus, samples_per_step=0)
    with pytest.raises(ValueError, match=r"max_tokens and data.test_samples"):
        make(small_corpus, max_tokens=0)
    with pytest.raises(ValueError, match="test_sources are names among digits, point"):
        make(small_corpus, test_sources=["photos"], held_out_every=5)
    with pytest.raises(ValueError, match="held_out_every of at least 2"):
        make(small_corpus, test_sources=["digits"])
    text = PairData(str(small_corpus), {"sums": Source("train/text-sums-level0-*.tar", 1.0)}, 4, 1, 64)
    text.connect(make(small_corpus).spec, Processor())
    text.setup("fit")
    batch = next(iter(text.train_dataloader()))
    assert batch.num_images == 0 and len(batch.skipped) == 4 and "0 images" in batch.skipped[0]

"""Facts stay facts: a flag has one name, levels do not meet, and images can be swapped for a control."""

import random

import numpy as np
import pytest

from step3vl.data.corpus.draw import RGB
from step3vl.data.corpus.flags import NUM_COMMON, NUM_RARE, SHADES, STRIPES, countries, flags, known
from step3vl.data.corpus.make import draw_samples, make_corpus, swap_images
from step3vl.data.shards import ShardReader, find_shards


def test_every_country_has_one_flag_and_one_name():
    found = countries()
    assert len(found) == NUM_COMMON + NUM_RARE
    assert len({stripes for stripes, _ in found}) == len({name for _, name in found}) == len(found)
    assert not set(known(0)) & set(known(1)) and set(known(0)) | set(known(1)) == set(found)
    assert found[0] == countries.__wrapped__()[0], "names change from call to call"


@pytest.mark.parametrize("level", [0, 1])
def test_the_image_shows_the_flag_that_is_asked(level):
    names = {name: stripes for stripes, name in known(level)}
    for k in range(20):
        draft = flags(random.Random(k), level, held_out=bool(k % 2), turns=4)
        pixels = np.asarray(draft.images[0]).astype(int)  # [64,64,3]
        assert len({turn.answer_text for turn in draft.turns}) == 4
        for turn in draft.turns:
            row = int(turn.question.removesuffix("?").split()[-1]) - 1
            for colour, (top, bottom) in zip(names[turn.answer_text], STRIPES):
                stripe = pixels[16 * row + top : 16 * row + bottom]
                assert abs(stripe - np.array(RGB[colour])).max() <= SHADES


def test_swapped_images_belong_to_others_and_none_is_lost():
    samples = list(draw_samples(0, "train", "knowledge", "flags", 0, 5)) + list(
        draw_samples(0, "train", "text", "sums", 0, 2)
    )
    swapped = swap_images(samples)
    assert [s.messages for s in swapped] == [s.messages for s in samples]
    assert [s.id for s in swapped] == [s.id for s in samples]
    assert [s.images[0] is samples[(k + 1) % 5].images[0] for k, s in enumerate(swapped[:5])] == [True] * 5
    assert [s.images for s in swapped[5:]] == [[], []]


def test_a_corpus_with_wrong_images_is_right_where_it_is_tested(tmp_path):
    few = {"knowledge/flags": {0: 4}}
    recipe = {"splits": {"train": few, "test": few}}
    for name, wrong in (("right", False), ("wrong", True)):
        make_corpus(tmp_path / name, recipe | {"wrong_images": wrong}, num_processes=1)

    def pixels(name, split):
        reader = ShardReader(find_shards(str(tmp_path / name / split / "*.tar"))[0])
        samples = [reader.read(k) for k in range(4)]
        return [np.asarray(sample.images[0]).tobytes() for sample in samples]

    assert pixels("right", "test") == pixels("wrong", "test")
    right, wrong = pixels("right", "train"), pixels("wrong", "train")
    assert wrong == [*right[1:], right[0]]
    with pytest.raises(ValueError, match="'wrong_images' must be true or false, got 'yes'"):
        make_corpus(tmp_path / "bad", recipe | {"wrong_images": "yes"}, num_processes=1)

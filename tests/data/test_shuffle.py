"""A shuffle computed element by element is a permutation, differs by key, and looks shuffled."""

from __future__ import annotations

from itertools import pairwise

import pytest

from step3vl.data.shuffle import mix, shuffled


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 17, 64, 100, 1000])
def test_is_a_permutation(n):
    assert sorted(shuffled(i, n, 5) for i in range(n)) == list(range(n))


def test_differs_by_key_and_is_stable():
    first = [shuffled(i, 50, 1) for i in range(50)]
    assert first != [shuffled(i, 50, 2) for i in range(50)]
    assert first == [shuffled(i, 50, 1) for i in range(50)]


def test_places_are_even():
    """Where element 0 of a shuffle of 10 goes, over 2,000 keys: each place about 200 times."""
    counts = [0] * 10
    for key in range(2000):
        counts[shuffled(0, 10, key)] += 1
    assert min(counts) > 140 and max(counts) < 260


def test_neighbours_part():
    places = [shuffled(i, 1000, 3) for i in range(1000)]
    steps = [abs(a - b) for a, b in pairwise(places)]
    assert 250 < sum(steps) / len(steps) < 420  # 333 for a perfect shuffle


def test_bounds_and_mixing():
    with pytest.raises(ValueError, match="element 3 of a shuffle of 3"):
        shuffled(3, 3, 0)
    assert mix(1, 2) != mix(2, 1) != mix(1) != mix(1, 0)
    assert 0 <= mix(-5, 2**70) < 2**64

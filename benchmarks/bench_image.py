"""JPEG bytes to stacked views: the 8-bit path against the released model's order (floats from the first resize on).

Ratios of process CPU time within one run. Both paths run with freed memory kept, as training does, which favours the
released order. No view may differ by more than 3 of 255 levels. Run: make bench
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.gate import abstain, interleaved, ratio
from step3vl.data.decode import open_image
from step3vl.data.images import views
from step3vl.data.malloc import keep_freed_memory
from step3vl.types import Grids, ImageSpec, MultiCrop
from tests.data.released_views import differences, jpeg, landscape, released_views

SPEC = ImageSpec(14, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711), MultiCrop())
SIZES = [(640, 480), (1920, 1080), (4000, 3000)]
DEMANDED = {(1920, 1080): 5.0, (4000, 3000): 5.0}
VARIANTS = {
    "released order": lambda data: Grids.stack(released_views(data, SPEC)),
    "8 bits": lambda data: Grids.stack(views(open_image(data, "image"), SPEC)),
}


@pytest.fixture(scope="module", params=SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def picture(request):
    torch.set_num_threads(1)
    keep_freed_memory()
    return request.param, jpeg(landscape(*request.param))


def assert_close(data: bytes) -> None:
    assert max(differences(views(open_image(data, "image"), SPEC), data, SPEC)) <= 3


@pytest.mark.parametrize("variant", VARIANTS)
def test_views(benchmark, picture, variant):
    size, data = picture
    assert_close(data)
    benchmark.group = f"JPEG of {size[0]}x{size[1]} ({len(data) // 1024} KB) to stacked views, CPU seconds"
    benchmark.pedantic(VARIANTS[variant], args=(data,), rounds=5, warmup_rounds=1)


def test_8_bits_are_five_times_as_fast(picture):
    size, data = picture
    assert_close(data)
    seconds = interleaved({name: lambda run=run: run(data) for name, run in VARIANTS.items()}, rounds=7)
    found = ratio(seconds, "released order", "8 bits", f"views of {size[0]}x{size[1]}")
    abstain(seconds)
    assert found >= DEMANDED.get(size, 1), f"released order / 8 bits = {found:.2f}"

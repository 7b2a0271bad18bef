"""docs/performance.md says what the package computes: every number of its tables, to the digits that it prints."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from lightning.pytorch.cli import LightningArgumentParser

from step3vl.callbacks.peak import PEAKS
from step3vl.config import compose
from step3vl.models import VisionLanguageModel
from step3vl.optim import MuonAdamW, build_groups
from step3vl.types import Size

TEXT = (Path(__file__).parents[1] / "docs/performance.md").read_text()
PEAK = PEAKS["H100"]
GIB = 2**30


@pytest.fixture(scope="module")
def vlm() -> VisionLanguageModel:
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_argument("--vlm", type=VisionLanguageModel)
    with torch.device("meta"):
        return parser.instantiate(parser.parse_object({"vlm": compose(["vlm/step3vl_10b.yaml"]).config})).vlm


def table(first: str) -> list[list[str]]:
    """The cells of the table whose first column is called `first`."""
    lines = TEXT[TEXT.index(f"\n| {first} |") :].split("\n\n")[0].strip().splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def assert_shown(cell: str, value: float) -> None:
    """The cell is `value`, rounded to the digits that it has."""
    number = re.fullmatch(r"([\d,]+)(\.\d+)?( %)?", cell)
    assert number, cell
    digits = len(number[2] or ".") - 1
    shown = float((number[1] + (number[2] or "")).replace(",", ""))
    assert abs(shown - value * (100 if number[3] else 1)) <= 0.501 * 10**-digits, f"{cell} should be {value}"


def test_views(vlm):
    rows = table("view")
    assert [row[0][:3] for row in rows] == ["728", "504"]
    for name, patches, tokens, forward, attention, training in rows:
        side = int(name[:3])
        n = side // 14
        total = vlm.vision_encoder.flops(n, n) + vlm.projector.flops(n, n)
        assert_shown(patches, n * n)
        assert_shown(tokens, vlm.num_visual_tokens(side))
        assert_shown(forward, total / 1e12)
        assert_shown(attention, 47 * 4 * n**4 * 1536 / total)
        assert_shown(training, vlm.flops().view(side, side) / 1e12)


def test_tokens(vlm):
    rows = table("document")
    assert len(rows) == 5
    for name, forward, attention, training, at_peak, at_half in rows:
        length = int(name.replace(",", ""))
        once = (vlm.decoder.flops(length) + vlm.decoder.head_flops(length)) / length
        learnt = vlm.flops().text(length, length) / length
        assert_shown(forward, once / 1e9)
        assert_shown(attention, 36 * 4 * 4096 * length / 2 / once)
        assert_shown(training, learnt / 1e9)
        assert_shown(at_peak, PEAK / learnt)
        assert_shown(at_half, PEAK / learnt / 2)
    flops = vlm.flops()
    assert_shown(re.search(r"carries no label costs ([\d.]+) GFLOP", TEXT)[1], flops.text(0, 1) / 1e9)
    a_view = flops.view(728, 728) / (flops.text(4096, 4096) / 4096)
    assert_shown(re.search(r"as much as ([\d,]+) tokens", TEXT)[1], a_view)


def test_samples(vlm):
    rows, flops = table("sample"), vlm.flops()
    assert [row[0] for row in rows] == ["no crops", "6 crops", "36 crops, the most"]
    num_parameters = sum(p.numel() for p in vlm.parameters())
    for (_, tokens, views, text, share, at_peak, more), crops in zip(rows, (0, 6, 36), strict=True):
        newlines = max(round(crops**0.5) - 1, 0)  # grids of 3 x 2 and 6 x 6
        layout = crops * (81 + 2) + newlines + 169 + 2
        length = int(tokens.replace(",", ""))
        assert layout + 500 < length < layout + 500 + 12, "markup and question take a few tokens"
        size = Size(length, 501, crops, 1)  # the end token is learnt too
        total, read = flops.sample(size), flops.text(size.num_tokens, size.num_labels)
        assert_shown(views, (total - read) / 1e12)
        assert_shown(text, read / 1e12)
        assert_shown(share, 1 - read / total)
        assert_shown(at_peak, total / PEAK * 1e3)
        assert_shown(more, total / (6 * num_parameters * length))


def test_memory(vlm):
    num_parameters = sum(p.numel() for p in vlm.parameters())
    assert f"{num_parameters:,} parameters" in TEXT
    rows = table("GPUs")
    assert [int(row[0]) for row in rows] == [1, 2, 8, 32, 64, 256]
    for gpus, *cells in rows:
        for cell, num_bytes in zip(cells, (16, 12, 8, 4), strict=True):
            assert_shown(cell, num_parameters * num_bytes / int(gpus) / GIB)
    groups = MuonAdamW(build_groups(vlm)).param_groups
    muon = sum(p.numel() for group in groups if group["algorithm"] == "muon" for p in group["params"])
    assert_shown(re.search(r"([\d.]+) bytes a\s+parameter on average", TEXT)[1], 16 - 4 * muon / num_parameters)
    blocks = [*vlm.vision_encoder.blocks(), *vlm.decoder.blocks()]
    inside = sum(p.numel() for block in blocks for p in block.parameters())
    layer = sum(p.numel() for p in vlm.decoder.blocks()[0].parameters())
    assert_shown(re.search(r"decoder layer is ([\d.]+) GiB", TEXT)[1], 4 * layer / GIB)
    assert_shown(re.search(r"one unit, are ([\d.]+) GiB", TEXT)[1], 4 * (num_parameters - inside) / GIB)
    kept = re.search(r"(\d+) KiB a token and (\d+) KiB a\s+patch", TEXT)
    assert_shown(kept[1], 36 * 4096 * 2 / 1024)
    assert_shown(kept[2], 47 * 1536 * 2 / 1024)


def test_every_logged_metric_is_explained():
    source = (Path(__file__).parents[1] / "step3vl/callbacks/throughput.py").read_text()
    logged = set(re.findall(r'\.log\(\s*f?"([^"{]+?)(?:/\{name\})?"', source))
    assert len(logged) >= 9
    assert logged <= set(re.findall(r"`([^`]+)`", "\n".join(row[0] for row in table("metric"))))

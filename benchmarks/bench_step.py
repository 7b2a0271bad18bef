"""One training step of a vision-language model: bf16-mixed against fp32, both against this machine's matrix products.

Two models on real and on drawn data: the tiny one of the tiny cards with a batch of its corpus, and one of 184 million
parameters whose matrices are large, with the work split as in the report's model (four fifths in the tower). FLOPs are
those of `vlm.flops()`, which counts no recomputation and no padding; the roofline is the fastest of large square
products, measured between the steps. Process CPU time, one thread, variants by turns. Run: make bench
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import pytest
import torch
from gate import abstain, interleaved, ratio
from tiny_vlm import adamw, batches, num_labels, stage
from torch import Tensor

from step3vl.losses import CrossEntropy
from step3vl.models import ConvProjector, Qwen3Decoder, VisionLanguageModel
from step3vl.models.vision import PELang
from step3vl.optim import build_groups
from step3vl.precision import fast_precision
from step3vl.types import IGNORE_INDEX, Batch, Grids, MultiCrop

SIDE = 2048
FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = 0.05
"""Of bf16 gradients: about three decimal digits a product, over all layers."""

pytestmark = pytest.mark.skipif(fast_precision("cpu") != "bf16-mixed", reason="this processor has no bf16 instructions")


def tiny() -> tuple[VisionLanguageModel, Batch]:
    made = stage()
    return made.vlm, batches(made.processor, 1)[0]


def tiny_long_tailed() -> tuple[VisionLanguageModel, Batch]:
    made = stage()
    return made.vlm, batches(made.processor, 1, long_tailed=True)[0]


def large() -> tuple[VisionLanguageModel, Batch]:
    """Four samples of a 448 px view (1,024 patches, 64 tokens), a question and an answer of 96 tokens each."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    layout = MultiCrop(global_size=448, crop_size=336, max_side=896, min_side=8)
    encoder = PELang(768, num_layers=6, num_heads=12, mlp_size=3072, patch_size=14, grid_size=32, layout=layout)
    decoder = Qwen3Decoder(1024, 3072, num_layers=4, num_heads=16, num_kv_heads=8, head_dim=64, vocab_size=16384)
    vlm = VisionLanguageModel(encoder, ConvProjector, decoder)
    vlm.bind(7)
    num, length = 4, 64 + 192
    ids = torch.randint(8, 16384, (num, length))
    ids[:, 2:66] = 7
    labels = ids.roll(-1, dims=1)
    labels[:, :159], labels[:, -1] = IGNORE_INDEX, IGNORE_INDEX
    views = torch.randint(0, 256, (num, 3, 448, 448), dtype=torch.uint8)
    batch = Batch(
        input_ids=ids.view(1, -1),
        labels=labels.view(1, -1),
        loss_weights=torch.ones(1, ids.numel()),
        position_ids=torch.arange(length).repeat(num)[None],
        images=Grids((views,), torch.arange(num)),
        num_tokens=[length] * num,
    )
    return vlm, batch


MODELS: dict[str, Callable[[], tuple[VisionLanguageModel, Batch]]] = {
    "tiny": tiny,
    "tiny, long-tailed samples": tiny_long_tailed,
    "184 million": large,
}


class Steps:
    """Training steps of one model on one batch, with AdamW at a rate of 0, in either format."""

    def __init__(self, name: str):
        self.vlm, self.batch = MODELS[name]()
        self.loss = CrossEntropy()
        self.optimizer = adamw(build_groups(self.vlm))
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        self.flops = self.vlm.flops().batch(self.batch, num_labels(self.batch))

    def __call__(self, number_format: str) -> float:
        self.optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=number_format == "bf16"):
            value = self.loss(self.vlm(self.batch), self.vlm.decoder.lm_head, self.batch).mean()
        value.backward()
        self.optimizer.step()
        return float(value.detach())

    def gradient(self) -> Tensor:
        return torch.cat([p.grad.flatten() for p in self.vlm.parameters() if p.grad is not None])


@pytest.fixture(scope="module", params=MODELS)
def steps(request) -> Steps:
    return Steps(request.param)


def check_equal(steps: Steps) -> None:
    """bf16 gives the loss to a thousandth, and the gradient as well as its digits allow."""
    values, gradients = {}, {}
    for name in FORMATS:
        values[name] = steps(name)
        gradients[name] = steps.gradient()
    error = float((gradients["bf16"] - gradients["fp32"]).norm() / gradients["fp32"].norm())
    print(f"\nbf16 against fp32: loss {values['bf16']:.4f} for {values['fp32']:.4f}, gradient off by {error:.1%}")
    assert values["bf16"] == pytest.approx(values["fp32"], rel=1e-3)
    assert error < TOLERANCE


@pytest.mark.parametrize("number_format", FORMATS)
def test_step(benchmark, steps, number_format):
    benchmark.group = f"training step, {steps.flops / 1e9:,.0f} GFLOP, CPU seconds"
    benchmark.pedantic(steps, args=(number_format,), rounds=3, warmup_rounds=1)


def test_bf16_takes_at_most_half_the_time(steps):
    check_equal(steps)
    seconds = interleaved({name: lambda n=name: steps(n) for name in FORMATS})
    found = ratio(seconds, "fp32", "bf16")
    abstain(seconds)
    assert found >= 2


def test_share_of_the_roofline(steps, request):
    """The tiny model's share is printed; that of the large one must reach 60 % in bf16."""
    matrices = {name: torch.randn(SIDE, SIDE).to(dtype) for name, dtype in FORMATS.items()}
    runs: dict[str, Callable[[], object]] = {}
    for name in FORMATS:
        runs[f"{name} product"] = lambda n=name: best_product(matrices[n])
        runs[name] = lambda n=name: steps(n)
    best: dict[str, list[float]] = {name: [] for name in FORMATS}

    def best_product(matrix: Tensor) -> None:
        for _ in range(3):
            start = time.process_time()
            torch.mm(matrix, matrix)
            best["bf16" if matrix.dtype == torch.bfloat16 else "fp32"].append(time.process_time() - start)

    seconds = interleaved(runs)
    shares = {}
    for name in FORMATS:
        peak, reached = 2 * SIDE**3 / min(best[name]), steps.flops / median(seconds[name])
        shares[name] = reached / peak
        print(f"\n{name}: {reached / 1e9:,.0f} of {peak / 1e9:,.0f} GFLOP/s, {shares[name]:.0%}")
    abstain({name: seconds[name] for name in FORMATS})
    if "184" in request.node.callspec.id:
        assert shares["bf16"] >= 0.6

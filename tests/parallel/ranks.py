"""Real processes that talk over gloo, and a small model and batches for them."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch

from step3vl.models import ConvProjector, DeepStack, Qwen3Decoder, VisionLanguageModel
from step3vl.models.vision import PELang
from step3vl.types import IGNORE_INDEX, Batch, Grids, MultiCrop

ROOT = Path(__file__).parents[2]
IMAGE = 3
LAYOUT = MultiCrop(global_size=32, crop_size=16)
LEAVE = "import os, sys; sys.stdout.flush(); os._exit(0)  # threads of torch may abort a process that ends by itself"


def launch(script: str, folder: Path, num_ranks: int = 2, *arguments: str, timeout: float = 150) -> str:
    """Run a script on so many ranks; returns what it printed. Fails with what it wrote to stderr."""
    (folder / "run.py").write_text(script + LEAVE)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ranks = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    done = subprocess.run(
        [sys.executable, *ranks, "run.py", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, _last_errors(done.stderr)
    return done.stdout


def small_vlm(deepstack: bool = False, hidden: int = 48, num_layers: int = 3, vocab: int = 65, **decoder):
    """An encoder of three blocks for views of 32 and 16 pixels, and a decoder; some numbers of rows are odd."""
    vision = PELang(32, 3, 2, 66, patch_size=4, grid_size=8, layout=LAYOUT)
    text = Qwen3Decoder(hidden, 2 * hidden + 2, num_layers, 4, 2, 16, vocab, **decoder)
    taps = partial(DeepStack, taps=[0, 2], inject_after=[0, 1])
    made = VisionLanguageModel(vision, ConvProjector, text, taps if deepstack else None)
    made.bind(IMAGE)
    return made


def small_batch(seed: int, sides: tuple[int, ...] = (), length: int = 12) -> Batch:
    """One row of one document that shows views of these sides, in pixels, and then goes on in text."""
    random = torch.Generator().manual_seed(seed)
    tokens = torch.randint(4, 65, (1, length), generator=random)  # [1,T]
    num_visual = sum((side // 16) ** 2 for side in sides)
    tokens[0, 1 : 1 + num_visual] = IMAGE
    views = [torch.randint(0, 256, (3, side, side), generator=random, dtype=torch.uint8) for side in sides]
    labels = torch.randint(4, 65, (1, length), generator=random)
    labels[tokens == IMAGE] = IGNORE_INDEX
    return Batch(
        input_ids=tokens,
        labels=labels,
        loss_weights=torch.ones(1, length),
        position_ids=torch.arange(length)[None],
        images=Grids.stack(views) if views else None,
        sample_ids=[f"{seed}"],
        num_visual_tokens=[num_visual],
        num_tokens=[length],
        sources=["drawn"],
    )


def _last_errors(text: str) -> str:
    """The ranks' own words, without the launcher's."""
    return text.partition("torch.distributed.run")[0].partition("torch/distributed/elastic")[0][-4000:]

"""Is an exported folder the model it came from? Tensors bit by bit, then logits through a fresh load.

Both models compute in float32 from the numbers that were written, so their logits must be equal to the last bit. They
are built one after the other: a second copy of a large model is never in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from step3vl.checkpoints.model import open_model
from step3vl.data.collate import collate
from step3vl.data.processor import Processor
from step3vl.models import VisionLanguageModel
from step3vl.types import IMAGE_MARK, Batch, Message, Prompt
from step3vl.weights import detect, open_source


@dataclass(slots=True, kw_only=True)
class Verified:
    """What was compared. `num_logits` counts numbers; all of them were equal."""

    num_tensors: int
    num_logits: int


def verify(src: str | Path, out: str | Path) -> Verified:
    """Compare the model of `src` with the one exported to `out`.

    Raises:
        ValueError: a tensor or a logit differs; the sentence names the tensor, or by how much logits differ.
    """
    num_tensors = _compare_tensors(src, out)
    original, processor = open_model(src)
    written = next(iter(open_source(out).keys().values())).dtype
    with torch.no_grad():
        for parameter in original.parameters():  # not buffers: rotary frequencies stay exact in any number format
            parameter.copy_(parameter.to(written))
    batch = random_batch(processor)
    expected = logits(original, batch)
    del original
    fresh, processor = open_model(out)
    again = random_batch(processor)
    if not torch.equal(batch.input_ids, again.input_ids):
        raise ValueError(f"{out}: the exported tokenizer or template gives other tokens than {src}")
    given = logits(fresh, again)
    if not torch.equal(given, expected):
        largest = (given - expected).abs().max()
        raise ValueError(
            f"{out}: logits differ from those of {src} by up to {largest:.3g}; its config.json is not right"
        )
    return Verified(num_tensors=num_tensors, num_logits=expected.numel())


def _compare_tensors(src: str | Path, out: str | Path) -> int:
    one, two = open_source(src), open_source(out)
    layouts = detect(one.keys()), detect(two.keys())
    names = {layouts[0].to_ours(name): name for name in list(one.keys())}
    for name, (_, dtype) in two.keys().items():
        ours = layouts[1].to_ours(name)
        if ours not in names or not torch.equal(_bits(one.read(names[ours]).to(dtype)), _bits(two.read(name))):
            raise ValueError(f"{out}: tensor {name} is not the one of {src}")
    return len(two.keys())


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def random_batch(processor: Processor, seed: int = 0) -> Batch:
    """One question about a picture of noise, large enough to be cut into crops."""
    assert processor.spec is not None
    side = processor.spec.layout.global_size
    pixels = torch.randint(256, (side + side // 2, 2 * side, 3), generator=torch.Generator().manual_seed(seed))
    image = Image.fromarray(pixels.to(torch.uint8).numpy())
    message = Message(role="user", content=f"{IMAGE_MARK}What is in the picture?")
    example = processor.encode_prompt(Prompt(messages=[message], images=[image]))
    return collate([example], seq_len=len(example.input_ids), pad_id=processor.pad_id)


@torch.inference_mode()
def logits(vlm: VisionLanguageModel, batch: Batch) -> Tensor:
    """[B,T,V] of a model in evaluation mode."""
    vlm.eval()
    return vlm.decoder.lm_head(vlm(batch))

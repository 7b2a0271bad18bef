"""A run, or any model we can open, in the released STEP3-VL layout: what engines with native support read.

safetensors shards with an index, config.json, generation_config.json, the tokenizer with its chat template,
preprocessor_config.json and a model card. Tensors travel one at a time.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from step3vl.checkpoints.model import build, complete, describe
from step3vl.checkpoints.model_card import model_card
from step3vl.checkpoints.released import CONFIGURATION, generation_config, preprocessor_config, released_config
from step3vl.data.processor import Processor
from step3vl.models import VisionLanguageModel
from step3vl.weights import Accepted, Entry, check, layout_named, open_source, save_sharded, unfinished
from step3vl.weights.save import MAX_SHARD_BYTES

NUMBERS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""Names of number formats on the command line."""
HEAD = "decoder.lm_head.weight"


def export_model(src: str | Path, out: str | Path, dtype: str = "bf16", max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write `src` (a run, an imported or an exported folder, or a checkpoint file in one) to `out`.

    Raises:
        ValueError: weights and configuration of `src` do not fit each other, a part has no place in the released
            layout, or `out` exists.
    """
    if dtype not in NUMBERS:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(NUMBERS)}")
    described, source = describe(src), open_source(src)
    card = complete(described.vlm, VisionLanguageModel)
    with torch.device("meta"):
        targets = build(card, VisionLanguageModel).state_dict(keep_vars=True)
    names = check(targets, source, Accepted(())).loaded
    processor = build(described.processor, Processor)

    def read(name: str) -> Tensor:
        return source.read(names[name])

    write_released(
        out,
        card,
        processor,
        {name: source.keys()[theirs] for name, theirs in names.items()},
        read,
        NUMBERS[dtype],
        model_card(Path(src), described, card, targets),
        max_shard_bytes,
    )


def write_released(
    out: str | Path,
    card: dict[str, Any],
    processor: Processor,
    entries: Mapping[str, Entry],
    read: Callable[[str], Tensor],
    dtype: torch.dtype,
    readme: str,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write the folder: tensors under the released names, and everything beside them.

    Args:
        out: where; the folder appears when it is whole.
        card: completed card of the model.
        processor: whose tokenizer and template are written.
        entries: our name -> (shape, dtype).
        read: our name -> tensor.
        dtype: what floating-point tensors are written as.
        readme: text of the model card.
        max_shard_bytes: size at which a shard is closed.
    """
    layout = layout_named("step3vl")
    config = released_config(card, processor, str(dtype).removeprefix("torch."))
    kept = [name for name in entries if name != HEAD or not config["tie_word_embeddings"]]
    ours = {layout.to_theirs(name) or "": name for name in kept}
    planned = {theirs: Entry(entries[name].shape, dtype) for theirs, name in ours.items()}
    with unfinished(out) as part:
        save_sharded(planned, lambda theirs: read(ours[theirs]).to(dtype), part, max_shard_bytes)
        write_json(part / "config.json", config)
        write_json(part / "generation_config.json", generation_config(processor))
        write_json(part / "preprocessor_config.json", preprocessor_config(card))
        processor.tokenizer.save(part, processor.template.source)
        _name_tokenizer_class(part / "tokenizer_config.json")
        shutil.copy(Path(__file__).with_name(CONFIGURATION), part)
        (part / "README.md").write_text(readme, encoding="utf-8")


def _name_tokenizer_class(file: Path) -> None:
    """The class by the name that transformers 4 and 5 both know; engines pin one or the other."""
    config = json.loads(file.read_text(encoding="utf-8"))
    config.pop("backend", None)
    write_json(file, config | {"tokenizer_class": "PreTrainedTokenizerFast"})


def write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

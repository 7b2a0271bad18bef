"""Any published checkpoint as a folder of ours: our names, a card of the model or part, the tokenizer.

`step3vl fit -c FILE --model.vlm=OUT/vlm.yaml --model.init_from=OUT` then trains from it; a part goes in with
`--model.vlm.decoder=OUT/decoder.yaml --model.init_from.decoder=OUT`.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from step3vl.checkpoints.cards import part_card
from step3vl.checkpoints.model import CHAT_TEMPLATE, build, complete, describe, own_template, read_json
from step3vl.models import VisionLanguageModel
from step3vl.models.decoder import LanguageDecoder
from step3vl.models.vision.base import VisionEncoder
from step3vl.weights import Accepted, check, detect, open_source, save_sharded, unfinished
from step3vl.weights.save import MAX_SHARD_BYTES

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", CHAT_TEMPLATE, "generation_config.json"),
)
KINDS = {"vlm": VisionLanguageModel, "vision_encoder": VisionEncoder, "decoder": LanguageDecoder}


@dataclass(slots=True, kw_only=True)
class Imported:
    """What was found: the layout, which part (vlm: the whole), how many tensors and parameters, what was left out."""

    layout: str
    part: str
    num_tensors: int
    num_parameters: int
    left_out: list[str] = field(default_factory=list)


def import_model(
    src: str | Path, out: str | Path, ignore: Sequence[str] = (), max_shard_bytes: int = MAX_SHARD_BYTES
) -> Imported:
    """Write the checkpoint at `src` to `out`, number formats unchanged, one tensor in memory at a time.

    Args:
        src: a folder or file in any layout that `step3vl.weights.LAYOUTS` lists.
        out: where; must not exist.
        ignore: name patterns of tensors that have no place in our part, or that it has and the checkpoint lacks.
        max_shard_bytes: size at which a shard is closed.

    Raises:
        ValueError: the layout is not known, config.json does not fit the tensors, or keys differ and are not named.
    """
    src = Path(src)
    source = open_source(src)
    layout = detect(source.keys(), str(source.path))
    folder = src if src.is_dir() else src.parent
    if layout.name == "ours" or layout.name.startswith("step3vl"):
        part, card = "vlm", describe(src).vlm
    else:
        part, card = part_card(layout, source.keys(), read_json(folder / "config.json"))
    card = complete(card, KINDS[part])
    with torch.device("meta"):
        built = build(card, KINDS[part])
    module = built if part == "vlm" else nn.ModuleDict({part: built})
    accepted = Accepted(ignore)
    report = check(module.state_dict(keep_vars=True), source, accepted, None if part == "vlm" else part, layout)
    accepted.check_used()
    entries = {ours: source.keys()[theirs] for ours, theirs in report.loaded.items()}
    num_parameters = sum(parameter.numel() for parameter in module.parameters())
    with unfinished(out) as written:
        save_sharded(entries, lambda ours: source.read(report.loaded[ours]), written, max_shard_bytes)
        title = f"From {folder.resolve().name} (layout {layout.name}): {num_parameters:,} parameters."
        write_card(written / f"{part}.yaml", card, title)
        for name in TOKENIZER_FILES:
            if (folder / name).is_file():
                shutil.copy(folder / name, written)
        if part == "vlm" and (folder / "tokenizer.json").is_file():
            template = "chat" if own_template(folder) == "chat" else str(Path(out) / CHAT_TEMPLATE)
            arguments = {"tokenizer": str(out), "template": template}
            processor = {"class_path": "step3vl.data.Processor", "init_args": arguments}
            write_card(written / "processor.yaml", processor, title)
    return Imported(
        layout=layout.name,
        part=part,
        num_tensors=len(entries),
        num_parameters=num_parameters,
        left_out=report.missing + report.unexpected + report.misshaped,
    )


def write_card(file: Path, card: dict[str, Any], title: str) -> None:
    """A card as YAML, with one line that says where it comes from."""
    file.write_text(f"# {title}\n{yaml.safe_dump(card, sort_keys=False)}", encoding="utf-8")

"""README.md of an exported model: what it is, how it was trained, on what data, and its scores with provenance."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from step3vl.checkpoints.model import Described, read_json
from step3vl.checkpoints.released import ARCHITECTURE, LAYOUT

HEADER = """---
license: apache-2.0
pipeline_tag: image-text-to-text
library_name: transformers
---
"""


def model_card(src: Path, described: Described, card: dict[str, Any], targets: Mapping[str, Tensor]) -> str:
    """The text for a model exported from `src`; sections without a source say that there is none."""
    sections = [
        f"{HEADER}\n# {src.resolve().name}",
        f"Exported by step3vl in the layout of STEP3-VL-10B, for engines that know `{ARCHITECTURE}`.",
        _parameters(targets),
        _images(card),
        _scores(src),
        _data(described),
        _configuration(described),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _parameters(targets: Mapping[str, Tensor]) -> str:
    counts: dict[str, int] = {}
    seen: set[int] = set()
    for name, tensor in targets.items():
        if id(tensor) not in seen:
            counts[name.split(".")[0]] = counts.get(name.split(".")[0], 0) + math.prod(tensor.shape)
        seen.add(id(tensor))
    rows = [f"| {part} | {count:,} |" for part, count in [*counts.items(), ("all", sum(counts.values()))]]
    return "\n".join(["## Parameters", "", "| part | parameters |", "|---|---:|", *rows])


def _images(card: dict[str, Any]) -> str:
    given = card["init_args"]["vision_encoder"]["init_args"]["layout"] or {}
    differs = {key: given[key] for key in LAYOUT if given.get(key) not in (None, LAYOUT[key])}
    if not differs:
        return ""
    listed = ", ".join(f"{key} {value} (engines: {LAYOUT[key]})" for key, value in differs.items())
    return f"## Images\n\nEngines hard-code the cuts of STEP3-VL-10B; this model was trained with {listed}."


def _scores(src: Path) -> str:
    metrics = read_json((src.parent.parent if src.is_file() else src) / "metrics.json")
    if metrics is None:
        return "## Scores\n\nNot measured: the source has no metrics.json (`step3vl test` writes it)."
    lines = [
        "## Scores",
        "",
        "| capability | score | 95 % interval | blind | majority | cases |",
        "|---|---|---|---|---|---|",
    ]
    for name, s in metrics["scores"].items():
        numbers = f"{s['score']:.3f} | {s['low']:.3f}..{s['high']:.3f} | {s['blind']:.3f} | {s['majority']:.3f}"
        lines.append(f"| {name} | {numbers} | {s['num_cases']} |")
    return "\n".join([*lines, "", "Provenance:", "", _yaml(metrics["provenance"])])


def _data(described: Described) -> str:
    init = ((described.run or {}).get("data") or {}).get("init_args") or {}
    if not init.get("root"):
        return ""
    lines = ["## Data", "", f"Root `{init['root']}`; sources and weights stand in the configuration below."]
    manifest = read_json(Path(init["root"]) / "manifest.json")
    if manifest is None:
        return "\n".join([*lines, "The root has no manifest.json (or is not here), so shards cannot be listed."])
    shards = manifest.get("shards") or []
    num_samples = sum(shard.get("num_samples", 0) for shard in shards)
    lines.append(f"Manifest: version {manifest.get('version')}, seed {manifest.get('seed')}, {len(shards)} shards,")
    return "\n".join([*lines, f"{num_samples:,} samples."])


def _configuration(described: Described) -> str:
    content = described.run or {"vlm": described.vlm, "processor": described.processor}
    return f"## Configuration\n\n{_yaml(content)}"


def _yaml(content: Any) -> str:
    return f"```yaml\n{yaml.safe_dump(content, sort_keys=False, width=10_000, allow_unicode=True)}```"

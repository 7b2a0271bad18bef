"""Into a model: every key is accounted for, then tensors are copied in place, one at a time.

Keys that are missing, unexpected or of another shape are an error unless a pattern names them. Sharded parameters
(DTensor over their first axis) read only the rows that this rank keeps.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from step3vl.weights.layouts import OPTIONAL, PARTS, Layout, detect
from step3vl.weights.source import TensorSource, open_source

SHOWN = 5
"""Keys that a message lists before it only counts."""


@dataclass
class Report:
    """What fits: `loaded` maps our names to the source's; the rest are differences that were accepted by name."""

    source: TensorSource
    layout: Layout
    loaded: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misshaped: list[str] = field(default_factory=list)


class Accepted:
    """Differences that the config names: regular expressions, searched in the names of keys."""

    def __init__(self, patterns: Sequence[str]):
        try:
            self.patterns = [re.compile(pattern) for pattern in patterns]
        except re.error as error:
            raise ValueError(f"ignore: {error.pattern!r} is not a regular expression ({error})") from None
        self.used: set[str] = set()

    def rest(self, names: Iterable[str]) -> list[str]:
        """The names that no pattern matches."""
        kept = []
        for name in names:
            hits = {pattern.pattern for pattern in self.patterns if pattern.search(name)}
            self.used |= hits
            if not hits:
                kept.append(name)
        return kept

    def check_used(self) -> None:
        """A pattern that matches nothing is a mistake."""
        idle = [pattern.pattern for pattern in self.patterns if pattern.pattern not in self.used]
        if idle:
            raise ValueError(f"ignore: {idle[0]!r} matches no difference between checkpoint and model; remove it")


def load_into(
    module: nn.Module,
    source: TensorSource,
    ignore: Sequence[str] = (),
    part: str | None = None,
    layout: Layout | None = None,
) -> Report:
    """Copy a source into `module` in place, casting to the parameters' number format.

    Args:
        module: names its parameters `vision_encoder.*`, `projector.*`, `decoder.*`, `deepstack.*`.
        source: from `open_source`.
        ignore: regular expressions, searched in names, of differences that are accepted.
        part: fill this part alone, one of `PARTS`. What the source has for others is left alone.
        layout: how the source names tensors; None: found from the names.

    Raises:
        ValueError: the source does not fit; one sentence with keys, shapes and what to do. Nothing was copied then.
    """
    accepted = Accepted(ignore)
    targets = module.state_dict(keep_vars=True)
    report = check(targets, source, accepted, part, layout)
    accepted.check_used()
    fill(targets, report)
    return report


def load_parts(module: nn.Module, sources: str | Mapping[str, str], ignore: Sequence[str] = ()) -> list[Report]:
    """Load a whole model from one place, or each part from its own; all are checked before anything is copied.

    Example: load_parts(vlm, {"vision_encoder": "pe/model.pt", "decoder": "qwen3-8b"})
    """
    accepted = Accepted(ignore)
    targets = module.state_dict(keep_vars=True)
    places: list[tuple[str | None, str]] = [(None, sources)] if isinstance(sources, str) else list(sources.items())
    reports = [check(targets, open_source(path), accepted, part) for part, path in places]
    accepted.check_used()
    for report in reports:
        fill(targets, report)
    return reports


def check(
    targets: Mapping[str, Tensor],
    source: TensorSource,
    accepted: Accepted,
    part: str | None = None,
    layout: Layout | None = None,
) -> Report:
    """Account for every key of `targets` and `source` by names and shapes alone; nothing is read. See `load_into`."""
    if part is not None and part not in PARTS:
        raise ValueError(f"there is no part {part!r} to load into; accepted: {', '.join(PARTS)}")
    entries = source.keys()
    layout = layout or detect(entries, str(source.path))
    if part is not None and part not in layout.parts:
        raise ValueError(f"{source.path} is a {layout.name} checkpoint, which has no {part}")
    wanted = {name: tensor for name, tensor in targets.items() if part is None or name.startswith(f"{part}.")}
    report = Report(source, layout)
    found: dict[str, str] = {}
    for theirs in entries:
        ours = layout.to_ours(theirs)
        if ours is not None and ours in wanted:
            found[ours] = theirs
        elif part is None or ours is None or ours.startswith(f"{part}."):
            report.unexpected.append(theirs)
    filled = {id(wanted[ours]) for ours in found}  # a tied weight is filled through either of its names
    report.missing = [name for name, tensor in wanted.items() if name not in found and id(tensor) not in filled]
    for ours in filter(found.__contains__, wanted):  # in the model's order, whatever the source's
        if tuple(wanted[ours].shape) == entries[found[ours]].shape:
            report.loaded[ours] = found[ours]
        else:
            report.misshaped.append(ours)
    missing, unexpected, misshaped = map(accepted.rest, (report.missing, report.unexpected, report.misshaped))
    if missing or unexpected or misshaped:

        def both(name: str) -> str:
            return f"{name}: {list(entries[found[name]].shape)} there, {list(wanted[name].shape)} here"

        listed = [
            _list("missing", missing),
            _list("unexpected", unexpected),
            _list("of another shape", misshaped, both),
        ]
        problems = "; ".join(text for text in listed if text)
        advice = _advice(missing, unexpected, misshaped)
        raise ValueError(f"{source.path} (layout {layout.name}) does not fit: {problems}. {advice}")
    return report


def fill(targets: Mapping[str, Tensor], report: Report) -> None:
    """Copy what fits, one tensor at a time."""
    names: dict[int, str] = {}
    source = report.source
    with torch.no_grad():
        for ours, theirs in report.loaded.items():
            first = names.setdefault(id(targets[ours]), theirs)
            if first != theirs and not torch.equal(source.read(first), source.read(theirs)):
                raise ValueError(
                    f"{source.path}: {first} and {theirs} differ, but the model ties them; set tie_embeddings: false"
                )
            copy_rows(targets[ours], source, theirs)


def copy_rows(target: Tensor, source: TensorSource, name: str) -> None:
    """Copy one tensor into `target`; a shard takes only its own rows from the source."""
    if target.is_meta:
        raise ValueError(f"{name}: the model has no memory yet; load weights after it has left the meta device")
    if not isinstance(target, DTensor):
        target.copy_(source.read(name))
        return
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if any(placement not in (Replicate(), Shard(0)) for placement in target.placements):
        raise ValueError(f"{name}: placement {target.placements} cannot be loaded; only the first axis may be sharded")
    shape, offset = compute_local_shape_and_global_offset(target.shape, target.device_mesh, target.placements)
    if not shape:
        target.to_local().copy_(source.read(name))
    elif shape[0]:
        target.to_local().copy_(source.read(name, (offset[0], offset[0] + shape[0])))


def _list(problem: str, names: list[str], show: Callable[[str], str] = str) -> str:
    if not names:
        return ""
    count = "1 key is" if len(names) == 1 else f"{len(names)} keys are"
    more = f", and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{count} {problem} ({', '.join(show(name) for name in names[:SHOWN])}{more})"


def _advice(missing: list[str], unexpected: list[str], misshaped: list[str]) -> str:
    parts = {name.split(".")[0] for name in missing} - OPTIONAL
    whole = [part for part in PARTS if part not in OPTIONAL]
    ways = []
    if missing == ["decoder.lm_head.weight"]:
        ways.append("the checkpoint ties its output layer to the embedding: set tie_embeddings: true in the decoder")
    elif misshaped:
        ways.append("model and checkpoint are of different sizes: use the card of this checkpoint")
    elif parts and parts < set(whole):
        given = next(part for part in whole if part not in parts)
        ways.append(f"if the checkpoint is one part of a model, say which: init_from: {{{given}: PATH}}")
    example = ".".join((missing + unexpected + misshaped)[0].split(".")[:2])
    ways.append(f"to accept a difference, name it: init_ignore: ['{example}'] (--ignore on the command line)")
    return "; ".join(ways).capitalize()[:1] + "; ".join(ways)[1:]

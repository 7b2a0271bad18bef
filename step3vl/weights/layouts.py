"""Names in published checkpoints <-> names here. A layout is an ordered list of prefixes; the first match wins.

Names here start with `vision_encoder.`, `projector.`, `decoder.` or `deepstack.`. STEP3-VL's names are those of the
release: the tower's two convolutions live in `vision_model`, here in the projector.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from step3vl.weights.source import Entry

ENCODER = "vision_encoder."
PARTS = ("vision_encoder", "projector", "decoder", "deepstack")
OPTIONAL = {"deepstack"}
"""Parts that a whole model may lack."""


@dataclass(frozen=True)
class Layout:
    """One way of naming tensors.

    Example: Layout("qwen3", (("model.", "decoder.model."), ("lm_head.", "decoder.lm_head.")), marks)
    """

    name: str
    prefixes: tuple[tuple[str, str], ...]
    """(theirs, ours), first match wins in both directions; a name that matches none is not ours."""
    marks: tuple[str, ...]
    """Tensors that every checkpoint of this layout has."""
    unlike: tuple[str, ...] = ()
    """Tensors that no checkpoint of this layout has."""
    num_axes: int | None = None
    """Axes of the first mark's tensor, where names alone do not decide."""
    text: str = ""
    """What people call it."""

    @property
    def parts(self) -> tuple[str, ...]:
        """Parts of the model that it can fill."""
        return tuple(part for part in PARTS if any(ours.startswith(f"{part}.") for _, ours in self.prefixes))

    def to_ours(self, name: str) -> str | None:
        """Their name -> ours; None when it has no place here."""
        return _swap(name, self.prefixes)

    def to_theirs(self, name: str) -> str | None:
        """Our name -> theirs; None when the layout has no such part."""
        return _swap(name, [(ours, theirs) for theirs, ours in self.prefixes])

    def fits(self, entries: Mapping[str, Entry]) -> bool:
        if any(mark not in entries for mark in self.marks) or any(mark in entries for mark in self.unlike):
            return False
        return self.num_axes is None or len(entries[self.marks[0]].shape) == self.num_axes


def _swap(name: str, pairs: list[tuple[str, str]] | tuple[tuple[str, str], ...]) -> str | None:
    for old, new in pairs:
        if name.startswith(old):
            return new + name[len(old) :]
    return None


def _step3vl(name: str, vision: str, projector: str, text: str, what: str) -> Layout:
    prefixes = (
        (f"{vision}vit_downsampler", "projector.vit_downsampler"),
        (vision, ENCODER),
        (projector, "projector.vit_large_projector."),
        (text, "decoder.model."),
        ("lm_head.", "decoder.lm_head."),
    )
    return Layout(name, prefixes, (f"{vision}conv1.weight", f"{projector}weight", f"{text}norm.weight"), text=what)


def _pe(name: str, prefix: str) -> Layout:
    marks = (f"{prefix}conv1.weight", f"{prefix}positional_embedding", f"{prefix}ln_pre.weight")
    return Layout(name, ((prefix, ENCODER),), marks, text="Meta's Perception Encoder")


def _dinov3(name: str, layer: str) -> Layout:
    names = ((layer, f"{ENCODER}model.model.layer."), ("", f"{ENCODER}model."))
    return Layout(name, names, (f"{layer}0.layer_scale1.lambda1", "embeddings.cls_token"), text="DINOv3")


def _siglip(name: str, prefix: str, num_axes: int, what: str) -> Layout:
    marks = (f"{prefix}embeddings.patch_embedding.weight", f"{prefix}encoder.layers.0.layer_norm1.weight")
    return Layout(name, ((prefix, f"{ENCODER}model."),), marks, num_axes=num_axes, text=what)


HEAD = ("lm_head.", "decoder.lm_head.")
Q_NORM = "layers.0.self_attn.q_norm.weight"

LAYOUTS = (
    Layout("ours", tuple((f"{part}.", f"{part}.") for part in PARTS), (), text="a run or an imported folder"),
    _step3vl("step3vl", "vision_model.", "vit_large_projector.", "model.", "STEP3-VL"),
    _step3vl(
        "step3vl_transformers",
        "model.vision_model.",
        "model.vit_large_projector.",
        "model.language_model.",
        "STEP3-VL as the release's key mapping renames it",
    ),
    _pe("pe", ""),
    _pe("pe_visual", "visual."),
    _dinov3("dinov3", "layer."),
    _dinov3("dinov3_model", "model.layer."),
    _siglip("siglip", "", 4, "SigLIP, SigLIP 2 of one resolution"),
    _siglip("siglip_full", "vision_model.", 4, "SigLIP with its text tower"),
    _siglip("siglip2", "", 2, "SigLIP 2 NaFlex"),
    _siglip("siglip2_full", "vision_model.", 2, "SigLIP 2 NaFlex with its text tower"),
    Layout(
        "qwen3", (("model.", "decoder.model."), HEAD), ("model.embed_tokens.weight", f"model.{Q_NORM}"), text="Qwen3"
    ),
    Layout(
        "qwen3_vl",
        (("model.language_model.", "decoder.model."), HEAD),
        ("model.language_model.embed_tokens.weight", f"model.language_model.{Q_NORM}", "model.visual.pos_embed.weight"),
        text="Qwen3-VL",
    ),
)


def detect(entries: Mapping[str, Entry], where: str = "the checkpoint") -> Layout:
    """The layout whose marks are all there.

    Raises:
        ValueError: no layout fits; the sentence shows some names and lists the layouts.
    """
    if entries and all(LAYOUTS[0].to_ours(name) for name in entries):
        return LAYOUTS[0]
    for layout in LAYOUTS[1:]:
        if layout.fits(entries):
            return layout
    some = ", ".join(sorted(entries)[:3]) or "nothing"
    known = ", ".join(layout.name for layout in LAYOUTS)
    raise ValueError(f"{where}: {len(entries)} names of no known layout ({some}, ...); known: {known}")


def layout_named(name: str) -> Layout:
    """The layout of this name. Raises ValueError with the accepted names."""
    for layout in LAYOUTS:
        if layout.name == name:
            return layout
    raise ValueError(f"no layout {name!r}; accepted: {', '.join(layout.name for layout in LAYOUTS)}")

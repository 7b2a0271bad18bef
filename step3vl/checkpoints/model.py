"""From a folder to a model: what a run, an imported, an exported or a released folder says about itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from step3vl.checkpoints.released import MODEL_TYPE, card_of
from step3vl.config import ConfigError, compose
from step3vl.data.processor import Processor
from step3vl.diagnose import check_classes, check_types
from step3vl.models import VisionLanguageModel
from step3vl.models.projector import Projector
from step3vl.weights import load_into, open_source

CHAT_TEMPLATE = "chat_template.jinja"


@dataclass(slots=True, kw_only=True)
class Described:
    """A folder's model and processor as cards, and the whole run where the folder is one."""

    vlm: dict[str, Any]
    processor: dict[str, Any]
    run: dict[str, Any] | None = None


def describe(folder: str | Path) -> Described:
    """Cards of the model in a run folder (config.yaml), an imported one (vlm.yaml) or a released one (config.json).

    A file stands for its folder, and a file in a run's checkpoints folder for the run.

    Raises:
        ValueError: the folder says nothing about a whole model; the sentence names what was looked for.
    """
    folder = Path(folder)
    if folder.is_file():
        folder = folder.parent.parent if folder.parent.name == "checkpoints" else folder.parent
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}: give a run, an imported or an exported folder")
    if (folder / "config.yaml").is_file():
        run = compose([(folder / "config.yaml").resolve()]).config
        init = run["model"]["init_args"]
        if "vlm" not in init:
            raise ValueError(f"{folder} is a run of {run['model']['class_path']}, which answers nothing")
        return Described(vlm=init["vlm"], processor=init["processor"], run=run)
    if (folder / "vlm.yaml").is_file():
        vlm = compose([(folder / "vlm.yaml").resolve()]).config
        return Described(vlm=vlm, processor=_processor_card(folder))
    config = read_json(folder / "config.json")
    if config is None:
        raise ValueError(f"{folder} has no config.yaml (a run), vlm.yaml (imported) or config.json (released)")
    if config.get("model_type") != MODEL_TYPE and not {"vision_config", "understand_projector_stride"} <= config.keys():
        raise ValueError(f"{folder / 'config.json'} describes a {config.get('model_type')!r} model, not {MODEL_TYPE!r}")
    card = card_of(config, read_json(folder / "preprocessor_config.json") or {})
    return Described(vlm=card, processor=_processor_card(folder))


def open_model(folder: str | Path) -> tuple[VisionLanguageModel, Processor]:
    """The model of a folder with its weights, and its processor, bound to each other; ready to answer."""
    described = describe(folder)
    vlm, processor = build(described.vlm, VisionLanguageModel), build(described.processor, Processor)
    load_into(vlm, open_source(folder))
    return vlm, connect(vlm, processor)


def connect(vlm: VisionLanguageModel, processor: Processor) -> Processor:
    """The two hand-overs: what the encoder needs from pixels, and which token stands for an image."""
    vlm.bind(processor.image_token_id)
    return processor.bind(vlm.image_spec, vlm.projector.grid)


def build(card: dict[str, Any], kind: Any) -> Any:
    """The object a card describes. Raises ConfigError with one sentence for a card that does not fit its class."""
    parser, parsed = _parse(card, kind)
    return parser.instantiate_classes(parsed).it


def complete(card: dict[str, Any], kind: Any) -> dict[str, Any]:
    """A card with every argument spelled out, defaults included."""
    parser, parsed = _parse(card, kind)
    return yaml.safe_load(parser.dump(parsed, skip_none=False, format="yaml"))["it"]


def read_json(file: Path) -> dict[str, Any] | None:
    """A JSON file's mapping; None when there is no file. Raises ValueError when it is not JSON."""
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a mapping, it holds a {type(content).__name__}")
    return content


def _parse(card: dict[str, Any], kind: Any) -> tuple[ArgumentParser, Any]:
    parser = ArgumentParser(exit_on_error=False)
    hint = Callable[[int, int], Projector] if kind is Projector else kind
    parser.add_argument("--it", type=hint)
    check_classes(card, "card")
    check_types(card, hint, "card")
    try:
        return parser, parser.parse_object({"it": card})
    except Exception as error:  # jsonargparse raises several kinds; the walk above has found the common ones
        raise ConfigError(f"card: {' '.join(str(error).split())[:300]}") from None


def _processor_card(folder: Path) -> dict[str, Any]:
    """The tokenizer beside the weights, with its own chat template where that copies contents as they are."""
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(f"{folder} has no tokenizer.json")
    return {
        "class_path": "step3vl.data.Processor",
        "init_args": {"tokenizer": str(folder), "template": own_template(folder)},
    }


def own_template(folder: Path) -> str:
    """The folder's own template, or the packaged ChatML one when a template takes contents apart (thinking, tools)."""
    from step3vl.data.template import ChatTemplate

    own = folder / CHAT_TEMPLATE
    if not own.is_file():
        return "chat"
    try:
        ChatTemplate(str(own))
    except Exception:  # a template is code of its own and may fail in any way; ours is the same ChatML
        return "chat"
    return str(own)

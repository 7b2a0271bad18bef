"""Cards built into objects by plain imports, without the command line."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module, resources
from typing import Any

import pytest
import yaml

from step3vl.types import MultiCrop

CONFIGS = resources.files("step3vl") / "configs"


def build_card(name: str, scale: str = "") -> Any:
    """The object a card describes; a projector card gives a class that still wants its two widths."""
    card = yaml.safe_load((CONFIGS / scale / name).read_text())
    arguments = dict(card.get("init_args", {}))
    for key, value in arguments.items():
        if isinstance(value, str) and value.endswith(".yaml"):
            arguments[key] = build_card(value, scale)
    if "layout" in arguments:
        arguments["mean"], arguments["std"] = tuple(arguments["mean"]), tuple(arguments["std"])
        arguments["layout"] = MultiCrop(**arguments["layout"])
    module, _, name = card["class_path"].rpartition(".")
    made = getattr(import_module(module), name)
    return partial(made, **arguments) if name == "ConvProjector" else made(**arguments)


@pytest.fixture
def card() -> Callable[..., Any]:
    return build_card

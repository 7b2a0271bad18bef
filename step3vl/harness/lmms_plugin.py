"""Entry point `lmms_eval.models`: makes `lmms-eval --model step3vl` known. Imported by lmms-eval alone."""

from __future__ import annotations

from typing import Any


def manifests() -> list[Any]:
    """What lmms-eval (0.7) asks its plugins for."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return [ModelManifest("step3vl", chat_class_path="step3vl.harness.lmms_model.Step3VLChat")]

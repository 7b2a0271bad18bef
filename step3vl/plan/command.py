"""The verb `plan`: what a run needs, before it is queued."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import Any

from step3vl.config import ConfigError, compose
from step3vl.data.processor import Processor
from step3vl.lightning_cli import Command
from step3vl.models import VisionLanguageModel
from step3vl.slurm.command import check_run

from .plan import GPU_BYTES, make_plan, prepare
from .report import print_plan
from .workload import KINDS, Mean, measured_mean, typical_mean


def run(args: Sequence[str]) -> int:
    """`step3vl plan FILE [options] [--a.b=c ...]`; `args` without the verb."""
    parser = argparse.ArgumentParser(prog="step3vl plan", allow_abbrev=False)
    parser.add_argument("file", help="an experiment or a row of a table")
    parser.add_argument("--scale", default="paper", help="paper or tiny")
    parser.add_argument("--gpu", default="H100", help=", ".join(GPU_BYTES))
    parser.add_argument("--mfu", type=float, default=0.4, help="model FLOPs utilisation to reckon with (default 0.4)")
    share = parser.add_mutually_exclusive_group()
    share.add_argument("--images", type=float, default=None, help="share of samples with one image, 0 to 1")
    share.add_argument("--mix", default=None, help=f"shares of kinds ({', '.join(KINDS)}): text=0.5,image=0.4,page=0.1")
    parser.add_argument("--text-tokens", type=int, default=None, help="text tokens of a typical sample")
    parser.add_argument("--json", action="store_true", help="print JSON in place of tables")
    options, words = parser.parse_known_args(args)
    bad = [word for word in words if not (word.startswith("--") and "=" in word)]
    if bad:
        raise ConfigError(f"plan: unknown argument {bad[0]!r}; overrides are --KEY=VALUE")
    overrides = [word[2:] for word in words]
    config = compose([options.file], overrides, options.scale).config
    check_run(Command("fit", [options.file], overrides, options.scale))
    vlm = prepare(config)
    sample, assumed = mean_sample(config, vlm, read_mix(options.mix), options.images, options.text_tokens)
    plan = make_plan(config, vlm, sample, assumed, options.gpu, options.mfu)
    if options.json:
        print(json.dumps(plan.as_dict(), indent=2))
    else:
        print_plan(plan, f"{options.file}, {options.scale} scale")
    return 0


def mean_sample(
    config: Mapping[str, Any],
    vlm: VisionLanguageModel,
    mix: Mapping[str, float] | None,
    images: float | None,
    text_tokens: int | None,
) -> tuple[Mean, tuple[str, ...]]:
    """The mean sample of measured shards, unless shares are given or shards are not there: then of typical samples."""
    data = config["data"]["init_args"]
    why: tuple[str, ...] = ()
    if mix is None and images is None and text_tokens is None:
        found = _measured(config, vlm)
        if not isinstance(found, str):
            return found
        why = (f"typical samples, because {found}",)
    sample, words = typical_mean(data, vlm, mix, images, text_tokens)
    return sample, (*why, *words)


def read_mix(text: str | None) -> dict[str, float] | None:
    """ "text=0.5,image=0.5" as shares by kind. Raises ConfigError for anything else."""
    if text is None:
        return None
    shares = {}
    for part in text.split(","):
        kind, sep, share = part.partition("=")
        try:
            shares[kind.strip()] = float(share if sep else "none")
        except ValueError:
            raise ConfigError(f"--mix {part!r}: write KIND=SHARE, e.g. text=0.5,image=0.5") from None
    return shares


def bound_processor(config: Mapping[str, Any], vlm: VisionLanguageModel) -> Processor:
    """The run's processor, laid out for its encoder. Raises ValueError or OSError when its tokenizer is not here."""
    card = config["model"]["init_args"]["processor"]
    arguments = card.get("init_args") or {} if "class_path" in card else card
    return Processor(**arguments).bind(vlm.image_spec, vlm.projector.grid)


def _measured(config: Mapping[str, Any], vlm: VisionLanguageModel) -> tuple[Mean, tuple[str, ...]] | str:
    try:
        processor = bound_processor(config, vlm)
    except (ValueError, OSError) as error:
        return f"the run's tokenizer is not here ({error})"
    return measured_mean(config["data"]["init_args"], processor, vlm)

"""Who answers, and how: what the verbs eval, pacore and serve have in common on the command line."""

from __future__ import annotations

import argparse
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from step3vl.ask import fast_numbers, load_model
from step3vl.config import CONFIGS, ConfigError, compose, nearest
from step3vl.generation.client import ChatClient
from step3vl.generation.sampler import Sampler
from step3vl.pacore import Counter, PaCoReGenerator, estimated, exact, parse_rounds
from step3vl.types import Generator, Sampling

MODES = ("sere", "pacore")


@dataclass(slots=True, kw_only=True)
class Preset:
    """How a question is answered. `rounds` is None for sequential reasoning, one chain of thought."""

    name: str
    sampling: Sampling
    rounds: list[int] | None = None
    max_context_tokens: int | None = None
    template: str | None = None
    """Of synthesis prompts: published, short, or a file; None: the published one."""

    @property
    def mode(self) -> str:
        return "sere" if self.rounds is None else "pacore"

    @property
    def label(self) -> str:
        """Stands after a model's name: nothing, or -pacore-16."""
        return "" if self.rounds is None else label(self.rounds)


@dataclass(slots=True, kw_only=True)
class Answering:
    """A generator, the arithmetic it is to be used in, and how its prompts are counted."""

    generator: Generator
    numbers: AbstractContextManager
    counter: Counter

    def coordinated(self, preset: Preset, **more: Any) -> PaCoReGenerator:
        """The same generator in a preset's rounds."""
        if preset.rounds is None:
            raise ConfigError(f"preset {preset.name} has no rounds; give --rounds")
        return PaCoReGenerator(
            self.generator, preset.rounds, preset.max_context_tokens, self.counter, template=preset.template, **more
        )


def label(rounds: list[int]) -> str:
    """-pacore-16, -pacore-32-4."""
    return "-pacore-" + "-".join(map(str, rounds))


def add_model(parser: argparse.ArgumentParser, batch: int = 16, optional: bool = False) -> None:
    """Which model: a folder, or a server by its address."""
    parser.add_argument(
        "checkpoint",
        nargs="?" if optional else None,
        help="a run (runs/...), an imported, exported or released folder, or a server's URL",
    )
    parser.add_argument("--model", default="", help="of a server: the name that it knows the model by")
    parser.add_argument("--batch", type=int, default=batch, help="sequences in flight at once")


def add_preset(
    parser: argparse.ArgumentParser, default: str, with_mode: bool = False, with_rounds: bool = True
) -> None:
    """How it answers: a preset, and what the command line changes of it."""
    shown = "greedy (default), sere, pacore" if with_mode else f"greedy, sere, pacore; default: {default}"
    parser.add_argument("--preset", default=None, help=f"card in configs/sampling: {shown}")
    parser.add_argument("--max-new-tokens", type=int, default=None, help="longest answer; default: the preset's")
    parser.add_argument("--temperature", type=float, default=None, help="default: the preset's")
    parser.add_argument("--seed", type=int, default=None, help="of sampled answers; default: the preset's")
    parser.add_argument("--scale", default="paper", help="of the preset: paper (default), tiny")
    parser.add_argument(
        "--max-context-tokens", type=int, default=None, help="of PaCoRe: prompt and answer; default: the preset's"
    )
    parser.add_argument("--template", help="of PaCoRe's prompts: published (default), short (tiny models), or a file")
    parser.set_defaults(default_preset=default, rounds=None)
    if with_rounds:
        parser.add_argument("--rounds", help='of PaCoRe: answers a round, such as "[16]"; default: the preset\'s')
    if with_mode:
        parser.add_argument("--mode", default=None, choices=MODES, help="one chain of thought, or coordinated ones")


def read_preset(options: argparse.Namespace) -> Preset:
    """A preset with what the command line changes; `--mode pacore` without a preset is the preset pacore."""
    mode = getattr(options, "mode", None)
    name = options.preset or ("pacore" if mode == "pacore" else options.default_preset)
    known = sorted(path.stem for path in (CONFIGS / "sampling").glob("*.yaml"))
    if name not in known:
        raise ConfigError(f"there is no preset {name!r}; {nearest(name, known)}")
    values = compose([f"sampling/{name}.yaml"], scale=options.scale).config
    if mode == "pacore" and "rounds" not in values:
        values |= {key: value for key, value in _card("pacore", options.scale).items() if key not in _sampling_keys()}
    if mode == "sere" and "rounds" in values:
        raise ConfigError(f"--mode sere and --preset {name} contradict each other: that preset coordinates rollouts")
    changed = {"max_new_tokens": options.max_new_tokens, "temperature": options.temperature, "seed": options.seed}
    values |= {key: value for key, value in changed.items() if value is not None}
    if "rounds" not in values and (options.rounds or options.max_context_tokens or options.template):
        raise ConfigError(
            "--rounds, --max-context-tokens and --template are PaCoRe's; give --mode pacore or --preset pacore too"
        )
    sampling = Sampling(**{key: value for key, value in values.items() if key in _sampling_keys()})
    preset = Preset(name=name, sampling=sampling)
    if "rounds" in values:
        preset.rounds = values["rounds"] if options.rounds is None else parse_rounds(options.rounds)
        preset.max_context_tokens = options.max_context_tokens or values["max_context_tokens"]
        preset.template = options.template
        if sampling.temperature == 0 and preset.rounds:
            raise ConfigError(
                "PaCoRe at temperature 0 would ask for the same answer again and again; give --temperature"
            )
    return preset


def open_answering(checkpoint: str, model: str, batch: int) -> Answering:
    """The generator of a folder or of a server, with everything that belongs to it."""
    if batch < 1:
        raise ConfigError(f"--batch is {batch}; accepted is 1 or more")
    if is_server(checkpoint):
        if not model:
            raise ConfigError("a server needs --model, the name that it knows the model by")
        client = ChatClient(checkpoint, model, max_concurrent=4 * batch)
        return Answering(generator=client, numbers=nullcontext(), counter=estimated())
    vlm, processor = load_model(checkpoint)
    sampler = Sampler(vlm, processor, batch_size=batch)
    return Answering(generator=sampler, numbers=fast_numbers(vlm), counter=exact(processor))


def is_server(checkpoint: str) -> bool:
    return checkpoint.startswith(("http://", "https://"))


def published_context(scale: str) -> int:
    """Tokens of a coordinated question's prompt and answer, as the card says."""
    return _card("pacore", scale)["max_context_tokens"]


def default_name(checkpoint: str, model: str = "") -> str:
    """What a model is called: its folder's last name, or the name that its server knows."""
    return model if is_server(checkpoint) else Path(checkpoint).resolve().name


def _card(name: str, scale: str) -> dict[str, Any]:
    return compose([f"sampling/{name}.yaml"], scale=scale).config


def _sampling_keys() -> set[str]:
    return {field.name for field in fields(Sampling)}

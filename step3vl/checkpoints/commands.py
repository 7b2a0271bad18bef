"""The verbs `import`, `export` and `make-tiny`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from step3vl.checkpoints.export import NUMBERS, export_model
from step3vl.checkpoints.importing import import_model
from step3vl.checkpoints.tiny import ARCHITECTURES, make_tiny
from step3vl.checkpoints.verify import verify


def run(args: Sequence[str]) -> int:
    """Run one verb; `args` starts with it. Mistakes are ValueErrors with one sentence."""
    match args[0]:
        case "import":
            return _import(args[1:])
        case "export":
            return _export(args[1:])
    return _make_tiny(args[1:])


def _import(args: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="step3vl import")
    parser.add_argument("src", type=Path, help="folder, .safetensors or .pt of a published checkpoint, or a run")
    parser.add_argument("out", type=Path, help="folder to write; must not exist")
    parser.add_argument(
        "--ignore", action="append", default=[], metavar="PATTERN", help="accept keys that match (repeatable)"
    )
    options = parser.parse_args(args)
    done = import_model(options.src, options.out, options.ignore)
    key = "model.vlm" if done.part == "vlm" else f"model.vlm.{done.part}"
    init = "model.init_from" if done.part == "vlm" else f"model.init_from.{done.part}"
    print(f"{done.layout}: {done.num_tensors} tensors, {done.num_parameters:,} parameters in {options.out}")
    if done.left_out:
        print(f"left out, as named: {', '.join(done.left_out[:5])}{', ...' if len(done.left_out) > 5 else ''}")
    print(f"use: step3vl fit -c FILE --{key}={options.out}/{done.part}.yaml --{init}={options.out}")
    return 0


def _export(args: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="step3vl export")
    parser.add_argument("src", type=Path, help="run, or an imported or exported folder")
    parser.add_argument("out", type=Path, help="folder to write in the released STEP3-VL layout; must not exist")
    parser.add_argument("--dtype", default="bf16", choices=list(NUMBERS), help="number format (release: bf16)")
    parser.add_argument("--verify", action="store_true", help="compare tensors bitwise, and logits, with a fresh load")
    options = parser.parse_args(args)
    export_model(options.src, options.out, options.dtype)
    print(f"exported {options.src} to {options.out}")
    if options.verify:
        done = verify(options.src, options.out)
        print(f"verified: {done.num_tensors} tensors bitwise, {done.num_logits:,} logits equal")
    return 0


def _make_tiny(args: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="step3vl make-tiny")
    parser.add_argument("arch", help=", ".join(ARCHITECTURES))
    parser.add_argument("out", type=Path, help="folder to write; must not exist")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(args)
    make_tiny(options.arch, options.out, options.seed)
    print(f"tiny random {options.arch} in {options.out}")
    return 0

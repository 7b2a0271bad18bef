"""The verb `checkpoint`: what a run has saved, whether it is whole, and one file of it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from step3vl.saving import read_checkpoint
from step3vl.weights.manifest import Damaged, read_manifest, verify
from step3vl.weights.runs import choose, folder_of, is_checkpoint, saved_steps


def run(args: Sequence[str]) -> int:
    """Run one of list, verify, consolidate. Mistakes are ValueErrors with one sentence."""
    parser = argparse.ArgumentParser(prog="step3vl checkpoint")
    verbs = parser.add_subparsers(dest="verb", required=True)
    listing = verbs.add_parser("list", help="what a run has saved, newest first, each compared with its checksums")
    listing.add_argument("run", type=Path, help="a run, or its folder of checkpoints")
    verifying = verbs.add_parser("verify", help="compare every file with its checksum")
    verifying.add_argument("path", type=Path, help="a checkpoint, or a run: then its newest whole one is found")
    gathering = verbs.add_parser("consolidate", help="write one file that torch.load and Lightning read anywhere")
    gathering.add_argument("path", type=Path, help="a checkpoint, or a run: then its newest whole one")
    gathering.add_argument("out", type=Path, help="file to write, .ckpt; must not exist")
    options = parser.parse_args(args)
    match options.verb:
        case "list":
            return _list(options.run)
        case "verify":
            return _verify(options.path)
    return _consolidate(options.path, options.out)


def _list(path: Path) -> int:
    """Prints a table; returns 1 when some checkpoint is damaged."""
    found = [path] if is_checkpoint(path) else saved_steps(folder_of(path))
    if not found:
        raise ValueError(f"there is no checkpoint in {path}")
    table = Table(title=str(path))
    for title in ("checkpoint", "step", "saved (UTC)", "ranks", "size", "state"):
        table.add_column(title, justify="left" if title in ("checkpoint", "state") else "right")
    num_damaged = 0
    for folder in found:
        try:
            manifest = read_manifest(folder)
            verify(folder)
        except Damaged as error:
            num_damaged += 1
            table.add_row(folder.name, "", "", "", "", str(error))
            continue
        facts, size = manifest["facts"], sum(entry["bytes"] for entry in manifest["files"].values())
        saved = str(facts.get("saved", ""))[:19].replace("T", " ")
        table.add_row(
            folder.name,
            str(facts.get("step", "")),
            saved,
            str(facts.get("ranks", "")),
            f"{size / 1e6:,.1f} MB",
            "whole",
        )
    Console().print(table)
    return 1 if num_damaged else 0


def _verify(path: Path) -> int:
    refused: list[str] = []
    chosen = choose(path, refused.append)
    for line in refused:
        print(line)
    files = read_manifest(chosen)["files"]
    size = sum(entry["bytes"] for entry in files.values())
    print(f"{chosen} is whole: {len(files)} files, {size:,} bytes agree with their checksums")
    return 1 if refused else 0


def _consolidate(path: Path, out: Path) -> int:
    if out.exists():
        raise ValueError(f"{out} exists already; give another name or remove it")
    if out.suffix != ".ckpt":
        raise ValueError(f"{out} must end in .ckpt, by which Lightning knows its kind")
    chosen = choose(path)
    checkpoint = read_checkpoint(chosen)
    part = out.with_name(f".{out.name}.part")
    torch.save(checkpoint, part)
    os.rename(part, out)
    num = sum(tensor.numel() for tensor in checkpoint["state_dict"].values())
    print(f"{out}: {num:,} parameters, with what is needed to go on training, from {chosen}")
    return 0

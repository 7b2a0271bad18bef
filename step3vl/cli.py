"""Every verb of the `step3vl` command, and the one place where an error becomes a sentence."""

from __future__ import annotations

import argparse
import atexit
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from step3vl.config import ConfigError, compose, nearest

USAGE = """usage: step3vl VERB ...

train and measure (Lightning)
  fit        train a stage:           step3vl fit -c FILE [--scale tiny] [--model.optimizer.lr=3e-4 ...]
  validate   loss on held-out data:   step3vl validate -c FILE --ckpt_path=last
  test       score the suite:         step3vl test -c FILE --ckpt_path=last
  predict    answers of the suite:    step3vl predict -c FILE --ckpt_path=last
             --print_config shows the resolved run and stops; its output runs again by itself

  eval CKPT --suite NAME              a model on the report's benchmarks, or any suite, from a folder of datasets
  compare A B                         two evaluations, paired case by case
  pacore ask|replay|measure|pool|band
                                      parallel coordinated reasoning: answers, traces, what it is worth, message pools
  serve CKPT [--pacore "[16]"]        an OpenAI-compatible server, of the model and of its coordinated form

  chain FOLDER                        fit and test every numbered stage in order; finished ones are kept

ablations
  ablate list                         tables, their rows, what is finished
  ablate run FOLDER                   train and score every row and seed; finished ones are kept
  ablate run FOLDER --slurm --nodes N --dry-run|--submit
                                      the same as a SLURM job array, one element a row and seed
  ablate table FOLDER                 our table beside the paper's; CSV, Markdown and PNG
  ablate diff A B                     only the keys that differ

clusters
  plan FILE                           memory a GPU, FLOPs, days and checkpoint sizes of a run, before it is queued
  slurm FILE --nodes N --dry-run|--submit
                                      the run as a SLURM job that saves and requeues itself

data
  data make OUT                       write the generated corpus as WebDataset shards
  data import SOURCE --out OUT --domain NAME [--images DIR]
                                      LLaVA, ShareGPT, Qwen-VL JSON or Hugging Face parquet as shards
  data validate PATH                  check shards, or a source before it is imported: file, line, field
  data prefer SHARDS OUT              pairs of a right and a wrong answer, for a reward model
  data view SHARD                     contact sheet PNG with boxes and points
  data twins CORPUS OUT               generated cases in the columns of the published benchmarks
  data stats FOLDER                   domains, lengths, image tokens

checkpoints
  checkpoint list RUN                 what a run has saved, and whether it is whole
  checkpoint verify PATH              compare a checkpoint, or the newest of a run, with its checksums
  checkpoint consolidate PATH OUT     one file of it, which torch.load and Lightning read anywhere
  import SRC OUT                      a published checkpoint (STEP3-VL, PE, DINOv3, SigLIP, Qwen3, Qwen3-VL) as ours
  export RUN OUT [--verify]           a run in the released STEP3-VL layout, for engines that serve it
  make-tiny ARCH OUT                  a tiny random checkpoint with the published structure
  ask CKPT QUESTION [--image FILE ...]  a model's answer, token by token; --show-crops PNG draws what it sees

  info       versions, device, missing extras with the pip line
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; user errors print one sentence and return 2 (STEP3VL_TRACEBACK=1 shows where they arose).

    Args:
        argv: the words of the command; None: those of this process, which ends here if it was one of several ranks.
    """
    if argv is not None:
        return _run(list(argv))
    try:
        status = _run(sys.argv[1:])
    except SystemExit as end:
        if not isinstance(end.code, int):
            raise
        status = end.code
    if _was_rank():
        leave(status)
    return status


def leave(status: int) -> NoReturn:
    """End this process as Python would, but without taking torch's threads down, which can abort it (status 134)."""
    for thread in threading.enumerate():  # a checkpoint that is being written
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    try:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def _was_rank() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized()


def _run(args: list[str]) -> int:
    if not sys.stdout.isatty():
        os.environ.setdefault("COLUMNS", "140")  # tables in logs and pipes keep their numbers whole
    verbs = {"fit": _lightning, "validate": _lightning, "test": _lightning, "predict": _lightning}
    verbs |= {"chain": _chain, "ablate": _ablate, "data": _data, "info": _info}
    verbs |= {"import": _checkpoints, "export": _checkpoints, "make-tiny": _checkpoints}
    verbs |= {"checkpoint": _saved, "eval": _eval, "compare": _compare}
    verbs |= {"ask": _ask, "plan": _plan, "slurm": _slurm, "pacore": _pacore, "serve": _serve}
    try:
        if not args or args[0] in ("-h", "--help"):
            print(USAGE, end="")
            return 0
        if args[0] == "--version":
            from step3vl import __version__

            print(f"step3vl {__version__}")
            return 0
        if args[0] not in verbs:
            raise ConfigError(f"no verb {args[0]!r}; {nearest(args[0], list(verbs))}")
        return verbs[args[0]](args)
    except (ValueError, FileNotFoundError) as error:
        if os.environ.get("STEP3VL_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _lightning(args: list[str]) -> int:
    verb, rest = args[0], args[1:]
    if not rest or rest[0] in ("-h", "--help"):
        print(f"usage: step3vl {verb} -c FILE [-c FILE ...] [--scale tiny] [--KEY=VALUE ...] [--print_config]\n")
        print(
            "KEY is dotted; inside a class init_args is implied: --model.vlm.vision_encoder=vision/dinov3_vitl16.yaml"
        )
        print(f"arguments of one class: step3vl {verb} --help step3vl.stages.PretrainStage")
        if len(rest) > 1:
            _class_help(rest[1])
        return 0
    from step3vl.data.malloc import keep_freed_memory
    from step3vl.lightning_cli import Step3VLCLI, read_command

    keep_freed_memory()
    Step3VLCLI(read_command(verb, rest))
    return 0


def _saved(args: list[str]) -> int:
    from step3vl.checkpoints.saved import run

    return run(args[1:])


def _eval(args: list[str]) -> int:
    from step3vl.evaluate import run

    return run(args[1:])


def _compare(args: list[str]) -> int:
    from step3vl.compare import run

    return run(args[1:])


def _class_help(class_path: str) -> None:
    import inspect

    from step3vl.diagnose import import_class

    cls = import_class(class_path, "--help")
    print(f"\n{class_path}{inspect.signature(cls)}\n\n{inspect.getdoc(cls) or ''}")


def _ablate(args: list[str]) -> int:
    from step3vl.ablation.command import run

    return run(args[1:])


def _chain(args: list[str]) -> int:
    from step3vl.chain import run_chain

    parser = argparse.ArgumentParser(prog="step3vl chain")
    parser.add_argument("folder", type=Path, help="a folder of stages, 1_NAME.yaml, 2_NAME.yaml, ...")
    parser.add_argument("--scale", default="paper", help="paper or tiny")
    options, overrides = parser.parse_known_args(args[1:])
    bad = [word for word in overrides if not (word.startswith("--") and "=" in word)]
    if bad:
        raise ConfigError(f"chain: unknown argument {bad[0]!r}; overrides are --KEY=VALUE and go to every stage")
    return run_chain(options.folder, options.scale, [word[2:] for word in overrides])


def _data(args: list[str]) -> int:
    from step3vl.data.importers import command as importing

    parser = argparse.ArgumentParser(prog="step3vl data")
    verbs = parser.add_subparsers(dest="verb", required=True)
    make = verbs.add_parser("make", help="write the generated corpus as WebDataset shards")
    make.add_argument("out", type=Path)
    make.add_argument("--recipe", default="corpus/default.yaml", help="card: how many samples of what")
    make.add_argument("--scale", default="paper", help="paper or tiny")
    make.add_argument("--seed", type=int, default=0)
    make.add_argument("--overwrite", action="store_true", help="replace a folder made with another recipe or seed")
    view = verbs.add_parser("view", help="contact sheet PNG with boxes and points")
    view.add_argument("shard", type=Path)
    view.add_argument("--out", type=Path, default=None, help="PNG to write (default: beside the shard)")
    view.add_argument("--num", type=int, default=24, help="samples to show")
    stats = verbs.add_parser("stats", help="domains, lengths, image tokens")
    stats.add_argument("folder", type=Path)
    stats.add_argument("--run", default=None, help="experiment whose processor counts tokens")
    stats.add_argument("--scale", default="tiny", help="scale of that experiment")
    twins = verbs.add_parser("twins", help="small files in the columns of the published benchmarks, from a corpus")
    twins.add_argument("corpus", type=Path)
    twins.add_argument("out", type=Path, help="folder to write, a --data-root for step3vl eval")
    twins.add_argument("--num", type=int, default=32, help="cases of each")
    prefer = verbs.add_parser("prefer", help="pairs of a right and a wrong answer, for reward models")
    prefer.add_argument("shards", help="folder or quoted pattern of samples with gold answers")
    prefer.add_argument("out", type=Path, help="folder to write")
    prefer.add_argument("--answers", type=Path, default=None, help="cases.jsonl of a run, or a pool (default: by rule)")
    prefer.add_argument("--limit", type=int, default=None, help="at most so many pairs")
    prefer.add_argument("--seed", type=int, default=0, help="of wrong answers made by rule")
    importing.add_verbs(verbs)
    options = parser.parse_args(args[1:])
    if options.verb == "import":
        return importing.run_import(options)
    if options.verb == "validate":
        return importing.run_validate(options)
    if options.verb == "make":
        from step3vl.data.corpus.make import make_corpus

        recipe = compose([options.recipe], scale=options.scale).config
        manifest = make_corpus(options.out, recipe, seed=options.seed, overwrite=options.overwrite)
        num_samples = sum(shard["num_samples"] for shard in manifest.shards)
        print(f"{num_samples:,} samples in {len(manifest.shards)} shards at {options.out}")
    elif options.verb == "twins":
        from step3vl.evaluation.benchmarks.twins import write_twins

        files = write_twins(options.corpus, options.out, options.num)
        print(f"{len(files)} benchmarks with up to {options.num} generated cases each in {options.out}")
    elif options.verb == "prefer":
        from step3vl.data.preference_make import write_preferences

        infos = write_preferences(options.shards, options.out, options.answers, options.limit, options.seed)
        print(f"{sum(info.num_samples for info in infos):,} preferences in {len(infos)} shards at {options.out}")
    elif options.verb == "view":
        from step3vl.data.view import contact_sheet

        out = options.out or options.shard.with_suffix(".png")
        print(contact_sheet(options.shard, out, options.num))
    else:
        from rich.console import Console

        from step3vl.data.stats import print_stats

        print_stats(options.folder, Console(), _token_counter(options.run, options.scale))
    return 0


def _token_counter(run: str | None, scale: str):
    """sample -> (text tokens, image tokens) under a run's processor and encoder, built without weights."""
    if run is None:
        return None
    from step3vl.lightning_cli import build_processor

    processor = build_processor(run, scale)

    def count(sample) -> tuple[int, int]:
        example = processor.encode(sample)
        return len(example.input_ids) - example.num_visual_tokens, example.num_visual_tokens

    return count


def _checkpoints(args: list[str]) -> int:
    from step3vl.checkpoints.commands import run

    return run(args)


def _ask(args: list[str]) -> int:
    from step3vl.ask import run

    return run(args[1:])


def _pacore(args: list[str]) -> int:
    from step3vl.coordinate import run

    return run(args[1:])


def _serve(args: list[str]) -> int:
    from step3vl.serve import run

    return run(args[1:])


def _plan(args: list[str]) -> int:
    from step3vl.plan.command import run

    return run(args[1:])


def _slurm(args: list[str]) -> int:
    from step3vl.slurm.command import run

    return run(args[1:])


def _info(args: list[str]) -> int:
    """Versions, device and, for each extra that is not installed, the pip line."""
    import platform
    from importlib import metadata
    from importlib.util import find_spec

    import torch
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from step3vl import __version__

    table = Table(title=f"step3vl {__version__}", show_header=False)
    table.add_row("python", platform.python_version())
    for name in ("torch", "lightning", "transformers", "webdataset", "omegaconf", "jsonargparse"):
        table.add_row(name, metadata.version(name))
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    table.add_row("devices", ", ".join(gpus) or f"CPU only ({os.cpu_count()} cores, {torch.get_num_threads()} threads)")
    from step3vl.precision import fast_precision

    table.add_row("precision chosen here", fast_precision(None))
    extras = {
        "gpu": "flash_attn",
        "eval": "datasets",
        "parquet": "pyarrow",
        "rl": "math_verify",
        "slurm": "submitit",
        "curation": "datasketch",
    }
    for extra, module in (extras | {"docs": "material", "dev": "pytest"}).items():
        missing = find_spec(module) is None
        table.add_row(f"extra {extra}", escape(f"missing: pip install -e '.[{extra}]'") if missing else "installed")
    Console().print(table)
    return 0

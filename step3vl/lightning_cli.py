"""fit, validate, test and predict: OmegaConf composes the run, jsonargparse types it, Lightning runs it."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import re
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentError, set_parsing_settings
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch.utils.data import DataLoader

from step3vl.callbacks import ProgressLines, Upbringing
from step3vl.config import Composed, ConfigError, compose, nearest
from step3vl.data.processor import Processor
from step3vl.diagnose import check_arguments, check_classes, check_keys, check_types
from step3vl.evaluation import Benchmark
from step3vl.evaluation.report import write_report, write_scores
from step3vl.models import LanguageDecoder, ValueModel, VisionLanguageModel
from step3vl.models.vision import VisionEncoder
from step3vl.precision import fast_precision
from step3vl.stages import EncoderStage, Stage, Trained
from step3vl.weights.runs import FOLDER, saved_steps

VERBS = ("fit", "validate", "test", "predict")
TOP_KEYS = ("scale", "seed_everything", "trainer", "model", "data", "suite", "ckpt_path", "weights_only", "verbose")


@dataclass
class Command:
    """A parsed command line: `step3vl VERB -c FILE ... [--scale S] [--a.b=c ...] [--print_config]`."""

    verb: str
    files: list[str] = field(default_factory=list)
    overrides: list[str] = field(default_factory=list)
    scale: str | None = None
    print_config: bool = False


def read_command(verb: str, args: Sequence[str]) -> Command:
    """Split the arguments of a Lightning verb. Raises ConfigError for what it cannot place."""
    command, rest = Command(verb), list(args)
    while rest:
        word = rest.pop(0)
        if word == "--print_config":
            command.print_config = True
            continue
        if not word.startswith("-"):
            raise ConfigError(f"{word!r} is not an option; a file is given with -c {word}")
        key, sep, value = word.partition("=")
        if not sep:
            if not rest or re.match(r"^--?[A-Za-z]", rest[0]):
                raise ConfigError(f"{key} needs a value: {key}=VALUE")
            value = rest.pop(0)
        if key in ("-c", "--config"):
            command.files.append(value)
        elif key == "--scale":
            command.scale = value
        elif key.startswith("--"):
            command.overrides.append(f"{key[2:]}={value}")
        else:
            raise ConfigError(f"unknown option {key}; {nearest(key, ['-c', '--config', '--scale', '--print_config'])}")
    if not command.files:
        raise ConfigError(
            f"no file given: step3vl {verb} -c experiments/step3vl_10b/1_pretrain_phase1.yaml --scale tiny"
        )
    return command


def run_folder(command: Command) -> Path:
    """Where a run lives follows from its file: ablations/t/row.yaml -> runs/[tiny/]ablations/t/row."""
    path = Path(command.files[-1]).resolve().with_suffix("")
    inside = path.is_relative_to(Path.cwd())
    scale = [command.scale] if command.scale and command.scale != "paper" else []
    return Path("runs", *scale) / (path.relative_to(Path.cwd()) if inside else path.name)


def hush() -> None:
    """Keep Lightning's hints and torch's deprecation notes out of the way; our start tables say what matters."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning_fabric", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for text in (
        "isinstance(treespec",
        ".*does not have many workers",
        "You defined a `validation_step`",
        ".*is not supported by the model summary",
    ):
        warnings.filterwarnings("ignore", message=f".*{re.escape(text) if '(' in text else text}.*")
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view")  # changed by nobody in place


class Step3VLCLI(LightningCLI):
    """LightningCLI fed with a composed configuration instead of raw files."""

    def __init__(self, command: Command):
        set_parsing_settings(docstring_parse_attribute_docstrings=True)
        hush()
        self.command = command
        self.composed = compose(command.files, command.overrides, command.scale)
        super().__init__(
            Trained,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            save_config_callback=SaveConfig,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={"exit_on_error": False},
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--scale", type=str, default="paper", help="Recorded beside every number of this run.")
        parser.add_argument(
            "--suite", type=dict[str, Benchmark] | None, default=None, help="Held-out benchmarks by name."
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = parse(parser, self.command, self.composed)

    def before_instantiate_classes(self) -> None:
        if self.command.print_config:
            print(dump(self._parser(self.subcommand), self.config[self.subcommand], self.composed), end="")
            raise SystemExit(0)
        config = self.config[self.subcommand]
        trainer = config.trainer
        config.ckpt_path = find_last(config.ckpt_path, Path(trainer.default_root_dir), self.subcommand)
        trainer.precision = trainer.precision or fast_precision(trainer.accelerator)
        for kind in (VisionEncoder, LanguageDecoder, VisionLanguageModel, ValueModel):
            self.parser.add_instantiator(without_memory, kind, subclasses=True)

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except ValueError as error:
            while isinstance(error.__cause__ or error.__context__, ValueError):  # the constructor's own sentence
                error = error.__cause__ or error.__context__  # type: ignore[assignment]
            raise ConfigError(str(error)) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = self._get(self.config_init, "trainer")
        root = config["default_root_dir"]
        if self.subcommand != "fit":
            kwargs["logger"] = False
        elif config["logger"] in (None, True):
            kwargs["logger"] = [
                CSVLogger(root, name="csv", flush_logs_every_n_steps=20),
                TensorBoardLogger(root, name="tb"),
            ]
        progress = config["enable_progress_bar"] is not False and sys.stdout.isatty()
        callbacks = [*(config["callbacks"] or []), RichProgressBar() if progress else ProgressLines()]
        return super().instantiate_trainer(callbacks=callbacks, enable_progress_bar=progress, **kwargs)

    def after_instantiate_classes(self) -> None:
        """The two hand-overs, in plain sight: what the encoder needs from pixels, and who makes tokens."""
        if isinstance(self.model, EncoderStage):
            if self._get(self.config_init, "suite"):
                raise ConfigError("suite: an encoder alone answers no questions; leave it out")
            self.model.connect(self.datamodule)
            return
        vlm, processor = self.model.vlm, self.model.processor
        processor.bind(vlm.image_spec, vlm.projector.grid)
        vlm.bind(processor.image_token_id)
        if processor.vocab_size > vlm.decoder.vocab_size:
            raise ConfigError(
                f"the tokenizer has {processor.vocab_size} tokens, the decoder only {vlm.decoder.vocab_size}"
            )
        if self.datamodule is not None:
            self.datamodule.connect(processor, vlm.flops().sample)
        self.model.suite = self._get(self.config_init, "suite") or {}

    # ---------------------------------------------------------------------------------------------- verbs

    def validate(self, model: Stage, ckpt_path: str | None = None, **kwargs: Any) -> None:
        """Print the losses of data.val_sources."""
        if isinstance(model, EncoderStage):
            raise ConfigError("validate: an encoder alone has no losses on held-out data; step3vl test measures it")
        if not self.config[self.subcommand].data.init_args.get("val_sources"):
            raise ConfigError("nothing to validate on: set data.val_sources and data.val_samples")
        for losses in self.trainer.validate(model, datamodule=self.datamodule, ckpt_path=ckpt_path, verbose=False):
            print("  ".join(f"{name} {value:.4f}" for name, value in losses.items()))

    def test(self, model: Stage | EncoderStage, ckpt_path: str | None = None, **kwargs: Any) -> None:
        """Score the suite on held-out cases, seeing and blind, or an encoder's probes; writes metrics.json."""
        start_s = time.process_time()
        alone = model if isinstance(model, EncoderStage) else None
        loaders = self.suite_loaders() if alone is None else alone.test_loaders(self.datamodule)
        self.trainer.test(model, dataloaders=loaders, ckpt_path=ckpt_path)
        folder = Path(self.trainer.default_root_dir)
        counted: Any = model.vlm if alone is None else alone.vision_encoder
        facts = {
            "command": "step3vl " + " ".join(sys.argv[1:]),
            "scale": self.config[self.subcommand].scale,
            "seed": self.config[self.subcommand].seed_everything,
            "label": self.composed.row.get("label", folder.name),
            "checkpoint": ckpt_path,
            "precision": str(self.trainer.precision),
            "num_parameters": sum(p.numel() for p in counted.parameters()),
            "optimizer": self.config[self.subcommand].model.init_args.optimizer.class_path,
            "evaluation_cpu_s": round(time.process_time() - start_s, 1),
        }
        probes: dict[str, Any] = {}
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Upbringing):
                facts |= callback.facts()
                probes |= callback.scores
        if not self.trainer.is_global_zero:
            return
        if alone is not None:
            own = {f"probe: {name}": score for name, score in probes.items()}
            print_scores(write_scores(folder, alone.scores | own, facts))
        elif isinstance(model, Stage):
            facts |= {"encoder_probes": probes} if probes else {}
            print_scores(write_report(folder, model.suite, model.records, facts))

    def predict(self, model: Stage, ckpt_path: str | None = None, **kwargs: Any) -> None:
        """Answer the suite's cases without scoring blind; writes predictions.jsonl into the run folder."""
        if isinstance(model, EncoderStage):
            raise ConfigError("predict: an encoder alone answers no questions; step3vl test measures it")
        batches = self.trainer.predict(model, dataloaders=self.suite_loaders(), ckpt_path=ckpt_path) or []
        batches = batches if len(model.suite) > 1 else [batches]
        records = [record for loader in batches for batch in loader for record in batch]
        out = Path(self.trainer.default_root_dir) / "predictions.jsonl"
        keep = ("benchmark", "id", "question", "answer", "said", "score", "truncated")
        out.write_text("".join(_json_line({k: v for k, v in asdict(r).items() if k in keep}) for r in records))
        print(f"{len(records)} predictions in {out}")

    def suite_loaders(self) -> list[DataLoader]:
        if not self.model.suite:
            raise ConfigError("suite is empty: name the held-out benchmarks, e.g. --suite=suite/held_out.yaml")
        return [DataLoader(b.cases(), batch_size=64, collate_fn=list) for b in self.model.suite.values()]


def build_processor(file: str, scale: str) -> Processor:
    """The processor of a run, bound to its encoder's image layout; nothing is trained or loaded."""
    with torch.device("meta"):
        composed = compose([file], scale=scale)
        init = composed.config["model"]["init_args"]
        parser = LightningArgumentParser(exit_on_error=False)
        parser.add_argument("--vlm", type=VisionLanguageModel)
        parser.add_argument("--processor", type=Processor)
        built = parser.instantiate_classes(parser.parse_object({"vlm": init["vlm"], "processor": init["processor"]}))
    return built.processor.bind(built.vlm.image_spec, built.vlm.projector.grid)


def find_last(ckpt_path: str | None, run: Path, verb: str | None) -> str | None:
    """What --ckpt_path=last stands for: the run's folder of checkpoints; None for a run that is to begin.

    Which of them is the newest whole one is found out when it is loaded, by all ranks together.
    """
    if ckpt_path != "last":
        return ckpt_path
    if saved_steps(run / FOLDER):
        return str(run / FOLDER)
    if verb != "fit":
        raise ConfigError(
            f"--ckpt_path=last: there is no checkpoint in {run / FOLDER}; train it first: step3vl fit ..."
        )
    return None


def without_memory(kind: type, *args: Any, **kwargs: Any) -> Any:
    """An object whose tensors are on the meta device: `Stage.configure_model` gives them memory, where it is needed."""
    with torch.device("meta"):
        return kind(*args, **kwargs)


class SaveConfig(SaveConfigCallback):
    """Writes the resolved configuration beside the checkpoints: `step3vl fit -c RUN/config.yaml` repeats the run."""

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        if trainer.is_global_zero and stage == "fit":
            folder = Path(trainer.default_root_dir)
            folder.mkdir(parents=True, exist_ok=True)
            self.parser.save(self.config, folder / "config.yaml", skip_none=False, overwrite=True, multifile=False)


# ------------------------------------------------------------------------------------------------ parsing


def parse(parser: LightningArgumentParser, command: Command, composed: Composed) -> Any:
    """Composed data -> typed configuration. Every mistake ends in one sentence that names key, given and accepted."""
    config = dict(composed.config)
    unknown = [key for key in config if key not in TOP_KEYS]
    if unknown:
        raise ConfigError(f"unknown key {unknown[0]!r}; {nearest(unknown[0], TOP_KEYS)}")
    for needed in ("model", "data"):
        if not isinstance(config.get(needed), dict):
            raise ConfigError(f"{needed} is missing: a run needs model, data and trainer")
    config["scale"] = command.scale or config.get("scale") or "paper"  # a resolved tiny run stays a tiny run
    config["trainer"] = dict(config.get("trainer") or {})
    config["trainer"].setdefault("default_root_dir", str(run_folder(command)))
    check_keys(config["trainer"], Trainer, "trainer")
    for key, value in config.items():
        check_classes(value, key)
    config = {k: v for k, v in config.items() if command.verb == "fit" or k != "verbose"}
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # jsonargparse prints usage first; our sentence is enough
            return parser.parse_object({"subcommand": command.verb, command.verb: config})
    except (ArgumentError, SystemExit, ValueError, TypeError) as error:
        hints = {
            "model": Trained,
            "data": LightningDataModule,
            "suite": dict[str, Benchmark] | None,
            "seed_everything": bool | int,
        }
        for key, hint in hints.items():
            if key in config:
                check_types(config[key], hint, key)
        check_arguments(config["trainer"], Trainer, "trainer")
        raise ConfigError(" ".join(str(error).split())[:400]) from None


# ------------------------------------------------------------------------------------------------ printing


def dump(parser: LightningArgumentParser, config: Any, composed: Composed) -> str:
    """The resolved run as YAML that runs again by itself, with the comment beside each number that has one."""
    plain = yaml.safe_load(parser.dump(config, skip_none=False, format="yaml"))
    plain.pop("config", None)
    lines: list[str] = []
    path: list[str] = []
    for line in yaml.safe_dump(plain, sort_keys=False, width=10_000, allow_unicode=True).splitlines():
        match = re.match(r"^( *)(- )?([\w./ -]+):(?: |$)", line)
        if match and not match[2]:
            depth = len(match[1]) // 2
            path = [*path[:depth], match[3]]
            note = composed.notes.get(tuple(path))
            line += f"  # {note}" if note else ""
        lines.append(line)
    return "\n".join(lines) + "\n"


def print_scores(metrics: dict) -> None:
    """Scores of one run as a table: what is seen, what blind guessing gives, what the answer prior gives."""
    from rich.console import Console
    from rich.table import Table

    facts = metrics["provenance"]
    table = Table(title=f"{facts['label']}, {facts['scale']} scale, seed {facts['seed']}")
    for title in ("capability", "score", "95 % interval", "blind", "majority", "cases"):
        table.add_column(title, justify="left" if title == "capability" else "right")
    for name, s in metrics["scores"].items():
        interval = f"{s['low']:.3f}..{s['high']:.3f}"
        table.add_row(
            name, f"{s['score']:.3f}", interval, f"{s['blind']:.3f}", f"{s['majority']:.3f}", str(s["num_cases"])
        )
    Console().print(table)


def _json_line(row: dict) -> str:
    return json.dumps(row) + "\n"

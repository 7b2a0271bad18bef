"""What a file of a synthesis stage says: its pools and their bands, who answers, what is held out (PaCoRe training)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jsonargparse import ArgumentParser

from step3vl.ablation.rows import table_folder
from step3vl.config import Composed, ConfigError, compose
from step3vl.evaluation import Benchmark
from step3vl.pacore.pool_data import PoolSource
from step3vl.types import Sampling

DATA = "step3vl.pacore.pool_data.PoolData"


@dataclass(slots=True, kw_only=True)
class Stage:
    """What a stage's file says about its pools."""

    file: Path
    scale: str
    composed: Composed
    overrides: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, file: Path, scale: str, overrides: Sequence[str] = ()) -> Stage:
        """Raises ConfigError for a file whose data are no pools."""
        composed = compose([file], overrides, scale)
        found = (composed.config.get("data") or {}).get("class_path")
        if found != DATA:
            raise ConfigError(f"{file}: data is {found}; a stage that learns synthesis has data of {DATA}")
        return cls(file=file, scale=scale, composed=composed, overrides=list(overrides))

    @property
    def pools(self) -> Path:
        return Path(self.composed.config["data"]["init_args"]["root"])

    @property
    def sources(self) -> dict[str, PoolSource]:
        return {k: PoolSource(**v) for k, v in self.composed.config["data"]["init_args"]["sources"].items()}

    @property
    def start(self) -> str:
        """The checkpoint whose messages the pools hold, and that the stage starts from."""
        return str(self.composed.config["model"]["init_args"]["init_from"])

    @property
    def template(self) -> str | None:
        return self.composed.config["data"]["init_args"].get("template")

    @property
    def seed(self) -> int:
        return int(self.composed.config.get("seed_everything") or 0)

    @property
    def sampling(self) -> Sampling:
        """Messages are sampled as the stage's own rollouts are."""
        return Sampling(**self.composed.config["model"]["init_args"]["rollout"], seed=self.seed)

    @property
    def batch(self) -> int:
        return int(self.composed.config["model"]["init_args"]["rollouts_in_flight"])

    @property
    def folder(self) -> Path:
        """Of the run."""
        return table_folder(self.file.parent, self.scale) / self.file.stem

    def suite(self) -> dict[str, Benchmark]:
        """The benchmarks that a curve is drawn of: those with the name of a source."""
        cards = {k: v for k, v in (self.composed.config.get("suite") or {}).items() if k in self.sources}
        parser = ArgumentParser(exit_on_error=False)
        parser.add_argument("--suite", type=dict[str, Benchmark])
        return parser.instantiate_classes(parser.parse_object({"suite": cards})).suite if cards else {}

    def held_out(self, source: PoolSource) -> Path:
        """The pool of held-out cases that belongs to a source's pool."""
        return self.pools / f"held-out-{source.pool}"

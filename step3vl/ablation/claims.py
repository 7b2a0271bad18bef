"""What the paper says of a table, put so that runs can agree or contradict: `row.claims` of a table's _base.yaml.

A claim compares two rows in one measure, or one row with itself blind:

    - {text: The loss falls faster with PE-lang, measure: mean_loss, of: pe_lang, against: dinov3, direction: lower}
    - {text: No benchmark gains, measure: all, of: on, against: off, direction: none, margin: 0.02}

A verdict follows from the interval of the difference alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from step3vl.config import ConfigError, nearest

from .intervals import Interval, mean_interval, sign_test
from .runs import RowRuns

Direction = Literal["higher", "lower", "none"]
RUN_MEASURES = ("mean_loss", "final_loss", "steps_to_loss")
BLIND = "blind"


@dataclass(frozen=True, slots=True)
class Claim:
    """`of` less `against` in `measure`: a capability, several, "all", or one of RUN_MEASURES.

    direction "none" says that there is no difference larger than `margin` either way.
    """

    text: str
    of: str
    against: str
    measure: str | tuple[str, ...]
    direction: Direction
    margin: float = 0.0
    source: str = "paper"

    @classmethod
    def read(cls, data: Mapping[str, Any], where: str) -> Claim:
        """Raises ConfigError for a key that is missing, unknown or of the wrong kind."""
        accepted = ("text", "of", "against", "measure", "direction", "margin", "source")
        for key in data:
            if key not in accepted:
                raise ConfigError(f"{where}: row.claims has the key {key!r}; {nearest(key, accepted)}")
        for key in accepted[:5]:
            if key not in data:
                raise ConfigError(f"{where}: a claim of row.claims lacks {key!r}; it needs {', '.join(accepted[:5])}")
        if data["direction"] not in get_args(Direction):
            raise ConfigError(f"{where}: a claim's direction is {data['direction']!r}; accepted: higher, lower, none")
        measure = data["measure"]
        own = {**data, "measure": measure if isinstance(measure, str) else tuple(measure)}
        return cls(**own)


@dataclass(frozen=True, slots=True)
class Verdict:
    """A claim with what the runs say. `gaps` are the differences of the single seeds."""

    claim: Claim
    interval: Interval | None
    gaps: tuple[float, ...]
    censored: int = 0

    @property
    def word(self) -> str:
        """agrees, contradicts, undecided, or not run."""
        if self.interval is None:
            return "not run"
        low, high, margin = self.interval.low, self.interval.high, self.claim.margin
        if self.claim.direction == "none":
            within = -margin <= low and high <= margin
            return "agrees" if within else "contradicts" if low > margin or high < -margin else "undecided"
        sign = 1 if self.claim.direction == "higher" else -1
        if low * sign > 0 and high * sign > 0:
            return "agrees"
        return "contradicts" if low * sign < 0 and high * sign < 0 else "undecided"

    @property
    def signs(self) -> str:
        """How many seeds point where the claim does, and the sign test's p."""
        if self.claim.direction == "none" or not self.gaps:
            return "-"
        agreeing, p = sign_test(self.gaps, 1 if self.claim.direction == "higher" else -1)
        return f"{agreeing} of {len(self.gaps)} (p = {p:.3g})"


def judge(claim: Claim, runs: Mapping[str, RowRuns], level: float) -> Verdict:
    """Compare the two rows; a row without a finished run gives no verdict. Raises ConfigError for unknown names."""
    for name in (claim.of, claim.against):
        if name not in runs and name != BLIND:
            raise ConfigError(f"row.claims: no row {name!r}; {nearest(name, list(runs))}")
    mine = runs[claim.of]
    theirs = mine if claim.against == BLIND else runs[claim.against]
    if not mine.seeds or not set(mine.seeds) & set(theirs.seeds):
        return Verdict(claim, None, ())
    if claim.measure in RUN_MEASURES:
        a, b, censored = _numbers(str(claim.measure), mine, theirs, level)
        gaps = (a - b)[:, None]  # [S,1]
        return Verdict(claim, mean_interval([gaps]), tuple(gaps[:, 0]), censored)
    names = mine.capabilities if claim.measure == "all" else _names(claim, mine)
    blocks = []
    for name in names:
        if claim.against == BLIND:
            blind = mine.blind(name)
            if blind is not None:
                blocks.append(mine.scores(name) - blind)
        else:
            a, b = mine.paired(theirs, name)
            blocks.append(a - b)
    gaps_by_seed = np.mean([block.mean(axis=1) for block in blocks], axis=0)  # [S]
    return Verdict(claim, mean_interval(blocks), tuple(gaps_by_seed))


def _names(claim: Claim, runs: RowRuns) -> tuple[str, ...]:
    names = (claim.measure,) if isinstance(claim.measure, str) else claim.measure
    accepted = ["all", *RUN_MEASURES, *runs.capabilities]
    for name in names:
        if name not in runs.capabilities:
            raise ConfigError(f"row.claims: no measure {name!r}; {nearest(name, accepted, len(accepted))}")
    return names


def _numbers(measure: str, mine: RowRuns, theirs: RowRuns, level: float) -> tuple[np.ndarray, np.ndarray, int]:
    seeds = [seed for seed in mine.seeds if seed in theirs.seeds]
    found, censored = [], 0
    for runs in (mine, theirs):
        values = runs.steps_to(level) if measure == "steps_to_loss" else getattr(runs, measure)()
        values = np.array([values[runs.seeds.index(seed)] for seed in seeds])
        ends = np.array([runs.curves[runs.seeds.index(seed)][0][-1] + 1 for seed in seeds])
        censored += int(np.isnan(values).sum())
        found.append(np.where(np.isnan(values), ends, values))
    return found[0], found[1], censored

"""One picture of how reinforcement learning went: reward, length, entropy, KL, clipping, critic, truncation, engine.

What each curve says is written in `step3vl.stages.RLStage`.
"""

from __future__ import annotations

import csv
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

PANELS = (
    ("reward", "reward of judged responses", ("reward",)),
    ("length", "tokens of a response", ("length", "length_max")),
    ("entropy", "nats a token", ("entropy",)),
    ("distance moved", "KL (nats a token)", ("approx_kl", "kl")),
    ("clipping", "share of tokens", ("clip_fraction", "clip_low", "clip_high")),
    ("critic", "explained variance", ("explained_variance",)),
    ("losses", "loss", ("loss", "value_loss")),
    ("gradients", "norm before clipping", ("grad_norm", "critic_grad_norm")),
    ("left out", "share", ("truncated", "unjudged", "failed", "dropped/*")),
    ("engine", "|log pi - log pi of the generator|", ("engine_mismatch", "engine_mismatch_max")),
    ("rewards", "mean of one reward", ("reward/*",)),
    ("time", "seconds an iteration", ("seconds/*",)),
)
"""(title, axis, columns); a star stands for all names with that beginning."""


class Dynamics(Callback):
    """Draws `dynamics.png` in the run's folder when training ends, also after an error or a stop."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._draw(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._draw(trainer)

    def _draw(self, trainer: Trainer) -> None:
        if not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            logger.save()
        curves = read_curves(Path(trainer.default_root_dir))
        if curves.get("reward"):
            out = Path(trainer.default_root_dir) / "dynamics.png"
            plot_dynamics(out, f"{trainer.default_root_dir}", curves)
            print(f"wrote {out}")


def read_curves(run: Path) -> dict[str, list[tuple[float, float]]]:
    """(iteration, value) of every logged name of a run, over its restarts; an iteration logged twice keeps its last."""
    found: dict[str, dict[float, float]] = {}
    files = sorted(run.glob("csv/version_*/metrics.csv"), key=lambda path: int(path.parent.name.split("_")[1]))
    for file in files:
        with file.open() as stream:
            for line in csv.DictReader(stream):
                if not line.get("iteration"):
                    continue
                for name, value in line.items():
                    if value:
                        found.setdefault(name, {})[float(line["iteration"])] = float(value)
    return {name: sorted(points.items()) for name, points in found.items()}


def plot_dynamics(out: Path, title: str, curves: dict[str, list[tuple[float, float]]]) -> None:
    """The panels that have a curve, four a row: thin as logged, thick as the mean of the last ten."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [(head, axis, _names(wanted, curves)) for head, axis, wanted in PANELS]
    panels = [panel for panel in panels if panel[2]]
    num_rows = -(-len(panels) // 4)
    figure, axes = plt.subplots(num_rows, 4, figsize=(18, 3.6 * num_rows), layout="constrained", squeeze=False)
    figure.suptitle(title, fontsize=10)
    for place, (head, axis, names) in zip(axes.flat, panels):
        for i, name in enumerate(names):
            x, y = zip(*curves[name])
            place.plot(x, y, color=f"C{i % 10}", alpha=0.3, linewidth=0.8)
            place.plot(x, _running(y), color=f"C{i % 10}", linewidth=1.8, label=name)
        place.set(title=head, xlabel="iteration", ylabel=axis)
        place.legend(fontsize=7)
    for place in list(axes.flat)[len(panels) :]:
        place.axis("off")
    figure.savefig(out, dpi=100)
    plt.close(figure)


def _names(wanted: tuple[str, ...], curves: dict[str, list[tuple[float, float]]]) -> list[str]:
    found: list[str] = []
    for name in wanted:
        if name.endswith("*"):
            found += sorted(n for n in curves if n.startswith(name[:-1]) and any(y for _, y in curves[n]))
        elif name in curves:
            found.append(name)
    return found


def _running(values: tuple[float, ...], width: int = 10) -> list[float]:
    return [sum(part) / len(part) for part in (values[max(0, k - width + 1) : k + 1] for k in range(len(values)))]

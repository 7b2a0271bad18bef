"""The scaling curve as a picture: accuracy against rollouts, and against the tokens they cost."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .scaling import Scaling


def plot_scaling(out: str | Path, curve: Scaling, title: str, others: Mapping[str, Scaling] | None = None) -> Path:
    """Write a PNG; returns its path.

    Args:
        out: the file.
        curve: what is drawn in full.
        title: stands above.
        others: further curves over the same rollouts, by label; of these, PaCoRe alone is drawn.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), sharey=True, layout="constrained")
    figure.suptitle(f"{title}: {curve.benchmark}, {curve.num_cases} cases", fontsize=10)
    points = curve.points
    widths = [point.num_rollouts for point in points]
    lines = {
        "PaCoRe@k": ([p.pacore for p in points], "C3", "o-"),
        "maj@k": ([p.voted for p in points], "C0", "s-"),
        "cov@k (oracle)": ([p.covered for p in points], "C7", "^:"),
        "SeRe (mean of k)": ([p.mean for p in points], "C2", "d--"),
    }
    for label, (values, colour, style) in lines.items():
        left.plot(widths, values, style, color=colour, label=label)
    left.fill_between(
        widths, [p.pacore_low for p in points], [p.pacore_high for p in points], color="C3", alpha=0.15, linewidth=0
    )
    for number, (label, other) in enumerate((others or {}).items()):
        at = [p.num_rollouts for p in other.points]
        left.plot(at, [p.pacore for p in other.points], "o:", color=f"C{4 + number}", label=f"PaCoRe@k, {label}")
    left.set_xscale("log", base=2)
    left.set_xticks(widths, [str(width) for width in widths])
    left.set(xlabel="rollouts a question", ylabel="accuracy", ylim=(0, 1), title="Band: 95 % over cases, PaCoRe")
    left.legend(fontsize=9)
    last = points[-1]
    word = "is above" if last.voted > last.pacore else "is not above"
    figure.supxlabel(
        f"At {last.num_rollouts} rollouts: PaCoRe less SeRe {last.gain:+.3f} "
        f"({last.gain_low:+.3f}..{last.gain_high:+.3f}); "
        f"maj@{last.num_rollouts} {word} PaCoRe ({last.voted:.3f}, {last.pacore:.3f})",
        fontsize=9,
    )
    if all(point.num_tokens > 0 for point in points):
        right.plot([p.num_tokens for p in points], [p.pacore for p in points], "o-", color="C3", label="PaCoRe@k")
        right.plot([p.num_rollout_tokens for p in points], [p.voted for p in points], "s-", color="C0", label="maj@k")
        right.set_xscale("log")
        right.minorticks_off()
        right.set_xticks([p.num_tokens for p in points], [f"{p.num_tokens:,.0f}" for p in points], fontsize=8)
        right.legend(fontsize=9)
    right.set(xlabel="tokens generated a question", title="The same, by what it costs")
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    plt.close(figure)
    return out

"""A plan as tables for people."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from .memory import RECOMPUTED
from .plan import GPU_BYTES, USABLE, Plan

UNITS = ("", "k", "M", "G", "T", "P", "E", "Z", "Y")


def print_plan(plan: Plan, title: str) -> None:
    """Parameters, memory a GPU, speed and checkpoints; then what was assumed, a sentence a line."""
    console = Console()
    console.print(title, highlight=False)
    for table in (parts_table(plan), memory_table(plan), run_table(plan)):
        console.print(table)
    for sentence in plan.assumed:
        console.print(f"- {sentence}", highlight=False, markup=False)


def parts_table(plan: Plan) -> Table:
    table = _table("Parameters", "part", "parameters")
    for name, num in plan.parameters.items():
        table.add_row(name, f"{num:,}")
    table.add_section()
    table.add_row("all", f"{sum(plan.parameters.values()):,}")
    table.add_row("trained", f"{plan.trained:,}")
    return table


def memory_table(plan: Plan) -> Table:
    found, capacity = plan.memory, GPU_BYTES[plan.gpu]
    columns = [f"{how} (this run)" if how == plan.recompute else how for how in RECOMPUTED]
    table = _table("Memory of a GPU, by model.recompute", "what", *columns)
    rows = [
        ("parameters", found.parameters),
        ("gradients", found.gradients),
        ("optimizer state", found.optimizer),
        ("gathered blocks", found.gathered),
        ("embedding, output layer, projector; whole", found.root),
        ("logits of a chunk", found.logits),
    ]
    for name, value in rows:
        table.add_row(name, *[scaled(value, "B")] * len(columns))
    table.add_row("activations", *(scaled(value, "B") for value in found.activations.values()))
    table.add_row(
        "in the optimizer's step, in place of these four", *[scaled(found.optimizer_step, "B")] * len(columns)
    )
    table.add_section()
    table.add_row("peak", *(scaled(found.peak(how), "B") for how in RECOMPUTED))
    fits = ["fits" if plan.fits(how) else "does not fit" for how in RECOMPUTED]
    table.add_row(f"{USABLE:.0%} of {plan.gpu}'s {scaled(capacity, 'B')}", *fits)
    largest = [f"{plan.largest[how]} of {plan.work.units_per_micro_batch}" for how in RECOMPUTED]
    table.add_row(f"largest micro-batch that fits ({plan.unit})", *largest)
    return table


def run_table(plan: Plan) -> Table:
    work, facts = plan.work, plan.as_dict()
    step, whole = facts["step"], facts["run"]
    table = _table(f"{plan.sharding.num_ranks} x {plan.gpu} at MFU {plan.mfu:g}", "what", "value")
    sample = work.sample
    views = f"{sample.num_global_views:.2f} global views, {sample.num_crops:.2f} crops"
    table.add_row("a sample", f"{sample.num_tokens:,.0f} tokens, {views}")
    table.add_row("a step", f"{step['samples']:,.0f} samples, {step['tokens']:,.0f} tokens, {step['views']:,.0f} views")
    table.add_row("FLOPs of a token, of a step", f"{scaled(step['flops_per_token'])}, {scaled(step['flops'])}")
    table.add_row("time of a step", f"{step['seconds']:.3g} s")
    table.add_row("tokens/s, images/s (views)", f"{whole['tokens_per_second']:,.0f}, {whole['images_per_second']:,.0f}")
    table.add_row("the run", f"{plan.max_steps:,} steps, {scaled(whole['tokens'])} tokens")
    table.add_row("days, GPU hours", f"{plan.days:,.2f}, {whole['gpu_hours']:,.0f}")
    table.add_section()
    table.add_row("weights exported in bf16", scaled(plan.weights, "B"))
    table.add_row("a checkpoint (full state)", scaled(plan.checkpoint, "B"))
    return table


def scaled(value: float, unit: str = "") -> str:
    """Three digits and a decimal prefix: 10171750144 -> 10.2 G."""
    power = 0
    while abs(value) >= 999.5 and power < len(UNITS) - 1:
        value, power = value / 1000, power + 1
    return f"{value:.3g} {UNITS[power]}{unit}".strip()


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    return table

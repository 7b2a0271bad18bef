"""`step3vl pacore`: coordinated answers on the terminal, their traces checked, their worth measured."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from step3vl import pools, synthesis
from step3vl.answering import add_model, add_preset, default_name, open_answering, read_preset
from step3vl.ask import question_of
from step3vl.config import ConfigError
from step3vl.data.decode import open_image
from step3vl.evaluate import add_suite, read_suite
from step3vl.pacore import SynthesisTemplate, Trace, read_traces, replay
from step3vl.pacore.agreement import agreement
from step3vl.pacore.plot import plot_scaling
from step3vl.pacore.scaling import Scaling, scaling

USAGE = """usage: step3vl pacore VERB ...

  ask CKPT QUESTION [--image FILE ...]  rounds as a table, and the answer (--rounds "[16]", --trace FILE)
  replay TRACE                          whether prompts and messages follow from the answers, to the byte
  measure CKPT --suite NAME             accuracy against rollouts: one answer, votes, coordination; JSON and PNG
  pool CKPT --out FILE                  24 scored messages a problem of shards or benchmarks; goes on where it ended
  band POOL OUT                         problems of a pool whose messages are right now and then
  train FILE [--scale S]                a stage that learns synthesis: pools, fit, test, curve; goes on where it ended

CKPT may be a server's URL, with --model NAME.
"""


def run(args: Sequence[str]) -> int:
    """The verb. Mistakes are ValueErrors with one sentence."""
    verbs: dict[str, Callable[[Sequence[str]], int]] = {
        "ask": _ask,
        "replay": _replay,
        "measure": _measure,
        "pool": pools.run_pool,
        "band": pools.run_band,
        "train": synthesis.run,
    }
    if not args or args[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if args[0] not in verbs:
        raise ConfigError(f"pacore has no verb {args[0]!r}; accepted are {', '.join(verbs)}")
    return verbs[args[0]](args[1:])


# ------------------------------------------------------------------------------------------------ ask


def _ask(args: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="step3vl pacore ask")
    add_model(parser)
    parser.add_argument("question", help="images stand before it, or where it has <image>")
    parser.add_argument("--image", type=Path, action="append", default=[], help="an image file (repeatable)")
    parser.add_argument("--trace", type=Path, default=None, help="JSON-lines file to add everything to")
    add_preset(parser, "pacore")
    parser.set_defaults(mode="pacore")
    options = parser.parse_args(args)
    prompt = question_of(options.question, [open_image(path, str(path)) for path in options.image])
    preset = read_preset(options)
    console = Console()
    answering = open_answering(options.checkpoint, options.model, options.batch)
    with Live(console=console, auto_refresh=False, transient=not console.is_terminal) as live:

        def show(place: int, trace: Trace) -> None:
            live.update(rounds_table(trace), refresh=True)

        pacore = answering.coordinated(preset, trace=options.trace, told=show)
        with answering.numbers:
            (((final, trace),),) = pacore.run([prompt], preset.sampling)
    if not console.is_terminal:
        console.print(rounds_table(trace))
    if final.error is not None:
        raise ConfigError(f"the last answer failed: {final.error}")
    print(final.text)
    if final.truncated:
        print(f"(the answer reached the limit of {preset.sampling.max_new_tokens} tokens)")
    return 0


def rounds_table(trace: Trace) -> Table:
    """One row a round: what came back, how many agree, and in what."""
    table = Table(title=f"{len(trace.rounds)} of {len(trace.widths)} rounds, {trace.num_tokens:,} tokens generated")
    names = ("round", "answers", "failed", "cut", "messages in", "dropped", "prompt", "tokens", "s", "agree", "in")
    for name in names:
        table.add_column(name, justify="left" if name == "in" else "right")
    for number, found in enumerate(trace.rounds, 1):
        came = [answer for answer in found.answers if answer.error is None]
        claim, num = agreement([answer.text for answer in came])
        prompt = "" if found.num_prompt_tokens is None else f"{found.num_prompt_tokens:,}"
        table.add_row(
            str(number),
            str(len(came)),
            str(found.num_failed),
            str(sum(answer.truncated for answer in came)),
            str(len(found.messages)),
            str(len(found.dropped)),
            prompt if trace.counted_exactly else f"~{prompt}",
            f"{found.num_tokens:,}",
            f"{found.seconds:.1f}",
            f"{num} of {len(came)}",
            Text(repr(claim)[1:-1]),
        )
    return table


# ------------------------------------------------------------------------------------------------ replay


def _replay(args: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="step3vl pacore replay")
    parser.add_argument("trace", type=Path)
    parser.add_argument("--template", type=Path, default=None, help="the synthesis template, where it was another one")
    options = parser.parse_args(args)
    template = SynthesisTemplate(options.template)
    num_same = num_torn = 0
    wrong: list[str] = []
    for number, trace in enumerate(read_traces(options.trace), 1):
        if trace is None:
            num_torn += 1
        elif differs := replay(trace, template):
            wrong.append(f"question {number} ({trace.id[:16]}): {'; '.join(differs)}")
        else:
            num_same += 1
    for sentence in wrong[:20]:
        print(sentence)
    print(
        f"{num_same} of {num_same + len(wrong)} questions give the same messages and prompts to the byte, with "
        f"template {template.hash}; {num_torn} torn lines"
    )
    return 1 if wrong or not num_same else 0


# ------------------------------------------------------------------------------------------------ measure


def _measure(args: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="step3vl pacore measure")
    add_model(parser)
    add_suite(parser, required=True)
    parser.add_argument("--rollouts", default="1,2,4,8,16", help="numbers of rollouts (default: 1,2,4,8,16)")
    parser.add_argument("--out", type=Path, default=None, help="folder of results; default: evals/NAME-scaling")
    add_preset(parser, "pacore")
    parser.set_defaults(mode="pacore")
    options = parser.parse_args(args)
    if options.rounds is not None:
        raise ConfigError("measure has one round, of each of --rollouts; --rounds is for ask, eval and serve")
    widths = [int(word) for word in options.rollouts.split(",") if word.strip().isdecimal()]
    if len(widths) != len(options.rollouts.split(",")):
        raise ConfigError(f"--rollouts is {options.rollouts!r}; accepted are counts such as 1,2,4,8,16")
    suite = read_suite(options.suite, options.data_root, options.only, options.scale)
    preset = read_preset(options)
    answering = open_answering(options.checkpoint, options.model, options.batch)
    name = default_name(options.checkpoint, options.model)
    out = options.out or Path("evals", f"{name}-scaling")
    out.mkdir(parents=True, exist_ok=True)
    console = Console()
    found: dict[str, Scaling] = {}
    cases_per_call = max(1, 4 * options.batch // max(widths))
    for key, benchmark in suite.items():
        with answering.numbers:
            found[key] = scaling(
                key,
                benchmark,
                answering.generator,
                preset.sampling,
                widths,
                options.limit,
                cases_per_call,
                lambda num, key=key: console.print(f"{key}: {num} cases", highlight=False),  # type: ignore[misc]
                max_context_tokens=preset.max_context_tokens,
                counter=answering.counter,
                template=preset.template,
                trace=out / "traces" / f"{key}.jsonl",
            )
        console.print(scaling_table(found[key]))
        plot_scaling(out / f"{key}.png", found[key], name)
    facts = {"command": "step3vl pacore measure " + " ".join(args), "sampling": asdict(preset.sampling), "name": name}
    curves = {key: asdict(curve) for key, curve in found.items()}
    (out / "scaling.json").write_text(json.dumps({"curves": curves, "provenance": facts}, indent=2) + "\n")
    print(f"wrote {out / 'scaling.json'} and a picture of each benchmark")
    return 0


def scaling_table(curve: Scaling) -> Table:
    """One row a number of rollouts."""
    table = Table(title=f"{curve.benchmark}, {curve.num_cases} cases")
    for name in (
        "rollouts",
        "SeRe",
        "maj@k",
        "cov@k",
        "PaCoRe@k",
        "95 %",
        "less maj@k",
        "p",
        "emergent",
        "tokens",
        "s",
    ):
        table.add_column(name, justify="right")
    for p in curve.points:
        table.add_row(
            str(p.num_rollouts),
            *(f"{value:.3f}" for value in (p.mean, p.voted, p.covered, p.pacore)),
            f"{p.pacore_low:.3f}..{p.pacore_high:.3f}",
            f"{p.pacore_less_voted:+.3f}",
            f"{p.p_value:.3f}",
            "" if p.emergent is None else f"{p.emergent:.3f}",
            f"{p.num_tokens:,.0f}",
            f"{p.seconds:.1f}",
        )
    return table

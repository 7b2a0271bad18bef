"""`step3vl serve`: a model, and its coordinated form, behind an OpenAI-compatible server."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from step3vl.answering import (
    Preset,
    add_model,
    add_preset,
    default_name,
    is_server,
    open_answering,
    published_context,
    read_preset,
)
from step3vl.config import ConfigError
from step3vl.pacore import parse_rounds
from step3vl.serving import Backend, Batcher, ChatServer, Coordinated, Limits, Plain, Weights

UPSTREAM_WORKERS = 64
"""Questions at once, where the model is elsewhere; each asks its rollouts at once."""


def run(args: Sequence[str]) -> int:
    """The verb; returns at Ctrl-C or SIGTERM. Mistakes are ValueErrors with one sentence."""
    options = _parser().parse_args(args)
    source = options.url or options.checkpoint
    if (options.url is None) == (options.checkpoint is None):
        raise ConfigError("give a checkpoint's folder, or --url URL --model NAME of a server that answers")
    preset = read_preset(argparse.Namespace(**vars(options) | {"max_context_tokens": None, "template": None}))
    max_context_tokens = options.max_context_tokens or published_context(options.scale)
    rounds = [parse_rounds(text) for text in options.pacore] or ([preset.rounds] if preset.rounds else [])
    api_key = _api_key(options.api_key_env)
    if options.weights_from is not None and is_server(source):
        raise ConfigError("--weights-from needs a checkpoint's folder; another server's weights are its own affair")
    answering = open_answering(source, options.model, options.batch)
    name = options.name or default_name(source, options.model)
    backends: dict[str, Backend] = {name: Plain(answering.generator, answering.counter, answering.numbers)}
    for widths in rounds:
        chosen = Preset(
            name=name,
            sampling=preset.sampling,
            rounds=widths,
            max_context_tokens=max_context_tokens,
            template=options.template,
        )
        pacore = answering.coordinated(chosen, trace=options.trace)
        backends[name + chosen.label] = Coordinated(pacore, answering.numbers)
    upstream = is_server(source)
    batcher = Batcher(
        backends,
        1 if upstream else options.batch,
        UPSTREAM_WORKERS if upstream else 1,
        max_waiting=options.max_waiting,
        seeds_alone=options.exact_seeds,
    )
    weights = None if options.weights_from is None else _weights(answering.generator, source, options.weights_from)
    limits = Limits(max_body_bytes=options.max_body_mib * 2**20)
    try:
        server = ChatServer(
            (options.host, options.port),
            batcher,
            preset.sampling,
            limits,
            api_key,
            options.split_thoughts,
            log=not options.quiet,
            weights=weights,
        )
    except OSError as error:
        raise ConfigError(f"{options.host}:{options.port} cannot be served: {error.strerror or error}") from None
    return _serve(server)


def _serve(server: ChatServer) -> int:
    def end(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    host, port = server.server_address[:2]
    print(f"serving {', '.join(server.batcher.backends)} at http://{host!s}:{port}/v1", flush=True)
    try:
        server.serve_forever(poll_interval=0.1)
    except KeyboardInterrupt:
        print("ending: requests in flight are answered with 503", file=sys.stderr, flush=True)
    finally:
        signal.signal(signal.SIGTERM, before)
        ended = server.stop()
    counts = ", ".join(f"{num} {what}" for what, num in server.counts.items())
    print(f"ended; requests: {counts}", flush=True)
    if not ended:  # the model is in mid-answer, which nobody waits for
        sys.stderr.flush()
        os._exit(0)
    return 0


def _api_key(name: str | None) -> str:
    if name is None:
        return ""
    if not os.environ.get(name):
        raise ConfigError(f"--api-key-env is {name}, but that environment variable is not set")
    return os.environ[name]


def _weights(generator: Any, source: str, folder: str) -> Weights:
    if not Path(folder).is_dir():
        raise ConfigError(f"--weights-from is {folder}, which is no folder")
    return Weights(generator.vlm, Path(source).resolve(), folder)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="step3vl serve")
    add_model(parser, optional=True)
    parser.add_argument("--url", default=None, help="instead of a checkpoint: a server that answers, with --model")
    parser.add_argument(
        "--pacore", action="append", default=[], metavar="ROUNDS", help='also offer NAME-pacore-16: "[16]" (repeatable)'
    )
    parser.add_argument("--name", default=None, help="of the model; default: the folder's, or --model")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: this machine alone)")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one (default: 8000)")
    parser.add_argument("--api-key-env", default=None, help="environment variable with the key that clients must send")
    parser.add_argument("--max-body-mib", type=int, default=64, help="longest request, images included (default: 64)")
    parser.add_argument("--max-waiting", type=int, default=1024, help="requests in the queue (default: 1024)")
    parser.add_argument("--split-thoughts", action="store_true", help="thoughts into reasoning_content")
    parser.add_argument(
        "--exact-seeds",
        action="store_true",
        help="answer requests with a seed one by one, so that they can be repeated",
    )
    parser.add_argument(
        "--weights-from",
        default=None,
        metavar="FOLDER",
        help="clients may load weights from folders in it (POST /update_weights_from_disk); default: they may not",
    )
    parser.add_argument("--trace", default=None, help="JSON-lines file of all coordinated answers")
    parser.add_argument("--quiet", action="store_true", help="no line a request")
    add_preset(parser, "sere", with_rounds=False)
    return parser

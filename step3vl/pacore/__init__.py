"""PaCoRe: parallel coordinated reasoning over any generator, its traces, its measures, and pools to train it from."""

from .budget import Counter, estimated, exact
from .generator import PaCoReGenerator, parse_rounds
from .messages import compact, passed_on
from .template import SynthesisTemplate
from .trace import Trace, TraceFile, read_traces, replay

__all__ = [
    "Counter",
    "PaCoReGenerator",
    "SynthesisTemplate",
    "Trace",
    "TraceFile",
    "compact",
    "estimated",
    "exact",
    "parse_rounds",
    "passed_on",
    "read_traces",
    "replay",
]

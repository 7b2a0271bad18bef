"""The order in which a mixture is drawn: by shares of samples, or by shares of tokens.

Both are functions of the seed alone, go on for ever, and have a state that does not depend on ranks or workers.
"""

from __future__ import annotations

from typing import Any, Protocol

from step3vl.data.mixture import Draw, Mixture


def draws_of(mixture: Mixture) -> Draws:
    """The order of a mixture from its beginning."""
    return SampleDraws(mixture) if mixture.unit == "samples" else TokenDraws(mixture)


class Draws(Protocol):
    """An endless order of samples, with a state that does not depend on ranks."""

    def __next__(self) -> Draw: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class SampleDraws:
    """Weights as shares of samples; the state is one integer."""

    def __init__(self, mixture: Mixture):
        self.mixture, self.position = mixture, 0

    def __next__(self) -> Draw:
        self.position += 1
        return self.mixture.sample_draw(self.position - 1)

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = int(state["position"])


class TokenDraws:
    """Weights as shares of tokens: the source furthest behind its share comes next. Unusable samples count nothing.

    The state is two integers a source. After any number of draws a source's tokens differ from its share of the whole
    by less than the longest sample times the number of sources.
    """

    def __init__(self, mixture: Mixture):
        if not mixture.is_measured:
            raise RuntimeError("Mixture.measure(processor, seq_len) must be called before tokens can be weighed")
        self.mixture = mixture
        self.shares = list(mixture.shares().items())
        self.drawn = dict.fromkeys(mixture.sources, 0)
        self.tokens = dict.fromkeys(mixture.sources, 0)

    def __next__(self) -> Draw:
        tokens = self.tokens
        name = min(self.shares, key=lambda pair: tokens[pair[0]] / pair[1])[0]
        draw = (name, self.drawn[name])
        self.drawn[name] += 1
        num_tokens = self.mixture.size(draw).num_tokens
        tokens[name] += num_tokens if 0 < num_tokens <= self.mixture.seq_len else 0
        return draw

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": dict(self.drawn), "tokens": dict(self.tokens)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if set(state["drawn"]) != set(self.drawn):
            raise ValueError(
                f"the run to resume drew from {', '.join(state['drawn'])}; this mixture has {', '.join(self.drawn)}"
            )
        self.drawn = {name: int(n) for name, n in state["drawn"].items()}
        self.tokens = {name: int(n) for name, n in state["tokens"].items()}

"""How sure the model was of what it generated: one number a branch, larger is surer.

Each signal reads what was noted at every generated token: the probability of the likeliest token (`top1`), and its
self-certainty, the divergence of the uniform distribution over the V tokens from the model's: -log V - mean log p, in
nats. Thresholds belong to one signal, since their scales differ.

Source: mean_top1: Sekar 2026, arXiv 2606.09937. tail and lowest_group: Fu et al. 2025, arXiv 2508.15260 (DeepConf), on
top1 instead of the mean over the k likeliest tokens. self_certainty: Kang et al. 2025, arXiv 2502.18581.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

TAIL = 16
"""Tokens at the end that `tail` looks at; the published 2,048 are of traces a hundred times as long as ours."""

GROUP = 16
"""Tokens of a group of `lowest_group`."""


@dataclass(slots=True)
class TokenSignals:
    """What was noted, one entry a generated token."""

    top1: list[float] = field(default_factory=list)
    self_certainty: list[float] = field(default_factory=list)

    def __add__(self, other: "TokenSignals") -> "TokenSignals":
        return TokenSignals(self.top1 + other.top1, self.self_certainty + other.self_certainty)

    def first(self, num_tokens: int) -> "TokenSignals":
        """Those of the first tokens."""
        return TokenSignals(self.top1[:num_tokens], self.self_certainty[:num_tokens])


def mean_top1(tokens: TokenSignals) -> float:
    """Mean over all tokens."""
    return _mean(tokens.top1)


def tail(tokens: TokenSignals) -> float:
    """Mean over the last `TAIL` tokens: where the answer is."""
    return _mean(tokens.top1[-TAIL:])


def lowest_group(tokens: TokenSignals) -> float:
    """The least mean over `GROUP` consecutive tokens: the weakest step of the argument."""
    values = tokens.top1
    if len(values) <= GROUP:
        return _mean(values)
    total = lowest = sum(values[:GROUP])
    for old, new in zip(values, values[GROUP:], strict=False):
        total += new - old
        lowest = min(lowest, total)
    return lowest / GROUP


def self_certainty(tokens: TokenSignals) -> float:
    """Mean over all tokens, nats."""
    return _mean(tokens.self_certainty)


SIGNALS: dict[str, Callable[[TokenSignals], float]] = {
    "mean_top1": mean_top1,
    "tail": tail,
    "lowest_group": lowest_group,
    "self_certainty": self_certainty,
}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan

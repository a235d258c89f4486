"""What the gates look at, written down for one problem.

Evidence comes from a solve without gates: every branch decoded to its end and asked about, the margin of YES over NO
noted after every layer. From it any thresholds can be tried without the model, see `minirksc.calibrate.replay`.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from minirksc.engine.signals import TokenSignals


@dataclass(frozen=True)
class BranchEvidence:
    """One branch of a solve without gates.

    Attributes:
        token_ids: tokens generated.
        text: text of all of them.
        ends: number of characters of `text` that are final after each token.
        num_hidden: number of characters at the end of `text` that are a stop string.
        finish_reason: "stop" or "length".
        signals: signals of how sure the model was of each token.
        probability: probability of YES after all layers.
        margins: logit of YES minus that of NO after each layer but the last; [] where the choices have several tokens
            each.
    """

    token_ids: list[int]
    text: str
    ends: list[int]
    num_hidden: int
    finish_reason: str
    signals: TokenSignals
    probability: float
    margins: list[float]

    def text_after(self, num_tokens: int) -> str:
        """What it had said after so many tokens; the answer where these are all."""
        if num_tokens >= len(self.token_ids):
            return self.text[: len(self.text) - self.num_hidden]
        return self.text[: self.ends[num_tokens - 1]] if num_tokens else ""


@dataclass(frozen=True)
class Evidence:
    """One problem.

    Attributes:
        branches: branches that did not fail, in order.
        num_layers: number of the model's layers.
        num_question_tokens: tokens that were computed to ask about one branch, on average.
        reference: right answer as text; None: unknown.
    """

    branches: list[BranchEvidence]
    num_layers: int
    num_question_tokens: float
    reference: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain data that JSON can hold: a margin that is not finite becomes None."""
        values = asdict(self)
        for branch in values["branches"]:
            branch["margins"] = [margin if math.isfinite(margin) else None for margin in branch["margins"]]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Evidence":
        """The opposite of `to_dict`.

        Raises:
            KeyError, TypeError, ValueError: The values are no evidence.
        """
        branches = []
        for branch in values["branches"]:
            signals = TokenSignals(**branch["signals"])
            margins = [math.nan if margin is None else margin for margin in branch["margins"]]
            branches.append(BranchEvidence(**{**branch, "signals": signals, "margins": margins}))
        evidence = cls(**{**values, "branches": branches})
        evidence.check()
        return evidence

    def check(self) -> None:
        """Holds the parts against each other.

        Raises:
            TypeError, ValueError: One is of another kind, or does not fit.
        """
        has_sizes = bool(self.branches) and self.num_layers >= 1 and 0 <= self.num_question_tokens < math.inf
        _require(has_sizes, f"{len(self.branches)} branches, num_layers {self.num_layers}")
        _require(isinstance(self.reference, str | None), "the reference is no text")
        for branch in self.branches:
            tokens, text, ends = branch.token_ids, branch.text, branch.ends
            _require(isinstance(text, str) and isinstance(branch.finish_reason, str), "no text or finish_reason")
            signals = [branch.signals.top1, branch.signals.self_certainty]
            counts = [len(ends), *map(len, signals)]
            _require(counts == [len(tokens)] * 3, "not one signal and end a token")
            _require([*ends, len(text)] == sorted([0, *ends, len(text)])[1:], "ends that are not in the text")
            whole = [*tokens, *ends, branch.num_hidden, self.num_layers]
            _require(all(type(number) is int for number in whole), "a token, an end or a count is no whole number")
            _require(0 <= branch.num_hidden <= len(text), "num_hidden is outside the text")
            _require(all(map(math.isfinite, [*signals[0], *signals[1]])), "a signal is not finite")
            _require(0 <= branch.probability <= 1, "the probability is none")
            _require(all(isinstance(margin, float | int) for margin in branch.margins), "a margin is no number")
            has_all = len(branch.margins) in (0, self.num_layers - 1)
            _require(has_all, f"{len(branch.margins)} margins of {self.num_layers} layers")


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)


@dataclass(frozen=True)
class Failed:
    """A problem that could not be solved.

    Attributes:
        error: reason, in words.
    """

    error: str

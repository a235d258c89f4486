"""CGEE (confidence-gated early exit): what need not be computed because the outcome is clear. Cheapest gate first:

    while decoding   consensus   no outcome of the branches under way can change the vote: they stop
                     decode exit one branch leads decisively: the others stop (or all do, as published), none is asked
                                 about
    before asking    agreement   every branch that could win gives the same answer: none is asked about
                     skip        one branch leads decisively by confidence: none is asked about
    asking           bound       the most confident are asked about first; those that cannot win any more, or could win
                                 only with the answer that leads already, are not asked about at all
    inside the pass  layer exit  a branch's question leaves between layers once its YES - NO is clear

Consensus, agreement and bound are exact for the parsed answer: it is the one that asking about all would give, since
p(YES) <= 1 and a score is p(YES) sqrt(confidence). Which of the branches that give it is named is another matter, and
hangs on which were asked about: of those the best; where there were none, the surest (the most confident). Asking about
all may name another one. Where no branch gives an answer, branches are what is chosen among, and exact too.

Skip, decode exit and layer exit are approximations with thresholds, chosen by `minirksc.calibrate` so that they change
few decisions, and reported for each result. After a decode exit none is asked about, unless the leader failed.

Where this differs from the paper (Sekar 2026, arXiv 2606.09937), and `PAPER_GATES` for its own rules: a lead is over
the best branch with *another* answer, not over the second best branch; layer exit looks at the sign and the margin of
YES - NO through the final norm, not at the entropy of the whole vocabulary, which is low or high with the norm of the
stream; the leader of a decode exit finishes its answer.

Here are leads, which branches must still be asked about, what stops decoding, and `Gates` with all thresholds; layer
exits are in `minirksc.rksc.exits`, the order in which gates are tried in `minirksc.rksc.judge`. Nothing here knows
tensors or the engine: a decode rule is handed the progress of each branch.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from minirksc.engine.signals import SIGNALS, TokenSignals
from minirksc.errors import ConfigError, brief
from minirksc.rksc.answers import choose
from minirksc.rksc.exits import EntropyRule, MarginRule, is_count, is_number

# Leading


@dataclass(frozen=True)
class Lead:
    """When the best of some values is decisive: it is at least `top`, and ahead of the rest by at least `gap`.

    Attributes:
        top: least value of the best one.
        gap: least distance to the next one.
        is_relative: the distance is relative to the best one.
    """

    top: float = 0.0
    gap: float = 0.0
    is_relative: bool = True

    @property
    def is_finite(self) -> bool:
        """Whether its numbers are some."""
        return is_number(self.top) and is_number(self.gap) and isinstance(self.is_relative, bool)

    def distance(self, best: float, rest: float) -> float:
        """How far the best value is ahead, in what `gap` is measured in."""
        return (best - rest) / best if self.is_relative and best > 0 else best - rest

    def holds(self, best: float, rest: float) -> bool:
        """Whether `best` leads decisively, the inequality of CGEE-1; never where a number is NaN."""
        return best >= self.top and self.distance(best, rest) >= self.gap


def best_and_rest(values: Sequence[float], answers: Sequence[str | None] | None) -> tuple[int, float, float]:
    """(index of the largest value, that value, the largest value of a rival or 0 where there is none).

    Args:
        values: confidence of each branch, or another signal.
        answers: answer of each branch: one with the best one's answer is no rival. None: every other branch is.
    """
    best = max(range(len(values)), key=lambda i: -math.inf if math.isnan(values[i]) else values[i])
    own: Sequence[str | None] = [None] * len(values) if answers is None else answers
    rivals = (value for i, value in enumerate(values) if i != best and (own[i] is None or own[i] != own[best]))
    return best, values[best], max(rivals, default=0.0)


def leader_of(values: Sequence[float], answers: Sequence[str | None] | None, leads: Sequence[Lead]) -> int | None:
    """Index of the branch that leads by any of the rules; None: there is none, or a value is not finite.

    With `PAPER_GATES` this is CGEE-1, the paper's condition for skipping verification.

    Args:
        values: confidence of each branch, or another signal.
        answers: answer of each branch, see `best_and_rest`.
        leads: rules; none: no branch ever leads.
    """
    best, top, rest = best_and_rest(values, answers)
    is_decided = all(map(math.isfinite, values)) and any(lead.holds(top, rest) for lead in leads)
    return best if is_decided else None


# Which must still be asked about


def standing(
    answers: Sequence[str | None], scores: Sequence[float | None], bounds: Sequence[float], rule: str
) -> tuple[int, list[int]]:
    """Where the choice stands while some branches have not been asked about.

    Args:
        answers: answer of each branch; None does not vote, and under "score" is an answer of its own.
        scores: score of each branch, 0 or more; None where it has not been asked about.
        bounds: the most that each branch's score can be.
        rule: rule by which the answer is chosen, see `answers.choose`.

    Returns:
        (the branch that leads, those that must still be asked about, highest bound first). Once there are none of
        these, the leader's answer is the one that `choose` would give if all scores were known; of those that give it
        the leader is the best with a score, else the one with the highest bound.

    Example:
        The second branch has not been asked about, and may still score 0.5, which is more than 0.4. Where it can score
        no more than 0.3, the first has won.

        >>> standing(["4", "7"], [0.4, None], [0.9, 0.5], "score")
        (0, [1])
        >>> standing(["4", "7"], [0.4, None], [0.9, 0.3], "score")
        (0, [])

        A third branch answers "4" too. It may score more than the first, which changes no answer, so it is not asked
        about; where scores of equal answers add up, both must be.

        >>> standing(["4", "7", "4"], [0.4, None, None], [0.9, 0.5, 0.8], "score")
        (0, [1])
        >>> standing(["4", "7", "4"], [0.4, None, None], [0.9, 0.5, 0.8], "weighted_vote")
        (0, [2, 1])
    """
    unknown = {i for i, score in enumerate(scores) if score is None}
    low = [score or 0.0 for score in scores]
    if not unknown:
        return choose(answers, low, rule), []
    high = [bounds[i] if i in unknown else low[i] for i in range(len(scores))]
    groups, weigh = _groups(answers, rule)
    first = max(groups, key=lambda group: (weigh(low[i] for i in group), weigh(high[i] for i in group)))
    least = weigh(low[i] for i in first)
    rivals = [group for group in groups if group is not first and weigh(high[i] for i in group) >= least]
    best = max(first, key=lambda i: (i not in unknown, high[i]))
    if not rivals:
        return best, []
    # One known score holds up a leader that is as good as its best; a sum grows with each. In a tie all may matter.
    is_held_up = (
        weigh is max and not unknown.issuperset(first) and all(weigh(low[i] for i in g) < least for g in rivals)
    )
    needed = rivals if is_held_up else [first, *rivals]
    asked = [i for group in needed for i in group if i in unknown and (weigh is sum or high[i] >= least)]
    if not asked:
        return choose(answers, low, rule), []
    return best, sorted(asked, key=lambda i: -bounds[i])


def _groups(answers: Sequence[str | None], rule: str) -> tuple[list[list[int]], Callable[[Iterable[float]], float]]:
    """Branches by answer, those that cannot win left out, and what a group's scores count for together."""
    by_score = rule == "score" or not any(answer is not None for answer in answers)
    found: dict[object, list[int]] = {}
    for index, answer in enumerate(answers):
        if answer is not None or by_score:
            found.setdefault(index if answer is None else answer, []).append(index)
    groups = list(found.values())
    if rule == "vote" and not by_score:
        most = max(map(len, groups))
        groups = [group for group in groups if len(group) == most]  # the others have lost, whatever they score
    return groups, max if by_score else sum


# While decoding


class Progress(Protocol):
    """What a decode rule sees of a branch."""

    @property
    def num_tokens(self) -> int:
        """Number of tokens that it has generated so far."""

    @property
    def signals(self) -> TokenSignals:
        """How sure the model was of each token."""

    @property
    def text(self) -> str:
        """Text that it has generated so far."""

    @property
    def finished(self) -> bool:
        """It has ended."""


class DecodeRule:
    """Stops branches while they are decoded: `LLM.extend` calls it after every step.

    Args:
        gates: thresholds.
        mode: "keep_leader": the others stop; "stop_all" (the paper): all stop, and the answer is cut off; "off".
        select: rule by which the answer is chosen; under "vote" the vote may be over early.
        parse: reader of the answer that a finished text gives.

    Attributes:
        leader: index of the branch that led decisively; None: none did.
        consensus: answer that the vote could not take back any more; None: it never came to that.
    """

    def __init__(self, gates: "Gates", mode: str, select: str, parse: Callable[[str], str | None]) -> None:
        self.leader: int | None = None
        self.consensus: str | None = None
        self._gates = gates
        self._mode = mode
        self._select = select
        self._parse = parse
        self._answers: dict[int, str | None] = {}  # of finished branches

    def __call__(self, progress: Sequence["Progress"]) -> dict[int, str]:
        """Names branches to stop.

        Args:
            progress: progress of each branch.

        Returns:
            index -> finish_reason: "early_exit" or "consensus".
        """
        live = [i for i, one in enumerate(progress) if not one.finished]
        if self.leader is not None or self.consensus is not None or not live:
            return {}
        if self._select == "vote" and self._gates.exact and self._vote_is_over(progress, len(live)):
            return dict.fromkeys(live, "consensus")
        if self._mode == "off" or min(progress[i].num_tokens for i in live) < self._gates.decode_min_tokens:
            return {}
        signal = SIGNALS[self._gates.signal]
        self.leader = leader_of([signal(one.signals) for one in progress], None, self._gates.decode_exit)
        if self.leader is None:
            return {}
        keeps = self._mode == "keep_leader"
        return {i: "early_exit" for i in live if not (keeps and i == self.leader)}

    def _vote_is_over(self, progress: Sequence["Progress"], num_live: int) -> bool:
        for i, one in enumerate(progress):
            if one.finished and i not in self._answers:
                self._answers[i] = self._parse(one.text)
        counts = Counter(answer for answer in self._answers.values() if answer is not None).most_common(2)
        if not counts or counts[0][1] <= num_live + (counts[1][1] if len(counts) > 1 else 0):
            return False
        self.consensus = counts[0][0]
        return True


# Thresholds


@dataclass(frozen=True)
class Gates:
    """Which gates are on, and their thresholds.

    Attributes:
        exact: agreement, bound and consensus; exact for the parsed answer.
        signal: key of `signals.SIGNALS` that leads are measured on.
        skip: leads before which no branch is asked about; none: never.
        compares_answers: a lead is over the best branch with another answer.
        layer_exit: rule by which rows leave the pass of the question; None: never.
        decode_exit: leads that end decoding, after which no branch is asked about; none: never.
        decode_min_tokens: tokens that every branch under way must have before.
        source: "exact", "paper", "uncalibrated" or, of a calibration file, "calibrated".

    Raises:
        ConfigError: a value is of another kind, or not finite.
    """

    exact: bool = True
    signal: str = "mean_top1"
    skip: tuple[Lead, ...] = ()
    compares_answers: bool = True
    layer_exit: MarginRule | EntropyRule | None = None
    decode_exit: tuple[Lead, ...] = ()
    decode_min_tokens: int = 16
    source: str = "exact"

    def __post_init__(self) -> None:
        for name in ("exact", "compares_answers"):
            _check(name, getattr(self, name), isinstance(getattr(self, name), bool), "True or False")
        _check("signal", self.signal, isinstance(self.signal, str) and self.signal in SIGNALS, f"one of {[*SIGNALS]}")
        for name in ("skip", "decode_exit"):
            leads = getattr(self, name)
            is_right = isinstance(leads, tuple) and all(isinstance(lead, Lead) and lead.is_finite for lead in leads)
            _check(name, leads, is_right, "a tuple of Lead, of finite numbers")
        rule = self.layer_exit
        is_right = rule is None or (isinstance(rule, MarginRule | EntropyRule) and rule.is_finite)
        _check("layer_exit", rule, is_right, "a MarginRule or EntropyRule, of finite numbers and patience above 0")
        _check("decode_min_tokens", self.decode_min_tokens, is_count(self.decode_min_tokens), "a whole number")
        _check("source", self.source, isinstance(self.source, str), "text")

    @property
    def is_calibrated(self) -> bool:
        """False where an approximate gate has thresholds that were not tested on this model."""
        return self.source in ("exact", "calibrated")


def _check(name: str, value: object, is_right: bool, wanted: str) -> None:
    if not is_right:
        raise ConfigError(f"gates with {name}={brief(value)}; it must be {wanted}")


NO_GATES = Gates(exact=False)
EXACT_GATES = Gates()
DEFAULT_GATES = Gates(skip=(Lead(gap=0.2),), decode_exit=(Lead(gap=0.3),), source="uncalibrated")
"""Without a calibration: leads that are rare, and no layer exit, since margins say nothing before their correction."""
PAPER_GATES = Gates(
    exact=False,
    skip=(Lead(0.70, 0.06, is_relative=False), Lead(0.63, 0.08)),
    compares_answers=False,
    layer_exit=EntropyRule(entropy=12.0, stability=3.0, start=2),
    decode_exit=(Lead(0.72, 0.10),),
    decode_min_tokens=4,
    source="paper",
)
"""Every published rule and constant. Source: arXiv 2606.09937, and its notebook, whose theta is 12 where the text has 8
for most models, and which counts steps from 0: after its step 3 there are 4 tokens."""

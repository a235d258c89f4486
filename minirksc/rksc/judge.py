"""Which branches of the last round to ask about, as far as the gates leave anything to ask, and which one wins.

The gates themselves are in `minirksc.rksc.cgee`; here is the order in which they are tried, and the score. Indices and
values go in, rulings come out; the caller does the asking.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from minirksc.rksc.answers import choose
from minirksc.rksc.cgee import Gates, best_and_rest, leader_of, standing

ASK_FIRST = 2
"""Branches that are asked about before it is looked which can still win: one alone settles little, all nothing."""

FAILED = -math.inf
"""The score of a branch that failed while it was asked about: it gives no answer, and is worse than all others."""


def score_of(verification: float, confidence: float | None) -> float:
    """The paper's score: p(YES) sqrt(confidence); 0 where there is no confidence, since nothing was generated."""
    return verification * math.sqrt(confidence or 0.0)


@dataclass(frozen=True)
class GateNote:
    """What a gate saw and decided.

    Attributes:
        gate: "agreement", "skip" or "bound".
        decision: what it decided, in words.
        reason: why, in words.
        value: number that the gate looked at; None: it looks at none.
        threshold: number that it was held against; None: there is none.
        calibrated: whether the threshold was tested on this model; None: there is none.
    """

    gate: str
    decision: str
    reason: str
    value: float | None = None
    threshold: float | None = None
    calibrated: bool | None = None


@dataclass(frozen=True)
class Ruling:
    """Where the choice stands.

    Attributes:
        best: index of the branch that wins; while some are to be asked about, of one that leads.
        ask: indices of branches to be asked about next, in this order; empty: the choice is made.
        notes: what gates saw and decided since the last ruling, in order.
    """

    best: int
    ask: tuple[int, ...] = ()
    notes: tuple[GateNote, ...] = ()


@dataclass(eq=False)
class Judge:
    """Chooses among the branches of one solve.

    The caller asks for a ruling, asks about the branches that it names, and comes back with their scores, until a
    ruling names none.

    Attributes:
        gates: gates that are on.
        select: rule by which the answer is chosen, see `answers.choose`.
        answers: answer of each branch; None: it gives none.
        confidences: mean probability of the likeliest token, of each branch; None: it has no tokens.
        values: what leads are measured on: `gates.signal` of each branch's tokens.
        leader: index of the branch that led decisively while all were decoded, so that none is asked about; None: none
            did.
    """

    gates: Gates
    select: str
    answers: Sequence[str | None]
    confidences: Sequence[float | None]
    values: Sequence[float]
    leader: int | None = None
    _asked: set[int] = field(default_factory=set, init=False)

    def ruling(self, scores: Sequence[float | None]) -> Ruling:
        """Says which are to be asked about next, or which one wins.

        Args:
            scores: score of each branch, see `score_of`, or `FAILED`; None: it has not been asked about, or in vain.
        """
        if self.leader is not None:
            return Ruling(self.leader)
        best, unsettled = self._standing(scores)
        if not self._asked and (unsettled or not self.gates.exact):
            ruling = self._after_skip(best, unsettled)
        else:
            ruling = Ruling(best, tuple(unsettled), () if unsettled else self._spared(scores, best))
        self._asked.update(ruling.ask)
        return ruling

    def _standing(self, scores: Sequence[float | None]) -> tuple[int, list[int]]:
        """Which leads, and which are still to be asked about: those that can change the answer, or all of them."""
        known = [0.0 if score is None and i in self._asked else score for i, score in enumerate(scores)]
        answers = [None if score == FAILED else answer for score, answer in zip(known, self.answers, strict=True)]
        if self.gates.exact:
            bounds = [score_of(1.0, confidence) for confidence in self.confidences]  # p(YES) is at most 1
            return standing(answers, known, bounds, self.select)
        unknown = [i for i, score in enumerate(known) if score is None]
        return choose(answers, [score or 0.0 for score in known], self.select), unknown

    def _after_skip(self, best: int, unsettled: Sequence[int]) -> Ruling:
        """The first to be asked about, unless one branch leads decisively by its signal."""
        ask = tuple(unsettled[:ASK_FIRST] if self.gates.exact else unsettled)
        if not self.gates.skip:
            return Ruling(best, ask)
        rivals = self.answers if self.gates.compares_answers else None
        leader = leader_of(self.values, rivals, self.gates.skip)
        _, top, rest = best_and_rest(self.values, rivals)
        # Of several rules the one that holds is noted, else the first.
        lead = next((lead for lead in self.gates.skip if lead.holds(top, rest)), self.gates.skip[0])
        note = GateNote(
            "skip",
            "ask" if leader is None else "nobody is asked",
            f"{self.gates.signal} {', '.join(f'{value:.3f}' for value in self.values)}",
            value=lead.distance(top, rest),
            threshold=lead.gap,
            calibrated=self.gates.is_calibrated,
        )
        return Ruling(best, ask, (note,)) if leader is None else Ruling(leader, (), (note,))

    def _spared(self, scores: Sequence[float | None], best: int) -> tuple[GateNote, ...]:
        """What is noted of branches that need not be asked about, now that the choice is made."""
        num_spared = sum(score is None and i not in self._asked for i, score in enumerate(scores))
        if not num_spared:
            return ()
        if not self._asked:
            reason = f"all that can win answer {self.answers[best]!r}; the surest of them is named"
            return (GateNote("agreement", "nobody is asked", reason),)
        reason = "whatever they would score, the answer stays"
        return (GateNote("bound", f"{num_spared} not asked", reason, value=num_spared),)

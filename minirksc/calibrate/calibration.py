"""Chooses the thresholds of gates so that they change few decisions, provably.

The rate of interest is over problems: the share of them whose decision (the parsed answer) is another one with the
gates than without. Fixed-sequence testing (Learn then Test, Angelopoulos et al. 2021, arXiv 2110.01052): candidates
stand in one sequence, from gates that approximate nothing to loose ones. For each in turn the hypothesis "its rate is
above the budget" is tested with the exact binomial tail at level 1 - confidence; the first that cannot be rejected ends
it, and the last one before is certified. Since the tests stop there, together they err with probability at most
1 - confidence, however many there are, if problems are drawn independently and alike, and the sequence does not depend
on the problems that test it.

So the problems are divided at random. The ordering part, at most a third, and no more than the test can spare, makes
the sequence; the other part tests it (as Pareto testing does: Laufer-Goldshtein et al. 2023, arXiv 2210.07913):

1. Each gate alone (skip, layer exit, decode exit) has a grid from strict to loose; its limit is the loosest point up to
   which it changes no larger share of the ordering part than the test could accept.
2. In a sequence all its gates go together from off to their limits in equal steps, and beyond: an order by counts alone
   would put one gate at its limit first, and end there.
3. What a layer exit reads in each layer is corrected by a line fitted to the ordering part (`fit_correction`).
4. There is one sequence for each set of gates, signal, patience and start. The one that saves most by the ordering
   part, up to where the test would be expected to end, is the one that is tested.

Without an ordering part every limit is the end of the grid, and the sequence that of the first variant: skip alone.
"""

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import combinations, product
from typing import Any

import numpy as np

from minirksc.calibrate.binomial import errors_allowed, problems_needed, tail, upper_bound
from minirksc.calibrate.evidence import Evidence
from minirksc.calibrate.trials import Tally, Trials
from minirksc.engine.signals import SIGNALS
from minirksc.rksc.cgee import Gates, Lead
from minirksc.rksc.exits import MarginRule

GAPS = (0.5, 0.4, 0.32, 0.25, 0.2, 0.16, 0.13, 0.1, 0.08, 0.065, 0.05, 0.04, 0.03, 0.02, 0.01, 0.005)
"""Of leads, relative to the best value; strict to loose."""

MARGINS = (64.0, 48.0, 32.0, 24.0, 20.0, 18.0, 16.0, 14.0, 12.0, 10.0, 8.0, 6.0, 4.0, 3.0, 2.0, 1.0)
"""Of layer exits, logits; strict to loose. Through the lens, middle layers can be twenty logits sure of nothing."""

PATIENCES = (3, 2)
STARTS = (0.5, 0.7, 0.85)
"""Share of the layers after which a layer exit begins to look."""

KINDS = ("skip", "decode_exit", "layer_exit")
MIN_TO_FIT = 50
BEYOND = 1.5
"""How far a sequence goes on, in multiples of the limits: the ordering part is small."""


@dataclass(frozen=True)
class Variant:
    """What is the same in all candidates of a sequence.

    Attributes:
        kinds: names of gates that approximate, of `KINDS`.
        signal: signal that leads are measured on.
        patience: layers in a row that a layer exit must hold.
        start: first layer that layer exits look at; None: half of all.
        correction: lines that correct what layer exits read, see `fit_correction`.
    """

    kinds: tuple[str, ...]
    signal: str = "mean_top1"
    patience: int = 3
    start: int | None = None
    correction: tuple[tuple[float, float], ...] | None = None

    def gates(self, levels: dict[str, int]) -> Gates:
        """Gates at points of the grids, 0: off."""

        def leads(kind: str) -> tuple[Lead, ...]:
            return (Lead(gap=GAPS[levels[kind] - 1]),) if levels.get(kind) else ()

        level = levels.get("layer_exit", 0)
        layer_exit = MarginRule(MARGINS[level - 1], self.patience, self.start, self.correction) if level else None
        return Gates(
            signal=self.signal,
            skip=leads("skip"),
            layer_exit=layer_exit,
            decode_exit=leads("decode_exit"),
            source="calibrated",
        )


@dataclass(frozen=True)
class Step:
    """One tested candidate.

    Attributes:
        gates: gates of the candidate.
        tally: what they do over the test part.
        bound: most that their rate of changed decisions is, with the confidence asked for.
        passed: whether a rate above the budget was ruled out.
    """

    gates: Gates
    tally: Tally
    bound: float
    passed: bool

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        gates, tally = asdict(self.gates), self.tally
        return {
            **{name: gates[name] for name in ("signal", "skip", "layer_exit", "decode_exit")},
            "problems": tally.num_problems,
            "changed": tally.num_changed,
            "bound": self.bound,
            "passed": self.passed,
            **{name: getattr(tally, name) for name in ("saved", "saved_question", "saved_decoding", "reasons")},
        }


@dataclass(frozen=True)
class Calibration:
    """What was found.

    Attributes:
        steps: candidates in the order of their tests; all but perhaps the last passed.
        variant: what all candidates have in common.
        num_ordering: number of problems that made the sequence.
        num_test: number of problems that tested it.
    """

    steps: list[Step]
    variant: Variant
    num_ordering: int
    num_test: int

    @property
    def certified(self) -> Step | None:
        """The loosest that passed; None: there were too few problems for any."""
        return next((step for step in reversed(self.steps) if step.passed), None)


def calibrate(
    trials: Trials,
    budget: float,
    confidence: float,
    *,
    among: Sequence[int] | None = None,
    seed: int = 0,
    signals: Sequence[str] = tuple(SIGNALS),
    kinds: Sequence[str] = KINDS,
    correction: tuple[tuple[float, float], ...] | None = None,
    on_variant: Callable[[], object] = lambda: None,
) -> Calibration:
    """Finds the loosest gates whose rate of changed decisions is at most `budget`.

    Args:
        trials: problems.
        budget: rate, 0..1.
        confidence: probability with which the certified rate keeps to it.
        among: indices of the problems that may be looked at; None: all.
        seed: seed of the division into ordering and test part.
        signals: candidates for what leads are measured on; the first is the plainest.
        kinds: names of gates that may be used, of `KINDS`.
        correction: correction of layer exits, from problems that are not among these; None: fitted to the ordering
            part.
        on_variant: callback after each of `variants` has been looked at.
    """
    shuffled = list(range(len(trials.replays)) if among is None else among)
    random.Random(seed).shuffle(shuffled)
    num_ordering = ordering_size(len(shuffled), budget, confidence)
    ordering, test = shuffled[:num_ordering], shuffled[num_ordering:]
    accepted = max(errors_allowed(len(test), budget, confidence), 0) / max(len(test), 1)
    correction = correction or fit_correction([trials.replays[index].evidence for index in ordering])
    if correction is None:  # raw margins say nothing
        kinds = [kind for kind in kinds if kind != "layer_exit"] or kinds
    chooser = _Chooser(trials, ordering, accepted)
    found = []
    for one in variants(signals, kinds, correction):
        found.append((one, *chooser.sequence(one)))
        on_variant()
    variant, sequence, _ = max(found, key=lambda choice: choice[2])  # of equals the earliest
    steps = run_tests(sequence, lambda gates: trials.tally(gates, test), budget, confidence)
    return Calibration(steps, variant, num_ordering, len(test))


def run_tests(
    sequence: Iterable[Gates], tally: Callable[[Gates], Tally], budget: float, confidence: float
) -> list[Step]:
    """Fixed-sequence testing.

    Args:
        sequence: candidates, fixed without a look at the problems that test them.
        tally: function that says what a candidate does over these problems.
        budget: rate that is to be ruled out.
        confidence: confidence of all tests together.

    Returns:
        Steps: all that was tested, to the first that did not pass, that one included.
    """
    steps: list[Step] = []
    for gates in sequence:
        steps.append(step_of(gates, tally(gates), budget, confidence))
        if not steps[-1].passed:
            break
    return steps


def step_of(gates: Gates, result: Tally, budget: float, confidence: float) -> Step:
    """The test of one candidate."""
    counts = (result.num_changed, result.num_problems)
    return Step(gates, result, upper_bound(*counts, confidence), tail(*counts, budget) <= 1 - confidence)


def ordering_size(num_problems: int, budget: float, confidence: float) -> int:
    """How many problems make the sequence: a third, or what the test can spare."""
    return max(0, min(num_problems // 3, num_problems - problems_needed(budget, confidence)))


def variants(
    signals: Sequence[str], kinds: Sequence[str], correction: tuple[tuple[float, float], ...] | None = None
) -> list[Variant]:
    """Every set of gates with every signal, patience and start that matters to it; the smallest sets first.

    Args:
        signals: signals for leads.
        kinds: names of gates, of `KINDS`.
        correction: correction of layer exits, one entry a layer.
    """
    found: list[Variant] = []
    num_layers = 0 if correction is None else len(correction)
    starts = [round(share * num_layers) for share in STARTS] if correction else [None]
    for size in range(1, len(kinds) + 1):
        for some in combinations(kinds, size):
            has_lead = "skip" in some or "decode_exit" in some
            exits: Iterable[tuple[Any, ...]] = [()]
            if "layer_exit" in some:
                exits = product(PATIENCES[:1] if has_lead else PATIENCES, starts, [correction])
            some_signals = signals if has_lead else signals[:1]
            found += [Variant(some, signal, *one) for signal, one in product(some_signals, exits)]
    return found


def fit_correction(evidence: Sequence[Evidence]) -> tuple[tuple[float, float], ...] | None:
    """A line a layer from the margin that a lens reads there to the last layer's, by least squares over all branches.

    Args:
        evidence: evidence of the problems.

    Returns:
        Pairs (slope, offset), one a layer, (1, 0) for the last; None where too little is known: fewer than `MIN_TO_FIT`
        branches with finite margins.

    Source: a tuned lens with two parameters, after Belrose et al. 2023, arXiv 2303.08112.
    """
    branches = [branch for one in evidence for branch in one.branches if branch.margins]
    margins = np.array([branch.margins for branch in branches], dtype=float)  # [branches, layers - 1]
    last = np.array([_logit(branch.probability) for branch in branches])  # [branches]
    is_known = np.isfinite(margins).all(-1) & np.isfinite(last) if len(branches) else np.zeros(0, dtype=bool)
    if is_known.sum() < MIN_TO_FIT:
        return None
    margins, last = margins[is_known], last[is_known]
    centred = margins - margins.mean(0)
    variance = (centred**2).mean(0)
    slopes = np.where(variance > 0, (centred * (last - last.mean())[:, None]).mean(0) / np.maximum(variance, 1e-12), 0)
    offsets = last.mean() - slopes * margins.mean(0)
    return (*zip(slopes.tolist(), offsets.tolist(), strict=True), (1.0, 0.0))


def _logit(probability: float) -> float:
    return math.log(probability / (1 - probability)) if 0 < probability < 1 else math.nan


def sequence_of(variant: Variant, limits: dict[str, int]) -> list[Gates]:
    """Candidates from off to the limits and beyond, without repetitions.

    Args:
        variant: what they have in common.
        limits: level of its grid for each kind of gate.
    """
    num_steps = max(limits[kind] for kind in variant.kinds)
    found = [variant.gates({})]
    for step in range(1, round(BEYOND * num_steps) + 1):
        levels = {kind: min(round(step / num_steps * limits[kind]), len(GAPS)) for kind in variant.kinds}
        gates = variant.gates(levels)
        if gates != found[-1]:
            found.append(gates)
    return found


class _Chooser:
    """Makes sequences by the ordering part.

    Args:
        trials: problems.
        ordering: indices of this part.
        accepted: share of changed decisions that the test could accept.
    """

    def __init__(self, trials: Trials, ordering: Sequence[int], accepted: float) -> None:
        self._trials = trials
        self._ordering = ordering
        self._accepted = accepted
        self._limit = cache(self._limit_alone)

    def sequence(self, variant: Variant) -> tuple[list[Gates], float]:
        """A variant's sequence, and what its last candidate saves before the first that changes too much."""
        limits = {kind: self._limit(replace(variant, kinds=(kind,))) for kind in variant.kinds}
        sequence = sequence_of(variant, limits)
        saved = 0.0
        for gates in sequence if self._ordering else ():
            if (result := self._tally_if_fine(gates)) is None:
                break
            saved = result.saved
        return sequence, saved

    def _limit_alone(self, variant: Variant) -> int:
        """The loosest level of a variant's one gate up to which it changes few enough decisions; at least 1."""
        (kind,) = variant.kinds
        level = 1
        while level < len(GAPS) and self._tally_if_fine(variant.gates({kind: level + 1})) is not None:
            level += 1
        return level

    def _tally_if_fine(self, gates: Gates) -> Tally | None:
        """What gates do; None: they change too many decisions."""
        result = self._trials.tally(gates, self._ordering)
        return result if result.num_changed <= self._accepted * len(self._ordering) else None

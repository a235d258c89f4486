"""How sure one can be of what was counted or measured over some problems: exact and resampled intervals.

A problem is the unit: problems are independent, the branches of one are not.

Sources: Clopper and Pearson 1934, Biometrika 26(4); Efron 1979, Annals of Statistics 7(1): the percentile bootstrap.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from minirksc.calibrate.binomial import upper_bound

RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """An estimate, and between what the truth lies with the confidence that was asked for."""

    estimate: float
    low: float
    high: float

    def show(self, form: str = ".3g") -> str:
        """As text, each number in one format."""
        return f"{self.estimate:{form}} [{self.low:{form}}, {self.high:{form}}]"


def clopper_pearson(count: int, total: int, confidence: float = 0.95) -> Interval:
    """Two-sided exact interval of a rate; for a one-sided bound see `minirksc.calibrate.binomial.upper_bound`.

    Args:
        count: number of successes, 0..total.
        total: number of trials; of none nothing is known, and the estimate is NaN.
        confidence: share of intervals that hold the truth, 0..1.
    """
    if not 0 <= count <= total:
        raise ValueError(f"{count} of {total}: the count must be in 0..total")
    side = 1 - (1 - confidence) / 2
    estimate = count / total if total else float("nan")
    return Interval(estimate, 1 - upper_bound(total - count, total, side), upper_bound(count, total, side))


def bootstrap(
    values: Sequence[float],
    statistic: Callable[[Sequence[float]], float] = fmean,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Percentile interval of a statistic, problems drawn with replacement.

    For a paired comparison the values are the differences or ratios, one a problem. Values that are all equal give an
    interval without width: that says nothing about rare problems, `clopper_pearson` of their number does.

    Args:
        values: values, one a problem, at least one.
        statistic: function of values.
        confidence: share of intervals that hold the truth, 0..1.
        resamples: number of draws.
        seed: seed of the draws.
    """
    if not values:
        raise ValueError("no values: the bootstrap needs at least one")
    draws = random.Random(seed)
    found = sorted(statistic(draws.choices(values, k=len(values))) for _ in range(resamples))
    margin = (1 - confidence) / 2
    low, high = (found[min(int(share * resamples), resamples - 1)] for share in (margin, 1 - margin))
    return Interval(statistic(values), low, high)

"""Exact binomial statistics: how sure one can be of a rate after counting errors among independent trials.

Source: Clopper and Pearson 1934, Biometrika 26(4): the one-sided upper bound. Plain Python, since the package does not
need scipy for anything else.
"""

import math
from bisect import bisect_left


def tail(num_errors: int, total: int, rate: float) -> float:
    """P[Bin(total, rate) <= num_errors], the p-value of "the rate is above `rate`".

    Args:
        num_errors: number of errors, 0 or more.
        total: number of trials, 0 or more.
        rate: rate of errors, 0..1.
    """
    if num_errors >= total or rate <= 0.0:
        return 1.0
    if rate >= 1.0:
        return 0.0
    log_rate, log_rest, log_all = math.log(rate), math.log1p(-rate), math.lgamma(total + 1)
    terms = (
        math.exp(log_all - math.lgamma(k + 1) - math.lgamma(total - k + 1) + k * log_rate + (total - k) * log_rest)
        for k in range(num_errors + 1)
    )
    return min(1.0, math.fsum(terms))


def upper_bound(num_errors: int, total: int, confidence: float) -> float:
    """The rate that is exceeded with probability at most 1 - confidence, given so many errors (Clopper-Pearson)."""
    if num_errors >= total:
        return 1.0
    low, high = num_errors / total, 1.0
    while low < (middle := (low + high) / 2) < high:
        if tail(num_errors, total, middle) > 1 - confidence:
            low = middle
        else:
            high = middle
    return high


def errors_allowed(total: int, budget: float, confidence: float) -> int:
    """Most errors among `total` with which a rate above `budget` is ruled out; -1: not even without an error."""
    return bisect_left(range(total), True, key=lambda count: tail(count, total, budget) > 1 - confidence) - 1


def problems_needed(budget: float, confidence: float, num_errors: int = 0) -> int:
    """Fewest trials that rule out a rate above `budget`, if `num_errors` of them are errors.

    Raises:
        ValueError: Budget or confidence is not inside (0, 1).
    """
    if not (0 < budget < 1 and 0 < confidence < 1):
        raise ValueError(f"budget={budget!r} and confidence={confidence!r} must be between 0 and 1")

    def suffice(total: int) -> bool:
        return tail(num_errors, total, budget) <= 1 - confidence

    high = num_errors + 1
    while not suffice(high):
        high *= 2
    return bisect_left(range(high), True, lo=num_errors + 1, key=suffice)


def smallest_budget(total: int, confidence: float) -> float:
    """The least rate that `total` trials can rule out, if none is an error."""
    return upper_bound(0, total, confidence) if total else 1.0

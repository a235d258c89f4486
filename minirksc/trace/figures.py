"""Values of a trace in words: figures, times, counts, and texts that fit into a line."""

import math
from typing import Any, TypeGuard

DASH = "\u2013"
"""What stands where there is no value."""


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def number(value: Any, digits: int = 2) -> str:
    """A figure, or a dash."""
    if not is_number(value):
        return DASH
    return f"{value:,}" if isinstance(value, int) else f"{value:.{digits}f}"


def seconds(value: Any) -> str:
    """A time in a unit that suits it, or a dash."""
    if not is_number(value):
        return DASH
    return f"{1000 * value:.0f} ms" if value < 0.1 else f"{value:.2f} s" if value < 10 else f"{value:,.1f} s"


def counted(count: int, one: str, many: str) -> str:
    """A count and what is counted."""
    return f"{count:,} {one if count == 1 else many}"


def one_line(text: Any) -> str:
    """Text whose runs of white space are one space each; None as nothing."""
    return "" if text is None else " ".join(str(text).split())


def shortened(text: str, most: int) -> str:
    """Text of at most so many characters."""
    return text if len(text) <= most else text[: most - 1] + "\u2026"

"""What counts as a threshold, wherever one is given."""

import sys


def is_number(value: object) -> bool:
    """Whether a value is a finite number; True and False are none."""
    # NaN compares false, and an int beyond all floats compares where math.isfinite would raise.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def is_count(value: object) -> bool:
    """Whether a value is a whole number, 0 or more."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0

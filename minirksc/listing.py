"""Lists in messages."""

from collections.abc import Sequence

MAX_LISTED = 20
MAX_CHARS = 200
"""Of one item, which may be a name from a file of anybody's."""


def listing(items: Sequence[str], separator: str) -> str:
    """Items in a row, or as many as somebody reads."""
    shown = [item if len(item) <= MAX_CHARS else f"{item[:MAX_CHARS]}..." for item in items[:MAX_LISTED]]
    more = [f"and {len(items) - MAX_LISTED} more"] if len(items) > MAX_LISTED else []
    return separator.join([*shown, *more])

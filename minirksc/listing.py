"""Lists in messages."""

from collections.abc import Sequence

MAX_LISTED = 20


def listing(items: Sequence[str], separator: str) -> str:
    """Items in a row, or as many as somebody reads."""
    more = [f"and {len(items) - MAX_LISTED} more"] if len(items) > MAX_LISTED else []
    return separator.join([*items[:MAX_LISTED], *more])

"""Which cached block goes first. A policy is one function: the lowest priority is evicted first.

Only leaves of the cached tree are ever asked about, so a block outlives everything that builds on it.
"""

from collections.abc import Callable
from typing import Protocol

Priority = tuple[float, ...]


class Evictable(Protocol):
    """What a policy may look at; see `rsbcm.Block`."""

    depth: int
    importance: float
    last_use: int
    num_uses: int


def rksc(block: Evictable) -> Priority:
    """Importance / (depth + 1): shallow blocks serve more branches. Ties go to the least recently used.

    Source: RKSC, arXiv 2606.09937 (RSBCM), with the block's importance in place of its branch's score.
    """
    return (block.importance / (block.depth + 1), block.last_use)


def lru(block: Evictable) -> Priority:
    """Least recently used first."""
    return (block.last_use,)


def lfu(block: Evictable) -> Priority:
    """Least often used first, then least recently."""
    return (block.num_uses, block.last_use)


POLICIES: dict[str, Callable[[Evictable], Priority]] = {"rksc": rksc, "lru": lru, "lfu": lfu}

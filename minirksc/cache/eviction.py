"""Which cached block goes first. A policy is one function: the lowest priority is evicted first.

Only leaves of the cached tree are ever asked about, so a block outlives everything that builds on it. A priority may
use nothing that changes while a block is cached, but for `num_awaited`: whoever changes that offers the block anew.
"""

from collections.abc import Callable
from typing import Protocol

Priority = tuple[float, ...]

REUSE_BY_USE = 0.02
"""What each use so far adds to the probability that a new prompt begins alike: what many had in common, more will."""
REUSE_BY_BRANCH = 0.5
"""Probability that one live branch comes back for its block before the block would go in any case."""
ATTENTION_TOKENS = 4096
"""Context at which a token's attention costs as much as all its linear layers.

A token at position p takes 2 * weights + 4 * layers * heads * head_dim * p FLOPs: both parts are equal at about 3,000
tokens in a model of 135 million parameters, at 30,000 in one of 8 billion. Nearer to the small one, since attention
runs at a lower rate.
"""
IMPORTANCE_WEIGHT = 0.25
"""How much importance says about cost: it chooses among blocks that are alike in all else."""
MAX_IMPORTANCE = 4.0
"""More is not believed: the first block is a sink of attention in every sequence, whether it is needed or not."""


class Evictable(Protocol):
    """What a policy may look at; see `prefix_index.Block`."""

    digest: bytes | None
    depth: int
    importance: float
    last_use: int
    num_uses: int
    num_tokens_before: int
    num_awaited: int
    cached_at: float


Policy = Callable[[Evictable], Priority]


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


def cost(block: Evictable) -> Priority:
    """Age + P(reuse) * cost of computing it again * (1 + importance / 4): what its loss would cost.

    P(reuse) comes first of all from the branches that are alive, have lost their tables and will need the block again,
    and a little from how often it was used. The cost of a block at the beginning of a sequence is 1. The age is the
    highest priority that had been evicted when the block was cached: what nobody comes for is overtaken, however dear.

    Source: GreedyDual-Size with Frequency, Cherkasova 1998: the age. There a count of uses stands for P(reuse).
    """
    reuse = 1 - (1 - REUSE_BY_USE) ** block.num_uses * (1 - REUSE_BY_BRANCH) ** block.num_awaited
    work = 1 + block.num_tokens_before / ATTENTION_TOKENS
    weight = 1 + IMPORTANCE_WEIGHT * min(block.importance, MAX_IMPORTANCE)
    return (block.cached_at + reuse * work * weight, block.last_use)


POLICIES: dict[str, Policy] = {"rksc": rksc, "lru": lru, "lfu": lfu, "cost": cost}
BY_IMPORTANCE = ("rksc", "cost")
"""Policies that need attention to be measured."""

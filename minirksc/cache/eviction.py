"""Which cached block goes first, and what is remembered of those that went.

A policy is one function: the block of lowest priority is evicted first. Only leaves of the cached tree are ever asked
about, so a block outlives everything that builds on it. A priority may use depth, importance, last_use, num_uses,
num_tokens_before, cached_at and digest, none of which changes while a block is cached, and num_awaited: where that
changes, the block is offered anew.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from minirksc.cache.index import Block

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


Policy = Callable[[Block], Priority]


def rksc(block: Block) -> Priority:
    """Importance / (depth + 1): shallow blocks serve more branches. Ties go to the least recently used.

    Source: RKSC, arXiv 2606.09937 (RSBCM), with the block's importance in place of its branch's score.
    """
    return (block.importance / (block.depth + 1), block.last_use)


def lru(block: Block) -> Priority:
    """Least recently used first."""
    return (block.last_use,)


def lfu(block: Block) -> Priority:
    """Least often used first, then least recently."""
    return (block.num_uses, block.last_use)


def cost(block: Block) -> Priority:
    """Age + P(reuse) * cost of computing it again * (1 + importance / 4): what its loss would cost.

    P(reuse) comes first of all from the branches that are alive, have lost their tables and will need the block again,
    and a little from how often it was used. The cost of a block at the beginning of a sequence is 1. The age is the
    highest priority that had been evicted when the block was cached: what nothing comes for is overtaken, however dear.

    Source: GreedyDual-Size with Frequency, Cherkasova 1998: the age. There a count of uses stands for P(reuse).
    """
    reuse = 1 - (1 - REUSE_BY_USE) ** block.num_uses * (1 - REUSE_BY_BRANCH) ** block.num_awaited
    work = 1 + block.num_tokens_before / ATTENTION_TOKENS
    weight = 1 + IMPORTANCE_WEIGHT * min(block.importance, MAX_IMPORTANCE)
    return (block.cached_at + reuse * work * weight, block.last_use)


POLICIES: dict[str, Policy] = {"rksc": rksc, "lru": lru, "lfu": lfu, "cost": cost}
BY_IMPORTANCE = ("rksc", "cost")
"""Policies that need attention to be measured."""

MAX_EVICTIONS = 4096
"""Evictions that are remembered: some MB at most, more than any cache of which a reader wants to see each block.

A block that is computed again after so many others went counts as new.
"""


@dataclass(slots=True)
class Eviction:
    """One cached block that had to make room.

    Attributes:
        block_id: its number, now another block's.
        num_tokens: length of its sequence up to its end; its own tokens are the last block_size of them.
        depth: place in the reasoning tree, as in `index.Block`.
        importance: attention mass, as in `index.Block`.
        num_uses: times that a table took it.
        num_awaited: live sequences that were known to need it again.
        priority: what the policy made of it, the lowest of all candidates.
        policy: name of the policy.
        at: clock of the pool, which counts the times that any table took a block.
        needed_again: True once its tokens have been computed again.
    """

    block_id: int
    num_tokens: int
    depth: int
    importance: float
    num_uses: int
    num_awaited: int
    priority: Priority
    policy: str
    at: int
    needed_again: bool = False


class EvictionLog:
    """The last evictions, and what was lost by them."""

    def __init__(self) -> None:
        self.num_evicted = 0
        self.num_needed_again = 0
        self._entries: deque[tuple[bytes, Eviction]] = deque()
        self._lost: dict[bytes, Eviction] = {}  # not computed again so far

    @property
    def entries(self) -> list[Eviction]:
        """The last `MAX_EVICTIONS`, oldest first."""
        return [eviction for _, eviction in self._entries]

    def add(self, digest: bytes, eviction: Eviction) -> None:
        """A block went."""
        self.num_evicted += 1
        self._entries.append((digest, eviction))
        self._lost[digest] = eviction
        if len(self._entries) > MAX_EVICTIONS:
            oldest, forgotten = self._entries.popleft()
            if self._lost.get(oldest) is forgotten:
                del self._lost[oldest]

    def computed(self, digest: bytes) -> Eviction | None:
        """A block has been computed; returns the eviction that made this necessary, if one did."""
        eviction = self._lost.pop(digest, None)
        if eviction is not None:
            eviction.needed_again = True
            self.num_needed_again += 1
        return eviction

    def forget_lost(self) -> None:
        """What is computed again from here on would have been lost in any case."""
        self._lost.clear()

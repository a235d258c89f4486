"""What was evicted, why, and whether it was needed again."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from minirksc.cache.eviction import Priority

MAX_EVICTIONS = 4096
"""Evictions that are remembered: some MB at most, more than any cache of which a reader wants to see each block.

A block that is computed again after so many others went counts as new.
"""


@dataclass(slots=True)
class Eviction:
    """One cached block that had to make room.

    Attributes:
        block_id: its number, now another block's.
        num_tokens: of its sequence, up to its end; its own are the last block_size of them.
        depth: of its node in the reasoning tree.
        importance: as in `prefix_index.Block`.
        num_uses: times that a table took it.
        num_awaited: live sequences that were known to need it again.
        priority: the lowest of all candidates, by the policy.
        policy: its name.
        at: clock of the block manager, which counts the times that any table took a block.
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

    def check(self, is_indexed: Callable[[bytes], bool]) -> None:
        """Verifies that it is bounded and that what counts as lost was not computed again.

        Args:
            is_indexed: whether a digest is in the prefix index.

        Raises:
            AssertionError: what is wrong.
        """
        assert len(self._lost) <= len(self._entries) <= MAX_EVICTIONS, "the log of evictions grows"
        entries = {id(eviction) for _, eviction in self._entries}
        for digest, eviction in self._lost.items():
            assert id(eviction) in entries and not eviction.needed_again, f"block {eviction.block_id} is not lost"
            assert not is_indexed(digest), f"block {eviction.block_id} is back in the index and counts as lost"

"""Belady's rule: the block that is needed again last goes first. An oracle: it has seen the same work done before.

The future is the order in which requests ended where the cache was ample. With less room requests wait and are
computed in another order, so that this is no bound there, only what a very good policy does. It chooses among cached
blocks as every policy does; whose table is taken back stays the scheduler's choice.

Source: L. A. Belady, A study of replacement algorithms for a virtual-storage computer, 1966.
"""

import math
from collections import deque
from collections.abc import Sequence

from minirksc.cache.eviction import Priority
from minirksc.cache.index import Block, block_digest
from minirksc.engine.request import Request


class Recorder:
    """Notes what each request of a run had in its blocks when it ended."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.uses: list[list[bytes]] = []

    def finished(self, request: Request) -> None:
        """A request ended."""
        self.uses.append(digests(request.sequence.token_ids, self.block_size))


class Belady:
    """A policy; tell it of each request that ends.

    Args:
        recorder: recorder of a run of the same work.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._block_size = recorder.block_size
        self._ranks: dict[tuple[bytes, ...], deque[int]] = {}  # of requests with these blocks that have not ended
        self._uses: dict[bytes, deque[int]] = {}
        self._ended: set[int] = set()
        self._fixed: dict[tuple[bytes, int], Priority] = {}
        for rank, chain in enumerate(recorder.uses):
            self._ranks.setdefault(tuple(chain), deque()).append(rank)
            for digest in chain:
                self._uses.setdefault(digest, deque()).append(rank)

    def finished(self, request: Request) -> None:
        """A request ended: what it used is behind us."""
        chain = tuple(digests(request.sequence.token_ids, self._block_size))
        self._ended.add(self._ranks[chain].popleft())

    def belady(self, block: Block) -> Priority:
        """Minus the rank of the next request that needs the block; ties as in lru."""
        assert block.digest is not None
        # A cached block keeps its priority until it is used again, whatever ends meanwhile.
        key = (block.digest, block.last_use)
        if key not in self._fixed:
            uses = self._uses.get(block.digest, deque())
            while uses and uses[0] in self._ended:
                uses.popleft()
            self._fixed[key] = (-uses[0] if uses else -math.inf, block.last_use)
        return self._fixed[key]


def digests(token_ids: Sequence[int], block_size: int) -> list[bytes]:
    """Of all full blocks; without a salt."""
    chain: list[bytes] = []
    for begin in range(0, len(token_ids) - block_size + 1, block_size):
        previous = chain[-1] if chain else b""
        chain.append(block_digest(previous, b"", token_ids[begin : begin + block_size]))
    return chain

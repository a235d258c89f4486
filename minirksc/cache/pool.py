"""The pool of KV blocks: which are free, held by a table, or merely cached, and which cached one goes first.

A block that no table holds any more is free at once, unless it is in the prefix index: then it stays cached until its
room is needed. Leaves of the cached tree are evicted first, in the order of an eviction policy. A block that goes
leaves the index and the window pool with it, and an entry in the log of evictions.

A pinned block is never evicted. Whoever pins one pins all blocks before it, so that every other cached block can still
be reached from the leaves.
"""

import heapq
from collections.abc import Sequence

from minirksc.cache.eviction import POLICIES, Policy, Priority
from minirksc.cache.eviction_log import Eviction, EvictionLog
from minirksc.cache.index import Block, PrefixIndex
from minirksc.cache.windows import WindowPool
from minirksc.errors import ConfigError


class BlockPool:
    """A fixed number of blocks.

    Args:
        num_blocks: how many.
        policy: eviction policy, a key of `eviction.POLICIES` or a function like those.
        index: where blocks may be indexed.
        windows: where blocks may have room for layers with a window.
        log: of evictions.

    Raises:
        ConfigError: an unknown policy.
    """

    def __init__(
        self, num_blocks: int, policy: str | Policy, index: PrefixIndex, windows: WindowPool, log: EvictionLog
    ) -> None:
        if isinstance(policy, str) and policy not in POLICIES:
            raise ConfigError(f"eviction {policy!r} is unknown; choose one of {', '.join(POLICIES)}")
        self._priority = POLICIES[policy] if isinstance(policy, str) else policy
        self._policy = self._priority.__name__
        self._index = index
        self._evictions = log
        self._windows = windows
        self._blocks = [Block(i) for i in range(num_blocks)]
        # Lowest ids first, and the neighbour of a table's last block before all: runs become likely.
        self._free_heap = list(range(num_blocks))
        self._free = set(self._free_heap)
        self._cached: set[int] = set()  # indexed and referenced by no table
        self._pinned: set[int] = set()  # the same, and not to be evicted
        # Candidates for eviction as (priority, block id); entries that are out of date are skipped.
        self._victims: list[tuple[Priority, int]] = []
        self._clock = 0
        self._age = 0.0  # highest priority that was ever evicted

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, block_id: int) -> Block:
        return self._blocks[block_id]

    @property
    def num_free(self) -> int:
        """Blocks that hold nothing."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Indexed blocks that no table holds, pinned ones included."""
        return len(self._cached) + len(self._pinned)

    @property
    def num_pinned(self) -> int:
        """Of the cached ones those that are not evicted."""
        return len(self._pinned)

    def has_room(self, num_blocks: int) -> bool:
        """True when `take` will succeed so many times."""
        return num_blocks <= self.num_free + len(self._cached)

    def take(self, wanted: int | None, depth: int) -> Block:
        """Hands out a block that holds nothing, referenced once; the caller knows that there is room.

        Args:
            wanted: the id that is best, if it is free.
            depth: of the table's node in the reasoning tree.
        """
        if not self._free:
            self._evict(logged=True)
        if wanted not in self._free:
            while self._free_heap[0] not in self._free:
                heapq.heappop(self._free_heap)  # taken out of turn, as somebody's neighbour
            wanted = heapq.heappop(self._free_heap)
        assert wanted is not None
        self._free.remove(wanted)
        block = self._blocks[wanted]
        block.depth, block.importance, block.num_uses = depth, 1.0, 0
        self.reference(block)
        return block

    def reference(self, block: Block) -> None:
        """One more table holds a block."""
        self._clock += 1
        block.last_use = self._clock
        block.num_uses += 1
        block.num_references += 1
        self._cached.discard(block.block_id)
        self._pinned.discard(block.block_id)

    def release(self, block: Block) -> None:
        """One table holds it no more."""
        block.num_references -= 1
        if block.num_references:
            return
        if block.digest is None:
            self._give_back(block)
        else:
            block.cached_at = self._age
            self._keep(block)

    def pin(self, block: Block) -> None:
        """An indexed block is not evicted any more. All blocks before it are pinned by the same caller."""
        block.num_pins += 1
        if block.block_id in self._cached:
            self._cached.remove(block.block_id)
            self._pinned.add(block.block_id)

    def unpin(self, block: Block) -> None:
        """Takes one `pin` back; from the end of a chain."""
        block.num_pins -= 1
        if block.num_pins == 0 and block.block_id in self._pinned:
            self._pinned.remove(block.block_id)
            self._keep(block)

    def set_awaited(self, block: Block, num_awaited: int) -> None:
        """Live sequences without a table will need an indexed block again; its priority may change with them."""
        block.num_awaited = num_awaited
        self._offer(block)

    def unindex(self, block: Block) -> None:
        """Takes a block that nothing builds on out of the index."""
        assert not block.num_pins
        parent = block.parent
        self._index.remove(block)
        block.num_awaited = 0
        if parent is not None:
            self._offer(parent)

    def reset(self) -> None:
        """Frees every block that is merely cached."""
        while self._cached:
            self._evict(logged=False)
        self._evictions.forget_lost()

    def check(self, references: Sequence[int], views: Sequence[int]) -> None:
        """Verifies that each block is free, cached or held, exactly once, and can be found.

        Args:
            references: tables that hold each block.
            views: tables whose window reaches each block.

        Raises:
            AssertionError: names the block.
        """
        for block in self._blocks:
            name, block_id = f"block {block.block_id}", block.block_id
            assert block.num_references == references[block_id], f"{name}: wrong reference count"
            assert block.num_views == views[block_id], f"{name}: wrong count of views"
            assert block.num_references or block.digest or block.window_id is None, f"{name}: free with a window"
            sets = (self._free, self._cached, self._pinned)
            states = [*(block_id in one for one in sets), block.num_references > 0]
            assert sum(states) == 1, f"{name} is not in exactly one state: {states}"
            assert block_id not in self._free or block.digest is None, f"{name}: free but indexed"
            assert not (states[1] or states[2]) or block.digest, f"{name}: cached but not indexed"
            assert not states[1] or not block.num_pins, f"{name} is pinned and could be evicted"
            assert not states[2] or block.num_pins, f"{name} is kept and not pinned"
            assert block.digest or not (block.num_pins or block.num_awaited), f"{name}: wanted but not indexed"
            if block.digest is not None:
                self._index.check(block)
        self._windows.check(self._blocks)
        assert len(self._index) == sum(b.digest is not None for b in self._blocks), "stale index entry"
        assert len(self._free_heap) <= 2 * len(self), "the heap of free blocks grows"
        assert len(self._victims) <= 2 * len(self), "the heap of victims grows"
        assert self._free.issubset(self._free_heap), "a free block cannot be found"
        leaves = {(self._priority(b), i) for i in self._cached if not (b := self._blocks[i]).children}
        assert leaves.issubset(self._victims), "a cached leaf cannot be found"
        self._evictions.check(lambda digest: self._index.get(digest) is not None)

    def _give_back(self, block: Block) -> None:
        self._windows.drop(block)
        self._free.add(block.block_id)
        heapq.heappush(self._free_heap, block.block_id)
        if len(self._free_heap) > 2 * len(self):  # mostly blocks that were taken out of turn
            self._free_heap = sorted(self._free)

    def _keep(self, block: Block) -> None:
        """Files an indexed block that no table holds."""
        if block.num_pins:
            self._pinned.add(block.block_id)
        else:
            self._cached.add(block.block_id)
            self._offer(block)

    def _offer(self, block: Block) -> None:
        """Makes a cached leaf a candidate for eviction."""
        if block.block_id not in self._cached or block.children:
            return
        heapq.heappush(self._victims, (self._priority(block), block.block_id))
        if len(self._victims) > 2 * len(self):  # mostly out of date: hits without pressure never pop
            leaves = (b for b in map(self._blocks.__getitem__, self._cached) if not b.children)
            self._victims = [(self._priority(b), b.block_id) for b in leaves]
            heapq.heapify(self._victims)

    def _evict(self, logged: bool) -> None:
        """Frees the cached leaf of lowest priority. Each entry is pushed once and popped once: O(log n)."""
        while True:
            priority, block_id = heapq.heappop(self._victims)
            block = self._blocks[block_id]
            is_leaf = block_id in self._cached and not block.children
            if is_leaf and priority == self._priority(block):  # else out of date
                break
        self._age = max(self._age, priority[0])
        if logged:
            self._log(block, priority)
        self._cached.remove(block_id)
        self.unindex(block)
        self._give_back(block)

    def _log(self, block: Block, priority: Priority) -> None:
        assert block.digest is not None
        eviction = Eviction(
            block_id=block.block_id,
            num_tokens=block.num_tokens_before + len(block.token_ids),
            depth=block.depth,
            importance=block.importance,
            num_uses=block.num_uses,
            num_awaited=block.num_awaited,
            priority=priority,
            policy=self._policy,
            at=self._clock,
        )
        self._evictions.add(block.digest, eviction)

"""The pool of KV blocks: which are free, held by a table, or merely cached, and which cached one goes first.

A block that no table holds any more is free at once, unless it is in the prefix index: then it stays cached until its
room is needed. Leaves of the cached tree are evicted first, in the order of an eviction policy. A block that goes
leaves the index with it, and an entry in the log of evictions.

A pinned block is never evicted. With one all blocks before it are pinned, so that every other cached block can still be
reached from the leaves.
"""

import heapq

from minirksc.cache.eviction import POLICIES, Eviction, EvictionLog, Policy, Priority
from minirksc.cache.index import Block, PrefixIndex
from minirksc.errors import ConfigError


class BlockPool:
    """A fixed number of blocks.

    Args:
        num_blocks: size of the pool.
        policy: eviction policy, a key of `eviction.POLICIES` or a function like those.
        index: where blocks may be indexed.
        log: where evictions are noted.

    Attributes:
        free: ids of blocks that hold nothing.
        cached: ids of indexed blocks that no table holds and that may be evicted.
        pinned: ids of indexed blocks that no table holds and that are not evicted.

    Raises:
        ConfigError: the policy is unknown.
    """

    def __init__(self, num_blocks: int, policy: str | Policy, index: PrefixIndex, log: EvictionLog) -> None:
        if isinstance(policy, str) and policy not in POLICIES:
            raise ConfigError(f"eviction {policy!r} is unknown; choose one of {', '.join(POLICIES)}")
        self._priority = POLICIES[policy] if isinstance(policy, str) else policy
        self._index = index
        self._log = log
        self._blocks = [Block(i) for i in range(num_blocks)]
        # Lowest ids first, and the neighbour of a table's last block before all: runs become likely.
        self._free_heap = list(range(num_blocks))
        self.free = set(self._free_heap)
        self.cached: set[int] = set()
        self.pinned: set[int] = set()
        # Candidates for eviction as (priority, block id); entries that are out of date are skipped.
        self._victims: list[tuple[Priority, int]] = []
        self._clock = 0
        self._age = 0.0  # highest priority that was ever evicted

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, block_id: int) -> Block:
        return self._blocks[block_id]

    def has_room(self, num_blocks: int) -> bool:
        """True when `take` will succeed so many times."""
        return num_blocks <= len(self.free) + len(self.cached)

    def take(self, wanted: int, depth: int) -> Block:
        """Hands out a block that holds nothing, referenced once; the caller knows that there is room.

        Args:
            wanted: block id that is best, if it is free.
            depth: place in the reasoning tree of the table that takes it.
        """
        if not self.free:
            self._evict(logged=True)
        if wanted not in self.free:
            while self._free_heap[0] not in self.free:
                heapq.heappop(self._free_heap)  # taken out of turn, as somebody's neighbour
            wanted = heapq.heappop(self._free_heap)
        self.free.remove(wanted)
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
        self.cached.discard(block.block_id)
        self.pinned.discard(block.block_id)

    def unreference(self, block: Block) -> None:
        """One table holds it no more."""
        block.num_references -= 1
        if block.num_references:
            return
        if block.digest is None:
            self._free_block(block)
        else:
            block.cached_at = self._age
            self.file(block)

    def file(self, block: Block) -> None:
        """Puts an indexed block among those that are pinned, or among those that may go, unless a table holds it.

        To be called when its claims have changed: these say whether it may go, and when.
        """
        if block.num_references:
            return
        to, other = (self.pinned, self.cached) if block.num_pins else (self.cached, self.pinned)
        to.add(block.block_id)
        other.discard(block.block_id)
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
        while self.cached:
            self._evict(logged=False)
        self._log.forget_lost()

    def _free_block(self, block: Block) -> None:
        self.free.add(block.block_id)
        heapq.heappush(self._free_heap, block.block_id)
        if len(self._free_heap) > 2 * len(self):  # mostly blocks that were taken out of turn
            self._free_heap = sorted(self.free)

    def _offer(self, block: Block) -> None:
        """Makes a cached leaf a candidate for eviction."""
        if block.block_id not in self.cached or block.children:
            return
        heapq.heappush(self._victims, (self._priority(block), block.block_id))
        if len(self._victims) > 2 * len(self):  # mostly out of date: hits without pressure never pop
            leaves = (b for b in map(self._blocks.__getitem__, self.cached) if not b.children)
            self._victims = [(self._priority(b), b.block_id) for b in leaves]
            heapq.heapify(self._victims)

    def _evict(self, logged: bool) -> None:
        """Frees the cached leaf of lowest priority. Each entry is pushed once and popped once: O(log n)."""
        while True:
            priority, block_id = heapq.heappop(self._victims)
            block = self._blocks[block_id]
            is_leaf = block_id in self.cached and not block.children
            if is_leaf and priority == self._priority(block):  # else out of date
                break
        self._age = max(self._age, priority[0])
        if logged:
            self._note(block, priority)
        self.cached.remove(block_id)
        self.unindex(block)
        self._free_block(block)

    def _note(self, block: Block, priority: Priority) -> None:
        assert block.digest is not None
        eviction = Eviction(
            block_id=block.block_id,
            num_tokens=block.num_tokens_before + len(block.token_ids),
            depth=block.depth,
            importance=block.importance,
            num_uses=block.num_uses,
            num_awaited=block.num_awaited,
            priority=priority,
            policy=self._priority.__name__,
            at=self._clock,
        )
        self._log.add(block.digest, eviction)

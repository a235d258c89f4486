"""RSBCM's block manager: which block of the KV cache holds which tokens.

The cache is a fixed pool of blocks of `block_size` tokens. A sequence's block table lists its blocks in order;
token position p lies in slot `table[p // block_size] * block_size + p % block_size`. Blocks are shared by
reference count; a shared block is copied just before one of its sharers writes into it (copy-on-write).

The life of a block:

    free --reserve--> referenced --commit, when full--> referenced and indexed
     ^                    |                                 |          ^
     |                  free()                            free()     add() finds it
     |                    v                                 v          |
     +--------------------+ <-------- evicted -------- cached ---------+

The `PrefixIndex` finds a full block by its whole history. The `BlockPool` keeps cached blocks until their room is
needed. Here are the tables over both: who shares, who copies, who gives back. What helps to choose whom to evict comes
from outside: how much attention blocks receive (`observe`), which sequences will come back (`free` with returns,
`forget`), what is to stay in any case (`pin`).

Where some layers have a sliding window, a block also has room in a `WindowPool` while a table's window reaches it. A
cached prefix serves only as far as the window before its end is still there.

Knows neither tensors nor requests: it hands out numbers, and says which blocks its caller must copy.
Source of the name and of the default priority: RKSC, arXiv 2606.09937, section on RSBCM.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from minirksc.cache.awaited import Awaited
from minirksc.cache.eviction import Policy
from minirksc.cache.eviction_log import Eviction, EvictionLog
from minirksc.cache.index import Block, PrefixIndex, block_digest
from minirksc.cache.pins import Pins
from minirksc.cache.pool import BlockPool
from minirksc.cache.search import PrefixSearch
from minirksc.cache.table import Table
from minirksc.cache.windows import NO_WINDOW, WindowPool
from minirksc.errors import CacheFullError, ConfigError

IMPORTANCE_RATE = 0.2
"""Weight of one measurement in the moving average: it is over about the last five readers."""


class BlockCopy(NamedTuple):
    """The caller must copy this block's KV before anything is written in the same step.

    A step's copies keep their order, or are all read before the first is stored: a source may be evicted and
    become the destination of a later copy. The window's numbers are those of layers with a pool apart.
    """

    source: int
    destination: int
    window_source: int = -1
    window_destination: int = -1


class BlockBytes(NamedTuple):
    """Bytes of one block's KV: over the layers that keep every block, and over those with a pool apart."""

    full: int
    window: int


class BlockManager:
    """A pool of blocks, the tables over it, and the prefix index.

    Args:
        num_blocks: size of the pool.
        block_size: tokens a block.
        policy: eviction policy, a key of `eviction.POLICIES` or a function like those.
        windows: room for the layers with a window, where they have a pool apart.

    Raises:
        ConfigError: a size below 1, or an unknown policy.
    """

    def __init__(
        self, num_blocks: int, block_size: int, policy: str | Policy = "rksc", windows: WindowPool | None = None
    ) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ConfigError(
                f"a pool of {num_blocks} blocks of {block_size} tokens is smaller than one block; raise kv_cache_bytes"
            )
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.windows = windows or WindowPool(0, None, block_size)
        self._policy = policy
        self._log = EvictionLog()
        self._open()

    def _open(self) -> None:
        """All blocks are free, and there is no table."""
        self._index = PrefixIndex(self.block_size)
        self._search = PrefixSearch(self._index, self.windows, self.block_size)
        self._pool = BlockPool(self.num_blocks, self._policy, self._index, self.windows, self._log)
        self._tables: dict[int, Table] = {}
        self._awaited = Awaited(self._index, self._pool)
        self._pins = Pins(self._pool, self.windows, self.block_size)

    # What there is

    @property
    def num_free(self) -> int:
        """Blocks that hold nothing."""
        return self._pool.num_free

    @property
    def num_cached(self) -> int:
        """Blocks that no table references, kept for the next prompt that begins with them; pinned ones included."""
        return self._pool.num_cached

    @property
    def num_pinned(self) -> int:
        """Of the cached blocks those that are pinned: they are not evicted."""
        return self._pool.num_pinned

    @property
    def num_used(self) -> int:
        """Blocks that some table references."""
        return self.num_blocks - self.num_free - self.num_cached

    @property
    def num_evicted_blocks(self) -> int:
        """Cached blocks that had to make room."""
        return self._log.num_evicted

    @property
    def num_recomputed_tokens(self) -> int:
        """Tokens of full blocks that were computed again because their block had been evicted."""
        return self._log.num_needed_again * self.block_size

    @property
    def evictions(self) -> list[Eviction]:
        """The last evictions, oldest first; see `eviction_log.MAX_EVICTIONS`."""
        return self._log.entries

    @property
    def pin_advice(self) -> str:
        """For messages about a full cache: how much of it is pinned and how to change that; "" if nothing is."""
        return self._pins.advice

    def __contains__(self, seq_id: int) -> bool:
        return seq_id in self._tables

    def block_table(self, seq_id: int) -> list[int]:
        """Block ids in order of position; the manager's own list, read-only."""
        return self._tables[seq_id].block_ids

    def window_table(self, seq_id: int) -> list[int]:
        """The same for layers with a window: where each block is in their pool; -1 for one that has no room there."""
        if self.windows.num_blocks == 0:
            return self.block_table(seq_id)
        ids = (self._pool[block_id].window_id for block_id in self.block_table(seq_id))
        return [-1 if window_id is None else window_id for window_id in ids]

    def salt(self, seq_id: int) -> bytes:
        """What the sequence's blocks were made with."""
        return self._tables[seq_id].salt

    def num_tokens(self, seq_id: int) -> int:
        """Tokens of the sequence whose KV has been written."""
        return len(self._tables[seq_id].token_ids)

    def holds(self, seq_id: int, positions: Sequence[int]) -> bool:
        """Whether KV of these positions has been written and is still in all layers."""
        if seq_id not in self._tables or max(positions, default=-1) >= self.num_tokens(seq_id):
            return False
        table = self.window_table(seq_id)
        return all(table[position // self.block_size] >= 0 for position in positions)

    def num_shared_tokens(self, seq_id: int) -> int:
        """Tokens whose block another table holds too."""
        table, size = self._tables[seq_id], self.block_size
        num_tokens = len(table.token_ids)
        return sum(
            min(size, num_tokens - place * size)
            for place, block_id in enumerate(table.block_ids[: -(-num_tokens // size)])
            if self._pool[block_id].num_references > 1
        )

    # Sequences

    def add(
        self,
        seq_id: int,
        token_ids: Sequence[int],
        *,
        salt: bytes = b"",
        depth: int = 0,
        use_cache: bool = True,
    ) -> list[BlockCopy]:
        """Opens a table and adopts the longest cached prefix of token_ids.

        At least one token is left to compute, since cached KV gives no logits. Whole blocks are shared; of
        the block after them, the tokens that agree are taken by a copy into an own block.

        Args:
            seq_id: not in use.
            token_ids: of the prompt.
            salt: sequences with different salts never share.
            depth: of its node in the reasoning tree. An adopted block is as shallow as the shallowest who took it.
            use_cache: False adopts nothing.

        Returns:
            At most one copy. `num_tokens` then tells how much was adopted.
        """
        assert seq_id not in self._tables
        table = self._tables[seq_id] = Table([], [], salt, depth, [], self.windows.first_needed(0))
        table.awaited = self._awaited.forget(seq_id)
        self._pins.resume(seq_id)
        if not use_cache:
            return []
        chain, partial, num_partial = self._search(token_ids, salt)
        table.window_begin = self.windows.first_needed(len(chain) * self.block_size)
        for block in chain:
            assert block.digest is not None
            self._pool.reference(block)
            block.depth = min(block.depth, depth)
            table.block_ids.append(block.block_id)
            table.digests.append(block.digest)
            table.token_ids += block.token_ids
        for block in chain[table.window_begin :]:
            self.windows.view(block)
        if partial is None:
            return []
        copies: list[BlockCopy] = []
        self._pool.reference(partial)  # the source must survive the search for room, in the window too
        if partial.window_id is not None:
            self.windows.view(partial)
        if self._pool.has_room(1) and self.windows.has_room(1):
            table.token_ids += partial.token_ids[:num_partial]
            copies.append(self._append_copy(table, partial))
        if partial.window_id is not None:
            self.windows.release(partial)
        self._pool.release(partial)
        self._slide(table)
        return copies

    def match(self, token_ids: Sequence[int], salt: bytes = b"") -> int:
        """How many tokens `add` would adopt, if it finds room for a partial block."""
        chain, _, num_partial = self._search(token_ids, salt)
        return len(chain) * self.block_size + num_partial

    def fork(self, parent_id: int, child_id: int, depth: int | None = None) -> None:
        """Opens a table that shares every block of another, the partial one included; copies nothing."""
        assert child_id not in self._tables
        parent = self._tables[parent_id]
        # Blocks past the written tokens are the parent's alone.
        held = parent.block_ids[: -(-len(parent.token_ids) // self.block_size)]
        for block_id in held:
            self._pool.reference(self._pool[block_id])
        for block_id in held[parent.window_begin :]:
            self.windows.view(self._pool[block_id])
        self._tables[child_id] = Table(
            list(held),
            list(parent.token_ids),
            parent.salt,
            parent.depth if depth is None else depth,
            list(parent.digests),
            parent.window_begin,
            parent.exact_len,
        )

    def free(self, seq_id: int, returns: bool = False) -> None:
        """Closes a table. Its indexed blocks stay cached, the others are free at once.

        Args:
            seq_id: whose.
            returns: the sequence goes on later and will want its blocks again; until `add` or `forget`.
        """
        table = self._tables.pop(seq_id)
        if returns:
            self._awaited.note(seq_id, table)
        self._pins.capture(seq_id, table)
        for block_id in table.block_ids[table.window_begin :]:
            self.windows.release(self._pool[block_id])
        # From the end, so that a cached leaf is older than its parent.
        for block_id in reversed(table.block_ids):
            self._pool.release(self._pool[block_id])

    def forget(self, seq_id: int) -> None:
        """A sequence without a table will not come back; does nothing where it was not awaited."""
        self._awaited.forget(seq_id)

    def await_fork(self, parent_id: int, child_id: int) -> None:
        """A sequence was forked that has no table: its child will come for the same blocks. Does nothing otherwise."""
        self._awaited.fork(parent_id, child_id)

    def pin(self, seq_id: int) -> None:
        """From now on full blocks of the sequence are not evicted when its table is closed; until `unpin` or `reset`.

        Twice is fine. What is pinned cannot be used for anything else: where too much is, `reserve` says so.
        """
        self._pins.add(seq_id)

    def unpin(self, seq_id: int) -> None:
        """Its blocks may be evicted again; one that is not pinned is left alone."""
        self._pins.discard(seq_id)

    def observe(self, seq_id: int, mass: Sequence[float]) -> None:
        """Takes in how much attention the blocks of a sequence received in one decode step.

        Importance is an exponential moving average of a block's mass, as a multiple of what an average block of its
        table receives. So a block that was never measured (1) is an average one, neither better nor worse than all
        that were, and blocks of short and long tables can be compared. A shared block is measured by each of its
        branches, one after the other: its average is over its last readers. Their number does not count here: it is in
        the depth (`rksc`) and in who will come back (`cost`).

        Args:
            seq_id: has a table.
            mass: of each of its blocks in order, mean over heads and layers. Where it is longer than the table or
                shorter, what both have is taken. What is not finite is left out.
        """
        block_ids = self._tables[seq_id].block_ids
        num_blocks = min(len(block_ids), len(mass))
        for block_id, one in zip(block_ids, mass, strict=False):
            if math.isfinite(one):  # NaN has no order: it would hide all other candidates
                block = self._pool[block_id]
                block.importance += IMPORTANCE_RATE * (one * num_blocks - block.importance)

    # Writing

    def blocks_needed(self, seq_id: int, num_tokens: int) -> int:
        """Blocks that `reserve` would take, the copy of a shared one included."""
        table = self._tables[seq_id]
        more = max(0, -(-num_tokens // self.block_size) - len(table.block_ids))
        return more + (num_tokens > len(table.token_ids) and self._must_copy(table))

    def can_reserve(self, seq_id: int, num_tokens: int) -> bool:
        """True when `reserve` would succeed."""
        needed = self.blocks_needed(seq_id, num_tokens)
        return self._pool.has_room(needed) and self.windows.has_room(needed)

    def can_hold(self, seq_id: int, num_tokens: int) -> bool:
        """True when so many tokens would fit, written in steps small enough for the window pool."""
        return self._pool.has_room(self.blocks_needed(seq_id, num_tokens))

    def reserve(self, seq_id: int, num_tokens: int) -> list[BlockCopy]:
        """Makes the table cover positions [0, num_tokens), those not yet written being the table's own.

        Returns:
            At most one copy: of the block that holds the next position, when it is not the table's alone.

        Raises:
            CacheFullError: too few blocks are free or evictable; nothing has changed.
        """
        table, size = self._tables[seq_id], self.block_size
        needed = self.blocks_needed(seq_id, num_tokens)
        if not (self._pool.has_room(needed) and self.windows.has_room(needed)):
            windows = self.windows
            raise CacheFullError(
                f"{needed} blocks are needed, {self.num_free} are free and {self.num_cached - self.num_pinned} "
                f"evictable of {self.num_blocks}"
                + (
                    f", for windows {windows.num_free} and {windows.num_cached} of {windows.num_blocks}"
                    if windows.num_blocks
                    else ""
                )
                + "; raise kv_cache_bytes"
                + self.pin_advice
            )
        copies: list[BlockCopy] = []
        place = len(table.token_ids) // size
        if num_tokens > len(table.token_ids) and place < len(table.block_ids):
            block = self._pool[table.block_ids[place]]
            if self._must_copy(table):
                copies.append(self._append_copy(table, block))
                table.block_ids[place] = table.block_ids.pop()
                if place >= table.window_begin:
                    self.windows.release(block)
                self._pool.release(block)
            elif block.digest is not None:
                self._pool.unindex(block)  # its tokens are about to change, and nothing builds on them
        while len(table.block_ids) * size < num_tokens:
            self._append_block(table)
        return copies

    def commit(self, seq_id: int, token_ids: Sequence[int]) -> None:
        """The KV of these tokens, from position `num_tokens` on, has been written; full blocks are indexed."""
        table = self._tables[seq_id]
        table.token_ids += token_ids
        assert len(table.token_ids) <= len(table.block_ids) * self.block_size
        while (len(table.digests) + 1) * self.block_size <= len(table.token_ids):
            self._index_next(table)
        self._slide(table)

    def keep_out_of_index(self, seq_id: int, num_tokens: int) -> None:
        """From position num_tokens on the table's KV is approximate: no other prompt may find it; forks share it."""
        table = self._tables[seq_id]
        table.exact_len = min(table.exact_len, num_tokens)

    def can_rewind(self, seq_id: int, num_tokens: int) -> bool:
        """Whether `rewind` is possible: by the last position always, by more as far as a window is still there."""
        table = self._tables[seq_id]
        return min(table.window_begin, len(table.block_ids)) <= self.windows.first_needed(num_tokens)

    def rewind(self, seq_id: int, num_tokens: int) -> None:
        """Forgets the KV of positions from num_tokens on; see `can_rewind`."""
        table, size = self._tables[seq_id], self.block_size
        assert 0 <= num_tokens <= len(table.token_ids)
        assert self.can_rewind(seq_id, num_tokens)
        del table.token_ids[num_tokens:]
        del table.digests[num_tokens // size :]
        keep = -(-num_tokens // size)
        for block_id in reversed(table.block_ids[keep:]):
            block = self._pool[block_id]
            if table.window_begin != NO_WINDOW:
                self.windows.release(block)
            self._pool.release(block)
        del table.block_ids[keep:]

    def clear(self) -> None:
        """Frees every block and closes every table, whatever state they are in. Pinned sequences stay pinned."""
        pinned = self._pins.seq_ids
        self.windows.clear()
        self._log.forget_lost()
        self._open()
        for seq_id in pinned:
            self._pins.add(seq_id)

    def reset(self) -> None:
        """Forgets every block that is merely cached, and unpins all."""
        self._pins.clear()
        self._pool.reset()

    # Inside: the index

    def _slide(self, table: Table) -> None:
        """Gives up what has left the table's window."""
        begin = min(self.windows.first_kept(len(table.token_ids)), len(table.block_ids))
        for block_id in table.block_ids[table.window_begin : begin]:
            self.windows.release(self._pool[block_id])
        table.window_begin = max(table.window_begin, begin)

    def _index_next(self, table: Table) -> None:
        """Indexes the table's next full block; where an equal one is indexed already, the table takes that one.

        Its parent must be the indexed block of this very table: then whoever holds a block holds the whole
        chain before it, and every cached block can be evicted once those after it are.
        """
        place, size = len(table.digests), self.block_size
        token_ids = tuple(table.token_ids[place * size : (place + 1) * size])
        previous = table.digests[-1] if place else b""
        digest = block_digest(previous, table.salt, token_ids)
        table.digests.append(digest)
        if len(table.digests) * size > table.exact_len:
            return
        block = self._pool[table.block_ids[place]]
        parent = self._pool[table.block_ids[place - 1]] if place else None
        lost = self._log.computed(digest)
        if lost is not None:
            block.depth = min(block.depth, lost.depth)  # whose branch computes it again says nothing about its place
        if parent is not None and parent.digest != previous:
            return
        if (equal := self._index.get(digest)) is not None:
            if equal.parent is parent and block.num_references == 1:
                self._replace(table, place, equal)
            return
        self._index.insert(block, parent, digest, token_ids, table.salt)
        self._pool.set_awaited(block, self._awaited.count(digest))

    def _replace(self, table: Table, place: int, equal: Block) -> None:
        """Puts an indexed block in place of the table's own, which holds the same; with its window, if that is lost."""
        block = self._pool[table.block_ids[place]]
        self._pool.reference(equal)
        if place >= table.window_begin:
            if equal.window_id is None:
                self.windows.move(block, equal)
            else:
                self.windows.view(equal)
                self.windows.release(block)
        table.block_ids[place] = equal.block_id
        self._pool.release(block)

    # Inside: blocks of a table

    def _must_copy(self, table: Table) -> bool:
        """True when the block of the next position holds what somebody else still needs."""
        place = len(table.token_ids) // self.block_size
        if place >= len(table.block_ids):
            return False
        block = self._pool[table.block_ids[place]]
        return block.num_references > 1 or bool(block.children) or block.num_pins > 0

    def _append_block(self, table: Table) -> Block:
        """Adds an own block to the table; the caller knows that there is one."""
        neighbour = table.block_ids[-1] + 1 if table.block_ids else None
        block = self._pool.take(neighbour, table.depth)
        if len(table.block_ids) >= table.window_begin:
            self.windows.take(block)
        table.block_ids.append(block.block_id)
        return block

    def _append_copy(self, table: Table, source: Block) -> BlockCopy:
        """Adds an own block to the table that is to be a copy of another one."""
        before = source.window_id
        block = self._append_block(table)
        if before is None or block.window_id is None:
            return BlockCopy(source.block_id, block.block_id)
        return BlockCopy(source.block_id, block.block_id, before, block.window_id)

    def check_integrity(self) -> None:
        """Verifies every invariant; for tests.

        Raises:
            AssertionError: names the block or table that is wrong.
        """
        references, views = [0] * self.num_blocks, [0] * self.num_blocks
        for seq_id, table in self._tables.items():
            for place, block_id in enumerate(table.block_ids):
                references[block_id] += 1
                views[block_id] += place >= table.window_begin
            blocks = [self._pool[block_id] for block_id in table.block_ids]
            first_in_view = self.windows.first_needed(len(table.token_ids))
            table.check(f"table {seq_id}", self.block_size, blocks, first_in_view)
        pins = self._pins.check(self._tables, views)
        for block_id in range(self.num_blocks):
            block = self._pool[block_id]
            assert block.num_pins == pins[block_id], f"block {block_id}: wrong count of pins"
            expected = 0 if block.digest is None else self._awaited.count(block.digest)
            assert block.num_awaited == expected, f"block {block_id}: wrong count of those who will come back"
        self._awaited.check(self._tables)
        self._pool.check(references, views)

"""Block tables for models that mix layers with a sliding window and layers that see everything.

Layers with a window need a block only while some sequence's window reaches it. So they have a pool apart, and a block
has a *room* in it beside its place in the full layers: it takes the room when it is made, and may lose it long before
the block itself goes:

    free --take--> in view of a table --hide, the last view--> cached (an indexed block: a prompt may come back)
     ^                  ^                                       |      |
     |                  +---------------- view -----------------+      |
     +-------------------------- drop: room needed, or the block goes -+

Cached rooms are dropped least recently used first. All else is the `BlockManager`'s: which tables hold a block, how it
is found, when it goes. A cached prefix then serves only as far as the window before its end still has rooms.
"""

import heapq
from collections.abc import Sequence

from minirksc.cache.eviction import Policy
from minirksc.cache.index import Block, closest
from minirksc.cache.rsbcm import BlockCopy, BlockManager
from minirksc.cache.tables import BlockCounts, Table
from minirksc.errors import ConfigError


class WindowCopy(BlockCopy):
    """A copy from room to room, in the layers with a window alone; one comes with each `BlockCopy` of a hybrid."""

    __slots__ = ()


def min_blocks(window: int, block_size: int) -> int:
    """Rooms that one sequence needs to go on: its window, the block that it writes, and one for a copy on write."""
    return -(-window // block_size) + 3


class WindowPool:
    """A pool of rooms, each of one block.

    Args:
        num_blocks: how many rooms.
        window: tokens that a query sees, its own included.
        block_size: tokens a block.

    Raises:
        ConfigError: there is less room than one sequence needs.
    """

    def __init__(self, num_blocks: int, window: int, block_size: int) -> None:
        least = min_blocks(window, block_size)
        if num_blocks < least:
            raise ConfigError(
                f"{num_blocks} blocks are less than the {least} that a window of {window} tokens needs; "
                "raise kv_cache_bytes"
            )
        self.num_blocks = num_blocks
        self.max_chunk_tokens = (num_blocks - least + 1) * block_size
        self._window = window
        self._block_size = block_size
        self.clear()

    def clear(self) -> None:
        """All rooms are free; the blocks that had them are gone."""
        self._free = list(range(self.num_blocks))
        self._rooms: dict[int, int] = {}  # by block id
        self._num_views: dict[int, int] = {}  # tables and pins whose window reaches a block that has a room
        self._cached: dict[int, None] = {}  # blocks with a room that no window reaches, least recently used first

    @property
    def num_free(self) -> int:
        """Rooms that hold nothing."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Rooms of blocks that no window reaches, kept until they are needed."""
        return len(self._cached)

    @property
    def num_used(self) -> int:
        """Rooms of blocks in view."""
        return self.num_blocks - self.num_free - self.num_cached

    def has_room(self, num_blocks: int) -> bool:
        """True when `take` will succeed so many times."""
        return num_blocks <= self.num_free + self.num_cached

    def room(self, block_id: int) -> int:
        """Where a block is in the layers with a window; -1: it has no room."""
        return self._rooms.get(block_id, -1)

    def first_needed(self, num_tokens: int) -> int:
        """Place of the first block that the query after so many tokens sees."""
        return max(0, num_tokens - self._window + 1) // self._block_size

    def first_kept(self, num_tokens: int) -> int:
        """Place of the first block to keep: the last token may be computed once more."""
        return max(0, num_tokens - self._window) // self._block_size

    def take(self, block_id: int) -> None:
        """Gives a room to a new block, in view of one table."""
        if not self._free:
            self.drop(next(iter(self._cached)))
        self._rooms[block_id] = heapq.heappop(self._free)
        self._num_views[block_id] = 1

    def view(self, block_id: int) -> None:
        """One more window reaches a block, which has a room."""
        self._num_views[block_id] += 1
        self._cached.pop(block_id, None)

    def hide(self, block: Block) -> None:
        """One window reaches it no more."""
        self._num_views[block.block_id] -= 1
        if self._num_views[block.block_id] == 0:
            self._cached[block.block_id] = None
            if block.digest is None:  # it cannot be found again
                self.drop(block.block_id)

    def drop(self, block_id: int) -> None:
        """Takes back the room, if there is any, of a block that is not in view."""
        if block_id in self._cached:
            del self._cached[block_id], self._num_views[block_id]
            heapq.heappush(self._free, self._rooms.pop(block_id))

    def move(self, source: int, destination: int) -> None:
        """Hands the room and the views of one block to an equal one that has none."""
        self._rooms[destination] = self._rooms.pop(source)
        self._num_views[destination] = self._num_views.pop(source)


class HybridManager(BlockManager):
    """A `BlockManager` whose blocks have rooms in a window pool besides.

    Args:
        num_blocks: size of the pool of the full layers.
        block_size: tokens a block.
        windows: pool of the layers with a window.
        policy: eviction policy, as in `BlockManager`.
    """

    def __init__(self, num_blocks: int, block_size: int, windows: WindowPool, policy: str | Policy = "rksc") -> None:
        super().__init__(num_blocks, block_size, policy)
        self.windows = windows
        self.max_chunk_tokens = windows.max_chunk_tokens

    def _open(self) -> None:
        super()._open()
        # Place of the first block whose room is held: by each table, and by each pinned sequence while it has none.
        self._begins: dict[int, int] = {}
        self._pin_begins: dict[int, int] = {}

    def clear(self) -> None:
        """Frees every block, room and table, whatever state they are in. Pinned sequences stay pinned."""
        self.windows.clear()
        super().clear()

    def reset(self) -> None:
        """Forgets every block that is merely cached, and unpins all."""
        super().reset()
        for block_id in range(self.num_blocks):
            if self._pool[block_id].digest is None:
                self.windows.drop(block_id)  # of what was evicted

    @property
    def window_counts(self) -> BlockCounts:
        """Rooms."""
        windows = self.windows
        return BlockCounts(windows.num_blocks, windows.num_used, windows.num_cached, windows.num_free)

    def window_table(self, seq_id: int) -> list[int]:
        """Where each block is in the layers with a window; -1 for one that has no room there."""
        return [self.windows.room(block_id) for block_id in self.block_table(seq_id)]

    def can_rewind(self, seq_id: int, num_tokens: int) -> bool:
        """Whether `rewind` is possible: by the last position always, by more as far as a window is still there."""
        return self._begins[seq_id] <= self.windows.first_needed(num_tokens)

    # Sequences

    def fork(self, parent_id: int, child_id: int, depth: int | None = None) -> None:
        """Opens a table that shares every block of another and sees what that sees."""
        super().fork(parent_id, child_id, depth)
        if child_id in self:
            begin = self._begins[child_id] = self._begins[parent_id]
            for block_id in self.block_table(child_id)[begin:]:
                self.windows.view(block_id)

    def free(self, seq_id: int, returns: bool = False) -> None:
        """Closes a sequence's table, if it has one; of a pinned one the window before its end stays."""
        table = self._tables.get(seq_id)
        if table is None:
            return super().free(seq_id, returns)
        begin, claimed = self._begins.pop(seq_id), self._pinned.get(seq_id, [])
        for block_id in table.block_ids[begin:]:
            self.windows.hide(self._pool[block_id])
        super().free(seq_id, returns)
        if seq_id in self._pinned:
            digests = self._pinned.get(seq_id, [])
            # A block more than the table had in view, if the last full one ends before the tokens do.
            begin = min(begin, self.windows.first_needed(len(digests) * self.block_size))
            self._view_pinned(seq_id, begin if digests != claimed else self._pin_begins.get(seq_id, 0))

    def unpin(self, seq_id: int) -> None:
        """Its blocks may be evicted again, and lose their rooms."""
        if seq_id not in self:
            self._hide_pinned(seq_id)
        self._pin_begins.pop(seq_id, None)
        super().unpin(seq_id)

    # Inside

    def _slide(self, table: Table) -> None:
        """Gives up what has left the table's window."""
        before, begin = self._begins[table.seq_id], self.windows.first_kept(len(table.token_ids))
        for block_id in table.block_ids[before:begin]:
            self.windows.hide(self._pool[block_id])
        self._begins[table.seq_id] = max(before, begin)

    def _pinned_blocks(self, seq_id: int) -> list[Block]:
        """What a pinned sequence claims; all of it is in the index."""
        blocks = map(self._index.get, self._pinned.get(seq_id, []))
        return [block for block in blocks if block is not None]

    def _view_pinned(self, seq_id: int, begin: int) -> None:
        """A pinned sequence whose table was closed holds the rooms from a block on, as far as none of them is lost."""
        blocks = self._pinned_blocks(seq_id)
        lost = [place for place, block in enumerate(blocks) if self.windows.room(block.block_id) < 0]
        begin = self._pin_begins[seq_id] = max(begin, lost[-1] + 1 if lost else 0)
        for block in blocks[begin:]:
            self.windows.view(block.block_id)

    def _hide_pinned(self, seq_id: int) -> None:
        """A pinned sequence that had no table holds no rooms any more."""
        for block in self._pinned_blocks(seq_id)[self._pin_begins.get(seq_id, 0) :]:
            self.windows.hide(block)

    def _find(self, token_ids: Sequence[int], salt: bytes) -> tuple[list[Block], Block | None, int]:
        usable = token_ids[:-1]
        chain = self._in_window(self._index.chain(usable, salt))
        begin = len(chain) * self.block_size
        following = [block for block in self._index.following(chain, salt) if self.windows.room(block.block_id) >= 0]
        return chain, *closest(following, usable[begin : begin + self.block_size])

    def _in_window(self, chain: list[Block]) -> list[Block]:
        """As much of a cached chain as has the window before its end."""
        missing = -1  # last place without a room
        num_usable = 0
        for place, block in enumerate(chain):
            if self.windows.room(block.block_id) < 0:
                missing = place
            if missing < self.windows.first_needed((place + 1) * self.block_size):
                num_usable = place + 1
        return chain[:num_usable]

    def _adopt(self, table: Table, chain: list[Block]) -> None:
        self._hide_pinned(table.seq_id)  # the table's window takes the place of the pin's
        super()._adopt(table, chain)
        begin = self._begins[table.seq_id] = self.windows.first_needed(len(chain) * self.block_size)
        for block in chain[begin:]:
            self.windows.view(block.block_id)

    def _append_block(self, table: Table) -> Block:
        block = super()._append_block(table)
        self.windows.drop(block.block_id)  # left by what was evicted for it
        self.windows.take(block.block_id)
        return block

    def _append_copy(self, table: Table, source: Block) -> list[BlockCopy]:
        copies = super()._append_copy(table, source)
        rooms = (self.windows.room(copy_of) for copy_of in copies[0])
        return [*copies, WindowCopy(*rooms)]

    def _replace(self, table: Table, place: int, equal: Block) -> None:
        own = self._pool[table.block_ids[place]]
        super()._replace(table, place, equal)
        if self.windows.room(equal.block_id) < 0:
            self.windows.move(own.block_id, equal.block_id)
        else:
            self.windows.view(equal.block_id)
            self.windows.hide(own)

    def _has_room(self, num_blocks: int) -> bool:
        return super()._has_room(num_blocks) and self.windows.has_room(num_blocks)

    def _room(self) -> str:
        windows = self.windows
        return f"{super()._room()}, for windows {windows.num_free} and {windows.num_cached} of {windows.num_blocks}"

    def _reference(self, block: Block) -> None:
        super()._reference(block)
        self.windows.view(block.block_id)

    def _unreference(self, block: Block) -> None:
        self.windows.hide(block)
        super()._unreference(block)

"""Room for the KV of blocks that are in view of layers with a sliding window.

Such layers need a block only while some sequence's window reaches it. So a block has room here beside its room in the
full layers, takes it when it is made, and may lose it long before the block itself goes:

    free --take--> in view of a table --release, the last view--> cached (an indexed block: a prompt may come back)
     ^                  ^                                          |      |
     |                  +----------------- view -------------------+      |
     +----------------------------------- room needed, or the block goes -+

Cached room is given up least recently used first. Knows blocks only by the fields of `Viewable`.
"""

import heapq
from collections.abc import Iterable
from typing import Protocol

from minirksc.errors import ConfigError

NO_WINDOW = 1 << 62
"""As a place: beyond every table, so that no block is ever in view."""


class Viewable(Protocol):
    """What this module reads and writes of a block.

    Attributes:
        block_id: its number in the full layers.
        digest: None when it is not in the prefix index.
        window_id: its number here; None when it has no room.
        num_views: tables whose window reaches it.
    """

    block_id: int
    digest: bytes | None
    window_id: int | None
    num_views: int


def min_blocks(window: int, block_size: int) -> int:
    """Rooms that one sequence needs to go on: its window, the block that it writes, and one for a copy on write."""
    return -(-window // block_size) + 3


class WindowPool:
    """A pool of rooms.

    Args:
        num_blocks: how many; 0 where no layer has a window apart.
        window: tokens that a query sees, its own included; None with num_blocks 0.
        block_size: tokens a block.

    Raises:
        ConfigError: there is less room than one sequence needs.
    """

    def __init__(self, num_blocks: int, window: int | None, block_size: int) -> None:
        if window is not None and num_blocks < min_blocks(window, block_size):
            raise ConfigError(
                f"{num_blocks} blocks are less than the {min_blocks(window, block_size)} that a window of {window} "
                "tokens needs; raise kv_cache_bytes"
            )
        self.num_blocks = num_blocks
        self._window = window
        self._block_size = block_size
        self.clear()

    def clear(self) -> None:
        """All rooms are free; the blocks that had them are gone."""
        self._free = list(range(self.num_blocks))
        self._cached: dict[int, Viewable] = {}  # by window_id, least recently used first

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

    @property
    def max_chunk_tokens(self) -> int:
        """Tokens of one sequence that a single step can always write, if it has the pool to itself."""
        if self._window is None:
            return NO_WINDOW
        return (self.num_blocks - min_blocks(self._window, self._block_size) + 1) * self._block_size

    def has_room(self, num_blocks: int) -> bool:
        """True when `take` will succeed so many times."""
        return self._window is None or num_blocks <= self.num_free + self.num_cached

    def first_needed(self, num_tokens: int) -> int:
        """Place of the first block that the query after so many tokens sees."""
        return NO_WINDOW if self._window is None else max(0, num_tokens - self._window + 1) // self._block_size

    def first_kept(self, num_tokens: int) -> int:
        """Place of the first block to keep: the last token may be computed once more."""
        return NO_WINDOW if self._window is None else max(0, num_tokens - self._window) // self._block_size

    def take(self, block: Viewable) -> None:
        """Gives room to a new block, in view of one table."""
        if not self._free:
            self.drop(next(iter(self._cached.values())))
        block.window_id = heapq.heappop(self._free)
        block.num_views = 1

    def view(self, block: Viewable) -> None:
        """One more table's window reaches a block, which has room."""
        assert block.window_id is not None
        block.num_views += 1
        self._cached.pop(block.window_id, None)

    def release(self, block: Viewable) -> None:
        """One table's window reaches it no more."""
        assert block.window_id is not None
        block.num_views -= 1
        if block.num_views == 0:
            self._cached[block.window_id] = block
            if block.digest is None:  # nobody can find it again
                self.drop(block)

    def drop(self, block: Viewable) -> None:
        """Takes back the room, if there is any, of a block that is not in view."""
        if block.window_id is not None:
            del self._cached[block.window_id]
            heapq.heappush(self._free, block.window_id)
            block.window_id = None

    def move(self, source: Viewable, destination: Viewable) -> None:
        """Hands the room and the views of one block to an equal one that has none."""
        assert destination.window_id is None
        destination.window_id, destination.num_views = source.window_id, source.num_views
        source.window_id, source.num_views = None, 0

    def check(self, blocks: Iterable[Viewable]) -> None:
        """Verifies that each room is free, cached or in view, exactly once.

        Raises:
            AssertionError: names the block or room.
        """
        seen: dict[int, Viewable] = {}
        for block in blocks:
            name = f"block {block.block_id}"
            if block.window_id is None:
                assert block.num_views == 0, f"{name} is in view and has no room"
                continue
            assert block.window_id not in seen, f"{name} shares the room {block.window_id}"
            seen[block.window_id] = block
            assert (block.num_views == 0) == (block.window_id in self._cached), f"{name}: wrongly cached in the window"
            assert block.num_views or block.digest is not None, f"{name} keeps a window that nobody can find"
        assert sorted([*seen, *self._free]) == list(range(self.num_blocks)), "rooms are lost or double"
        assert all(seen.get(i) is block for i, block in self._cached.items()), "a cached room is another block's"

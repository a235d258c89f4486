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
needed. Here are the tables over both: who shares, who copies, who gives back.

Where some layers have a sliding window, a block also has room in a `WindowPool` while a table's window reaches it. A
cached prefix serves only as far as the window before its end is still there.

Knows neither tensors nor requests: it hands out numbers, and says which blocks its caller must copy.
Source of the name and of the default priority: RKSC, arXiv 2606.09937, section on RSBCM.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from minirksc.block_pool import BlockPool
from minirksc.errors import CacheFullError, ConfigError
from minirksc.prefix_index import Block, PrefixIndex, block_digest
from minirksc.window_pool import NO_WINDOW, WindowPool


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


@dataclass(slots=True)
class Table:
    """One sequence.

    Attributes:
        block_ids: in order of position; may reach beyond the tokens.
        token_ids: whose KV has been written.
        salt: root of its digests.
        depth: of its node in the reasoning tree.
        digests: of its full blocks, indexed or not.
        window_begin: place of the first block that it keeps in view of the layers with a window.
    """

    block_ids: list[int]
    token_ids: list[int]
    salt: bytes
    depth: int
    digests: list[bytes]
    window_begin: int = NO_WINDOW


class BlockManager:
    """A pool of blocks, the tables over it, and the prefix index.

    Args:
        num_blocks: size of the pool.
        block_size: tokens a block.
        policy: eviction policy, a key of `eviction.POLICIES`.
        windows: room for the layers with a window, where they have a pool apart.

    Raises:
        ConfigError: a size below 1, or an unknown policy.
    """

    def __init__(
        self, num_blocks: int, block_size: int, policy: str = "rksc", windows: WindowPool | None = None
    ) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ConfigError(
                f"a pool of {num_blocks} blocks of {block_size} tokens is smaller than one block; raise kv_cache_bytes"
            )
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.windows = windows or WindowPool(0, None, block_size)
        self._index = PrefixIndex(block_size)
        self._pool = BlockPool(num_blocks, policy, self._index, self.windows)
        self._tables: dict[int, Table] = {}

    # What there is

    @property
    def num_free(self) -> int:
        """Blocks that hold nothing."""
        return self._pool.num_free

    @property
    def num_cached(self) -> int:
        """Blocks that no table references, kept for the next prompt that begins with them."""
        return self._pool.num_cached

    @property
    def num_used(self) -> int:
        """Blocks that some table references."""
        return self.num_blocks - self.num_free - self.num_cached

    @property
    def num_evicted_blocks(self) -> int:
        """Cached blocks that had to make room."""
        return self._pool.num_evicted

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
            depth: of its node in the reasoning tree.
            use_cache: False adopts nothing.

        Returns:
            At most one copy. `num_tokens` then tells how much was adopted.
        """
        assert seq_id not in self._tables
        table = self._tables[seq_id] = Table([], [], salt, depth, [], self.windows.first_needed(0))
        if not use_cache:
            return []
        chain, partial, num_partial = self._find(token_ids, salt)
        table.window_begin = self.windows.first_needed(len(chain) * self.block_size)
        for block in chain:
            assert block.digest is not None
            self._pool.reference(block)
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
        chain, _, num_partial = self._find(token_ids, salt)
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
        )

    def free(self, seq_id: int) -> None:
        """Closes a table. Its indexed blocks stay cached, the others are free at once."""
        table = self._tables.pop(seq_id)
        for block_id in table.block_ids[table.window_begin :]:
            self.windows.release(self._pool[block_id])
        # From the end, so that a cached leaf is older than its parent.
        for block_id in reversed(table.block_ids):
            self._pool.release(self._pool[block_id])

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
        if not self.can_reserve(seq_id, num_tokens):
            windows = self.windows
            raise CacheFullError(
                f"{needed} blocks are needed, {self.num_free} are free and {self.num_cached} evictable of "
                f"{self.num_blocks}"
                + (
                    f", for windows {windows.num_free} and {windows.num_cached} of {windows.num_blocks}"
                    if windows.num_blocks
                    else ""
                )
                + "; raise kv_cache_bytes"
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

    def rewind(self, seq_id: int, num_tokens: int) -> None:
        """Forgets the KV of positions from num_tokens on; with a window, of the last one only."""
        table, size = self._tables[seq_id], self.block_size
        assert 0 <= num_tokens <= len(table.token_ids)
        assert min(table.window_begin, len(table.block_ids)) <= self.windows.first_needed(num_tokens)
        del table.token_ids[num_tokens:]
        del table.digests[num_tokens // size :]
        keep = -(-num_tokens // size)
        for block_id in reversed(table.block_ids[keep:]):
            block = self._pool[block_id]
            if table.window_begin != NO_WINDOW:
                self.windows.release(block)
            self._pool.release(block)
        del table.block_ids[keep:]

    def reset(self) -> None:
        """Forgets every block that is merely cached."""
        self._pool.reset()

    # Inside: the index

    def _find(self, token_ids: Sequence[int], salt: bytes) -> tuple[list[Block], Block | None, int]:
        """(full blocks, the block to copy from, how many of its tokens agree)."""
        usable = token_ids[:-1]
        chain = self._in_window(self._index.chain(usable, salt))
        begin = len(chain) * self.block_size
        rest = tuple(usable[begin : begin + self.block_size])
        best, num_best = None, 0
        for block in self._index.following(chain, salt):
            if self.windows.num_blocks and block.window_id is None:
                continue
            num_equal = 0
            while num_equal < len(rest) and block.token_ids[num_equal] == rest[num_equal]:
                num_equal += 1
            if num_equal > num_best:
                best, num_best = block, num_equal
        return chain, best, num_best

    def _in_window(self, chain: list[Block]) -> list[Block]:
        """As much of a cached chain as has the window before its end."""
        missing = -1  # last place without room in the window pool
        num_usable = 0
        for place, block in enumerate(chain):
            if block.window_id is None:
                missing = place
            if missing < self.windows.first_needed((place + 1) * self.block_size):
                num_usable = place + 1
        return chain[:num_usable]

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
        block = self._pool[table.block_ids[place]]
        parent = self._pool[table.block_ids[place - 1]] if place else None
        if parent is not None and parent.digest != previous:
            return
        if (equal := self._index.get(digest)) is not None:
            if equal.parent is parent and block.num_references == 1:
                self._replace(table, place, equal)
            return
        self._index.insert(block, parent, digest, token_ids, table.salt)

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
        return block.num_references > 1 or bool(block.children)

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
            size = self.block_size
            assert len(table.block_ids) * size >= len(table.token_ids), f"table {seq_id} is too short"
            assert len(table.digests) == len(table.token_ids) // size, f"digests of table {seq_id}"
            assert len(set(table.block_ids)) == len(table.block_ids), f"table {seq_id} repeats a block"
            for block_id in table.block_ids[table.window_begin :]:
                views[block_id] += 1
            needed = self.windows.first_needed(len(table.token_ids))
            assert min(table.window_begin, len(table.block_ids)) <= needed, f"table {seq_id} lost what is in its window"
            digest = b""
            for place, block_id in enumerate(table.block_ids):
                references[block_id] += 1
                if place < len(table.digests):
                    tokens = table.token_ids[place * size : (place + 1) * size]
                    digest = block_digest(digest, table.salt, tokens)
                    assert table.digests[place] == digest, f"digest {place} of table {seq_id}"
                    block = self._pool[block_id]
                    assert block.digest in (None, digest), f"block {block_id} is indexed as another's"
                    assert block.digest is None or block.salt == table.salt, f"block {block_id}: another salt's"
        self._pool.check(references, views)

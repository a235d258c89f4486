"""RSBCM, RKSC's block cache manager: which block of the KV cache holds which tokens.

- What is a block? Room for the keys and values of `block_size` tokens, in every layer. There is a fixed number of them.
- Which tables hold it? A sequence's `Table` lists its blocks in order of position; any number of tables may list the
  same block, and `Block.num_references` counts them.
- How is it found again? A full block is indexed by its tokens and all tokens before it (`index`). A prompt that begins
  alike takes the same blocks, as many as agree.
- Which goes first? What no table holds stays cached until its room is needed (`pool`); then the eviction policy chooses
  (`eviction`), among those that no claim protects (`claims`).

100 tokens in 7 blocks (block_size 16); position p lies in slot `table[p // 16] * 16 + p % 16`:

    positions    0-15   16-31   32-47   48-63   64-79   80-95   96-99
    table      [    3,      4,      5,      9,     10,     11,     12]    12 is partial, the others are indexed

Fork, then copy on write:

    fork                 parent [3 4 5 9 10 11 12]    child [3 4 5 9 10 11 12]    nothing is copied
    child decodes        parent [3 4 5 9 10 11 12]    child [3 4 5 9 10 11 20]    BlockCopy(source=12, destination=20)

The life of a block:

    free --reserve--> referenced --commit, when full--> referenced and indexed
     ^                    |                                 |          ^
     |                  free()                            free()     add() finds it
     |                    v                                 v          |
     +--------------------+ <-------- evicted -------- cached ---------+

One verb a level: a *sequence* is released (by its engine), so its *table* is freed here (`free`), so its *blocks* are
unreferenced, each by one table; those that no table references are cached, or free. In layers with a window the
*rooms* of its blocks are hidden, each from one table; those that nothing views are cached, or dropped.

Knows neither tensors nor requests: it hands out numbers, and says which blocks its caller must copy. All its layers
keep every block; where some of them have a sliding window, `hybrid.HybridManager` is in its place.
Source of the name and of the default priority: RKSC, arXiv 2606.09937, section on RSBCM.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from minirksc.cache.claims import longer
from minirksc.cache.index import Block, block_digest, closest
from minirksc.cache.tables import BlockTables, Table
from minirksc.errors import CacheFullError

IMPORTANCE_RATE = 0.2
"""Weight of one measurement in the moving average: it is over about the last five readers."""


class BlockCopy(NamedTuple):
    """The caller must copy this block's KV before anything is written in the same step.

    A step's copies keep their order, or are all read before the first is stored: a source may be evicted and
    become the destination of a later copy.
    """

    source: int
    destination: int


class BlockBytes(NamedTuple):
    """Bytes of one block's KV: over the layers that keep every block, and over those with a window apart."""

    full: int
    window: int


class BlockManager(BlockTables):
    """One cache of blocks: what its tables hold, share and copy.

    Each sequence is added (or forked), reserves room, commits what was written, and is freed in the end.
    """

    # Sequences

    def add(
        self, seq_id: int, token_ids: Sequence[int], *, salt: bytes = b"", depth: int = 0, use_cache: bool = True
    ) -> list[BlockCopy]:
        """Opens a table and adopts the longest cached prefix of token_ids.

        At least one token is left to compute, since cached KV gives no logits. Whole blocks are shared; of
        the block after them, the tokens that agree are taken by a copy into an own block.

        Args:
            seq_id: key of the sequence, not in use.
            token_ids: tokens of the prompt.
            salt: sequences with different salts never share.
            depth: place of its node in the reasoning tree. An adopted block is as shallow as the shallowest taker.
            use_cache: False adopts nothing.

        Returns:
            The copy of that block, if there is one. `num_tokens` then tells how much was adopted.
        """
        assert seq_id not in self._tables
        table = self._tables[seq_id] = Table(seq_id, salt, depth, awaited=self._awaited.pop(seq_id, []))
        chain, partial, num_equal = self._find(token_ids if use_cache else [], salt)
        self._adopt(table, chain)
        copies = [] if partial is None else self._adopt_copy(table, partial, num_equal)
        self._slide(table)
        return copies

    def match(self, token_ids: Sequence[int], salt: bytes = b"") -> int:
        """How many tokens `add` would adopt, if it finds room for a partial block."""
        chain, _, num_equal = self._find(token_ids, salt)
        return len(chain) * self.block_size + num_equal

    def fork(self, parent_id: int, child_id: int, depth: int | None = None) -> None:
        """Opens a table that shares every block of another, the partial one included; copies nothing.

        Where the parent's table was taken back the child has none either: it waits for the same blocks.
        """
        assert child_id not in self._tables
        if parent_id in self._awaited:
            self._awaited[child_id] = self._awaited[parent_id]
        if parent_id not in self._tables:
            return
        parent = self._tables[parent_id]
        child = self._tables[child_id] = replace(
            parent,
            seq_id=child_id,
            depth=parent.depth if depth is None else depth,
            # Blocks past the written tokens are the parent's alone.
            block_ids=parent.block_ids[: -(-len(parent.token_ids) // self.block_size)],
            token_ids=list(parent.token_ids),
            digests=list(parent.digests),
            awaited=[],
        )
        for block_id in child.block_ids:
            self._pool.reference(self._pool[block_id])

    def free(self, seq_id: int, returns: bool = False) -> None:
        """Closes a sequence's table, if it has one. Its indexed blocks stay cached, the others are free at once.

        Args:
            seq_id: key of the sequence.
            returns: the sequence goes on later and will want its blocks again, until it is added or freed for good.
        """
        table = self._tables.pop(seq_id, None)
        if table is None:
            if not returns:
                self._awaited.pop(seq_id, None)
            return
        self._claim(table, returns)
        for block_id in table.block_ids:
            self._pool.unreference(self._pool[block_id])

    def pin(self, seq_id: int) -> None:
        """From now on full blocks of the sequence are not evicted when its table is closed; until `unpin` or `reset`.

        Twice is fine. What is pinned cannot be used for anything else: where too much is, `reserve` says so.
        """
        self._pinned.setdefault(seq_id, [])

    def unpin(self, seq_id: int) -> None:
        """Its blocks may be evicted again; one that is not pinned is left alone."""
        self._pinned.pop(seq_id, None)

    def observe(self, seq_id: int, mass: Sequence[float]) -> None:
        """Takes in how much attention the blocks of a sequence received in one decode step.

        Importance is an exponential moving average of a block's mass, as a multiple of what an average block of its
        table receives. So a block that was never measured (1) is an average one, neither better nor worse than all
        that were, and blocks of short and long tables can be compared. A shared block is measured by each of its
        branches, one after the other: its average is over its last readers. Their number does not count here: it is in
        the depth (`rksc`) and in what will come back (`cost`).

        Args:
            seq_id: key of a sequence that has a table.
            mass: share of each of its blocks in order, mean over heads and layers. Where it is longer than the table
                or shorter, what both have is taken. What is not finite is left out.
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

    def can_reserve(self, seq_id: int, num_tokens: int, total: int = 0) -> bool:
        """True when `reserve` would succeed, and could go on to a total of so many tokens, step by step.

        The total is asked of the pool alone: layers with a window give rooms back on the way.
        """
        if total > num_tokens and not self._pool.has_room(self.blocks_needed(seq_id, total)):
            return False
        return self._has_room(self.blocks_needed(seq_id, num_tokens))

    def reserve(self, seq_id: int, num_tokens: int) -> list[BlockCopy]:
        """Makes the table cover positions [0, num_tokens), those not yet written being the table's own.

        Returns:
            The copy of the block that holds the next position, when that is not the table's alone.

        Raises:
            CacheFullError: too few blocks are free or evictable; nothing has changed.
        """
        table = self._tables[seq_id]
        if not self.can_reserve(seq_id, num_tokens):
            needed = self.blocks_needed(seq_id, num_tokens)
            raise CacheFullError(f"{needed} blocks are needed, {self._room()}; raise kv_cache_bytes{self.pin_advice}")
        copies = self._own_next(table) if num_tokens > len(table.token_ids) else []
        while len(table.block_ids) * self.block_size < num_tokens:
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
        """Whether `rewind` is possible: by the last position always, by more where no window hides what is gone."""
        return True

    def rewind(self, seq_id: int, num_tokens: int) -> None:
        """Forgets the KV of positions from num_tokens on; see `can_rewind`."""
        table, size = self._tables[seq_id], self.block_size
        assert 0 <= num_tokens <= len(table.token_ids) and self.can_rewind(seq_id, num_tokens)
        del table.token_ids[num_tokens:]
        del table.digests[num_tokens // size :]
        while len(table.block_ids) > -(-num_tokens // size):
            self._unreference(self._pool[table.block_ids.pop()])

    def clear(self) -> None:
        """Frees every block and closes every table, whatever state they are in. Pinned sequences stay pinned."""
        pinned = list(self._pinned)
        self._log.forget_lost()
        self._open()
        for seq_id in pinned:
            self.pin(seq_id)

    def reset(self) -> None:
        """Forgets every block that is merely cached, and unpins all."""
        for seq_id in list(self._pinned):
            self.unpin(seq_id)
        self._pool.reset()

    # Inside: a table and its blocks

    def _find(self, token_ids: Sequence[int], salt: bytes) -> tuple[list[Block], Block | None, int]:
        """(full blocks to adopt, the block to copy from, how many of its tokens agree); one token is left over."""
        usable = token_ids[:-1]
        chain = self._index.chain(usable, salt)
        begin = len(chain) * self.block_size
        rest = usable[begin : begin + self.block_size]
        return chain, *closest(self._index.following(chain, salt), rest)

    def _adopt(self, table: Table, chain: list[Block]) -> None:
        """A new table takes indexed blocks."""
        for block in chain:
            assert block.digest is not None
            self._pool.reference(block)
            block.depth = min(block.depth, table.depth)
            table.block_ids.append(block.block_id)
            table.digests.append(block.digest)
            table.token_ids += block.token_ids

    def _adopt_copy(self, table: Table, source: Block, num_tokens: int) -> list[BlockCopy]:
        """A new table takes the first tokens of an indexed block into an own block, if there is room for one."""
        copies: list[BlockCopy] = []
        self._reference(source)  # it must survive the search for room
        if self._has_room(1):
            table.token_ids += source.token_ids[:num_tokens]
            copies = self._append_copy(table, source)
        self._unreference(source)
        return copies

    def _claim(self, table: Table, returns: bool) -> None:
        """Says what is to stay of a table that is about to be closed."""
        if returns:
            self._awaited[table.seq_id] = longer(table.awaited, table.digests)
        if table.seq_id in self._pinned:
            blocks = map(self._pool.__getitem__, table.block_ids)
            digests = [block.digest for block in blocks if block.digest is not None]
            self._pinned[table.seq_id] = longer(self._pinned[table.seq_id], digests)

    def _own_next(self, table: Table) -> list[BlockCopy]:
        """Makes the block of the next position, if the table lists one already, its own."""
        place = len(table.token_ids) // self.block_size
        if place == len(table.block_ids):
            return []
        block = self._pool[table.block_ids[place]]
        if self._must_copy(table):
            copies = self._append_copy(table, block)
            table.block_ids[place] = table.block_ids.pop()
            self._unreference(block)
            return copies
        if block.digest is not None:
            self._pool.unindex(block)  # its tokens are about to change, and nothing builds on them
        return []

    def _must_copy(self, table: Table) -> bool:
        """True when the block of the next position holds what is still needed elsewhere."""
        place = len(table.token_ids) // self.block_size
        if place >= len(table.block_ids):
            return False
        block = self._pool[table.block_ids[place]]
        return block.num_references > 1 or bool(block.children) or block.num_pins > 0

    def _append_block(self, table: Table) -> Block:
        """Adds an own block to the table; the caller knows that there is one."""
        neighbour = table.block_ids[-1] + 1 if table.block_ids else 0
        block = self._pool.take(neighbour, table.depth)
        table.block_ids.append(block.block_id)
        return block

    def _append_copy(self, table: Table, source: Block) -> list[BlockCopy]:
        """Adds an own block to the table that is to be a copy of another one."""
        return [BlockCopy(source.block_id, self._append_block(table).block_id)]

    def _index_next(self, table: Table) -> None:
        """Indexes the table's next full block; where an equal one is indexed already, the table takes that one.

        Two prompts that begin alike were computed side by side, with block_size 4:

            7: tokens 0-3 in block [5], nothing equal is indexed    -> [5] is indexed
            8: tokens 0-3 in block [9], [5] holds the same          -> table 8 lists [5], and [9] is free

        So the blocks before it in this very table are the indexed ones, up to where the KV is approximate: what holds a
        block holds the whole chain before it, and every cached block can be evicted once those after it are.
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
        if (lost := self._log.computed(digest)) is not None:
            block.depth = min(block.depth, lost.depth)  # the branch that computes it again says nothing of its place
        if (equal := self._index.get(digest)) is None:
            self._index.insert(block, parent, digest, token_ids, table.salt)
            self._awaited.mark(block)
        else:
            self._replace(table, place, equal)

    def _replace(self, table: Table, place: int, equal: Block) -> None:
        """Puts an indexed block in place of the table's own, which holds the same."""
        self._pool.reference(equal)
        self._pool.unreference(self._pool[table.block_ids[place]])
        table.block_ids[place] = equal.block_id

    # Inside: what a hybrid does besides

    def _slide(self, table: Table) -> None:
        """Gives up what has left the table's window; there is none."""

    def _has_room(self, num_blocks: int) -> bool:
        """True when `_append_block` will succeed so many times."""
        return self._pool.has_room(num_blocks)

    def _room(self) -> str:
        """How much room there is, for messages."""
        return f"{self.num_free} are free and {len(self._pool.cached)} evictable of {self.num_blocks}"

    def _reference(self, block: Block) -> None:
        """One more table holds a block and sees it."""
        self._pool.reference(block)

    def _unreference(self, block: Block) -> None:
        """One table that sees a block holds it no more."""
        self._pool.unreference(block)

"""Block tables over one pool, and what can be asked of them without changing anything."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from minirksc.cache.claims import Claims
from minirksc.cache.eviction import Eviction, EvictionLog, Policy
from minirksc.cache.index import PrefixIndex
from minirksc.cache.pool import BlockPool
from minirksc.errors import ConfigError

NO_LIMIT = 1 << 62


class BlockCounts(NamedTuple):
    """How many blocks of a pool there are in all, are held by tables, merely cached, and free."""

    total: int
    used: int
    cached: int
    free: int


@dataclass(slots=True)
class Table:
    """One sequence's block table.

    Attributes:
        seq_id: key of the sequence.
        salt: root of its digests.
        depth: place of its node in the reasoning tree.
        block_ids: its blocks in order of position; may reach beyond the tokens.
        token_ids: tokens whose KV has been written.
        digests: keys of its full blocks, indexed or not.
        exact_len: tokens whose KV is the model's own; blocks beyond are approximate and never indexed.
        awaited: what it claimed before it came back: the full blocks that it had.
    """

    seq_id: int
    salt: bytes
    depth: int
    block_ids: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    exact_len: int = NO_LIMIT
    awaited: list[bytes] = field(default_factory=list)


class BlockTables:
    """A pool of blocks, the tables over it, the prefix index, and what is claimed.

    Args:
        num_blocks: size of the pool.
        block_size: tokens a block.
        policy: eviction policy, a key of `eviction.POLICIES` or a function like those.

    Attributes:
        max_chunk_tokens: tokens of one sequence that a single step can always write, if it has the cache to itself.

    Raises:
        ConfigError: a size is below 1, or the policy is unknown.
    """

    def __init__(self, num_blocks: int, block_size: int, policy: str | Policy = "rksc") -> None:
        if num_blocks < 1 or block_size < 1:
            raise ConfigError(
                f"a pool of {num_blocks} blocks of {block_size} tokens is smaller than one block; raise kv_cache_bytes"
            )
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.max_chunk_tokens = NO_LIMIT
        self._policy = policy
        self._log = EvictionLog()
        self._open()

    def _open(self) -> None:
        """All blocks are free, and there is no table."""
        self._index = PrefixIndex(self.block_size)
        self._pool = BlockPool(self.num_blocks, self._policy, self._index, self._log)
        self._tables: dict[int, Table] = {}
        self._awaited = Claims("num_awaited", self._index, self._pool)
        self._pinned = Claims("num_pins", self._index, self._pool)

    # Of the pool

    @property
    def num_free(self) -> int:
        """Blocks that hold nothing."""
        return len(self._pool.free)

    @property
    def num_cached(self) -> int:
        """Blocks that no table references, kept for the next prompt that begins with them; pinned ones included."""
        return len(self._pool.cached) + len(self._pool.pinned)

    @property
    def num_pinned(self) -> int:
        """Cached blocks that are pinned: they are not evicted."""
        return len(self._pool.pinned)

    @property
    def num_used(self) -> int:
        """Blocks that some table references."""
        return self.num_blocks - self.num_free - self.num_cached

    @property
    def window_counts(self) -> BlockCounts:
        """Blocks of layers whose window has a pool apart; none here."""
        return BlockCounts(0, 0, 0, 0)

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
        """The last evictions, oldest first; see `eviction.MAX_EVICTIONS`."""
        return self._log.entries

    @property
    def pin_advice(self) -> str:
        """For messages about a full cache: how much of it is pinned and how to change that; "" if nothing is."""
        if not self.num_pinned:
            return ""
        return f"; {self.num_pinned} blocks of {len(self._pinned)} pinned sequences stay in it: unpin() some"

    # Of one table

    def __contains__(self, seq_id: int) -> bool:
        return seq_id in self._tables

    def block_table(self, seq_id: int) -> list[int]:
        """Block ids in order of position; the manager's own list, read-only."""
        return self._tables[seq_id].block_ids

    def window_table(self, seq_id: int) -> list[int]:
        """The same for layers with a window; where these have a pool apart, -1 for a block that has no room in it."""
        return self.block_table(seq_id)

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
        """Tokens whose block another table holds too; shared blocks are always the first ones."""
        table = self._tables[seq_id]
        num_shared = sum(self._pool[block_id].num_references > 1 for block_id in table.block_ids)
        return min(num_shared * self.block_size, len(table.token_ids))

"""Claims: reasons for which blocks should stay although no table holds them.

There are two kinds, and each is one `Claims`:

- *awaited*: a sequence whose table was taken back, because room was needed, goes on later and wants its blocks again.
  The claim ends when it is back, or will not come. It makes eviction less likely (see `eviction.cost`).
- *pinned*: somebody asked for it. The claim ends with `unpin`, and until then the blocks are not evicted.

What a sequence claims is set when its table is closed. It claims digests, not blocks, and these are counted: so a claim
outlives its block. Where a block was evicted and is computed again for somebody else, it is known at once who waits for
it. Every indexed block is told its counts.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Literal

from minirksc.cache.index import Block, PrefixIndex
from minirksc.cache.pool import BlockPool


class Claims:
    """Digests by the sequences that claim them, for one reason.

    Args:
        count: Attribute of a block that counts these claims.
        index: Where the block of a digest is found.
        pool: What is told of each change: it decides which blocks may go.
    """

    def __init__(self, count: Literal["num_awaited", "num_pins"], index: PrefixIndex, pool: BlockPool) -> None:
        self._count = count
        self._index = index
        self._pool = pool
        self._digests: dict[int, list[bytes]] = {}
        self._counts: Counter[bytes] = Counter()

    def __contains__(self, seq_id: int) -> bool:
        return seq_id in self._digests

    def __iter__(self) -> Iterator[int]:
        return iter(self._digests)

    def __len__(self) -> int:
        return len(self._digests)

    def of(self, seq_id: int) -> list[bytes]:
        """What a sequence claims, in order of position."""
        return self._digests.get(seq_id, [])

    def claim(self, seq_id: int, digests: Sequence[bytes]) -> None:
        """From now on the sequence claims these, in place of what it claimed."""
        before = self.of(seq_id)
        self._digests[seq_id] = list(digests)
        self._add(digests, 1)
        self._add(before, -1)

    def drop(self, seq_id: int) -> list[bytes]:
        """The sequence claims nothing any more; returns what it claimed."""
        digests = self._digests.pop(seq_id, [])
        self._add(digests, -1)
        return digests

    def mark(self, block: Block) -> None:
        """Tells an indexed block how many sequences claim it."""
        assert block.digest is not None
        self._pool.mark(block, self._count, self._counts[block.digest])

    def _add(self, digests: Sequence[bytes], number: int) -> None:
        for digest in digests:
            self._counts[digest] += number
            if not self._counts[digest]:
                del self._counts[digest]  # else the counter grows with everything that was ever claimed
            if (block := self._index.get(digest)) is not None:
                self.mark(block)


def longer(before: list[bytes], now: list[bytes]) -> list[bytes]:
    """What to claim at the end of a table: what was claimed before, if the table was closed on the way back to it."""
    return before if before[: len(now)] == now else now

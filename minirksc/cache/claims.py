"""Claims: reasons for which blocks should stay although no table holds them.

There are two kinds, and each is one `Claims`:

- *awaited*: a sequence whose table was taken back, because room was needed, goes on later and wants its blocks again.
  The claim ends when it is back, or will not come. It makes eviction less likely (see `eviction.cost`).
- *pinned*: somebody asked for it. The claim ends with `unpin`, and until then the blocks are not evicted.

What a sequence claims is set when its table is closed. It claims digests, not blocks, and these are counted: so a claim
outlives its block. Where a block was evicted and is computed again for somebody else, it is known at once who waits for
it. Every indexed block is told its counts.
"""

from collections import Counter, UserDict
from collections.abc import Sequence
from typing import Literal

from minirksc.cache.index import Block, PrefixIndex
from minirksc.cache.pool import BlockPool


class Claims(UserDict[int, list[bytes]]):
    """Sequence -> digests of the blocks that it claims, in order of position, for one reason.

    A dict that counts: with each change of it the blocks learn how often they are claimed now.

    Args:
        count: attribute of a block that counts these claims.
        index: where the block of a digest is found.
        pool: what is told of each change: it decides which blocks may go.
    """

    def __init__(self, count: Literal["num_awaited", "num_pins"], index: PrefixIndex, pool: BlockPool) -> None:
        super().__init__()
        self._count = count
        self._index = index
        self._pool = pool
        self._counts: Counter[bytes] = Counter()

    def __setitem__(self, seq_id: int, digests: list[bytes]) -> None:
        before = self.data.get(seq_id, [])
        self.data[seq_id] = digests
        self._add(digests, 1)
        self._add(before, -1)

    def __delitem__(self, seq_id: int) -> None:
        self._add(self.data.pop(seq_id), -1)

    def mark(self, block: Block) -> None:
        """Tells an indexed block how many sequences claim it."""
        assert block.digest is not None
        setattr(block, self._count, self._counts[block.digest])
        self._pool.file(block)

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

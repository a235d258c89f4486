"""Which blocks live sequences without a table will need again.

A sequence whose table was taken back, because room was needed, goes on later: its blocks are wanted again. One that
was pruned or has finished wants nothing. Blocks are counted by digest, so that a count outlives its block: where a
block was evicted and somebody computes it again, it is known at once who else waits for it. What is indexed is told
its count.
"""

from collections import Counter
from collections.abc import Collection, Sequence

from minirksc.cache.index import PrefixIndex
from minirksc.cache.pool import BlockPool
from minirksc.cache.table import Table


class Awaited:
    """Digests by the sequences that will come back for them.

    Args:
        index: of full blocks.
        pool: where a block's priority may change with its count.
    """

    def __init__(self, index: PrefixIndex, pool: BlockPool) -> None:
        self._index = index
        self._pool = pool
        self._digests: dict[int, list[bytes]] = {}
        self._counts: Counter[bytes] = Counter()

    def count(self, digest: bytes) -> int:
        """How many sequences will come back for a block."""
        return self._counts[digest]

    def note(self, seq_id: int, table: Table) -> None:
        """The table of a sequence that will come back is about to be closed."""
        digests = table.digests
        if table.awaited[: len(digests)] == digests:
            digests = table.awaited  # taken back again before it had computed what it had
        self._note(seq_id, digests)

    def fork(self, parent_id: int, child_id: int) -> None:
        """A child will come back for what its parent is awaited with, if it is."""
        if parent_id in self._digests:
            self._note(child_id, self._digests[parent_id])

    def forget(self, seq_id: int) -> list[bytes]:
        """A sequence is back, or will not come; returns what it was noted with, if it was."""
        digests = self._digests.pop(seq_id, [])
        for digest in digests:
            self._counts[digest] -= 1
            if not self._counts[digest]:
                del self._counts[digest]  # else the counter grows with everything that was ever noted
        self._tell(digests)
        return digests

    def check(self, tables: Collection[int]) -> None:
        """Verifies that the counts are those of the sequences, none of which has a table.

        Args:
            tables: sequences that have one.

        Raises:
            AssertionError: names the sequence.
        """
        for seq_id in self._digests:
            assert seq_id not in tables, f"sequence {seq_id} has a table and is awaited"
        expected = Counter(digest for digests in self._digests.values() for digest in digests)
        assert dict(self._counts) == dict(expected), "counts of awaited blocks"

    def _note(self, seq_id: int, digests: Sequence[bytes]) -> None:
        assert seq_id not in self._digests
        self._digests[seq_id] = list(digests)
        self._counts.update(digests)
        self._tell(digests)

    def _tell(self, digests: Sequence[bytes]) -> None:
        for digest in digests:
            if (block := self._index.get(digest)) is not None:
                self._pool.set_awaited(block, self._counts[digest])

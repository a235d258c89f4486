"""Which keys each query of a batch reads, and where they lie: what forms of the attention on a CPU plan with.

Sequences with several new tokens are prefills, of which each reads its own past. The others decode: they are brought
into an order, that of their places, in which those that share a prefix are neighbours.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from minirksc.errors import ConfigError
from minirksc.kernels.attention.batch import AttentionBatch
from minirksc.kernels.attention.prefix_attention import Segment, find_shared

Run = tuple[int, int]
"""(first slot, number of tokens) of keys that lie consecutively in the cache."""


@dataclass(frozen=True, slots=True)
class PrefillReads:
    """New tokens of one sequence.

    Attributes:
        begin, num_queries: first batch row of the sequence, and number of its rows.
        first_query: position of the first query.
        first_key: position of the first key that it sees.
        is_cut: whether the window hides some of the keys from there on from some of the queries.
        table: places of the sequence's blocks in these layers' cache.
        block_size: number of tokens a block.
    """

    begin: int
    num_queries: int
    first_query: int
    first_key: int
    is_cut: bool
    table: Sequence[int]
    block_size: int

    @property
    def num_past(self) -> int:
        """Keys before the new ones, as far back as the first query sees."""
        return self.first_query - self.first_key

    def runs(self, begin: int, end: int) -> list[Run]:
        """Where the keys at positions [begin, end) are."""
        return _runs(self.table, begin, end, self.block_size)


@dataclass(frozen=True, slots=True)
class DecodeReads:
    """What sequences with one query read.

    Attributes:
        rows: batch row of each place.
        shared: segments that neighbouring places read together, and where their keys are.
        own: runs of keys that each place reads alone; never nothing.
        own_ranges: positions [begin, end) of these.
    """

    rows: list[int]
    shared: list[tuple[Segment, list[Run]]]
    own: list[list[Run]]
    own_ranges: list[list[tuple[int, int]]]


def find_reads(batch: AttentionBatch) -> tuple[list[PrefillReads], DecodeReads]:
    """What the sequences of a batch read, prompts and decode rows.

    Raises:
        ConfigError: its lists do not go together, or a sequence has more new tokens than tokens, or more tokens than
            its blocks hold.
    """
    size = batch.block_size
    if size < 1 or (batch.window is not None and batch.window < 1):
        raise ConfigError(f"blocks of {size} tokens and a window of {batch.window}; both must be 1 at least")
    counts = {len(batch.cu_seqlens_q) - 1, len(batch.context_lens), len(batch.block_tables), len(batch.kv_tables)}
    if len(counts) > 1 or batch.cu_seqlens_q[0] != 0:
        raise ConfigError(
            f"lists of {sorted(counts)} sequences, from row {batch.cu_seqlens_q[0]}: as many in each, from 0"
        )
    prefills: list[PrefillReads] = []
    decode = []
    for i, context_len in enumerate(batch.context_lens):
        begin, end = batch.cu_seqlens_q[i], batch.cu_seqlens_q[i + 1]
        room = min(len(batch.block_tables[i]), len(batch.kv_tables[i])) * size
        if not 0 <= begin <= end <= begin + context_len <= begin + room:
            raise ConfigError(f"sequence {i} has {end - begin} new of {context_len} tokens in blocks for {room}")
        if end - begin == 1:
            decode.append(i)
        elif end > begin:
            first_query = context_len - (end - begin)
            first_key = batch.first_visible(first_query)
            is_cut = batch.first_visible(context_len - 1) > first_key
            table = batch.kv_tables[i]
            prefills.append(PrefillReads(begin, end - begin, first_query, first_key, is_cut, table, size))
    order, segments, ranges = find_shared(batch, decode)
    own = [
        [run for begin, end in some for run in _runs(batch.kv_tables[i], begin, end, size)]
        for i, some in zip(order, ranges, strict=True)
    ]
    shared = [
        (s, _runs(batch.kv_tables[order[s.row_begin]], s.block_begin * size, s.block_end * size, size))
        for s in segments
    ]
    return prefills, DecodeReads([batch.cu_seqlens_q[i] for i in order], shared, own, ranges)


def _runs(table: Sequence[int], begin: int, end: int, block_size: int) -> list[Run]:
    """Slots of positions [begin, end) as runs."""
    if begin >= end:
        return []
    first, last = begin // block_size, (end - 1) // block_size
    runs: list[Run] = []
    run_begin = before = table[first]  # blocks of the run
    skipped = begin - first * block_size  # slots of its first one
    for block_id in table[first + 1 : last + 1]:
        if block_id != before + 1:
            runs.append((run_begin * block_size + skipped, (before + 1 - run_begin) * block_size - skipped))
            run_begin, skipped = block_id, 0
        before = block_id
    unused = (last + 1) * block_size - end
    runs.append((run_begin * block_size + skipped, (before + 1 - run_begin) * block_size - skipped - unused))
    return runs

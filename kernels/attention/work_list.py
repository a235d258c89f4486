"""The work of one step's attention, cut into items: some queries of neighbouring rows against a range of keys.

Decode rows, the shared prefixes of a reasoning tree, chunks of prompts and whole prompts are all items, and one kernel
(`paged_attention`) works through them; only this plan knows the difference. One program takes an item and a KV head.

- Sequences with few new tokens stand in an order in which those that share blocks are neighbours. A shared run of
  blocks is read once for all of them (`prefix_attention`), the rest by each alone.
- Their keys are cut at every multiple of `AttentionBatch.key_chunk`, so that long contexts keep the whole processor
  busy. A token's results over several ranges are partials, merged afterwards. With a fixed chunk the cuts do not
  depend on what else is in the batch.
- Sequences with many new tokens are cut into tiles of queries, each over all the keys that it sees.

Made once a step, on the host, from what the scheduler knows; all layers of a shape use it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from minirksc.kernels.attention import launch_table
from minirksc.kernels.attention.batch import KEY_CHUNK, AttentionBatch
from minirksc.kernels.attention.launch_table import AttentionTile, attention_tile, max_short_rows, product_dtype
from minirksc.kernels.attention.prefix_attention import Segment, find_shared, is_worth_sharing
from minirksc.kernels.kv.kv_check import check_attention
from minirksc.kernels.kv.layer_cache import LayerCache


class Shape(NamedTuple):
    """What a plan depends on besides the batch."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    kv_dtype: torch.dtype
    architecture: str


def work_shape(num_heads: int, layer_cache: LayerCache, dtype: torch.dtype) -> Shape:
    """What the work list for a layer depends on.

    Args:
        num_heads: number of query heads.
        layer_cache: cache of the layer.
        dtype: type of the queries.
    """
    kv = layer_cache.kv
    return Shape(num_heads, kv.shape[3], kv.shape[4], dtype, kv.dtype, launch_table.architecture(kv.device))


class Item(NamedTuple):
    """Queries at places [place_begin, place_begin + num_places) against positions [kv_begin, kv_end) of a table row.

    Attributes:
        full_begin, full_end: range of the whole tiles of keys that all these queries see, between those masked.
        part: number of this among a token's partials; -1: it is the whole result.
    """

    place_begin: int
    num_places: int
    table_row: int
    kv_begin: int
    kv_end: int
    full_begin: int
    full_end: int
    part: int


ITEM_FIELDS = len(Item._fields)


@dataclass(slots=True)
class WorkList:
    """Items as tensors, int32 on the device of the cache.

    Attributes:
        tile: launch of the items of few queries; None: there are none.
        prefill_tile: launch of the items of long prompts; None: there are none.
        items: `[items, ITEM_FIELDS]`, those of few queries first.
        num_short: number of items of few queries.
        tokens: `[tokens]`, batch row of each place.
        positions: `[tokens]`, position in its sequence of the token at each place.
        parts: `[tokens, 2]`, first partial of each token and how many it has; one: it is written directly.
        table: `[sequences, blocks]`, -1 where a sequence has none.
        num_parts: number of partials in all.
    """

    tile: AttentionTile | None
    prefill_tile: AttentionTile | None
    items: Tensor
    num_short: int
    tokens: Tensor
    positions: Tensor
    parts: Tensor
    table: Tensor
    num_parts: int
    _partials: tuple[Tensor, Tensor] | None = field(default=None, init=False, repr=False)

    def launches(self) -> list[tuple[AttentionTile, Tensor]]:
        """How which items are computed; a launch each."""
        parts = (self.tile, self.items[: self.num_short]), (self.prefill_tile, self.items[self.num_short :])
        return [(tile, items) for tile, items in parts if tile is not None]

    def partials(self, num_heads: int, head_dim: int) -> tuple[Tensor, Tensor]:
        """(out `[num_parts, num_heads, head_dim]`, base-2 lse `[num_parts, num_heads]`), float32, for all layers."""
        if self._partials is None:
            shape = (max(self.num_parts, 1), num_heads)
            empty = self.items.new_empty
            self._partials = empty((*shape, head_dim), dtype=torch.float32), empty(shape, dtype=torch.float32)
        return self._partials

    def size_key(self) -> tuple[object, ...]:
        """What a recorded launch of this work depends on, besides the numbers in its tensors."""
        return self.tile, padded_size(self.num_short), padded_size(self.num_parts)


def padded_size(count: int) -> int:
    """The next power of two: a context that grows gets a new size ever more rarely."""
    return 1 << max(count - 1, 0).bit_length()


class StaticWorkList:
    """Buffers that a work list of decode rows is copied into, so that recorded launches find it.

    Args:
        num_rows: number of tokens of the largest batch.
        max_items: number of items that there is room for.
        max_blocks: largest number of blocks of a sequence.
        device: device of the buffers.
    """

    def __init__(self, num_rows: int, max_items: int, max_blocks: int, device: torch.device) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        self._items = zeros(padded_size(max_items), ITEM_FIELDS)
        self._tokens, self._positions = zeros(num_rows), zeros(num_rows)
        self._parts, self._table = zeros(num_rows, 2), zeros(num_rows, max_blocks)

    def has_room(self, work: WorkList) -> bool:
        """Whether there are few enough items; all else is bounded by the batch and the longest sequence."""
        return work.prefill_tile is None and work.num_short <= len(self._items)

    def fill(self, work: WorkList) -> None:
        """Copies the numbers in; items and tokens beyond them become empty."""
        num_rows, width = work.table.shape
        self._items[: work.num_short].copy_(work.items)
        self._items[work.num_short : padded_size(work.num_short)].zero_()
        self._tokens[:num_rows].copy_(work.tokens)
        self._positions[:num_rows].copy_(work.positions)
        self._parts[:num_rows].copy_(work.parts)
        self._parts[num_rows:].zero_()
        self._table[:num_rows, :width].copy_(work.table)

    def view(self, num_rows: int, work: WorkList) -> WorkList:
        """The buffers as a work list for all batches of `work`'s size key.

        It has room for a partial at least: the merge is what gives padding its zeros.
        """
        num_items = padded_size(work.num_short)
        return replace(
            work,
            items=self._items[:num_items],
            num_short=num_items,
            tokens=self._tokens[:num_rows],
            positions=self._positions[:num_rows],
            parts=self._parts[:num_rows],
            table=self._table[:num_rows],
            num_parts=padded_size(work.num_parts),
        )


def adaptive_chunk(context_lens: Sequence[int], num_kv_heads: int, num_programs: int) -> int:
    """Keys an item reads so that about `num_programs` programs have work: fewer partials than a fixed chunk makes.

    Args:
        context_lens: number of keys of each sequence.
        num_kv_heads: number of programs an item.
        num_programs: number of programs that the processor runs at once, for example 4 a multiprocessor.

    Returns:
        A multiple of `KEY_CHUNK`.
    """
    wanted = sum(context_lens) * num_kv_heads / max(num_programs, 1)
    return max(1, round(wanted / KEY_CHUNK)) * KEY_CHUNK


def find_work(q: Tensor, layer_cache: LayerCache, batch: AttentionBatch) -> WorkList:
    """The batch's work list for such queries and such a cache, made by the first layer that asks.

    Args:
        q: `[tokens, num_heads, head_dim]`.
        layer_cache: cache of the layer.
        batch: places of queries and keys.

    Raises:
        ConfigError: a dtype, shape or layout that the kernel cannot serve.
    """
    check_attention(q, layer_cache, batch.block_size)
    shape = work_shape(q.shape[1], layer_cache, q.dtype)
    return batch.plan(shape, lambda batch: make_work_list(batch, shape))


def make_work_list(batch: AttentionBatch, shape: Shape, device: torch.device | None = None) -> WorkList:
    """Cuts a batch into items.

    Args:
        batch: places of queries and keys.
        shape: heads, dtypes and the architecture, which decide the tiles.
        device: device of the tensors; None: the batch's.
    """
    return _Builder(batch, shape).build(device or batch.device)


class _Builder:
    """State while one work list is made."""

    def __init__(self, batch: AttentionBatch, shape: Shape) -> None:
        self.batch, self.shape = batch, shape
        self.group = shape.num_heads // shape.num_kv_heads
        self.items: list[Item] = []
        self.tokens: list[int] = []
        self.positions: list[int] = []
        self.parts = [(0, 1)] * batch.cu_seqlens_q[-1]
        self.num_parts = 0
        self.chunk = batch.key_chunk or adaptive_chunk(
            batch.context_lens, shape.num_kv_heads, launch_table.num_programs(batch.device)
        )

    def build(self, device: torch.device) -> WorkList:
        batch, shape = self.batch, self.shape
        most = max(1, max_short_rows(shape.head_dim, product_dtype(shape.dtype, shape.kv_dtype)) // self.group)
        sequences = [i for i in range(len(batch.context_lens)) if batch.num_queries(i) > 0]
        short = [i for i in sequences if batch.num_queries(i) <= most]
        long = [i for i in sequences if batch.num_queries(i) > most]
        tile = self._add_short(short, most) if short else None
        num_short = len(self.items)
        prefill_tile = self._add_long(long) if long else None

        def tensor(values: object) -> Tensor:
            # Nested lists take torch.tensor four times as long, and contexts are long.
            return torch.from_numpy(np.array(values, dtype=np.int32)).to(device)

        width = max(map(len, batch.kv_tables), default=0)
        table = [[*blocks, *[-1] * (width - len(blocks))] for blocks in batch.kv_tables]
        return WorkList(
            tile=tile,
            prefill_tile=prefill_tile,
            items=tensor(self.items).view(-1, ITEM_FIELDS),
            num_short=num_short,
            tokens=tensor(self.tokens),
            positions=tensor(self.positions),
            parts=tensor(self.parts).view(-1, 2),
            table=tensor(table).view(len(table), width),
            num_parts=self.num_parts,
        )

    def _tile(self, rows: int | None) -> AttentionTile:
        s = self.shape
        return attention_tile(s.architecture, s.head_dim, self.batch.block_size, rows, s.dtype, s.kv_dtype)

    def _place(self, sequence: int) -> int:
        """Gives the sequence's tokens the next places; the first of them."""
        begin, n = self.batch.cu_seqlens_q[sequence], self.batch.num_queries(sequence)
        first = len(self.tokens)
        self.tokens += range(begin, begin + n)
        context_len = self.batch.context_lens[sequence]
        self.positions += range(context_len - n, context_len)
        return first

    def _add_short(self, sequences: list[int], most: int) -> AttentionTile:
        """Items of sequences with at most `most` new tokens: shared prefixes, then what each reads alone."""
        sequences, segments, own = find_shared(self.batch, sequences, self._is_worth)
        places = [self._place(i) for i in sequences]
        places.append(len(self.tokens))
        size = self.batch.block_size
        # Sequences [begin, end) of this order, and the positions [begin, end) that they read together.
        reads = [(s.row_begin, s.row_end, s.block_begin * size, s.block_end * size) for s in segments]
        reads += [(i, i + 1, *positions) for i, ranges in enumerate(own) for positions in ranges]
        most_queries = max(places[end] - places[begin] for begin, end, *_ in reads)
        tile = self._tile(self.group * min(most_queries, most))
        step = tile.rows // self.group
        counts = [0] * len(sequences)  # partials of each query
        for begin, end, *positions in reads:
            pieces = self._pieces(*positions)
            is_all = end - begin == len(pieces) == 1 and not counts[begin]
            # All sharers of a run share the outer runs too, so that its partials have one number.
            for part, (kv_begin, kv_end) in enumerate(pieces, start=counts[begin]):
                for place in range(places[begin], places[end], step):
                    n = min(step, places[end] - place)
                    self._add(place, n, sequences[begin], kv_begin, kv_end, -1 if is_all else part, tile)
            for i in range(begin, end):
                counts[i] += len(pieces)
        for count, begin, end in zip(counts, places, places[1:], strict=False):
            if count > 1:
                for token in self.tokens[begin:end]:
                    self.parts[token] = (self.num_parts, count)
                    self.num_parts += count
        return tile

    def _is_worth(self, segment: Segment, order: Sequence[int]) -> bool:
        return is_worth_sharing(
            self.group,
            num_sequences=segment.row_end - segment.row_begin,
            num_queries=sum(self.batch.num_queries(i) for i in order[segment.row_begin : segment.row_end]),
            num_keys=(segment.block_end - segment.block_begin) * self.batch.block_size,
            kv_itemsize=self.shape.kv_dtype.itemsize,
        )

    def _add_long(self, sequences: list[int]) -> AttentionTile:
        """Tiles of queries, longest first: the last ones of a causal prompt have the most keys."""
        tile = self._tile(None)
        step = max(1, tile.rows // self.group)
        for i in sequences:
            place, n = self._place(i), self.batch.num_queries(i)
            first = self.batch.context_lens[i] - n
            for begin in reversed(range(0, n, step)):
                end = min(begin + step, n)
                kv_begin = self.batch.first_visible(first + begin)
                self._add(place + begin, end - begin, i, kv_begin, first + end, -1, tile)
        return tile

    def _pieces(self, begin: int, end: int) -> list[tuple[int, int]]:
        """[begin, end) cut at the multiples of the chunk."""
        cuts = [begin, *range((begin // self.chunk + 1) * self.chunk, end, self.chunk), end]
        return list(pairwise(cuts))

    def _add(
        self, place: int, num_places: int, sequence: int, kv_begin: int, kv_end: int, part: int, tile: AttentionTile
    ) -> None:
        first, last = min(self.positions[place : place + num_places]), max(self.positions[place : place + num_places])
        size = tile.tile
        full_begin = -(-max(kv_begin, self.batch.first_visible(last)) // size) * size
        full_end = min(kv_end, first + 1) // size * size
        if full_begin > full_end:
            full_begin = full_end = kv_begin // size * size
        self.items.append(Item(place, num_places, sequence, kv_begin, kv_end, full_begin, full_end, part))

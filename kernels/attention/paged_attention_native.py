"""Paged attention compiled (`kernels/native/attention.cpp`): keys are read where they lie, once a group.

What decode rows read is cut into pieces of at most `PIECE_KEYS` keys, so that one long context, or one shared prefix,
is work for several cores. A piece goes with all places that read it; its partial results, one row a place, are added up
by their largest scores and sums of weights.

In bfloat16 on a processor that multiplies it, the cache is in tiles, and prompts are pieces too, `QUERIES` places with
all that they see (`attention_bf16.cpp`). Otherwise prompts go through `paged_attention_torch`, as does an int8 cache.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, chain
from typing import NamedTuple

import torch
from torch import Tensor

from minirksc.errors import ConfigError
from minirksc.kernels.attention.batch import AttentionBatch
from minirksc.kernels.attention.paged_attention_torch import (
    LayerAttention,
    Prefill,
    attend_prefills,
    find_prefills,
    paged_attention_torch,
)
from minirksc.kernels.attention.reads import DecodeReads, PrefillReads, Run, find_reads
from minirksc.kernels.kv.layer_cache import TILE, LayerCache, plain_block_shape
from minirksc.kernels.native.check import is_rows, refused
from minirksc.kernels.native.ops import check_heads, has_bf16_products, is_bfloat16, native, slots_of

PIECE_KEYS = 256
QUERIES = 32
MAX_GROUP = 96
"""Query heads a KV head that `attention_bf16.cpp` has room for."""

PIECE_TILES = PIECE_KEYS // TILE + 1
"""Tiles that a piece has keys in, at most; so in `kernels/native/ops.h`."""


@dataclass(slots=True)
class NativePlan:
    """What each layer does; made once a step. Tensors are int64.

    Attributes:
        prefills: prompts that torch attends to.
        rows: `[places]`, batch row of each place.
        pieces: `[pieces, 7]`: places [begin, end), runs [begin, end), first row of the partial results, or -1 - that
            row where the piece is all that its place sees, position of the first key, position of the first query or
            -1 where all keys are visible to all.
        runs: `[runs, 2]`: first slot and number of keys.
        part_begins: `[places + 1]`, where each place's entries of `parts` begin.
        parts: `[parts]`, rows of the partial results that are added up.
        num_results: number of rows of the partial results, those that need no adding up included.
        num_tokens: number of rows of the batch.
        slots: range [begin, end) of the slots that are read.
    """

    prefills: list[Prefill]
    rows: Tensor
    pieces: Tensor
    runs: Tensor
    part_begins: Tensor
    parts: Tensor
    num_results: int
    num_tokens: int
    slots: tuple[int, int]
    _tables: dict[tuple[int, int], "TableWithSums"] = field(default_factory=dict)

    @property
    def has_rows(self) -> bool:
        """Whether there is anything to do beside the prefills."""
        return self.rows.shape[0] > 0

    def check(self, num_tokens: int, num_slots: int) -> None:
        """Refuses a batch of another size, and slots that a cache does not have.

        Raises:
            ConfigError: it is such a batch.
        """
        begin, end = self.slots
        if self.num_tokens != num_tokens or begin < 0 or end > num_slots:
            raise ConfigError(
                f"a batch of {self.num_tokens} tokens that reads slots {begin} to {end - 1}, with {num_tokens} queries "
                f"and a cache of {num_slots} slots"
            )

    def table(self, num_heads: int, head_dim: int) -> Tensor:
        """What layers of these sizes hand over: the numbers of `AttentionPlan` in `kernels/native/ops.h`, int64."""
        key = num_heads, head_dim
        if key not in self._tables:
            self._tables[key] = self._table(num_heads, head_dim, torch.empty(0))
        return self._tables[key].table

    def table_with_sums(self, num_heads: int, head_dim: int) -> "TableWithSums":
        """The same for one call on a cache of tiles, which leaves the sums of each."""
        return self._table(num_heads, head_dim, torch.zeros(self.num_results, num_heads, PIECE_TILES, 2))

    def _table(self, num_heads: int, head_dim: int, tile_sums: Tensor) -> "TableWithSums":
        outs = torch.empty(self.num_results, num_heads, head_dim)
        sums = torch.empty(self.num_results, num_heads, 2)
        inputs = [one.data_ptr() for one in (self.rows, self.pieces, self.runs, self.part_begins, self.parts)]
        results = [one.data_ptr() for one in (outs, sums, tile_sums)]  # of an empty one 0
        numbers = torch.tensor([*inputs, len(self.rows), len(self.pieces), *results])
        return TableWithSums(numbers, outs, sums, tile_sums)


class TableWithSums(NamedTuple):
    """A table of a plan, and the float32 memory that it points at.

    Attributes:
        table: numbers of `AttentionPlan`, see `NativePlan.table`.
        outs: `[rows, num_heads, head_dim]`.
        sums: `[rows, num_heads, 2]`, largest score and sum of exp(score - largest).
        tile_sums: `[rows, num_heads, PIECE_TILES, 2]`, of each tile the sum of exp(score - another) and that other;
            empty where they are not wanted.
    """

    table: Tensor
    outs: Tensor
    sums: Tensor
    tile_sums: Tensor


def paged_attention_native(
    q: Tensor, kv: Tensor, layer_cache: LayerCache, batch: AttentionBatch, scale: float, softcap: float | None
) -> Tensor:
    """Arguments and result as in `paged_attention_reference`.

    Raises:
        ConfigError: a tensor that it would misread, or a batch that does not go with it.
    """
    if layer_cache.scales is not None:
        return paged_attention_torch(q, kv, layer_cache, batch, scale, softcap)
    num_slots = check_layout(q, layer_cache, batch.block_size, softcap)
    num_heads, head_dim = q.shape[1:]
    plan = batch.plan(*(WHOLE if layer_cache.is_tiled else DECODE))
    plan.check(len(q), num_slots)
    out = q.new_empty(q.shape)
    if plan.prefills:
        if not is_rows(kv, q.dtype, len(q), 2, layer_cache.kv.shape[3], head_dim):
            raise refused("kv", kv, f"[{len(q)}, 2, {layer_cache.kv.shape[3]}, {head_dim}] {q.dtype} of the CPU")
        layer = LayerAttention.of(layer_cache, q.dtype, scale, softcap)
        attend_prefills(out, q, kv, layer, batch, plan.prefills)
    if plan.has_rows:
        attend_rows(q, layer_cache, out, plan.table(num_heads, head_dim), batch.window, scale, softcap)
    return out


def check_layout(q: Tensor, cache: LayerCache, block_size: int, softcap: float | None) -> int:
    """How many slots the cache has.

    Args:
        q: `[tokens, num_heads, head_dim]`.
        cache: cache of the layer.
        block_size: number of tokens a block, as the batch has it.
        softcap: bound of the scores; None for none.

    Raises:
        ConfigError: queries that the compiled forms would misread, or a cache that does not go with them.
    """
    if softcap is not None and not softcap > 0:  # 0 would stand for none
        raise ConfigError(f"softcap is {softcap!r}; it must be above 0, or None")
    check_heads("q", q)
    _, num_heads, head_dim = q.shape
    num_kv_heads = cache.kv.shape[3] if isinstance(cache.kv, Tensor) and cache.kv.dim() > 3 else 0
    num_slots = slots_of(cache.kv, q.dtype, num_kv_heads, head_dim)
    group = num_heads // max(num_kv_heads, 1)
    is_served = has_bf16_products and head_dim % 32 == 0 and group <= MAX_GROUP if cache.is_tiled else head_dim % 8 == 0
    if group == 0 or group * num_kv_heads != num_heads or not is_served:
        raise refused("the cache", cache.kv, f"what {num_heads} heads of {head_dim} numbers can share")
    if num_slots != len(cache.kv) * block_size:
        raise refused("the cache", cache.kv, f"blocks of {block_size} tokens, as the batch")
    return num_slots


def attend_rows(
    q: Tensor, cache: LayerCache, out: Tensor, table: Tensor, window: int | None, scale: float, softcap: float | None
) -> None:
    """Fills in the rows of a plan.

    Args:
        q: `[tokens, num_heads, head_dim]`.
        cache: cache of the layer.
        out: `[tokens, num_heads, head_dim]`, dtype of q.
        table: table of the plan, see `NativePlan.table`.
        window: window of the layer.
        scale: factor of the scores.
        softcap: bound of the scores.
    """
    # The plan of decode rows has seen to the window.
    call, number = native.decode_attention, int(is_bfloat16[q.dtype])
    if cache.is_tiled:
        call, number = native.attention_bf16, window or 0
    sizes = q.stride(0), q.shape[1], cache.kv.shape[3], q.shape[2]
    call(q, cache.kv, out, table, *sizes, number, scale, softcap or 0.0)


def block_shape_native(
    num_heads: int, num_kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype
) -> tuple[int, ...]:
    """Shape of a block in tiles, where `attention_bf16.cpp` can serve; arguments as of `plain_block_shape`."""
    fits = head_dim % 32 == 0 and num_heads // num_kv_heads <= MAX_GROUP and block_size % TILE == 0
    if dtype == torch.bfloat16 and has_bf16_products and fits:
        return block_size // TILE, 2, num_kv_heads, TILE, head_dim
    return plain_block_shape(num_heads, num_kv_heads, head_dim, block_size, dtype)


def plan_decode(batch: AttentionBatch) -> NativePlan:
    """Cuts what decode rows read into pieces, and leaves prompts to torch."""
    prefills, decode = find_reads(batch)
    return _plan(batch, decode, [], find_prefills(prefills, batch.device))


def plan_all(batch: AttentionBatch) -> NativePlan:
    """Cuts all that the batch reads into pieces."""
    prefills, decode = find_reads(batch)
    tiles = [tile for reads in prefills for tile in _tiles(reads, batch)]
    return _plan(batch, decode, tiles, [])


DECODE = "native, decode", plan_decode
WHOLE = "native, whole", plan_all
"""Arguments of `AttentionBatch.plan`."""


def _tiles(reads: PrefillReads, batch: AttentionBatch) -> Iterator[PrefillReads]:
    """A prompt as several of at most `QUERIES` tokens."""
    for begin in range(0, reads.num_queries, QUERIES):
        first_query = reads.first_query + begin
        yield replace(
            reads,
            begin=reads.begin + begin,
            num_queries=min(QUERIES, reads.num_queries - begin),
            first_query=first_query,
            first_key=batch.first_visible(first_query),
        )


def _plan(
    batch: AttentionBatch, decode: DecodeReads, tiles: Sequence[PrefillReads], prefills: list[Prefill]
) -> NativePlan:
    pieces: list[tuple[int, ...]] = []
    runs: list[Run] = []
    rows = list(decode.rows)
    # The longest first: a thread that computes a short one last lets the others wait less.
    for tile in sorted(tiles, key=lambda tile: tile.first_key - tile.first_query):
        place, run = len(rows), len(runs)
        rows += range(tile.begin, tile.begin + tile.num_queries)
        runs += tile.runs(tile.first_key, tile.first_query + tile.num_queries)
        pieces.append((place, len(rows), run, len(runs), -1, tile.first_key, tile.first_query))
    # Places [begin, end) and what they read: what many read first, as the largest pieces of work.
    reads = [(segment.row_begin, segment.row_end, shared) for segment, shared in decode.shared]
    reads += [(place, place + 1, own) for place, own in enumerate(decode.own)]
    parts: list[list[int]] = [[] for _ in rows]
    num_results = 0
    for begin, end, read in reads:
        cut = list(_cut(read))
        is_all = end - begin == len(cut) == 1 and not parts[begin]
        for piece in cut:
            row = -1 - num_results if is_all else num_results
            pieces.append((begin, end, len(runs), len(runs) + len(piece), row, 0, -1))
            runs += piece
            if not is_all:
                for place in range(begin, end):
                    parts[place].append(num_results + place - begin)
            num_results += end - begin
    part_begins = [0, *accumulate(map(len, parts))]
    read = [*runs, *chain(*(prefill.past for prefill in prefills if isinstance(prefill.past, list)))]
    # One tensor for all of them: each costs microseconds.
    lists = rows, [*chain(*pieces)], [*chain(*runs)], part_begins, [*chain(*parts)]
    numbers = torch.tensor([*chain(*lists)], dtype=torch.int64).split([len(some) for some in lists])
    return NativePlan(
        prefills=prefills,
        rows=numbers[0],
        pieces=numbers[1].view(-1, 7),
        runs=numbers[2].view(-1, 2),
        part_begins=numbers[3],
        parts=numbers[4],
        num_results=num_results,
        num_tokens=batch.cu_seqlens_q[-1],
        slots=(min(read, default=(0, 0))[0], max(map(sum, read), default=0)),
    )


def _cut(runs: Sequence[Run]) -> Iterator[list[Run]]:
    """The runs in parts of at most `PIECE_KEYS` keys."""
    piece: list[Run] = []
    room = PIECE_KEYS
    for begin, length in runs:
        while length:
            taken = min(length, room)
            piece.append((begin, taken))
            begin, length, room = begin + taken, length - taken, room - taken
            if not room:
                yield piece
                piece, room = [], PIECE_KEYS
    if piece:
        yield piece

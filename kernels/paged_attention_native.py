"""Paged attention compiled (`kernels/native/attention.cpp`): keys are read where they lie, once a group.

What decode rows read is cut into pieces of at most `PIECE_KEYS` keys, so that one long context, or one shared prefix,
is work for several cores. A piece goes with all places that read it; its partial results, one row a place, are added up
by their largest scores and sums of weights.

In bfloat16 on a processor that multiplies it, prompts are pieces too, `TILE` queries with all that they see
(`attention_bf16.cpp`). Otherwise prompts go through `paged_attention_torch`, and so does an int8 cache.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from minirksc.kernels.attention_batch import AttentionBatch
from minirksc.kernels.attention_reads import DecodeReads, PrefillReads, Run, find_reads
from minirksc.kernels.layer_cache import LayerCache
from minirksc.kernels.native_ops import has_bf16_products, is_bfloat16, native
from minirksc.kernels.paged_attention_torch import (
    Attend,
    Masks,
    Prefill,
    Slots,
    attend_prefills,
    find_prefills,
    paged_attention_torch,
)
from torch import Tensor

PIECE_KEYS = 256
TILE = 32
MAX_GROUP = 96
"""Query heads a KV head that `attention_bf16.cpp` has room for."""


@dataclass(slots=True)
class NativePlan:
    """What each layer does; made once a step. Tensors are int64.

    Attributes:
        prefills: prompts that torch attends to.
        rows: `[places]`, batch row of each place.
        pieces: `[pieces, 7]`: places [begin, end), runs [begin, end), first row of the partial results or -1 where the
            piece is all that its places see, position of the first key, position of the first query or -1 where all
            keys are visible to all.
        runs: `[runs, 2]`: first slot and number of keys.
        part_begins: `[places + 1]`, where each place's entries of `parts` begin.
        parts: `[parts]`, rows of the partial results.
        masks: of the prefills' tiles.
    """

    prefills: list[Prefill]
    rows: Tensor
    pieces: Tensor
    runs: Tensor
    part_begins: Tensor
    parts: Tensor
    masks: Masks = field(default_factory=dict)
    _tables: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)

    @property
    def has_rows(self) -> bool:
        """Whether there is anything to do beside the prefills."""
        return self.rows.shape[0] > 0

    def table(self, num_heads: int, head_dim: int) -> Tensor:
        """What a layer of these sizes hands over: the numbers of `AttentionPlan` in `kernels/native/ops.h`, int64."""
        key = num_heads, head_dim
        if key not in self._tables:
            # Partial results: weighted sums of values; largest score and sum of weights.
            outs, sums = torch.empty(len(self.parts), *key), torch.empty(len(self.parts), num_heads, 2)
            tensors = (self.rows, self.pieces, self.runs, self.part_begins, self.parts)
            pointers = [tensor.data_ptr() for tensor in tensors]
            numbers = [*pointers, len(self.rows), len(self.pieces), outs.data_ptr(), sums.data_ptr()]
            self._tables[key] = torch.tensor(numbers), outs, sums
        return self._tables[key][0]


def paged_attention_native(
    q: Tensor, kv: Tensor, layer_cache: LayerCache, batch: AttentionBatch, scale: float, softcap: float | None
) -> Tensor:
    """Arguments and result as in `paged_attention_reference`."""
    if layer_cache.scales is not None:
        return paged_attention_torch(q, kv, layer_cache, batch, scale, softcap)
    num_kv_heads = layer_cache.kv.shape[3]
    num_heads, head_dim = q.shape[1:]
    in_bfloat16 = is_bfloat16[q.dtype]
    whole = in_bfloat16 and has_bf16_products and head_dim % 32 == 0 and num_heads // num_kv_heads <= MAX_GROUP
    plan = batch.plan(*(WHOLE if whole else DECODE))
    out = q.new_empty(q.shape)
    if plan.prefills:
        cache = Slots.of(layer_cache, q.dtype)
        attend_prefills(out, q, kv, cache, plan.prefills, plan.masks, batch.window, Attend(scale, softcap))
    if plan.has_rows:
        attend = native.attention_bf16 if whole else native.decode_attention
        attend(
            q.data_ptr(),
            layer_cache.kv.data_ptr(),
            out.data_ptr(),
            plan.table(num_heads, head_dim).data_ptr(),
            q.stride(0),
            num_heads,
            num_kv_heads,
            head_dim,
            batch.window or 0 if whole else in_bfloat16,
            scale,
            softcap or 0.0,
        )
    return out


def plan_decode(batch: AttentionBatch) -> NativePlan:
    """Cuts what decode rows read into pieces, and leaves prompts to torch."""
    prefills, decode = find_reads(batch)
    return _plan(decode, [], find_prefills(prefills, batch.device))


def plan_all(batch: AttentionBatch) -> NativePlan:
    """Cuts all that the batch reads into pieces."""
    prefills, decode = find_reads(batch)
    tiles = [tile for reads in prefills for tile in _tiles(reads, batch)]
    return _plan(decode, tiles, [])


DECODE = "native, decode", plan_decode
WHOLE = "native, whole", plan_all
"""Arguments of `AttentionBatch.plan`."""


@dataclass(frozen=True, slots=True)
class _Tile:
    """Consecutive queries of a prompt, batch rows [begin, end), and all keys that they see."""

    begin: int
    end: int
    first_query: int
    first_key: int
    runs: list[Run]


def _tiles(reads: PrefillReads, batch: AttentionBatch) -> Iterator[_Tile]:
    for begin in range(0, reads.num_queries, TILE):
        end = min(begin + TILE, reads.num_queries)
        first_query = reads.first_query + begin
        first_key = batch.first_visible(first_query)
        runs = reads.runs(first_key, reads.first_query + end)
        yield _Tile(reads.begin + begin, reads.begin + end, first_query, first_key, runs)


def _plan(decode: DecodeReads, tiles: Sequence[_Tile], prefills: list[Prefill]) -> NativePlan:
    pieces: list[tuple[int, ...]] = []
    runs: list[Run] = []
    rows = list(decode.rows)
    parts: list[list[int]] = [[] for _ in rows]
    num_parts = 0
    # The longest first: whoever computes a short one last keeps the others waiting less.
    for tile in sorted(tiles, key=lambda tile: tile.first_key - tile.first_query):
        place = len(rows)
        rows += range(tile.begin, tile.end)
        run_end = len(runs) + len(tile.runs)
        pieces.append((place, len(rows), len(runs), run_end, -1, tile.first_key, tile.first_query))
        runs += tile.runs
    cut = list(_pieces(decode))
    num_pieces = [0] * len(decode.rows)
    for begin, end, _ in cut:
        for place in range(begin, end):
            num_pieces[place] += 1
    for begin, end, piece in cut:
        is_all = end - begin == 1 and num_pieces[begin] == 1
        pieces.append((begin, end, len(runs), len(runs) + len(piece), -1 if is_all else num_parts, 0, -1))
        runs += piece
        if not is_all:
            for place in range(begin, end):
                parts[place].append(num_parts + place - begin)
            num_parts += end - begin
    part_begins = [0]
    for some in parts:
        part_begins.append(part_begins[-1] + len(some))
    part_begins += [part_begins[-1]] * (len(rows) - len(parts))
    return NativePlan(
        prefills=prefills,
        rows=torch.tensor(rows, dtype=torch.int64),
        pieces=torch.tensor(pieces, dtype=torch.int64),
        runs=torch.tensor(runs, dtype=torch.int64),
        part_begins=torch.tensor(part_begins),
        parts=torch.tensor([part for some in parts for part in some], dtype=torch.int64),
    )


def _pieces(decode: DecodeReads) -> Iterator[tuple[int, int, list[Run]]]:
    """(places [begin, end), what they read), the largest pieces of work first."""
    for segment, runs in decode.shared:
        for piece in _cut(runs):
            yield segment.row_begin, segment.row_end, piece
    for place, runs in enumerate(decode.own):
        for piece in _cut(runs):
            yield place, place + 1, piece


def _cut(runs: Sequence[Run]) -> Iterator[list[Run]]:
    """The same keys in parts of at most `PIECE_KEYS`."""
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

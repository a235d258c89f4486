"""Attention of a mixed batch (prefills, chunks of prefills, decode rows) over the paged KV cache.

Formula, per query token i of a sequence with `context_len` keys: softmax(s(q_i k_j * scale)) v_j over all j that are
not after i and, with a window W, not before i - W + 1; query heads read KV head `head // (num_heads /
num_kv_heads)`. With a soft cap c, s(x) = c tanh(x / c), else s(x) = x. Softmax in float32.

The kernel: one program takes an item of the work list (`work_list`) and a KV head. Its rows are the item's queries
times the query heads of the group, so that a tile of keys is read once for all of them. It walks the item's keys tile
by tile with a running maximum m and sum l (Milakov and Gimelshein 2018, arXiv 1805.02867): first the tiles that all
rows see whole, without a mask, then those at the edges. The block-table entry of the next tile is loaded one iteration
ahead: were it loaded where it is used, the pipeliner would give keys and values one buffer instead of two.

Scores are in base 2 (log2 e is in the scale), accumulated in float32; probabilities are rounded to the dtype of the
values before the second product. An int8 cache is multiplied as float16 (exact), its scales folded into scores and
probabilities; what float16 then holds is relative to the largest of these products, 2^15, so that little is lost of
small ones. A range's result is a partial: its own softmax, and the base-2 log-sum-exp to merge it by. Keys and values
outside what a query sees are never used, whatever they hold, NaN included; NaN in what it sees makes its result NaN.

Limits: head_dim to 512 (256 in float32), block_size a power of two to 256, at most 64 query heads a KV head.
Source: Dao et al. 2022, arXiv 2205.14135 (tiled softmax); Kwon et al. 2023, arXiv 2309.06180 (paged KV); the grouped
rows and the range split after arXiv 2511.11581.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from minirksc.errors import ConfigError
from minirksc.kernels.attention import launch_table
from minirksc.kernels.attention.batch import AttentionBatch
from minirksc.kernels.attention.launch_table import AttentionTile
from minirksc.kernels.attention.prefix_attention import merge_partials_triton
from minirksc.kernels.attention.work_list import Shape, WorkList, make_work_list
from minirksc.kernels.jit import tl, triton
from minirksc.kernels.kv.kv_check import check_attention
from minirksc.kernels.kv.layer_cache import LayerCache

LOG2_E = math.log2(math.e)


def paged_attention_reference(
    q: Tensor, kv: Tensor, layer_cache: LayerCache, batch: AttentionBatch, scale: float, softcap: float | None
) -> Tensor:
    """The specification, sequence by sequence in float32.

    Args:
        q: `[tokens, num_heads, head_dim]`.
        kv: `[tokens, 2, num_kv_heads, head_dim]`, new keys and values; unused here, they are in the cache.
        layer_cache: `[num_blocks, block_size, 2, num_kv_heads, head_dim]`, and its scales.
        batch: where queries and keys are.
        scale: multiplied to the scores.
        softcap: c of c * tanh(score / c); None for none.

    Returns:
        `[tokens, num_heads, head_dim]`, dtype of q.
    """
    out = torch.empty_like(q)
    for i, (_, weights, values) in enumerate(weights_and_values(q, layer_cache, batch, scale, softcap)):
        rows = slice(batch.cu_seqlens_q[i], batch.cu_seqlens_q[i + 1])
        out[rows] = torch.einsum("hqk,khd->qhd", weights, values).to(q.dtype)
    return out


def weights_and_values(
    q: Tensor, layer_cache: LayerCache, batch: AttentionBatch, scale: float, softcap: float | None
) -> list[tuple[int, Tensor, Tensor]]:
    """Of each sequence: first key's position, weights `[heads, queries, keys]`, values `[keys, heads, head_dim]`."""
    found = []
    group, size = q.shape[1] // layer_cache.kv.shape[3], batch.block_size
    for i, (context_len, table) in enumerate(zip(batch.context_lens, batch.kv_tables, strict=True)):
        begin, end = batch.cu_seqlens_q[i], batch.cu_seqlens_q[i + 1]
        first_query = context_len - (end - begin)
        first_key = batch.first_visible(first_query)
        slots = [table[p // size] * size + p % size for p in range(first_key, context_len)]
        own = layer_cache.kv.flatten(0, 1)[slots].float()  # [keys, 2, num_kv_heads, head_dim]
        if layer_cache.scales is not None:
            own = (own * layer_cache.scales.flatten(0, 1)[slots].unsqueeze(-1)).to(q.dtype).float()
        keys, values = own.repeat_interleave(group, dim=2).unbind(1)  # [keys, num_heads, head_dim]
        scores = torch.einsum("qhd,khd->hqk", q[begin:end].float(), keys) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        query_at = torch.arange(first_query, context_len, device=q.device)[:, None]
        key_at = torch.arange(first_key, context_len, device=q.device)
        visible = key_at <= query_at  # [queries, keys]
        if batch.window is not None:
            visible &= key_at > query_at - batch.window
        found.append((first_key, scores.masked_fill(~visible, float("-inf")).softmax(-1), values))
    return found


@triton.jit
def _table_entries(table_ptr, start, end, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    """Block ids of the tokens of the tile at `start`: one id where the tile lies within a block, else one a token."""
    if BLOCK_SIZE >= TILE:
        return tl.load(table_ptr + start // BLOCK_SIZE, mask=start < end, other=0)
    else:
        at = start + tl.arange(0, TILE)  # [TILE]
        return tl.load(table_ptr + at // BLOCK_SIZE, mask=at < end, other=0)


@triton.jit
def _attend_to_tile(
    q,
    state,
    start,
    entries,
    kv_ptr,
    scales_ptr,
    granule_lse_ptrs,
    is_row,
    positions,
    kv_begin,
    kv_end,
    score_scale,
    softcap,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    TILE: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One step of the running softmax: state (m, total, acc) after the keys [start, start + TILE)."""
    m, total, acc = state  # [ROWS], [ROWS], [ROWS, HEAD_PAD]
    TOKEN: tl.constexpr = 2 * NUM_KV_HEADS * HEAD_DIM
    offs_d = tl.arange(0, acc.shape[1])
    offs_n = tl.arange(0, TILE)
    at = start + offs_n
    if BLOCK_SIZE >= TILE:
        slots = entries.to(tl.int64) * BLOCK_SIZE + start % BLOCK_SIZE + offs_n  # [TILE]
        k_ptrs = (kv_ptr + entries.to(tl.int64) * (BLOCK_SIZE * TOKEN) + (start % BLOCK_SIZE) * TOKEN) + (
            offs_n[:, None] * TOKEN + offs_d[None, :]
        )  # [TILE, HEAD_PAD]
    else:
        slots = entries.to(tl.int64) * BLOCK_SIZE + offs_n % BLOCK_SIZE
        rows = kv_ptr + entries.to(tl.int64) * (BLOCK_SIZE * TOKEN) + (offs_n % BLOCK_SIZE) * TOKEN
        k_ptrs = rows[:, None] + offs_d[None, :]
    v_ptrs = k_ptrs + NUM_KV_HEADS * HEAD_DIM
    in_range = (at >= kv_begin) & (at < kv_end)
    if MASKED:  # values too: zero times NaN is NaN
        mask = in_range[:, None] & (offs_d < HEAD_DIM)[None, :]
        k = tl.load(k_ptrs, mask=mask, other=0.0)
        v = tl.load(v_ptrs, mask=mask, other=0.0)
    elif acc.shape[1] == HEAD_DIM:
        k = tl.load(k_ptrs)
        v = tl.load(v_ptrs)
    else:
        k = tl.load(k_ptrs, mask=(offs_d < HEAD_DIM)[None, :], other=0.0)
        v = tl.load(v_ptrs, mask=(offs_d < HEAD_DIM)[None, :], other=0.0)
    scores = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision=PRECISION) * score_scale  # [ROWS, TILE]
    if scales_ptr is not None:
        scale_ptrs = scales_ptr + slots * (2 * NUM_KV_HEADS)
        if MASKED:
            k_scale = tl.load(scale_ptrs, mask=in_range, other=0.0)
            v_scale = tl.load(scale_ptrs + NUM_KV_HEADS, mask=in_range, other=0.0)
        else:
            k_scale = tl.load(scale_ptrs)
            v_scale = tl.load(scale_ptrs + NUM_KV_HEADS)
        scores *= k_scale[None, :]
    if HAS_SOFTCAP:  # tanh(x) = 1 - 2 / (1 + exp(2 x)); score_scale holds 2 log2(e) / cap
        x = scores * 0.34657359  # log(2) / 2; near 0 the exponential's form cancels, and the series does not
        square = x * x
        series = x * (1.0 - square * (0.33333334 - square * 0.13333334))
        scores = softcap * tl.where(square < 0.01, series, 1.0 - 2.0 / (1.0 + tl.exp2(scores)))
    if MASKED:
        visible = in_range[None, :] & (at[None, :] <= positions[:, None])
        if WINDOW > 0:
            visible = visible & (at[None, :] > positions[:, None] - WINDOW)
        scores = tl.where(visible, scores, float("-inf"))
    peaks = scores
    if scales_ptr is not None:  # what is added up is p * v_scale: a sink has most of the weight, and hardly a value
        # log2 to 0.09, by the bits; -64 at least, since p itself must stay in the range of float32.
        bits = tl.maximum(v_scale.to(tl.int32, bitcast=True), 63 << 23)
        peaks += (bits.to(tl.float32) * 1.1920929e-07 - 127.0)[None, :]
    new_m = tl.max(peaks, 1)
    if q.dtype == tl.float16:  # whose smallest normal number is 2^-14, and whose largest 2^16
        new_m -= 15.0
    new_m = tl.maximum(m, new_m)
    # A row may see nothing of a masked tile: -inf - -inf would be NaN.
    shift = tl.where(new_m == float("-inf"), 0.0, new_m) if MASKED else new_m
    p = tl.exp2(scores - shift[:, None])
    decay = tl.exp2(m - shift)
    total = total * decay + tl.sum(p, 1)
    if granule_lse_ptrs is not None:
        GRANULE: tl.constexpr = BLOCK_SIZE if BLOCK_SIZE < TILE else TILE
        sums = tl.sum(tl.reshape(p, (acc.shape[0], TILE // GRANULE, GRANULE)), 2)  # [ROWS, TILE // GRANULE]
        granule = start // GRANULE + tl.arange(0, TILE // GRANULE)
        is_seen = (
            is_row[:, None] & (granule * GRANULE < kv_end)[None, :] & (((granule + 1) * GRANULE) > kv_begin)[None, :]
        )
        # A sum may have underflowed to zero: its logarithm is then so low that the mass is zero too.
        tl.store(
            granule_lse_ptrs[:, None] + granule[None, :],
            shift[:, None] + tl.log2(tl.maximum(sums, 1e-38)),
            mask=is_seen,
        )
    if scales_ptr is not None:
        p *= v_scale[None, :]
    acc = tl.dot(p.to(q.dtype), v.to(q.dtype), acc * decay[:, None], input_precision=PRECISION)
    return new_m, total, acc


@triton.jit(do_not_specialize=["stride_table", "stride_granule"])
def _paged_attention_kernel(
    q_ptr,
    kv_ptr,
    scales_ptr,
    out_ptr,
    lse_ptr,
    part_out_ptr,
    part_lse_ptr,
    granule_lse_ptr,
    items_ptr,
    tokens_ptr,
    positions_ptr,
    parts_ptr,
    table_ptr,
    stride_q,
    stride_table,
    stride_granule,
    score_scale,
    softcap,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (item, KV head): see the module."""
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    item_ptr = items_ptr + tl.program_id(0) * 8  # fields of `work_list.Item`
    kv_head = tl.program_id(1)
    num_places = tl.load(item_ptr + 1)
    if num_places == 0:  # padding
        return
    place_begin = tl.load(item_ptr)
    table_row = tl.load(item_ptr + 2)
    kv_begin, kv_end = tl.load(item_ptr + 3), tl.load(item_ptr + 4)
    full_begin, full_end = tl.load(item_ptr + 5), tl.load(item_ptr + 6)
    part = tl.load(item_ptr + 7)

    rows = tl.arange(0, ROWS)
    offs_d = tl.arange(0, HEAD_PAD)
    is_row = rows // GROUP < num_places  # [ROWS]
    place = place_begin + rows // GROUP
    token = tl.load(tokens_ptr + place, mask=is_row, other=0).to(tl.int64)
    positions = tl.load(positions_ptr + place, mask=is_row, other=0)
    head = kv_head * GROUP + rows % GROUP
    io_mask = is_row[:, None] & (offs_d < HEAD_DIM)[None, :]  # [ROWS, HEAD_PAD]
    q = tl.load(q_ptr + (token * stride_q + head * HEAD_DIM)[:, None] + offs_d[None, :], mask=io_mask, other=0.0)
    if scales_ptr is not None:
        scales_ptr += kv_head
        q = q.to(tl.float16)  # int8 becomes float16 far faster than bfloat16 or float32
    kv_ptr += kv_head * HEAD_DIM
    table_ptr += table_row.to(tl.int64) * stride_table
    granule_lse_ptrs = None
    if granule_lse_ptr is not None:
        granule_lse_ptrs = granule_lse_ptr + (token * NUM_HEADS + head) * stride_granule

    m = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, HEAD_PAD], tl.float32)
    entries = _table_entries(table_ptr, full_begin, full_end, BLOCK_SIZE, TILE)
    for start in tl.range(full_begin, full_end, TILE, num_stages=STAGES):
        start = tl.multiple_of(start, TILE)
        following = _table_entries(table_ptr, start + TILE, full_end, BLOCK_SIZE, TILE)
        m, total, acc = _attend_to_tile(
            q, (m, total, acc), start, entries, kv_ptr, scales_ptr, granule_lse_ptrs, is_row, positions, kv_begin,
            kv_end, score_scale, softcap, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, WINDOW, HAS_SOFTCAP, TILE,
            PRECISION, False,
        )  # fmt: skip
        entries = following
    num_before = (full_begin - kv_begin + TILE - 1) // TILE
    num_edges = num_before + (kv_end - full_end + TILE - 1) // TILE
    for i in tl.range(0, num_edges, num_stages=1):
        start = tl.where(i < num_before, full_begin - (num_before - i) * TILE, full_end + (i - num_before) * TILE)
        start = tl.multiple_of(start, TILE)
        entries = tl.maximum(_table_entries(table_ptr, start, kv_end, BLOCK_SIZE, TILE), 0)  # -1: slid out of view
        m, total, acc = _attend_to_tile(
            q, (m, total, acc), start, entries, kv_ptr, scales_ptr, granule_lse_ptrs, is_row, positions, kv_begin,
            kv_end, score_scale, softcap, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, WINDOW, HAS_SOFTCAP, TILE,
            PRECISION, True,
        )  # fmt: skip

    acc = acc / total[:, None]  # NaN of a row that sees none of these keys, whose lse is -inf
    lse = m + tl.log2(total)
    if part < 0:
        row = token * NUM_HEADS + head
        tl.store(out_ptr + row[:, None] * HEAD_DIM + offs_d[None, :], acc.to(out_ptr.dtype.element_ty), mask=io_mask)
        if lse_ptr is not None:
            tl.store(lse_ptr + row, lse, mask=is_row)
    else:
        first_part = tl.load(parts_ptr + 2 * token, mask=is_row, other=0)
        row = (first_part + part).to(tl.int64) * NUM_HEADS + head
        tl.store(part_out_ptr + row[:, None] * HEAD_DIM + offs_d[None, :], acc, mask=io_mask)
        tl.store(part_lse_ptr + row, lse, mask=is_row)


class Attended(NamedTuple):
    """Everything that the kernel can tell.

    Attributes:
        out: `[tokens, num_heads, head_dim]`, dtype of q.
        lse: `[tokens, num_heads]` float32, base-2 log-sum-exp of the scores; None where not asked for.
        granule_lse: `[tokens, num_heads, granules]` float32, the same of each `granule` keys; None where not asked for.
        granule: keys, the smaller of the block and the tile.
        work: where each token's queries are.
    """

    out: Tensor
    lse: Tensor | None
    granule_lse: Tensor | None
    granule: int
    work: WorkList


def paged_attention_triton(
    q: Tensor, kv: Tensor, layer_cache: LayerCache, batch: AttentionBatch, scale: float, softcap: float | None
) -> Tensor:
    """The same in at most three launches: few queries, long prompts, the merge of partials.

    Raises:
        ConfigError: a dtype, shape or layout that the kernel cannot serve.
    """
    return attend(q, layer_cache, batch, scale, softcap).out


def work_shape(num_heads: int, layer_cache: LayerCache, dtype: torch.dtype) -> Shape:
    """What a work list for a layer depends on besides the batch."""
    kv = layer_cache.kv
    return Shape(num_heads, kv.shape[3], kv.shape[4], dtype, kv.dtype, launch_table.architecture(kv.device))


def attend(
    q: Tensor,
    layer_cache: LayerCache,
    batch: AttentionBatch,
    scale: float,
    softcap: float | None,
    with_lse: bool = False,
    with_mass: bool = False,
) -> Attended:
    """As `paged_attention_triton`, with the log-sum-exp of each query's scores, and of its scores in each block.

    Raises:
        ConfigError: a dtype, shape or layout that the kernel cannot serve.
    """
    check_attention(q, layer_cache, batch.block_size)
    num_tokens, num_heads, head_dim = q.shape
    shape = work_shape(num_heads, layer_cache, q.dtype)
    work = batch.plan(shape, lambda batch: make_work_list(batch, shape))
    out = q.new_empty((num_tokens, num_heads, head_dim))
    needs_lse = with_lse or with_mass
    lse = q.new_empty((num_tokens, num_heads), dtype=torch.float32) if needs_lse else None
    granule, granule_lse = 0, None
    tiles = [tile for tile in (work.tile, work.prefill_tile) if tile is not None]
    if with_mass and tiles:
        granule = min(batch.block_size, *(tile.tile for tile in tiles))
        if any(min(batch.block_size, tile.tile) != granule for tile in tiles):
            raise ConfigError(
                f"attention mass of a batch whose tiles are {[t.tile for t in tiles]} keys and whose blocks are "
                f"{batch.block_size}: ask for it with blocks of at most {granule}, or in a step without prefills"
            )
        width = work.table.shape[1] * batch.block_size // granule
        granule_lse = q.new_empty((num_tokens, num_heads, width), dtype=torch.float32)
    if num_tokens == 0:
        return Attended(out, lse, granule_lse, granule, work)
    launches = (
        (work.tile, work.items[: work.num_short]),
        (work.prefill_tile, work.items[work.num_short :]),
    )
    for tile, items in launches:
        if tile is not None:
            _launch(q, layer_cache, batch, work, tile, items, scale, softcap, out, lse, granule_lse)
    if work.num_parts:
        merge_partials_triton(*work.partials(num_heads, head_dim), work.parts, out, lse)
    return Attended(out, lse, granule_lse, granule, work)


def _launch(
    q: Tensor,
    layer_cache: LayerCache,
    batch: AttentionBatch,
    work: WorkList,
    tile: AttentionTile,
    items: Tensor,
    scale: float,
    softcap: float | None,
    out: Tensor,
    lse: Tensor | None,
    granule_lse: Tensor | None,
) -> None:
    num_heads, head_dim = q.shape[1:]
    num_kv_heads = layer_cache.kv.shape[3]
    architecture = launch_table.architecture(q.device)
    part_out, part_lse = work.partials(num_heads, head_dim)
    _paged_attention_kernel[(len(items), num_kv_heads)](
        q,
        layer_cache.kv,
        layer_cache.scales,
        out,
        lse,
        part_out,
        part_lse,
        granule_lse,
        items,
        work.tokens,
        work.positions,
        work.parts,
        work.table,
        q.stride(0),
        work.table.stride(0),
        0 if granule_lse is None else granule_lse.shape[2],
        scale * LOG2_E if softcap is None else 2 * scale * LOG2_E / softcap,
        0.0 if softcap is None else softcap * LOG2_E,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        HEAD_PAD=max(16, triton.next_power_of_2(head_dim)),
        BLOCK_SIZE=batch.block_size,
        WINDOW=batch.window or 0,
        HAS_SOFTCAP=softcap is not None,
        ROWS=tile.rows,
        TILE=tile.tile,
        STAGES=tile.stages,
        PRECISION=launch_table.dot_precision(architecture),
        num_warps=tile.warps,
        num_stages=tile.stages,
        **launch_table.compile_options(architecture, tile.registers),
    )

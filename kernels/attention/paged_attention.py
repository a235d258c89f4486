"""Attention of a mixed batch (prefills, chunks of prefills, decode rows) over the paged KV cache.

Formula, per query token i of a sequence with `context_len` keys: softmax(s(q_i k_j * scale)) v_j over all j that are
not after i and, with a window W, not before i - W + 1; query heads read KV head `head // (num_heads /
num_kv_heads)`. With a soft cap c, s(x) = c tanh(x / c), else s(x) = x. Softmax in float32.

A step's attention is a list of items (`work_list`): an item is some queries against one range of keys. Queries stand
at places, those that share keys side by side: a segment is a run of blocks that neighbours share, and an item of it has
the queries of all of them. A long range of keys is split into several items; what each of these finds for a query is a
partial, with a softmax of its own and the base-2 log-sum-exp to merge it by.

The kernel: one program takes an item and a KV head. Its rows are the item's queries times the query heads of the
group, so that a tile of keys is read once for all of them. It walks the item's keys tile by tile with a running maximum
m and sum l (Milakov and Gimelshein 2018, arXiv 1805.02867): first the tiles that all rows see whole, without a mask,
then those at the edges. The block-table entry of the next tile is loaded one iteration ahead: were it loaded where it
is used, the pipeliner would give keys and values one buffer instead of two.

Scores are in base 2 (log2 e is in the scale), accumulated in float32; probabilities are rounded to the dtype of the
values before the second product. An int8 cache is multiplied as float16 (exact), its scales folded into scores and
probabilities; what float16 then holds is relative to the largest of these products, 2^15, so that little is lost of
small ones. Keys and values outside what a query sees are never used, whatever they hold, NaN included; NaN in what it
sees makes its result NaN.

Limits: head_dim to 512 (256 in float32), block_size a power of two to 256, at most 64 query heads a KV head.
Source: Dao et al. 2022, arXiv 2205.14135 (tiled softmax); Kwon et al. 2023, arXiv 2309.06180 (paged KV); the grouped
rows and the range split after arXiv 2511.11581.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from minirksc.kernels.attention import launch_table
from minirksc.kernels.attention.batch import AttentionBatch
from minirksc.kernels.attention.key_tile import attend_to_tile, table_entries
from minirksc.kernels.attention.prefix_attention import merge_partials_triton
from minirksc.kernels.attention.work_list import WorkList, find_work
from minirksc.kernels.jit import launch_options, tl, triton
from minirksc.kernels.kv.layer_cache import LayerCache, multiply_out

LOG2_E = math.log2(math.e)


def paged_attention_reference(
    q: Tensor, kv: Tensor, layer_cache: LayerCache, batch: AttentionBatch, scale: float, softcap: float | None
) -> Tensor:
    """The specification, sequence by sequence in float32.

    Args:
        q: `[tokens, num_heads, head_dim]`.
        kv: `[tokens, 2, num_kv_heads, head_dim]`, new keys and values; unused here, they are in the cache.
        layer_cache: `[num_blocks, block_size, 2, num_kv_heads, head_dim]`, and its scales.
        batch: places of queries and keys.
        scale: factor of the scores.
        softcap: bound c of c * tanh(score / c); None for none.

    Returns:
        `[tokens, num_heads, head_dim]`, dtype of q.
    """
    out = torch.empty_like(q)
    for rows, _, weights, values in weights_and_values(q, layer_cache, batch, scale, softcap):
        out[rows] = torch.einsum("hqk,khd->qhd", weights, values).to(q.dtype)
    return out


def weights_and_values(
    q: Tensor, layer_cache: LayerCache, batch: AttentionBatch, scale: float, softcap: float | None
) -> Iterator[tuple[slice, int, Tensor, Tensor]]:
    """Of each sequence: rows of its queries, position of its first key, weights and values.

    Weights are `[num_heads, queries, keys]` and values `[keys, num_heads, head_dim]`, float32.
    """
    group, size = q.shape[1] // layer_cache.kv.shape[3], batch.block_size
    for i, (context_len, table) in enumerate(zip(batch.context_lens, batch.kv_tables, strict=True)):
        rows = slice(batch.cu_seqlens_q[i], batch.cu_seqlens_q[i + 1])
        first_key = batch.first_visible(context_len - batch.num_queries(i))
        slots = [table[p // size] * size + p % size for p in range(first_key, context_len)]
        scales = None if layer_cache.scales is None else layer_cache.scales.flatten(0, 1)[slots]
        own = multiply_out(layer_cache.kv.flatten(0, 1)[slots], scales, q.dtype).float()
        keys, values = own.repeat_interleave(group, dim=2).unbind(1)  # [keys, num_heads, head_dim] each
        scores = torch.einsum("qhd,khd->hqk", q[rows].float(), keys) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        hidden = ~batch.visible(batch.num_queries(i), len(slots))
        yield rows, first_key, scores.masked_fill(hidden, float("-inf")).softmax(-1), values


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
    if granule_lse_ptr is not None:
        granule_lse_ptr += (token * NUM_HEADS + head) * stride_granule  # [ROWS]

    m = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, HEAD_PAD], tl.float32)
    entries = table_entries(table_ptr, full_begin, full_end, BLOCK_SIZE, TILE)
    for start in tl.range(full_begin, full_end, TILE, num_stages=STAGES):
        start = tl.multiple_of(start, TILE)
        following = table_entries(table_ptr, start + TILE, full_end, BLOCK_SIZE, TILE)
        m, total, acc = attend_to_tile(
            q, (m, total, acc), start, entries, kv_ptr, scales_ptr, granule_lse_ptr, is_row, positions, kv_begin,
            kv_end, score_scale, softcap, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, WINDOW, HAS_SOFTCAP, TILE,
            PRECISION, False,
        )  # fmt: skip
        entries = following
    num_before = (full_begin - kv_begin + TILE - 1) // TILE
    num_edges = num_before + (kv_end - full_end + TILE - 1) // TILE
    for i in tl.range(0, num_edges, num_stages=1):
        start = tl.where(i < num_before, full_begin - (num_before - i) * TILE, full_end + (i - num_before) * TILE)
        start = tl.multiple_of(start, TILE)
        entries = tl.maximum(table_entries(table_ptr, start, kv_end, BLOCK_SIZE, TILE), 0)  # -1: slid out of view
        m, total, acc = attend_to_tile(
            q, (m, total, acc), start, entries, kv_ptr, scales_ptr, granule_lse_ptr, is_row, positions, kv_begin,
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


def paged_attention_triton(
    q: Tensor, kv: Tensor, layer_cache: LayerCache, batch: AttentionBatch, scale: float, softcap: float | None
) -> Tensor:
    """The same in at most three launches: few queries, long prompts, the merge of partials.

    Raises:
        ConfigError: a dtype, shape or layout that the kernel cannot serve.
    """
    return attend(q, layer_cache, batch, find_work(q, layer_cache, batch), scale, softcap)


def attend(
    q: Tensor,
    layer_cache: LayerCache,
    batch: AttentionBatch,
    work: WorkList,
    scale: float,
    softcap: float | None,
    lse: Tensor | None = None,
    granule_lse: Tensor | None = None,
) -> Tensor:
    """As `paged_attention_triton`, with the sums of weights where they are wanted.

    Args:
        q: `[tokens, num_heads, head_dim]`.
        layer_cache: cache of the layer.
        batch: places of queries and keys.
        work: items of `find_work`.
        scale: factor of the scores.
        softcap: bound of the scores.
        lse: `[tokens, num_heads]` float32, overwritten by the base-2 log-sum-exp of each query's scores.
        granule_lse: `[tokens, num_heads, granules]` float32, overwritten by the same over each granule that is seen: as
            many keys as the smaller of a block and a tile has.

    Returns:
        `[tokens, num_heads, head_dim]`, dtype of q.
    """
    _, num_heads, head_dim = q.shape
    num_kv_heads = layer_cache.kv.shape[3]
    architecture = launch_table.architecture(q.device)
    out = q.new_empty(q.shape)
    partials = work.partials(num_heads, head_dim)
    for tile, items in work.launches():
        _paged_attention_kernel[(len(items), num_kv_heads)](
            q,
            *layer_cache,
            out,
            lse,
            *partials,
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
            **launch_options(tile.warps, tile.stages),
            **launch_table.compile_options(architecture, tile.registers),
        )
    if work.num_parts:
        merge_partials_triton(*partials, work.parts, out, lse)
    return out

"""One tile of keys in the attention kernel: where they lie, and a step of the running softmax over them.

`paged_attention` has the formula, the layouts and the loop over tiles. A tile is some TILE consecutive positions; it
lies within one block, or in several. Masked, its keys outside of what a row sees have no weight, whatever they hold.
"""

from minirksc.kernels.jit import tl, triton


@triton.jit
def table_entries(table_ptr, start, end, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    """Block ids of the tokens of the tile at `start`: one id where the tile lies within a block, else one a token."""
    if BLOCK_SIZE >= TILE:
        return tl.load(table_ptr + start // BLOCK_SIZE, mask=start < end, other=0)
    else:
        at = start + tl.arange(0, TILE)  # [TILE]
        return tl.load(table_ptr + at // BLOCK_SIZE, mask=at < end, other=0)


@triton.jit
def attend_to_tile(
    q,
    state,
    start,
    entries,
    kv_ptr,
    scales_ptr,
    granule_lse_ptr,  # of each row, [ROWS]
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
    mask = None
    if MASKED:  # values too: zero times NaN is NaN
        mask = in_range[:, None] & (offs_d < HEAD_DIM)[None, :]
    elif acc.shape[1] != HEAD_DIM:
        mask = (offs_d < HEAD_DIM)[None, :]
    other = None if mask is None else 0.0
    k = tl.load(k_ptrs, mask=mask, other=other)
    v = tl.load(v_ptrs, mask=mask, other=other)
    scores = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision=PRECISION) * score_scale  # [ROWS, TILE]
    if scales_ptr is not None:
        scale_ptrs = scales_ptr + slots * (2 * NUM_KV_HEADS)
        mask = in_range if MASKED else None
        k_scale = tl.load(scale_ptrs, mask=mask, other=0.0 if MASKED else None)
        v_scale = tl.load(scale_ptrs + NUM_KV_HEADS, mask=mask, other=0.0 if MASKED else None)
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
    if granule_lse_ptr is not None:
        GRANULE: tl.constexpr = BLOCK_SIZE if BLOCK_SIZE < TILE else TILE
        sums = tl.sum(tl.reshape(p, (acc.shape[0], TILE // GRANULE, GRANULE)), 2)  # [ROWS, TILE // GRANULE]
        granule = start // GRANULE + tl.arange(0, TILE // GRANULE)
        is_seen = (
            is_row[:, None] & (granule * GRANULE < kv_end)[None, :] & (((granule + 1) * GRANULE) > kv_begin)[None, :]
        )
        # A sum may have underflowed to zero: its logarithm is then so low that the mass is zero too.
        tl.store(
            granule_lse_ptr[:, None] + granule[None, :],
            shift[:, None] + tl.log2(tl.maximum(sums, 1e-38)),
            mask=is_seen,
        )
    if scales_ptr is not None:
        p *= v_scale[None, :]
    acc = tl.dot(p.to(q.dtype), v.to(q.dtype), acc * decay[:, None], input_precision=PRECISION)
    return new_m, total, acc

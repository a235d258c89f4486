"""From one product's queries, keys and values to what the attention reads: normed, rotated, and stored in the cache.

For each token: q and k are normed head by head (`rms_norm`) where the model does so, then rotated (`rope`); v is
normed without a weight where the model does so; q is multiplied by its growth; k and v go to the token's slot of the
cache. Computed in float32, and rounded to the dtype of the activations after each of these steps.

What is written back into `qkv` is what the cache holds, for int8 (`kernels/kv/int8.py`) number * scale, so that a
token's own step sees the keys and values that all later steps see.

The kernel does all of this in one launch, since in a decode step a launch costs more than its work. One program takes
some heads of q, of k or of v of one token, and holds the two halves that are rotated into each other, and the rest
of a head, as tiles of their own. Limits: `kernels/kv/kv_check.py`.
"""

import torch
from torch import Tensor

from minirksc.kernels.jit import launch_options, tl, triton
from minirksc.kernels.kv.int8 import abs_max_bits, int8_numbers, int8_scales, round_to_int8
from minirksc.kernels.kv.kv_check import check_kv_store
from minirksc.kernels.kv.layer_cache import multiply_out
from minirksc.kernels.kv.placement import HeadNorms, Placement
from minirksc.kernels.rms_norm import rms_norm_reference, rms_norm_torch
from minirksc.kernels.rope import RopeTables, rope_reference, rope_torch, rotated


def kv_store_reference(qkv: Tensor, norms: HeadNorms, placement: Placement) -> None:
    """The specification: step by step, and into the cache token by token.

    Args:
        qkv: `[tokens, num_heads + 2 * num_kv_heads, head_dim]`, heads of q, k and v; `[tokens, num_heads, head_dim]`
            where keys and values are another layer's. Overwritten by q as the attention takes it, and k and v as the
            cache holds them.
        norms: norms of the layer's heads.
        placement: positions of the tokens, and the place of their keys and values.
    """
    num_heads, eps = norms.num_heads, norms.eps
    rope, query_growth, cache, slots = placement
    num_kv_heads = (qkv.shape[1] - num_heads) // 2
    q, k, v = qkv.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    if norms.q_norm is not None:
        q.copy_(rms_norm_reference(q, norms.q_norm, eps))
    if norms.k_norm is not None:
        k.copy_(rms_norm_reference(k, norms.k_norm, eps))
    if norms.v_norm:
        v.copy_(rms_norm_reference(v, None, eps))
    if rope is not None:
        rope_reference(q, *rope)
        rope_reference(k, *rope)
    if query_growth is not None:
        q.copy_(q.float() * query_growth.float())
    if cache is None:
        return
    stored, scales = torch.stack((k, v), dim=1), None  # [tokens, 2, num_kv_heads, head_dim]
    if cache.scales is not None:
        stored, scales = round_to_int8(stored)
        qkv[:, num_heads:] = multiply_out(stored, scales, qkv.dtype).flatten(1, 2)
    block_size = cache.kv.shape[1]
    for token, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        block_id, offset = divmod(slot, block_size)
        cache.kv[block_id, offset] = stored[token]
        if cache.scales is not None and scales is not None:
            cache.scales[block_id, offset] = scales[token]


def kv_store_torch(qkv: Tensor, norms: HeadNorms, placement: Placement) -> None:
    """The same in few passes and one scatter. Every token has a slot: -1 is not among them."""
    num_heads, eps = norms.num_heads, norms.eps
    rope, query_growth, cache, slots = placement
    num_kv_heads = (qkv.shape[1] - num_heads) // 2
    q, k, v = qkv.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    if norms.q_norm is not None:
        q.copy_(rms_norm_torch(q, norms.q_norm, eps))
    if norms.k_norm is not None and num_kv_heads:
        k.copy_(rms_norm_torch(k, norms.k_norm, eps))
    if norms.v_norm and num_kv_heads:
        v.copy_(rms_norm_torch(v, None, eps))
    if rope is not None:
        rope_torch(qkv[:, : num_heads + num_kv_heads], *rope)
    if query_growth is not None:
        q.mul_(query_growth)
    if cache is None:
        return
    slots = slots.long()
    kv = qkv[:, num_heads:].view(len(qkv), 2, num_kv_heads, qkv.shape[2])
    if cache.scales is not None:
        numbers, scales = round_to_int8(kv)
        kv.copy_(multiply_out(numbers, scales, kv.dtype))
        cache.scales.flatten(0, 1).index_copy_(0, slots, scales)
        kv = numbers
    cache.kv.flatten(0, 1).index_copy_(0, slots, kv)


@triton.jit
def _normed(x, factor, weight_ptr, cols, mask, dtype):
    x = x * factor[:, None]
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + cols, mask=mask, other=0.0)
        x = x.to(weight.dtype).to(tl.float32) * weight.to(tl.float32)[None, :]
    return x.to(dtype).to(tl.float32)


@triton.jit
def _finish_heads(
    x_ptr,  # of a token's first head of q, k or v
    cache_ptr,  # of the same in its slot; None for q
    scales_ptr,
    num_stored,  # all heads, or none where there is no slot
    first,
    norm_ptr,
    eps,
    cos_ptr,
    sin_ptr,
    growth_ptr,
    IS_NORMED: tl.constexpr,
    stride_head: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    HALF_PAD: tl.constexpr,
    REST_PAD: tl.constexpr,  # 0: both halves are all of a head
):
    dtype = x_ptr.dtype.element_ty
    heads = first + tl.arange(0, HEADS)
    is_head = heads < NUM_HEADS
    x_ptr += (heads * stride_head)[:, None]
    cols = tl.arange(0, HALF_PAD)
    mask = is_head[:, None] & (cols < HALF)[None, :]
    low = tl.load(x_ptr + cols, mask=mask, other=0.0).to(tl.float32)  # [HEADS, HALF_PAD]
    high = tl.load(x_ptr + HALF + cols, mask=mask, other=0.0).to(tl.float32)
    if REST_PAD > 0:
        rest_cols = 2 * HALF + tl.arange(0, REST_PAD)
        rest_mask = is_head[:, None] & (rest_cols < HEAD_DIM)[None, :]
        rest = tl.load(x_ptr + rest_cols, mask=rest_mask, other=0.0).to(tl.float32)  # [HEADS, REST_PAD]

    if IS_NORMED:
        squares = tl.sum(low * low + high * high, 1)
        if REST_PAD > 0:
            squares += tl.sum(rest * rest, 1)
        factor = tl.rsqrt(squares / HEAD_DIM + eps)
        low = _normed(low, factor, norm_ptr, cols, cols < HALF, dtype)
        high = _normed(high, factor, norm_ptr, HALF + cols, cols < HALF, dtype)
        if REST_PAD > 0:
            rest = _normed(rest, factor, norm_ptr, rest_cols, rest_cols < HEAD_DIM, dtype)
    if cos_ptr is not None:
        low, high = rotated(low, high, cos_ptr, sin_ptr, cols, HALF)
        low, high = low.to(dtype).to(tl.float32), high.to(dtype).to(tl.float32)
    if growth_ptr is not None:
        growth = tl.load(growth_ptr).to(tl.float32)
        low, high = low * growth, high * growth
        if REST_PAD > 0:
            rest = rest * growth

    if cache_ptr is not None:
        number = cache_ptr.dtype.element_ty
        is_stored = heads < num_stored
        cache_ptr += (heads * HEAD_DIM)[:, None]
        if scales_ptr is not None:
            bits = tl.maximum(abs_max_bits(low), abs_max_bits(high))
            if REST_PAD > 0:
                bits = tl.maximum(bits, abs_max_bits(rest))
            factor, scales = int8_scales(bits)
            tl.store(scales_ptr + heads, scales, mask=is_stored)
            low, high = int8_numbers(low, factor), int8_numbers(high, factor)
            if REST_PAD > 0:
                rest = int8_numbers(rest, factor)
        tl.store(cache_ptr + cols, low.to(number), mask=mask & is_stored[:, None])
        tl.store(cache_ptr + HALF + cols, high.to(number), mask=mask & is_stored[:, None])
        if REST_PAD > 0:
            tl.store(cache_ptr + rest_cols, rest.to(number), mask=rest_mask & is_stored[:, None])
        if scales_ptr is not None:
            low, high = low * scales[:, None], high * scales[:, None]
            if REST_PAD > 0:
                rest = rest * scales[:, None]

    if IS_NORMED or (cos_ptr is not None) or (growth_ptr is not None) or (scales_ptr is not None):
        tl.store(x_ptr + cols, low.to(dtype), mask=mask)
        tl.store(x_ptr + HALF + cols, high.to(dtype), mask=mask)
        if REST_PAD > 0:
            tl.store(x_ptr + rest_cols, rest.to(dtype), mask=rest_mask)


@triton.jit
def _kv_store_kernel(
    qkv_ptr,
    q_norm_ptr,
    k_norm_ptr,
    cos_ptr,
    sin_ptr,
    growth_ptr,
    kv_ptr,
    scales_ptr,
    slots_ptr,
    eps,
    stride_token,
    stride_rope_token,
    stride_head: tl.constexpr,
    V_NORM: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,  # of the rotated part of a head
    HEADS: tl.constexpr,  # of a program
    HALF_PAD: tl.constexpr,
    REST_PAD: tl.constexpr,
    Q_GROUPS: tl.constexpr,
    KV_GROUPS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    qkv_ptr += token * stride_token
    if cos_ptr is not None:
        cos_ptr += token * stride_rope_token
        sin_ptr += token * stride_rope_token
    if growth_ptr is not None:
        growth_ptr += token
    # fmt: off
    if group < Q_GROUPS:
        _finish_heads(
            qkv_ptr, None, None, 0, group * HEADS, q_norm_ptr, eps, cos_ptr, sin_ptr, growth_ptr,
            q_norm_ptr is not None, stride_head, NUM_HEADS, HEAD_DIM, HALF, HEADS, HALF_PAD, REST_PAD,
        )
    elif NUM_KV_HEADS > 0:
        slot = tl.load(slots_ptr + token).to(tl.int64)
        num_stored = tl.where(slot >= 0, NUM_KV_HEADS, 0)
        k_ptr = qkv_ptr + NUM_HEADS * stride_head
        kv_ptr += slot * (2 * NUM_KV_HEADS * HEAD_DIM)
        if scales_ptr is not None:
            scales_ptr += slot * (2 * NUM_KV_HEADS)
        if group < Q_GROUPS + KV_GROUPS:
            _finish_heads(
                k_ptr, kv_ptr, scales_ptr, num_stored, (group - Q_GROUPS) * HEADS, k_norm_ptr, eps, cos_ptr, sin_ptr,
                None, k_norm_ptr is not None, stride_head, NUM_KV_HEADS, HEAD_DIM, HALF, HEADS, HALF_PAD, REST_PAD,
            )
        else:
            v_ptr = k_ptr + NUM_KV_HEADS * stride_head
            kv_ptr += NUM_KV_HEADS * HEAD_DIM
            if scales_ptr is not None:
                scales_ptr += NUM_KV_HEADS
            _finish_heads(
                v_ptr, kv_ptr, scales_ptr, num_stored, (group - Q_GROUPS - KV_GROUPS) * HEADS, None, eps, None, None,
                None, V_NORM, stride_head, NUM_KV_HEADS, HEAD_DIM, HALF, HEADS, HALF_PAD, REST_PAD,
            )
    # fmt: on


def head_parts(head_dim: int, rope: RopeTables | None) -> dict[str, int]:
    """How a kernel takes a head apart: two halves that are rotated into each other, and the rest.

    Args:
        head_dim: size of a head.
        rope: tables, as wide as both halves; None: these are all of it.
    """
    half = (head_dim if rope is None else rope[0].shape[2]) // 2
    rest = head_dim - 2 * half
    padded = triton.next_power_of_2
    return {"HEAD_DIM": head_dim, "HALF": half, "HALF_PAD": padded(half), "REST_PAD": padded(rest) if rest else 0}


def heads_of_program(head_dim: int, num_heads: int) -> int:
    """How many heads a program takes, a power of two: 512 numbers for its one warp, 16 a thread.

    Args:
        head_dim: size of a head.
        num_heads: number of heads.
    """
    padded = triton.next_power_of_2
    heads: int = min(max(1, 512 // padded(head_dim)), padded(num_heads))
    return heads


def kv_store_triton(qkv: Tensor, norms: HeadNorms, placement: Placement) -> None:
    """The kernel: one launch; none where nothing is to be done.

    Raises:
        ConfigError: a dtype, a shape or a stride that the kernel cannot serve.
    """
    check_kv_store(qkv, norms, placement)
    num_heads, q_norm, k_norm, v_norm, eps = norms
    rope, query_growth, cache, slots = placement
    tokens, _, head_dim = qkv.shape
    num_kv_heads = (qkv.shape[1] - num_heads) // 2
    heads = heads_of_program(head_dim, max(num_heads, num_kv_heads))
    is_q_changed = q_norm is not None or rope is not None or query_growth is not None
    q_groups = triton.cdiv(num_heads, heads) if is_q_changed else 0
    kv_groups = triton.cdiv(num_kv_heads, heads)
    if tokens == 0 or q_groups + kv_groups == 0:
        return
    cos, sin = (None, None) if rope is None else rope
    _kv_store_kernel[(tokens, q_groups + 2 * kv_groups)](
        qkv,
        q_norm,
        k_norm,
        cos,
        sin,
        query_growth,
        *(cache or (None, None)),
        slots,
        eps,
        qkv.stride(0),
        0 if cos is None else cos.stride(0),
        stride_head=qkv.stride(1),
        V_NORM=v_norm,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEADS=heads,
        **head_parts(head_dim, rope),
        Q_GROUPS=q_groups,
        KV_GROUPS=kv_groups,
        **launch_options(1),
    )

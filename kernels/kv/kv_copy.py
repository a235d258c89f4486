"""Copies inside the paged KV cache: whole blocks, and single tokens whose keys are turned to other positions.

A key that stands at position p was rotated by p; turned by (q - p) it is the key of position q (`rope`). So a run of
tokens that another prompt has elsewhere needs no forward pass: values are copied, keys copied and turned. Rotations
add up exactly for tables without an attention factor; only the rounding of keys happens once more. Keys of an int8
cache are multiplied out, turned in float32 and rounded anew, with a new scale. Without tables nothing is turned, and
all numbers are copied as they are.

The kernel of blocks gives every program a part of one block of one layer. The kernel of tokens is that of `kv_store`
between two slots.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from minirksc.errors import ConfigError
from minirksc.kernels.jit import launch_options, tl, triton
from minirksc.kernels.kv.int8 import abs_max_bits, int8_numbers, int8_scales, round_to_int8
from minirksc.kernels.kv.kv_check import check_cache, check_rope, check_slots
from minirksc.kernels.kv.kv_store import head_parts, heads_of_program
from minirksc.kernels.kv.layer_cache import LayerCache, multiply_out, read_slots, write_slots
from minirksc.kernels.rope import RopeTables, rope_reference, rope_torch, rotated

MAX_PART_BYTES = 16384  # that a program copies


def copy_blocks_reference(cache: Tensor, copies: Sequence[tuple[int, int]]) -> None:
    """The specification: all sources are read before any destination is written, so a block may be both.

    Args:
        cache: `[num_layers, num_blocks, ...]`, written in place: `LayerCache.kv` or `LayerCache.scales` of layers.
        copies: block ids (source, destination); destinations are distinct.
    """
    before = cache.clone()
    for source, destination in copies:
        cache[:, destination] = before[:, source]


def copy_blocks_torch(cache: Tensor, copies: Sequence[tuple[int, int]]) -> None:
    """The same in one gather and one scatter."""
    if copies:
        sources, destinations = torch.tensor(copies, device=cache.device).unbind(1)
        cache[:, destinations] = cache[:, sources]


@triton.jit
def _copy_blocks_kernel(
    cache_ptr,
    copies_ptr,  # [copies, 2] int64
    stride_layer,
    BLOCK_NUMBERS: tl.constexpr,  # numbers of a KV block
    PART: tl.constexpr,
):
    source = tl.load(copies_ptr + 2 * tl.program_id(0))
    destination = tl.load(copies_ptr + 2 * tl.program_id(0) + 1)
    cache_ptr += tl.program_id(1).to(tl.int64) * stride_layer
    numbers = tl.program_id(2) * PART + tl.arange(0, PART)
    mask = numbers < BLOCK_NUMBERS
    x = tl.load(cache_ptr + source * BLOCK_NUMBERS + numbers, mask=mask)
    tl.store(cache_ptr + destination * BLOCK_NUMBERS + numbers, x, mask=mask)


def part_launch(block_numbers: int, itemsize: int) -> tuple[int, int]:
    """(numbers that a program copies, its warps): a thread copies 128 bytes, all of them read before any is written.

    Args:
        block_numbers: number of elements of a KV block.
        itemsize: bytes of an element.
    """
    part: int = min(MAX_PART_BYTES // itemsize, triton.next_power_of_2(block_numbers))
    return part, max(1, part * itemsize // 4096)


def copy_blocks_triton(cache: Tensor, copies: Sequence[tuple[int, int]]) -> None:
    """The kernel: one launch, where no block is both a source and a destination; else the torch form.

    Raises:
        ConfigError: blocks are not contiguous, or there is no such block.
    """
    num_layers, num_blocks = cache.shape[:2]
    if num_layers and not cache[0].is_contiguous():
        given = f"the cache has shape {list(cache.shape)} and strides {cache.stride()}"
        raise ConfigError(f"{given}; the blocks of a layer must be contiguous")
    for source, destination in copies:
        if not (0 <= source < num_blocks and 0 <= destination < num_blocks):
            raise ConfigError(f"block {source} is to be copied to {destination}; blocks are 0 to {num_blocks - 1}")
    if not copies or cache.numel() == 0:
        return
    if {source for source, _ in copies} & {destination for _, destination in copies}:
        copy_blocks_torch(cache, copies)
        return
    block_numbers = cache[0, 0].numel()
    part, num_warps = part_launch(block_numbers, cache.itemsize)
    table = torch.tensor(copies, dtype=torch.int64).to(cache.device, non_blocking=True)
    _copy_blocks_kernel[(len(copies), num_layers, triton.cdiv(block_numbers, part))](
        cache,
        table,
        cache.stride(0),
        BLOCK_NUMBERS=block_numbers,
        PART=part,
        **launch_options(num_warps),
    )


def copy_rotated_reference(cache: LayerCache, sources: Tensor, destinations: Tensor, rope: RopeTables | None) -> None:
    """The specification: token by token.

    Args:
        cache: cache of one layer, written in place.
        sources: `[tokens]` int64 or int32, slots.
        destinations: `[tokens]` int64 or int32, slots; distinct, and none of them a source.
        rope: tables of new minus old position with scale 1, see `rope_tables`; None for a layer without positions.
    """
    kv, scales = (None if part is None else part.flatten(0, 1) for part in cache)  # by slot
    assert kv is not None
    for token, (source, destination) in enumerate(zip(sources.tolist(), destinations.tolist(), strict=True)):
        kv[destination] = kv[source]
        if scales is not None:
            scales[destination] = scales[source]
        if rope is None:
            continue
        table = rope[0][token : token + 1], rope[1][token : token + 1]
        if scales is None:
            rope_reference(kv[destination, :1], *table)
            continue
        key = multiply_out(kv[source, :1], scales[source, :1], torch.float32)  # [1, num_kv_heads, head_dim]
        rope_reference(key, *table)
        kv[destination, :1], scales[destination, :1] = round_to_int8(key)


def copy_rotated_torch(cache: LayerCache, sources: Tensor, destinations: Tensor, rope: RopeTables | None) -> None:
    """The same in one gather and one scatter, in float32."""
    kv = read_slots(cache.kv, sources)  # [tokens, 2, num_kv_heads, head_dim]
    scales = None if cache.scales is None else cache.scales.flatten(0, 1)[sources]  # [tokens, 2, num_kv_heads]
    if rope is not None:
        keys = multiply_out(kv[:, 0], None if scales is None else scales[:, 0], torch.float32).float()
        rope_torch(keys, *(table.float() for table in rope))
        if scales is None:
            kv[:, 0] = keys
        else:
            kv[:, 0], scales[:, 0] = round_to_int8(keys)
    if cache.scales is not None and scales is not None:
        cache.scales.flatten(0, 1).index_copy_(0, destinations.long(), scales)
    write_slots(cache.kv, destinations, kv)


@triton.jit
def _copy_rotated_kernel(
    kv_ptr,
    scales_ptr,
    sources_ptr,
    destinations_ptr,
    cos_ptr,
    sin_ptr,
    stride_rope_token,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,  # of the rotated part of a head
    HEADS: tl.constexpr,  # of a program
    HALF_PAD: tl.constexpr,
    REST_PAD: tl.constexpr,  # 0: both halves are all of a head
    GROUPS: tl.constexpr,  # programs of a token's keys
):
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)  # first those of keys, then those of values
    is_key = group < GROUPS
    dtype = kv_ptr.dtype.element_ty
    heads = (group % GROUPS) * HEADS + tl.arange(0, HEADS)
    is_head = heads < NUM_KV_HEADS
    heads += tl.where(is_key, 0, NUM_KV_HEADS)
    source = tl.load(sources_ptr + token).to(tl.int64) * (2 * NUM_KV_HEADS)
    destination = tl.load(destinations_ptr + token).to(tl.int64) * (2 * NUM_KV_HEADS)
    source_ptr = kv_ptr + source * HEAD_DIM + (heads * HEAD_DIM)[:, None]
    destination_ptr = kv_ptr + destination * HEAD_DIM + (heads * HEAD_DIM)[:, None]
    cols = tl.arange(0, HALF_PAD)
    mask = is_head[:, None] & (cols < HALF)[None, :]
    low = tl.load(source_ptr + cols, mask=mask, other=0.0).to(tl.float32)  # [HEADS, HALF_PAD]
    high = tl.load(source_ptr + HALF + cols, mask=mask, other=0.0).to(tl.float32)
    if REST_PAD > 0:
        rest_cols = 2 * HALF + tl.arange(0, REST_PAD)
        rest_mask = is_head[:, None] & (rest_cols < HEAD_DIM)[None, :]
        rest = tl.load(source_ptr + rest_cols, mask=rest_mask, other=0.0).to(tl.float32)  # [HEADS, REST_PAD]
    if scales_ptr is not None:
        scales = tl.load(scales_ptr + source + heads, mask=is_head, other=0.0)
    if cos_ptr is not None and is_key:
        cos_ptr += token * stride_rope_token
        sin_ptr += token * stride_rope_token
        if scales_ptr is None:
            low, high = rotated(low, high, cos_ptr, sin_ptr, cols, HALF)
        else:
            low, high = rotated(low * scales[:, None], high * scales[:, None], cos_ptr, sin_ptr, cols, HALF)
            bits = tl.maximum(abs_max_bits(low), abs_max_bits(high))
            if REST_PAD > 0:
                rest = rest * scales[:, None]
                bits = tl.maximum(bits, abs_max_bits(rest))
            factor, scales = int8_scales(bits)
            low, high = int8_numbers(low, factor), int8_numbers(high, factor)
            if REST_PAD > 0:
                rest = int8_numbers(rest, factor)
    tl.store(destination_ptr + cols, low.to(dtype), mask=mask)
    tl.store(destination_ptr + HALF + cols, high.to(dtype), mask=mask)
    if REST_PAD > 0:
        tl.store(destination_ptr + rest_cols, rest.to(dtype), mask=rest_mask)
    if scales_ptr is not None:
        tl.store(scales_ptr + destination + heads, scales, mask=is_head)


def copy_rotated_triton(cache: LayerCache, sources: Tensor, destinations: Tensor, rope: RopeTables | None) -> None:
    """The kernel: one launch.

    Raises:
        ConfigError: a dtype, a shape or a stride that the kernel cannot serve.
    """
    check_cache(cache)
    cos, sin = (None, None) if rope is None else rope
    tokens, (_, num_kv_heads, head_dim) = len(sources if cos is None else cos), cache.kv.shape[2:]
    check_slots("sources", sources, tokens)
    check_slots("destinations", destinations, tokens)
    if rope is not None:
        check_rope(rope, tokens, head_dim)
    if tokens == 0:
        return
    heads = heads_of_program(head_dim, num_kv_heads)
    groups = triton.cdiv(num_kv_heads, heads)
    _copy_rotated_kernel[(tokens, 2 * groups)](
        *cache,
        sources,
        destinations,
        cos,
        sin,
        0 if cos is None else cos.stride(0),
        NUM_KV_HEADS=num_kv_heads,
        HEADS=heads,
        **head_parts(head_dim, rope),
        GROUPS=groups,
        **launch_options(1),
    )

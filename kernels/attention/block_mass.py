"""Attention mass of a KV block: the softmax weights that a query gives to its keys, summed, mean over heads.

The block manager keeps what is looked at. The attention kernel stores, where it is asked to, the base-2 log-sum-exp of
each granule of keys (the smaller of a block and a tile) from the sums that it has anyway; relative to the whole row's
that is the granule's weight. No scores are computed a second time.

`paged_attention_mass_*` are attention and mass of a decode step; the CPU's is in `block_mass_torch`.
"""

from itertools import pairwise

import torch
from torch import Tensor

from minirksc.errors import ConfigError
from minirksc.kernels.attention.batch import AttentionBatch
from minirksc.kernels.attention.paged_attention import attend, paged_attention_reference, weights_and_values
from minirksc.kernels.attention.work_list import find_work
from minirksc.kernels.jit import launch_options, tl, triton
from minirksc.kernels.kv.layer_cache import LayerCache


def paged_attention_mass_reference(
    q: Tensor, kv: Tensor, layer_cache: LayerCache, batch: AttentionBatch, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """The specification of attention with mass; arguments as of `paged_attention_reference`.

    Returns:
        (out `[sequences, num_heads, head_dim]` as of `paged_attention`, mass `[sequences, blocks]` float32 as of
        `block_mass_reference`).

    Raises:
        ConfigError: a sequence has more or fewer new tokens than one.
    """
    check_decode(batch)
    out = paged_attention_reference(q, kv, layer_cache, batch, scale, softcap)
    return out, block_mass_reference(q, layer_cache, batch, scale, softcap)


def check_decode(batch: AttentionBatch) -> None:
    """Refuses a batch in which not every sequence has one new token.

    Raises:
        ConfigError: it is such a batch.
    """
    for i, (begin, end) in enumerate(pairwise(batch.cu_seqlens_q)):
        if end - begin != 1:
            raise ConfigError(
                f"attention mass is for decode steps, and sequence {i} has {end - begin} new tokens; it must be 1 in "
                "each, use paged_attention for this step"
            )


def block_mass_reference(
    q: Tensor, layer_cache: LayerCache, batch: AttentionBatch, scale: float, softcap: float | None
) -> Tensor:
    """The specification.

    Args:
        q: `[tokens, num_heads, head_dim]`.
        layer_cache: cache of the layer.
        batch: places of queries and keys.
        scale: factor of the scores.
        softcap: bound c of c * tanh(score / c); None for none.

    Returns:
        `[tokens, blocks]` float32, in the order of the sequence's block table; a row sums to one.
    """
    size = batch.block_size
    width = max((len(table) for table in batch.kv_tables), default=0)
    mass = torch.zeros((len(q), width), dtype=torch.float32, device=q.device)
    for rows, first, weights, _ in weights_and_values(q, layer_cache, batch, scale, softcap):
        block = torch.arange(first, first + weights.shape[-1], device=q.device) // size
        mass[rows] = mass[rows].index_add(1, block, weights.mean(0))
    return mass


@triton.jit
def _block_mass_kernel(
    granule_lse_ptr,
    lse_ptr,
    tokens_ptr,
    positions_ptr,
    mass_ptr,
    num_granules,
    num_blocks,
    NUM_HEADS: tl.constexpr,
    WINDOW: tl.constexpr,
    GRANULE: tl.constexpr,  # keys
    PER_BLOCK: tl.constexpr,  # granules of a block
    BLOCKS: tl.constexpr,  # of a program
):
    """Program (place, some blocks): mean over heads of the weight that each block received."""
    token = tl.load(tokens_ptr + tl.program_id(0)).to(tl.int64)
    position = tl.load(positions_ptr + tl.program_id(0))
    first_key = tl.maximum(position - WINDOW + 1, 0) if WINDOW > 0 else 0
    blocks = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    granules = tl.program_id(1) * (BLOCKS * PER_BLOCK) + tl.arange(0, BLOCKS * PER_BLOCK)
    is_seen = (granules >= first_key // GRANULE) & (granules <= position // GRANULE)  # others were never written
    mass = tl.zeros([BLOCKS * PER_BLOCK], tl.float32)
    for head in range(NUM_HEADS):
        row = token * NUM_HEADS + head
        lse = tl.load(granule_lse_ptr + row * num_granules + granules, mask=is_seen, other=float("-inf"))
        mass += tl.exp2(lse - tl.load(lse_ptr + row))
    mass = tl.sum(tl.reshape(mass, (BLOCKS, PER_BLOCK)), 1) / NUM_HEADS
    tl.store(mass_ptr + token * num_blocks + blocks, mass, mask=blocks < num_blocks)


def paged_attention_mass_triton(
    q: Tensor, kv: Tensor, layer_cache: LayerCache, batch: AttentionBatch, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """The kernels: one launch more than the attention.

    Not to be recorded as part of a CUDA graph: the places beyond a batch in its buffers name tokens of earlier ones.

    Raises:
        ConfigError: not a decode step, or a dtype, shape or layout that the kernel cannot serve.
    """
    check_decode(batch)
    return attend_with_mass(q, layer_cache, batch, scale, softcap)


def attend_with_mass(
    q: Tensor, layer_cache: LayerCache, batch: AttentionBatch, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """The same of any step without long prompts; arguments and result as of `paged_attention_mass_triton`."""
    work = find_work(q, layer_cache, batch)
    num_tokens, num_heads, _ = q.shape
    num_blocks = work.table.shape[1]
    mass = q.new_empty((num_tokens, num_blocks), dtype=torch.float32)
    if work.tile is None:
        return torch.empty_like(q), mass
    assert work.prefill_tile is None  # whose granules would be of another size
    granule = min(batch.block_size, work.tile.tile)
    per_block = batch.block_size // granule
    lse = q.new_empty((num_tokens, num_heads), dtype=torch.float32)
    granule_lse = q.new_empty((num_tokens, num_heads, num_blocks * per_block), dtype=torch.float32)
    out = attend(q, layer_cache, batch, work, scale, softcap, lse, granule_lse)
    blocks = max(1, 128 // per_block)
    _block_mass_kernel[(num_tokens, triton.cdiv(num_blocks, blocks))](
        granule_lse,
        lse,
        work.tokens,
        work.positions,
        mass,
        granule_lse.shape[2],
        num_blocks,
        NUM_HEADS=num_heads,
        WINDOW=batch.window or 0,
        GRANULE=granule,
        PER_BLOCK=per_block,
        BLOCKS=blocks,
        **launch_options(4, num_stages=None),
    )
    return out, mass

"""One layer's part of the paged KV cache, as the kernels see it: slot by slot, or in tiles."""

from typing import NamedTuple

import torch
from torch import Tensor

TILE = 16
"""Slots of a tile; `KV_TILE` in `kernels/native/ops.h`."""


class LayerCache(NamedTuple):
    """Keys and values of one layer.

    A slot is block_id * block_size + offset. Where `kv` is of slots, keys are at index 0 of the third dimension and
    values at 1, so that one token's key and value are one contiguous row.

    A cache of tiles holds the same numbers in the order in which AVX512-BF16 multiplies them, so that no attention has
    to turn them around: of the keys of a tile and head `[head_dim / 2, TILE, 2]`, pairs of each key's numbers, TILE
    keys side by side; of the values `[TILE / 2, head_dim, 2]`, each number of two consecutive keys side by side.

    Attributes:
        kv: `[num_blocks, block_size, 2, num_kv_heads, head_dim]`, the model's dtype or int8; or in tiles
            `[num_blocks, block_size / TILE, 2, num_kv_heads, TILE, head_dim]`, the model's dtype.
        scales: `[num_blocks, block_size, 2, num_kv_heads]` float32, what int8 numbers of a token and head are
            multiplied by; None where kv is not int8.
    """

    kv: Tensor
    scales: Tensor | None = None

    @property
    def is_tiled(self) -> bool:
        """Whether it is in tiles."""
        return self.kv.dim() == 6


def plain_block_shape(
    num_heads: int, num_kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype
) -> tuple[int, ...]:
    """Shape of a block whose slots lie one after the other.

    Args:
        num_heads: number of heads of the queries.
        num_kv_heads: number of heads of keys and values.
        head_dim: size of a head of both.
        block_size: number of tokens a block.
        dtype: type of the cache.
    """
    return block_size, 2, num_kv_heads, head_dim


def read_slots(kv: Tensor, slots: Tensor) -> Tensor:
    """Keys and values of some slots.

    Args:
        kv: numbers of a `LayerCache`.
        slots: `[tokens]` integers.

    Returns:
        `[tokens, 2, num_kv_heads, head_dim]`.
    """
    slots = slots.long()
    if kv.dim() == 5:
        return kv.flatten(0, 1).index_select(0, slots)
    tiles, place = slots // TILE, slots % TILE
    keys = _keys(kv)[tiles, :, :, place].flatten(2)
    return torch.stack((keys, _values(kv)[tiles, :, place // 2, :, place % 2]), dim=1)


def write_slots(kv: Tensor, slots: Tensor, rows: Tensor) -> None:
    """Overwrites keys and values of some slots.

    Args:
        kv: numbers of a `LayerCache`.
        slots: `[tokens]` integers, distinct.
        rows: `[tokens, 2, num_kv_heads, head_dim]`, of the cache's dtype.
    """
    slots = slots.long()
    if kv.dim() == 5:
        kv.flatten(0, 1).index_copy_(0, slots, rows)
        return
    tiles, place = slots // TILE, slots % TILE
    _keys(kv)[tiles, :, :, place] = rows[:, 0].unflatten(2, (-1, 2))
    _values(kv)[tiles, :, place // 2, :, place % 2] = rows[:, 1]


def _keys(kv: Tensor) -> Tensor:
    """A view of tiles, `[tiles, num_kv_heads, head_dim / 2, TILE, 2]`."""
    keys = kv.flatten(0, 1)[:, 0]
    return keys.view(*keys.shape[:2], -1, TILE, 2)


def _values(kv: Tensor) -> Tensor:
    """A view of tiles, `[tiles, num_kv_heads, TILE / 2, head_dim, 2]`."""
    values = kv.flatten(0, 1)[:, 1]
    return values.view(*values.shape[:2], TILE // 2, -1, 2)


def multiply_out(numbers: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What is read out of the cache: number * scale, multiplied in float32.

    Args:
        numbers: `[..., head_dim]`, some of `LayerCache.kv`.
        scales: `[...]` float32, those of `LayerCache.scales`; None: the numbers are themselves what was stored.
        dtype: type of the activations.

    Returns:
        `[..., head_dim]` of that dtype; the numbers themselves where there are no scales.
    """
    return numbers if scales is None else (numbers * scales.unsqueeze(-1)).to(dtype)

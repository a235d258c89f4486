"""One layer's part of the paged KV cache, as the kernels see it."""

from typing import NamedTuple

import torch
from torch import Tensor


class LayerCache(NamedTuple):
    """Keys and values of one layer.

    Keys are at index 0 of the third dimension and values at 1, so that one token's key and value are one contiguous
    row. A slot is block_id * block_size + offset.

    Attributes:
        kv: `[num_blocks, block_size, 2, num_kv_heads, head_dim]`, the model's dtype or int8.
        scales: `[num_blocks, block_size, 2, num_kv_heads]` float32, what int8 numbers of a token and head are
            multiplied by; None where kv is not int8.
    """

    kv: Tensor
    scales: Tensor | None = None


def multiply_out(numbers: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What is read out of the cache: number * scale, multiplied in float32.

    Args:
        numbers: `[..., head_dim]`, of `LayerCache.kv`.
        scales: `[...]` float32, those of `LayerCache.scales`; None: the numbers are themselves what was stored.
        dtype: of the activations.

    Returns:
        `[..., head_dim]` of that dtype; the numbers themselves where there are no scales.
    """
    return numbers if scales is None else (numbers * scales.unsqueeze(-1)).to(dtype)

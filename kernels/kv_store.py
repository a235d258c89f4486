"""Writes into the paged KV cache and copies inside it.

Layout of one layer's cache: `[num_blocks, block_size, 2, num_kv_heads, head_dim]`, keys at index 0 of the
third dimension and values at 1, so that one token's key and value are one contiguous row and one write.
A slot is block_id * block_size + offset.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def kv_store_reference(kv: Tensor, layer_cache: Tensor, slots: Tensor) -> None:
    """The specification: token by token.

    Args:
        kv: `[tokens, 2, num_kv_heads, head_dim]`.
        layer_cache: `[num_blocks, block_size, 2, num_kv_heads, head_dim]`, written in place.
        slots: `[tokens]` int64, distinct.
    """
    block_size = layer_cache.shape[1]
    for token, slot in enumerate(slots.tolist()):
        layer_cache[slot // block_size, slot % block_size] = kv[token]


def kv_store(kv: Tensor, layer_cache: Tensor, slots: Tensor) -> None:
    """The same in one scatter."""
    layer_cache.flatten(0, 1).index_copy_(0, slots, kv)


def copy_blocks(cache: Tensor, copies: Sequence[tuple[int, int]]) -> None:
    """Copies whole blocks in all layers at once (copy-on-write).

    All sources are read before any destination is written, so a block may be both.

    Args:
        cache: `[num_layers, num_blocks, block_size, 2, num_kv_heads, head_dim]`, written in place.
        copies: (source, destination) block ids.
    """
    sources = torch.tensor([source for source, _ in copies], device=cache.device)
    destinations = torch.tensor([destination for _, destination in copies], device=cache.device)
    cache[:, destinations] = cache[:, sources]

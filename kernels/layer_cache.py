"""One layer's part of the paged KV cache, as the kernels see it."""

from typing import NamedTuple

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

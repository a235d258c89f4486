"""The KV cache as tensors: what the block manager's numbers point at.

Layers that see everything keep the KV of every token. Where such layers are mixed with layers that have a window,
the latter keep only the blocks in view, in a pool of their own: a block of theirs is numbered apart. Layers of one
kind and shape are one tensor, so that blocks are copied in all of them at once; in int8, one more for their scales.
"""

from collections.abc import Sequence

import torch

from minirksc.cache.hybrid import WindowCopy
from minirksc.cache.rsbcm import BlockBytes, BlockCopy
from minirksc.kernels.backend import Backend
from minirksc.kernels.huge_pages import empty
from minirksc.kernels.kv.layer_cache import LayerCache
from minirksc.models.spec import ArchSpec, LayerSpec

SCALE_BYTES = 4
"""A float32 number of each token and head, for its key and for its value, where these are int8."""


def block_bytes(spec: ArchSpec, block_size: int, dtype: torch.dtype, retained_window: int | None) -> BlockBytes:
    """Bytes that a block takes.

    Args:
        spec: architecture of the model.
        block_size: tokens a block.
        dtype: type of the cache; int8 has scales besides.
        retained_window: tokens that layers with a window keep; None: they keep all.
    """
    full = window = 0
    for layer in spec.layers:
        if layer.kv_layer is not None:
            continue
        head_bytes = layer.head_dim * dtype.itemsize + (SCALE_BYTES if dtype == torch.int8 else 0)
        num_bytes = block_size * 2 * layer.num_kv_heads * head_bytes
        if retained_window is None or layer.window is None:
            full += num_bytes
        else:
            window += num_bytes
    return BlockBytes(full, window)


class KvCache:
    """Keys and values of all layers.

    Args:
        spec: architecture of the model.
        num_blocks: blocks of the layers that keep every block.
        num_window_blocks: blocks of the layers that keep a window; 0: there are none apart.
        block_size: tokens a block.
        dtype: type of keys and values; int8 has scales besides.
        device: place of the tensors.
        backend: operations that read and write the cache, in their layout.

    Attributes:
        layers: cache of each layer, with `num_blocks` or `num_window_blocks` blocks.
        dtype: type of keys and values.
    """

    def __init__(
        self,
        spec: ArchSpec,
        num_blocks: int,
        num_window_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        backend: Backend,
    ) -> None:
        def kind(layer: LayerSpec) -> tuple[bool, int, int]:
            has_pool_apart = num_window_blocks > 0 and layer.window is not None
            return has_pool_apart, layer.num_kv_heads, layer.head_dim

        members: dict[tuple[bool, int, int], list[int]] = {}
        for index, layer in enumerate(spec.layers):
            if layer.kv_layer is None:
                members.setdefault(kind(layer), []).append(index)
        # Not zeroed: nothing reads a slot before it is written, and untouched pages cost neither time nor memory.
        self._tensors: list[tuple[bool, LayerCache]] = []  # of all layers of a kind: has a pool apart, tensors
        own: dict[int, LayerCache] = {}
        for (has_pool_apart, num_kv_heads, head_dim), indices in members.items():
            blocks = len(indices), num_window_blocks if has_pool_apart else num_blocks
            shape = *blocks, *backend.block_shape(spec.num_heads, num_kv_heads, head_dim, block_size, dtype)
            kv = empty(*shape, dtype=dtype) if device.type == "cpu" else torch.empty(shape, dtype=dtype, device=device)
            scales = torch.empty(shape[:-1], dtype=torch.float32, device=device) if dtype == torch.int8 else None
            self._tensors.append((has_pool_apart, LayerCache(kv, scales)))
            for i, index in enumerate(indices):
                own[index] = LayerCache(kv[i], None if scales is None else scales[i])
        self.layers: Sequence[LayerCache] = [
            own[index if layer.kv_layer is None else layer.kv_layer] for index, layer in enumerate(spec.layers)
        ]
        self.dtype = dtype
        self._copy_blocks = backend.copy_blocks

    def copy(self, copies: Sequence[BlockCopy]) -> None:
        """Copies blocks, each in the layers of its pool; all sources are read before any destination is written."""
        for has_pool_apart, tensors in self._tensors:
            own = [copy for copy in copies if isinstance(copy, WindowCopy) == has_pool_apart]
            for tensor in filter(torch.is_tensor, tensors):
                self._copy_blocks(tensor, own)

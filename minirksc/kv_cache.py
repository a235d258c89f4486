"""The KV cache as tensors: what the block manager's numbers point at.

Layers that see everything keep the KV of every token. Where such layers are mixed with layers that have a window,
the latter keep only the blocks in view, in a pool of their own: a block of theirs is numbered apart. Layers of one
kind and shape are one tensor, so that blocks are copied in all of them at once.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from minirksc.kernels.kv_store import copy_blocks
from minirksc.models.spec import ArchSpec, LayerSpec
from minirksc.rsbcm import BlockBytes, BlockCopy


def block_bytes(spec: ArchSpec, block_size: int, dtype: torch.dtype, retained_window: int | None) -> BlockBytes:
    """What a block takes.

    Args:
        spec: the architecture.
        block_size: tokens a block.
        dtype: of the cache.
        retained_window: tokens that layers with a window keep; None: they keep all.
    """
    full = window = 0
    for layer in spec.layers:
        if layer.kv_layer is not None:
            continue
        num_bytes = block_size * 2 * layer.num_kv_heads * layer.head_dim * dtype.itemsize
        if retained_window is None or layer.window is None:
            full += num_bytes
        else:
            window += num_bytes
    return BlockBytes(full, window)


class KvCache:
    """Keys and values of all layers.

    Args:
        spec: the architecture.
        num_blocks: of the layers that keep every block.
        num_window_blocks: of the layers that keep a window; 0: there are none apart.
        block_size: tokens a block.
        dtype: of keys and values.
        device: where they are.

    Attributes:
        layers: of each layer `[num_blocks or num_window_blocks, block_size, 2, num_kv_heads, head_dim]`.
    """

    def __init__(
        self,
        spec: ArchSpec,
        num_blocks: int,
        num_window_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        def kind(layer: LayerSpec) -> tuple[bool, int, int]:
            has_pool_apart = num_window_blocks > 0 and layer.window is not None
            return has_pool_apart, layer.num_kv_heads, layer.head_dim

        members: dict[tuple[bool, int, int], list[int]] = {}
        for index, layer in enumerate(spec.layers):
            if layer.kv_layer is None:
                members.setdefault(kind(layer), []).append(index)
        # Not zeroed: nothing reads a slot before it is written, and untouched pages cost neither time nor memory.
        self._tensors = {
            key: torch.empty(
                (len(indices), num_window_blocks if key[0] else num_blocks, block_size, 2, *key[1:]),
                dtype=dtype,
                device=device,
            )
            for key, indices in members.items()
        }
        own = {index: self._tensors[key][i] for key, indices in members.items() for i, index in enumerate(indices)}
        self.layers: Sequence[Tensor] = [
            own[index if layer.kv_layer is None else layer.kv_layer] for index, layer in enumerate(spec.layers)
        ]

    def copy(self, copies: Sequence[BlockCopy]) -> None:
        """Copies blocks in every layer; all sources are read before any destination is written."""
        full = [(copy.source, copy.destination) for copy in copies]
        window = [(copy.window_source, copy.window_destination) for copy in copies]
        for (has_pool_apart, *_), tensor in self._tensors.items():
            copy_blocks(tensor, window if has_pool_apart else full)

"""Owns the model and the KV cache tensor, and runs one `ForwardBatch`."""

import torch
from torch import Tensor

from minirksc.batch import ForwardBatch
from minirksc.kernels.kv_store import copy_blocks
from minirksc.models.decoder import Decoder
from minirksc.models.spec import ArchSpec


def kv_block_bytes(spec: ArchSpec, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block's keys and values over all layers."""
    return spec.num_layers * block_size * 2 * spec.num_kv_heads * spec.head_dim * dtype.itemsize


class Runner:
    """Model and cache.

    Args:
        model: the decoder.
        num_blocks: of the KV cache.
        block_size: tokens a block.
    """

    def __init__(self, model: Decoder, num_blocks: int, block_size: int) -> None:
        spec = model.spec
        self.model = model
        # Not zeroed: nothing reads a slot before it is written, and untouched pages cost neither time nor memory.
        self.cache = torch.empty(
            (spec.num_layers, num_blocks, block_size, 2, spec.num_kv_heads, spec.head_dim),
            dtype=model.dtype,
            device=model.device,
        )

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch) -> Tensor:
        """Copies blocks, writes the new KV, and returns logits `[rows, vocab]` float32."""
        if batch.copies:
            copy_blocks(self.cache, batch.copies)
        return self.model.forward(
            batch.token_ids,
            batch.positions,
            batch.slots,
            batch.attention,
            self.cache,
            batch.logits_rows,
        )

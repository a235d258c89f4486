"""Owns the model and the KV cache, and runs one `ForwardBatch`."""

import torch
from torch import Tensor

from minirksc.batch import ForwardBatch
from minirksc.kv_cache import KvCache
from minirksc.models.decoder import Decoder


class Runner:
    """Model and cache.

    Args:
        model: the decoder.
        num_blocks: of the KV cache.
        num_window_blocks: of the layers whose window has a pool apart; 0: there are none.
        block_size: tokens a block.
    """

    def __init__(self, model: Decoder, num_blocks: int, num_window_blocks: int, block_size: int) -> None:
        self.model = model
        self.cache = KvCache(model.spec, num_blocks, num_window_blocks, block_size, model.dtype, model.device)

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch) -> Tensor:
        """Copies blocks, writes the new KV, and returns logits `[rows, vocab]` float32."""
        if batch.copies:
            self.cache.copy(batch.copies)
        return self.model.forward(
            batch.token_ids,
            batch.positions,
            batch.sequence_lens,
            batch.attention,
            self.cache.layers,
            batch.logits_rows,
        )

"""Owns the model and the KV cache, and runs one `ForwardBatch`."""

from typing import Any

import torch
from torch import Tensor

from minirksc.engine.batch import ForwardBatch
from minirksc.engine.kv_tensors import KvCache
from minirksc.engine.recorded import Recordings
from minirksc.models.decoder import Decoder
from minirksc.models.hooks import LayerControl, MassSample


class Runner:
    """Model and cache.

    Args:
        model: the decoder.
        num_blocks: blocks of the KV cache.
        num_window_blocks: blocks of the layers whose window has a pool apart; 0: there are none.
        block_size: tokens a block.
        kv_dtype: dtype of the KV cache: the model's or int8.

    Attributes:
        recorded: serves decode steps where it can; None: every step runs as it is.
    """

    def __init__(
        self, model: Decoder, num_blocks: int, num_window_blocks: int, block_size: int, kv_dtype: torch.dtype
    ) -> None:
        self.model = model
        self.recorded: Recordings[Any] | None = None
        self.cache = KvCache(
            model.spec, num_blocks, num_window_blocks, block_size, kv_dtype, model.device, model.backend
        )

    @torch.inference_mode()
    def forward(
        self, batch: ForwardBatch, control: LayerControl | None = None, mass: MassSample | None = None
    ) -> Tensor:
        """Copies blocks, writes the new KV, and returns logits `[rows, vocab]` float32.

        Args:
            batch: the step.
            control: what may take rows out between layers; their logits are not computed.
            mass: what gains the attention mass of KV blocks, see `Decoder.forward`.
        """
        if batch.copies:
            self.cache.copy(batch.copies)
        if self.recorded is not None and control is None:
            logits = self.recorded.forward(batch, mass)
            if logits is not None:
                return logits
        return self.model.forward(*batch.inputs, batch.attention, self.cache.layers, batch.logits_rows, control, mass)

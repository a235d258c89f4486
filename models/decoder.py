"""The decoder: embedding, layers, final norm and head, for every family that an `ArchSpec` describes.

Explicit from end to end: whatever a forward pass needs is an argument. Knows nothing about requests,
scheduling or who owns the cache.
"""

from collections.abc import Iterator

import torch
from minirksc.kernels.backend import Backend
from minirksc.kernels.linear import Linear
from minirksc.kernels.paged_attention import AttentionBatch
from minirksc.kernels.rope import rope_tables
from minirksc.models.layers import DecoderLayer
from minirksc.models.rope import inv_freq
from minirksc.models.spec import ArchSpec, RopeSpec
from torch import Tensor
from torch.nn import functional as F

from minirksc.errors import UnsupportedModelError


class Decoder:
    """A causal language model ready to run.

    Args:
        spec: the architecture.
        weights: (name, tensor) pairs in the order of `models.weights.iter_weights`: embedding, layer after
            layer, final norm, head. Each tensor is packed as soon as it arrives and then dropped.
        backend: the form of every op.

    Raises:
        UnsupportedModelError: the spec asks for a formula that is not implemented.
    """

    def __init__(self, spec: ArchSpec, weights: Iterator[tuple[str, Tensor]], backend: Backend) -> None:
        _check_supported(spec)
        self.spec = spec
        self.backend = backend
        self.layers: list[DecoderLayer] = []
        top: dict[str, Tensor] = {}
        of_layer: dict[str, Tensor] = {}
        for name, tensor in weights:
            if not name.startswith("layers."):
                top[name] = tensor
                continue
            _, index, rest = name.split(".", 2)
            if int(index) > len(self.layers):  # the layer before is complete: pack it, free its tensors
                self.layers.append(DecoderLayer(spec, of_layer, backend))
                of_layer = {}
            of_layer[rest] = tensor
        self.layers.append(DecoderLayer(spec, of_layer, backend))
        self.embed = top["embed.weight"]  # [vocab, hidden]
        self.norm = top["norm.weight"]
        self.head = Linear(top.get("lm_head.weight", self.embed), prepack=backend.prepack)
        # Layers that rotate alike share one table a step.
        self._inv_freq: dict[RopeSpec, Tensor] = {
            rope: inv_freq(rope).to(self.device) for rope in spec.ropes if rope is not None
        }

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embed.device

    @property
    def dtype(self) -> torch.dtype:
        """Of weights, activations and KV cache."""
        return self.embed.dtype

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        slots: Tensor,
        attention: AttentionBatch,
        cache: Tensor,
        logits_rows: Tensor | None,
    ) -> Tensor:
        """Runs a flattened batch through all layers.

        Args:
            token_ids: `[tokens]` int64.
            positions: `[tokens]` int64.
            slots: `[tokens]` int64, where each token's KV goes.
            attention: where queries and keys are.
            cache: `[num_layers, num_blocks, block_size, 2, num_kv_heads, head_dim]`, written at `slots`.
            logits_rows: `[rows]` int64, tokens whose logits are wanted; None: all.

        Returns:
            Logits `[rows, vocab]` float32.
        """
        hidden = F.embedding(token_ids, self.embed)  # [tokens, hidden]
        tables = {
            rope: rope_tables(positions, freq, rope.attention_factor, self.dtype)
            for rope, freq in self._inv_freq.items()
        }
        for layer, rope, layer_cache in zip(self.layers, self.spec.ropes, cache, strict=True):
            table = tables[rope] if rope is not None else None
            hidden = layer(hidden, table, layer_cache, slots, attention)
        if logits_rows is not None:
            if len(logits_rows) == 0:
                return hidden.new_empty((0, self.spec.vocab_size), dtype=torch.float32)
            hidden = hidden[logits_rows]
        return self.head(self.backend.rms_norm(hidden, self.norm, self.spec.norm_eps)).float()


def _check_supported(spec: ArchSpec) -> None:
    """The spec can say more than the decoder can do; what it cannot do must never be skipped silently."""
    unsupported = {
        "norm_offset": spec.norm_offset != 0,
        "qk_norm": spec.qk_norm,
        "v_norm": spec.v_norm,
        "sandwich_norms": spec.sandwich_norms,
        "embed_scale": spec.embed_scale != 1,
        "attn_softcap": spec.attn_softcap is not None,
        "final_softcap": spec.final_softcap is not None,
        "windows": any(window is not None for window in spec.windows),
    }
    if names := [name for name, present in unsupported.items() if present]:
        raise UnsupportedModelError(
            f"model_type {spec.model_type!r} needs {', '.join(names)}, which the decoder does not implement"
        )

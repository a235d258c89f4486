"""One decoder layer: pre-norm attention and pre-norm gated MLP, each added to the residual stream."""

from collections.abc import Mapping

from minirksc.kernels.backend import Backend
from minirksc.kernels.linear import Linear
from minirksc.kernels.paged_attention import AttentionBatch
from minirksc.models.spec import ArchSpec
from torch import Tensor


class DecoderLayer:
    """Weights of one layer and its forward pass.

    Args:
        spec: sizes and constants.
        weights: this layer's parameters by their names below `layers.L.`; see `models/weights.py`.
        backend: the form of every op.
    """

    def __init__(self, spec: ArchSpec, weights: Mapping[str, Tensor], backend: Backend) -> None:
        def linear(name: str) -> Linear:
            return Linear(weights[f"{name}.weight"], weights.get(f"{name}.bias"), backend.prepack)

        self.spec = spec
        self.backend = backend
        self.attn_norm = weights["attn_norm.weight"]
        self.qkv = linear("qkv")
        self.o = linear("o")
        self.mlp_norm = weights["mlp_norm.weight"]
        self.gate_up = linear("gate_up")
        self.down = linear("down")

    def __call__(
        self,
        hidden: Tensor,
        rope_tables: tuple[Tensor, Tensor] | None,
        layer_cache: Tensor,
        slots: Tensor,
        attention: AttentionBatch,
    ) -> Tensor:
        """Runs the layer on a flattened batch.

        Args:
            hidden: `[tokens, hidden]`, the residual stream; overwritten.
            rope_tables: (cos, sin) of `kernels.rope.rope_tables`; None for a layer without positions.
            layer_cache: `[num_blocks, block_size, 2, num_kv_heads, head_dim]`, written at `slots`.
            slots: `[tokens]` int64.
            attention: where queries and keys are.

        Returns:
            `[tokens, hidden]`, the new residual stream.
        """
        spec, ops = self.spec, self.backend
        normed = ops.rms_norm(hidden, self.attn_norm, spec.norm_eps)
        qkv = self.qkv(normed).view(len(hidden), -1, spec.head_dim)  # [tokens, heads + 2 kv, head_dim]
        if rope_tables is not None:
            ops.rope(qkv[:, : spec.num_heads + spec.num_kv_heads], *rope_tables)
        q = qkv[:, : spec.num_heads]
        kv = qkv[:, spec.num_heads :].view(len(hidden), 2, spec.num_kv_heads, spec.head_dim)
        ops.kv_store(kv, layer_cache, slots)
        attended = ops.paged_attention(q, kv, layer_cache, attention, spec.query_scale)
        hidden = hidden.add_(self.o(attended.flatten(1)))

        normed = ops.rms_norm(hidden, self.mlp_norm, spec.norm_eps)
        activated = ops.gated_act(self.gate_up(normed), spec.activation)  # [tokens, intermediate]
        return hidden.add_(self.down(activated))

"""One decoder layer: attention, then a gated MLP, each on a normed copy of the residual stream and added to it."""

from collections.abc import Mapping

import torch
from minirksc.kernels.attention_batch import AttentionBatch
from minirksc.kernels.backend import Backend
from minirksc.kernels.linear import Linear
from minirksc.models.spec import ArchSpec, LayerSpec
from torch import Tensor


class DecoderLayer:
    """Weights of one layer and its forward pass.

    Args:
        spec: sizes and constants.
        layer: what is this layer's own.
        weights: this layer's parameters by their names below `layers.L.`; see `models/weights.py`.
        backend: the form of every op.
    """

    def __init__(self, spec: ArchSpec, layer: LayerSpec, weights: Mapping[str, Tensor], backend: Backend) -> None:
        def linear(name: str) -> Linear:
            return Linear(weights[f"{name}.weight"], weights.get(f"{name}.bias"), backend.prepack)

        def norm(name: str) -> Tensor | None:
            return norm_weight(spec, weights.get(f"{name}.weight"))

        self.spec = spec
        self.layer = layer
        self.backend = backend
        self.attn_norm = norm("attn_norm")
        self.qkv = linear("qkv")
        self.q_norm, self.k_norm = norm("q_norm"), norm("k_norm")
        self.o = linear("o")
        self.attn_post_norm = norm("attn_post_norm")
        self.mlp_norm = norm("mlp_norm")
        self.gate_up = linear("gate_up")
        self.down = linear("down")
        self.mlp_post_norm = norm("mlp_post_norm")
        if spec.layer_input_size is not None:
            self.input_gate, self.input_project = linear("input_gate"), linear("input_project")
        self.input_norm = norm("input_norm")
        self.scale = weights.get("scale")  # [1]

    def __call__(
        self,
        hidden: Tensor,
        rope_tables: tuple[Tensor, Tensor] | None,
        query_growth: Tensor | None,
        layer_cache: Tensor,
        attention: AttentionBatch,
        shared_kv: Tensor | None,
        layer_input: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Runs the layer on a flattened batch.

        Args:
            hidden: `[tokens, hidden]`, the residual stream; overwritten.
            rope_tables: (cos, sin) of `kernels.rope.rope_tables`; None for a layer without positions.
            query_growth: `[tokens, 1, 1]`, multiplied to queries; None for none.
            layer_cache: `[num_blocks, block_size, 2, num_kv_heads, head_dim]`, written at the batch's slots.
            attention: where queries and keys are.
            shared_kv: new keys and values of the layer whose cache this one reads; None: it has its own.
            layer_input: `[tokens, layer_input_size]`, see `LayerInputs`; None for none.

        Returns:
            (hidden `[tokens, hidden]`, the new keys and values `[tokens, 2, num_kv_heads, head_dim]`).
        """
        spec, ops = self.spec, self.backend
        normed = ops.rms_norm(hidden, self.attn_norm, spec.norm_eps)
        q, kv = self._queries_and_kv(normed, rope_tables)
        if query_growth is not None:
            q = q * query_growth
        if shared_kv is None:
            ops.kv_store(kv, layer_cache, attention.slots)
        else:
            kv = shared_kv
        attended = ops.paged_attention(q, kv, layer_cache, attention, spec.query_scale, spec.attn_softcap)
        out = self.o(attended.flatten(1))
        if spec.sandwich_norms:
            out = ops.rms_norm(out, self.attn_post_norm, spec.norm_eps)
        hidden = hidden.add_(out)

        normed = ops.rms_norm(hidden, self.mlp_norm, spec.norm_eps)
        out = self.down(ops.gated_act(self.gate_up(normed), spec.activation))
        if spec.sandwich_norms:
            out = ops.rms_norm(out, self.mlp_post_norm, spec.norm_eps)
        hidden = hidden.add_(out)
        if layer_input is not None:
            gate_and_input = torch.cat((self.input_gate(hidden), layer_input), dim=-1)
            out = self.input_project(ops.gated_act(gate_and_input, spec.activation))
            hidden = hidden.add_(ops.rms_norm(out, self.input_norm, spec.norm_eps))
        if self.scale is not None:
            hidden = hidden.mul_(self.scale)
        return hidden, kv

    def _queries_and_kv(self, normed: Tensor, rope_tables: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """(q `[tokens, num_heads, head_dim]`, kv `[tokens, 2, num_kv_heads, head_dim]`; 0 for 2 where kv is shared)."""
        spec, layer, norm = self.spec, self.layer, self.backend.rms_norm
        num_heads, num_kv_heads = spec.num_heads, layer.num_kv_heads
        qkv = self.qkv(normed).view(len(normed), -1, layer.head_dim)  # [tokens, heads of q, k and v, head_dim]
        if layer.value_is_key:
            qkv = torch.cat((qkv, qkv[:, num_heads:]), dim=1)
        q, k, v = qkv[:, :num_heads], qkv[:, num_heads : num_heads + num_kv_heads], qkv[:, num_heads + num_kv_heads :]
        if spec.qk_norm:
            q.copy_(norm(q, self.q_norm, spec.norm_eps))
            k.copy_(norm(k, self.k_norm, spec.norm_eps))
        if spec.v_norm:
            v.copy_(norm(v, None, spec.norm_eps))
        if rope_tables is not None:
            self.backend.rope(qkv[:, : num_heads + num_kv_heads], *rope_tables)
        num_parts = (qkv.shape[1] - num_heads) // num_kv_heads  # 2, or 0 where another layer has them
        return q, qkv[:, num_heads:].view(len(normed), num_parts, num_kv_heads, layer.head_dim)


def norm_weight(spec: ArchSpec, weight: Tensor | None) -> Tensor | None:
    """A norm's weight as `kernels.rms_norm` takes it."""
    if weight is None or not spec.norm_in_float32:
        return weight
    return weight.float() + spec.norm_offset

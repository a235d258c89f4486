"""One decoder layer: attention, then a gated MLP, each on a normed copy of the residual stream and added to it."""

from collections.abc import Mapping

import torch
from torch import Tensor

from minirksc.kernels.attention.batch import AttentionBatch
from minirksc.kernels.backend import Backend
from minirksc.kernels.kv.layer_cache import LayerCache
from minirksc.kernels.kv.placement import HeadNorms, Placement
from minirksc.kernels.weights.linear import Linear, Pack
from minirksc.models.spec import ArchSpec, LayerSpec


class ResidualStream:
    """The residual stream. What a branch adds waits for the norm that follows: sum and norm are one op.

    Args:
        hidden: `[tokens, hidden]`, where it begins; overwritten.
        backend: the form of every op.
        eps: epsilon of all norms.
    """

    def __init__(self, hidden: Tensor, backend: Backend, eps: float) -> None:
        self._hidden = hidden
        self._backend = backend
        self._eps = eps
        self._update: Tensor | None = None  # [tokens, hidden], not yet added
        self._update_norm: Tensor | None = None

    def add(self, update: Tensor, norm: Tensor | None = None) -> None:
        """Adds `[tokens, hidden]`; with the weight of a norm, its normed copy."""
        self.total()
        self._update, self._update_norm = update, norm

    def normed(self, weight: Tensor | None) -> Tensor:
        """A normed copy of the sum, `[tokens, hidden]`."""
        if self._update is None:
            return self._backend.rms_norm(self._hidden, weight, self._eps)
        update, self._update = self._update, None
        return self._backend.add_rms_norm(self._hidden, update, self._update_norm, weight, self._eps)

    def total(self) -> Tensor:
        """The sum itself, `[tokens, hidden]`; what is written into it changes the stream."""
        if self._update is not None:
            update, self._update = self._update, None
            self._hidden.add_(self._as_added(update))
        return self._hidden

    def at(self, rows: Tensor) -> Tensor:
        """A copy of the sum at the tokens `[rows]` int64; the stream stays as it is."""
        hidden = self._hidden[rows]
        return hidden if self._update is None else hidden.add_(self._as_added(self._update[rows]))

    def _as_added(self, update: Tensor) -> Tensor:
        """`[tokens, hidden]`, under its norm if it has one."""
        norm = self._update_norm
        return update if norm is None else self._backend.rms_norm(update, norm, self._eps)

    def keep(self, rows: Tensor) -> None:
        """Goes on with the tokens `[rows]` int64 alone."""
        self._hidden = self._hidden[rows]
        self._update = None if self._update is None else self._update[rows]


class DecoderLayer:
    """Weights of one layer and its forward pass.

    Args:
        spec: sizes and constants.
        layer: what is this layer's own.
        weights: this layer's parameters by their names below `layers.L.`; see `models/weights/rules.py`.
        backend: the form of every op.
        pack: makes the form of a weight.
    """

    def __init__(
        self, spec: ArchSpec, layer: LayerSpec, weights: Mapping[str, Tensor], backend: Backend, pack: Pack
    ) -> None:
        def linear(name: str) -> Linear:
            return Linear(weights[f"{name}.weight"], weights.get(f"{name}.bias"), pack)

        def norm(name: str) -> Tensor | None:
            return norm_weight(spec, weights.get(f"{name}.weight"))

        self.spec = spec
        self.layer = layer
        self.backend = backend
        self.attn_norm = norm("attn_norm")
        self.qkv = linear("qkv")
        self.head_norms = HeadNorms(spec.num_heads, norm("q_norm"), norm("k_norm"), spec.v_norm, spec.norm_eps)
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

    @property
    def linears(self) -> list[Linear]:
        """All that multiply."""
        return [one for one in vars(self).values() if isinstance(one, Linear)]

    def __call__(
        self,
        stream: ResidualStream,
        rope_tables: tuple[Tensor, Tensor] | None,
        query_growth: Tensor | None,
        layer_cache: LayerCache,
        attention: AttentionBatch,
        shared_kv: Tensor | None,
        layer_input: Tensor | None,
        masses: list[Tensor] | None = None,
    ) -> Tensor:
        """Runs the layer on a flattened batch.

        Args:
            stream: `[tokens, hidden]`, added to.
            rope_tables: (cos, sin) of `kernels.rope.rope_tables`; None for a layer without positions.
            query_growth: `[tokens, 1, 1]`, multiplied to queries; None for none.
            layer_cache: written at the batch's slots, unless another layer does.
            attention: places of queries and keys.
            shared_kv: new keys and values of the layer whose cache this one reads; None: it has its own.
            layer_input: `[tokens, layer_input_size]`, see `LayerInputs`; None for none.
            masses: gains what each KV block received of the attention, `[sequences, blocks]` float32; None: not asked.

        Returns:
            The new keys and values as the cache holds them, `[tokens, 2, num_kv_heads, head_dim]`.
        """
        spec, ops, num_heads = self.spec, self.backend, self.spec.num_heads
        qkv = self._qkv(stream.normed(self.attn_norm))
        own_cache = layer_cache if shared_kv is None else None
        # Norms and turns queries and keys in place, and writes keys and values at their slots.
        ops.kv_store(qkv, self.head_norms, Placement(rope_tables, query_growth, own_cache, attention.slots))
        q, kv = qkv[:, :num_heads], self._new_kv(qkv) if shared_kv is None else shared_kv
        given = q, kv, layer_cache, attention, spec.query_scale, spec.attn_softcap
        if masses is None:
            attended = ops.paged_attention(*given)
        else:
            attended, mass = ops.paged_attention_mass(*given)
            masses.append(mass)
        stream.add(self.o(attended.flatten(1)), self.attn_post_norm)

        gate_up = self.gate_up(stream.normed(self.mlp_norm))
        stream.add(self.down(ops.gated_act(gate_up, spec.activation)), self.mlp_post_norm)
        if layer_input is not None:
            gate_and_input = torch.cat((self.input_gate(stream.total()), layer_input), dim=-1)
            stream.add(self.input_project(ops.gated_act(gate_and_input, spec.activation)), self.input_norm)
        if self.scale is not None:
            stream.total().mul_(self.scale)
        return kv

    def _qkv(self, normed: Tensor) -> Tensor:
        """`[tokens, num_heads + 2 * num_kv_heads, head_dim]`; `[tokens, num_heads, head_dim]` where kv is shared."""
        qkv = self.qkv(normed).view(len(normed), -1, self.layer.head_dim)
        return torch.cat((qkv, qkv[:, self.spec.num_heads :]), dim=1) if self.layer.value_is_key else qkv

    def _new_kv(self, qkv: Tensor) -> Tensor:
        """Keys and values in `qkv`, `[tokens, 2, num_kv_heads, head_dim]`."""
        return qkv[:, self.spec.num_heads :].view(len(qkv), 2, self.layer.num_kv_heads, self.layer.head_dim)


def norm_weight(spec: ArchSpec, weight: Tensor | None) -> Tensor | None:
    """A norm's weight as `kernels.rms_norm` takes it."""
    if weight is None or not spec.norm_in_float32:
        return weight
    return weight.float() + spec.norm_offset

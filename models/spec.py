"""`ArchSpec`: one model architecture as plain data.

What differs between two families is a value here, read by the one decoder. `families.py` makes specs from
config.json; nothing in here knows a family by name.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from minirksc.errors import CheckpointError
from minirksc.models.weights.fp8 import Fp8

ACTIVATIONS = ("silu", "gelu_tanh", "gelu")


@dataclass(frozen=True)
class RopeSpec:
    """How a layer turns positions into rotations; see `rope.py` for the formulas.

    Attributes:
        kind: key of `rope.KINDS`.
        theta: base of the wavelengths.
        rotary_dim: leading elements of each head that are rotated.
        parameters: (name, value) pairs that the kind needs; pairs, so that equal specs are equal keys.
        attention_factor: factor of cosines and sines.
    """

    kind: str
    theta: float
    rotary_dim: int
    parameters: tuple[tuple[str, float | tuple[float, ...]], ...] = ()
    attention_factor: float = 1.0

    def __post_init__(self) -> None:
        if self.rotary_dim < 2 or self.rotary_dim % 2:
            raise CheckpointError(f"rotary dimension {self.rotary_dim} must be even and positive")
        for name, value in (("rope_theta", self.theta), ("attention_factor", self.attention_factor)):
            if not (value > 0 and math.isfinite(value)):
                raise CheckpointError(f"{self.kind} rope: {name} {value} must be positive and finite")
        low, high = self.number("low_freq_factor", 0), self.number("high_freq_factor", 0)
        if self.kind == "llama3" and not low < high:
            raise CheckpointError(f"llama3 rope: low_freq_factor {low} must be less than high_freq_factor {high}")
        if self.kind == "yarn" and self.theta == 1:
            raise CheckpointError("yarn rope: rope_theta 1.0 turns all pairs alike, and none is the slowest")
        if self.kind == "dynamic" and self.rotary_dim < 4:
            raise CheckpointError(f"dynamic rope: rotary dimension {self.rotary_dim} must be at least 4")
        if self.kind == "longrope":
            for name in ("short_factor", "long_factor"):
                count, pairs = len(self.numbers(name)), self.rotary_dim // 2
                if count != pairs:
                    raise CheckpointError(f"longrope: {name} has {count} entries, {pairs} pairs rotate")

    def number(self, name: str, default: float | None = None) -> float:
        """A parameter that is one number."""
        value = dict(self.parameters).get(name, default)
        assert isinstance(value, int | float), name
        return value

    def numbers(self, name: str) -> tuple[float, ...]:
        """A parameter that is a list of numbers; () when it is absent."""
        value = dict(self.parameters).get(name, ())
        assert isinstance(value, tuple), name
        return value


def _check_positive(spec: object, names: Iterable[str]) -> None:
    """Refuses a spec with a number that is not positive; None is none."""
    for name in names:
        value = getattr(spec, name)
        if value is not None and not value > 0:
            raise CheckpointError(f"{name} {value} must be positive")


@dataclass(frozen=True)
class LayerSpec:
    """What may differ from layer to layer.

    Attributes:
        num_kv_heads, head_dim: heads of its keys and values, and their width.
        intermediate_size: width of its MLP.
        rope: rotation; None for a layer without positions.
        window: number of latest keys that a query sees, its own included; None for all.
        value_is_key: whether the value is the key before its norm and rotation, without a projection of its own.
        kv_layer: index of the earlier layer of which it reads keys and values; None: it has its own.
    """

    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rope: RopeSpec | None
    window: int | None = None
    value_is_key: bool = False
    kv_layer: int | None = None

    def __post_init__(self) -> None:
        _check_positive(self, ("num_kv_heads", "head_dim", "intermediate_size", "window"))
        if self.rope is not None and self.rope.rotary_dim > self.head_dim:
            raise CheckpointError(f"rotary dimension {self.rope.rotary_dim} is more than head_dim {self.head_dim}")


@dataclass(frozen=True)
class WeightLayout:
    """How a checkpoint names and cuts the tensors of a model.

    Attributes:
        fused_qkv: whether q, k and v are one tensor, `qkv_proj`.
        fused_gate_up: whether gate and up are one tensor, `gate_up_proj`.
        mlp_norm: name of the norm before the MLP.
        is_wrapped: whether the text model is part of a larger one, of which other tensors are skipped.
        fp8: scales of its FP8 weights; None where it has none.
    """

    fused_qkv: bool = False
    fused_gate_up: bool = False
    mlp_norm: str = "post_attention_layernorm"
    is_wrapped: bool = False
    fp8: Fp8 | None = None


@dataclass(frozen=True)
class ArchSpec:
    """Sizes and constants of a decoder-only transformer.

    Attributes:
        model_type: config.json's name for the family, for messages only.
        vocab_size, hidden_size: sizes.
        num_heads: query heads of every layer; num_heads / num_kv_heads of them share a KV head.
        layers: specs of the layers, in order.
        max_position_embeddings: longest sequence that the model was made for.
        activation: name of the MLP's activation: "silu", "gelu_tanh" or "gelu".
        norm_eps: number that is added to the mean square.
        tie_word_embeddings: whether the head is the embedding.
        eos_token_ids: tokens that end a generation.
        bos_token_id: token that begins a prompt, for people to read: the tokenizer puts it there; None for none.
        query_scale: factor of attention scores.
        query_growth: (beta, length): queries at position p are multiplied by 1 + beta * ln(1 + floor(p / length)).
        norm_offset: number that is added to every norm weight (Gemma's 1 + w).
        norm_in_float32: whether norm weights are applied before the cast to the model's dtype, not after it.
        qkv_bias, o_bias, mlp_bias: whether these projections have biases.
        qk_norm, v_norm: whether there are norms on each head's query and key, or value; the value's has no weight.
        sandwich_norms: whether what attention and MLP give is normed too, before it is added.
        layer_scale: whether each layer's output is multiplied by a number of its own.
        layer_input_size: width of the vector that each layer gets of every token beside the stream; None for none.
        embed_scale: factor of embeddings, rounded to the model's dtype.
        attn_softcap, final_softcap: bound c of c * tanh(x / c) on scores or logits; None for none.
        layout: layout of the checkpoint; changes nothing that is computed.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    num_heads: int
    layers: tuple[LayerSpec, ...]
    max_position_embeddings: int
    activation: str
    norm_eps: float
    tie_word_embeddings: bool
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    query_scale: float
    query_growth: tuple[float, float] | None = None
    norm_offset: float = 0.0
    norm_in_float32: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    v_norm: bool = False
    sandwich_norms: bool = False
    layer_scale: bool = False
    layer_input_size: int | None = None
    embed_scale: float = 1.0
    attn_softcap: float | None = None
    final_softcap: float | None = None
    layout: WeightLayout = field(default_factory=WeightLayout)

    def __post_init__(self) -> None:
        _check_positive(self, ("vocab_size", "hidden_size", "num_layers", "num_heads", "max_position_embeddings"))
        _check_positive(self, ("norm_eps", "query_scale", "embed_scale"))
        _check_positive(self, ("attn_softcap", "final_softcap", "layer_input_size"))
        if self.norm_offset and not self.norm_in_float32:
            raise CheckpointError(f"norm_offset {self.norm_offset} is added to norm weights in float32 only")
        if self.activation not in ACTIVATIONS:
            raise CheckpointError(f"activation {self.activation!r} is none of {', '.join(ACTIVATIONS)}")
        for index, layer in enumerate(self.layers):
            if self.num_heads % layer.num_kv_heads:
                raise CheckpointError(
                    f"{self.num_heads} attention heads cannot share {layer.num_kv_heads} KV heads evenly"
                )
            if layer.kv_layer is not None:
                self._check_shared(index, layer, layer.kv_layer)

    def _check_shared(self, index: int, layer: LayerSpec, source: int) -> None:
        if not 0 <= source < index or self.layers[source].kv_layer is not None:
            raise CheckpointError(f"layer {index} cannot read the keys and values of layer {source}")
        other = self.layers[source]
        if (layer.num_kv_heads, layer.head_dim, layer.window) != (other.num_kv_heads, other.head_dim, other.window):
            raise CheckpointError(
                f"layer {index} reads the keys and values of layer {source}, which is of another kind"
            )

    @property
    def num_layers(self) -> int:
        """How many layers."""
        return len(self.layers)

    @property
    def switch_len(self) -> int | None:
        """Longest sequence of the short rotations; all positions of a longer one rotate otherwise. None: all alike."""
        ropes = [layer.rope for layer in self.layers if layer.rope is not None and layer.rope.kind == "longrope"]
        return min((int(rope.number("original_max_position_embeddings")) for rope in ropes), default=None)

    @property
    def retained_window(self) -> int | None:
        """Tokens that the layers with a window keep, where others keep all; None: every layer keeps all."""
        windows = [layer.window for layer in self.layers if layer.window is not None]
        return max(windows) if 0 < len(windows) < self.num_layers else None

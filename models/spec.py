"""`ArchSpec`: one model architecture as plain data.

What differs between two families is a value here, read by the one decoder. `families.py` makes specs from
config.json; nothing in here knows a family by name.
"""

import math
from dataclasses import dataclass

from minirksc.errors import CheckpointError

ACTIVATIONS = ("silu", "gelu_tanh", "gelu")


@dataclass(frozen=True)
class RopeSpec:
    """How a layer turns positions into rotations; see `rope.py` for the formulas.

    Attributes:
        kind: "default", "linear" or "llama3"; other kinds arrive with the families that use them.
        theta: base of the wavelengths.
        rotary_dim: leading elements of each head that are rotated.
        parameters: what the kind needs, as (name, value) pairs, so that equal specs are equal keys.
        attention_factor: multiplied into cosines and sines.
    """

    kind: str
    theta: float
    rotary_dim: int
    parameters: tuple[tuple[str, float], ...] = ()
    attention_factor: float = 1.0

    def __post_init__(self) -> None:
        if self.rotary_dim < 2 or self.rotary_dim % 2:
            raise CheckpointError(f"rotary dimension {self.rotary_dim} must be even and positive")
        for name, value in (("rope_theta", self.theta), ("attention_factor", self.attention_factor)):
            if not (value > 0 and math.isfinite(value)):
                raise CheckpointError(f"{self.kind} rope: {name} {value} must be positive and finite")
        bands = dict(self.parameters)
        low, high = bands.get("low_freq_factor", 0.0), bands.get("high_freq_factor", 0.0)
        if self.kind == "llama3" and not low < high:
            raise CheckpointError(f"llama3 rope: low_freq_factor {low} must be less than high_freq_factor {high}")


@dataclass(frozen=True)
class ArchSpec:
    """Sizes and constants of a decoder-only transformer.

    Attributes:
        model_type: config.json's name for the family, for messages only.
        vocab_size, hidden_size, intermediate_size, num_layers: sizes.
        num_heads, num_kv_heads, head_dim: attention; num_heads / num_kv_heads queries share a KV head.
        max_position_embeddings: longest sequence that the model was made for.
        activation: "silu", "gelu_tanh" or "gelu".
        norm_eps: added to the mean square.
        windows: per layer, how many latest keys a query sees; None for all.
        ropes: per layer; None for a layer without positions.
        tie_word_embeddings: the head is the embedding.
        eos_token_ids: end a generation.
        bos_token_id: begins a prompt; None when the model has none.
        query_scale: multiplied to attention scores.
        norm_offset: added to every norm weight (Gemma's 1 + w).
        qkv_bias, o_bias, mlp_bias: which projections have one.
        qk_norm, v_norm: norms on each head's query and key, or value.
        sandwich_norms: a second norm on each branch's output, before it is added.
        embed_scale: multiplied to embeddings.
        attn_softcap, final_softcap: c * tanh(x / c) on scores or logits; None for none.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    activation: str
    norm_eps: float
    windows: tuple[int | None, ...]
    ropes: tuple[RopeSpec | None, ...]
    tie_word_embeddings: bool
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    query_scale: float
    norm_offset: float = 0.0
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    v_norm: bool = False
    sandwich_norms: bool = False
    embed_scale: float = 1.0
    attn_softcap: float | None = None
    final_softcap: float | None = None

    def __post_init__(self) -> None:
        for name in (
            *("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads"),
            *("head_dim", "max_position_embeddings", "norm_eps"),
        ):
            if not getattr(self, name) > 0:
                raise CheckpointError(f"{name} {getattr(self, name)} must be positive")
        if self.activation not in ACTIVATIONS:
            raise CheckpointError(f"activation {self.activation!r} is none of {', '.join(ACTIVATIONS)}")
        if self.num_heads % self.num_kv_heads:
            raise CheckpointError(f"{self.num_heads} attention heads cannot share {self.num_kv_heads} KV heads evenly")
        if not len(self.windows) == len(self.ropes) == self.num_layers:
            raise CheckpointError(
                f"{self.num_layers} layers, but {len(self.windows)} windows and {len(self.ropes)} ropes"
            )
        for rope in self.ropes:
            if rope is not None and rope.rotary_dim > self.head_dim:
                raise CheckpointError(f"rotary dimension {rope.rotary_dim} is more than head_dim {self.head_dim}")

    @property
    def q_size(self) -> int:
        """Width of all query heads together."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key heads together, and of all value heads."""
        return self.num_kv_heads * self.head_dim

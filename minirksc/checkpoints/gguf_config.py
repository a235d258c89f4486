"""Architectures that can be imported from GGUF: their config.json, and the names and shapes of their tensors.

What llama.cpp computes without a field for it is written here in full: Gemma 3's local RoPE base, every sixth
layer global, and the query scale of its 27B.

Source: the fields as https://github.com/ggml-org/ggml/blob/master/docs/gguf.md names them; the stored RoPE factors
as the Llama 3.1 reference code computes them.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from minirksc.checkpoints.gguf_fields import GgufFields
from minirksc.errors import CheckpointError

ATTENTION_PARTS = ("attn_q", "attn_k", "attn_v", "attn_output")
MLP_PARTS = ("ffn_gate", "ffn_up", "ffn_down")
ROPE_FACTORS = "rope_freqs.weight"

TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
MATRIX_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TWO_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
SIX_NORMS = {
    "attn_norm": "input_layernorm",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}

KNOWN_FIELDS = (
    *("block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size"),
    *("attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length"),
    *("attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.dimension_count", "tensor_data_layout"),
    *("rope.scaling.type", "rope.scaling.factor", "rope.scale_linear"),
    *("rope.scaling.original_context_length", "rope.scaling.finetuned"),  # linear scaling needs neither
)
NEUTRAL_FIELDS = {
    "expert_count": 0,
    "expert_used_count": 0,
    "attention.causal": True,
    "rope.scaling.attn_factor": 1.0,
    "attn_logit_softcapping": 0.0,
}
"""Fields that mean nothing with these values."""

MAX_LAYERS = 1000

LLAMA3_FACTORS = (8.0, 32.0)
LLAMA3_BANDS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""As published with Llama 3.1 and 3.3 (factor 8) and Llama 3.2 (factor 32)."""

GEMMA3_PERIOD = 6
GEMMA3_LOCAL_BASE = 10000.0
GEMMA3_27B_LAYERS = 62


@dataclass(frozen=True)
class Architecture:
    """How GGUF files of one architecture differ from Hugging Face checkpoints.

    Attributes:
        model_type, hf_class: of config.json.
        norms: norms of a layer, GGUF name to Hugging Face name.
        activation: the name and value of config.json's field.
        bias_parts: which matrices have biases, where that is not for the file to say.
        is_interleaved: rows of q and k have rotary pairs side by side, and not halves apart.
        norm_offset: what llama.cpp has added to the norm weights.
        fields: that it has beside KNOWN_FIELDS.
        end_tokens: that end a turn without a field that says so.
    """

    model_type: str
    hf_class: str
    norms: Mapping[str, str]
    activation: tuple[str, str] = ("hidden_act", "silu")
    bias_parts: tuple[str, ...] = ()
    is_interleaved: bool = False
    norm_offset: float = 0.0
    fields: tuple[str, ...] = ()
    end_tokens: tuple[str, ...] = ()


ARCHITECTURES = {
    "llama": Architecture("llama", "LlamaForCausalLM", TWO_NORMS, is_interleaved=True),
    "qwen2": Architecture(
        "qwen2",
        "Qwen2ForCausalLM",
        TWO_NORMS,
        bias_parts=("attn_q", "attn_k", "attn_v"),
        end_tokens=("<|im_end|>", "<|endoftext|>"),
    ),
    "gemma3": Architecture(
        "gemma3_text",
        "Gemma3ForCausalLM",
        SIX_NORMS,
        activation=("hidden_activation", "gelu_pytorch_tanh"),
        norm_offset=1.0,
        fields=(
            *("attention.sliding_window", "attention.sliding_window_pattern"),
            *("rope.freq_base_swa", "final_logit_softcapping"),
        ),
        end_tokens=("<end_of_turn>",),
    ),
}


def make_config(
    arch: Architecture,
    fields: GgufFields,
    shapes: Mapping[str, tuple[int, ...]],
    rope_factors: Sequence[float] | None,
) -> dict[str, Any]:
    """config.json without token ids and dtype.

    Args:
        arch: of the file.
        fields: of the architecture.
        shapes: of the file's tensors.
        rope_factors: content of rope_freqs.weight, one number a rotated pair; None if there is none.

    Raises:
        CheckpointError: a field is missing, impossible, or cannot be translated exactly.
    """
    fields.check_known((*KNOWN_FIELDS, *arch.fields), NEUTRAL_FIELDS)
    heads, hidden = fields.integer("attention.head_count"), fields.integer("embedding_length")
    num_layers = fields.integer("block_count")
    if num_layers > MAX_LAYERS:
        raise CheckpointError(
            f"{fields.source}: {fields.prefix}block_count is {num_layers}, no model has over {MAX_LAYERS}"
        )
    head_dim = fields.integer("attention.key_length", hidden // heads)
    for name in ("attention.value_length", "rope.dimension_count"):
        if fields.integer(name, head_dim) != head_dim:
            raise CheckpointError(
                f"{fields.source}: {fields.prefix}{name} is {fields[name]}, only the head size {head_dim} is supported"
            )
    config: dict[str, Any] = {
        "architectures": [arch.hf_class],
        "model_type": arch.model_type,
        arch.activation[0]: arch.activation[1],
        "hidden_size": hidden,
        "intermediate_size": fields.integer("feed_forward_length"),
        "num_hidden_layers": num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": fields.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "vocab_size": shapes.get("token_embd.weight", (0,))[0],
        "max_position_embeddings": fields.integer("context_length"),
        "rope_theta": fields.decimal("rope.freq_base", 10000.0),
        "rms_norm_eps": fields.decimal("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in shapes,
    }
    config["rope_scaling"] = _rope_scaling(fields, config, rope_factors)
    if arch.model_type == "llama":
        has_bias = {part_of(name) for name in shapes if name.endswith(".bias")}
        config["attention_bias"] = bool(has_bias & set(ATTENTION_PARTS))
        config["mlp_bias"] = bool(has_bias & set(MLP_PARTS))
    if arch.model_type == "gemma3_text":
        config |= _gemma3(fields, config)
    return config


def expected_shapes(arch: Architecture, config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor that a file of this config has, by its GGUF name."""
    hidden, mlp, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    q_rows = config["num_attention_heads"] * config["head_dim"]
    kv_rows = config["num_key_value_heads"] * config["head_dim"]
    yield "token_embd.weight", (vocab, hidden)
    yield "output_norm.weight", (hidden,)
    if not config["tie_word_embeddings"]:
        yield "output.weight", (vocab, hidden)
    matrices = {
        "attn_q": (q_rows, hidden),
        "attn_k": (kv_rows, hidden),
        "attn_v": (kv_rows, hidden),
        "attn_output": (hidden, q_rows),
        "ffn_gate": (mlp, hidden),
        "ffn_up": (mlp, hidden),
        "ffn_down": (hidden, mlp),
    }
    biased = set(arch.bias_parts)
    biased |= set(ATTENTION_PARTS) if config.get("attention_bias") else set()
    biased |= set(MLP_PARTS) if config.get("mlp_bias") else set()
    for layer in range(config["num_hidden_layers"]):
        for part in arch.norms:
            is_of_head = part in ("attn_q_norm", "attn_k_norm")
            yield f"blk.{layer}.{part}.weight", (config["head_dim"] if is_of_head else hidden,)
        for part, shape in matrices.items():
            yield f"blk.{layer}.{part}.weight", shape
            if part in biased:
                yield f"blk.{layer}.{part}.bias", shape[:1]


def part_of(name: str) -> str:
    """The layer's part in "blk.LAYER.PART.KIND"; "" for other tensors."""
    parts = name.split(".")
    return parts[2] if len(parts) == 4 and parts[0] == "blk" else ""


def is_norm(name: str) -> bool:
    """Whether a tensor is the weight of a norm, by its GGUF name."""
    return name == "output_norm.weight" or part_of(name) in SIX_NORMS


def hf_name(arch: Architecture, name: str) -> str:
    """The Hugging Face name of a tensor that `expected_shapes` lists."""
    if name in TOP_NAMES:
        return TOP_NAMES[name]
    _, layer, part, kind = name.split(".")
    return f"model.layers.{layer}.{({**MATRIX_NAMES, **arch.norms})[part]}.{kind}"


def _gemma3(fields: GgufFields, config: Mapping[str, Any]) -> dict[str, Any]:
    num_layers = config["num_hidden_layers"]
    pattern = fields.get("attention.sliding_window_pattern", GEMMA3_PERIOD)
    if isinstance(pattern, list):  # whether each layer slides
        slides = [bool(layer) for layer in pattern]
    else:
        period = fields.integer("attention.sliding_window_pattern", GEMMA3_PERIOD)
        slides = [(layer + 1) % period != 0 for layer in range(num_layers)]
    if len(slides) != num_layers:
        raise CheckpointError(
            f"{fields.source}: {fields.prefix}attention.sliding_window_pattern has {len(slides)} layers, the model has "
            f"{num_layers}"
        )
    is_27b = num_layers == GEMMA3_27B_LAYERS
    return {
        "attention_bias": False,
        "sliding_window": fields.integer("attention.sliding_window"),
        "layer_types": ["sliding_attention" if slide else "full_attention" for slide in slides],
        "rope_local_base_freq": fields.decimal("rope.freq_base_swa", GEMMA3_LOCAL_BASE),
        "query_pre_attn_scalar": (
            config["hidden_size"] // config["num_attention_heads"] if is_27b else config["head_dim"]
        ),
        "attn_logit_softcapping": None,
        "final_logit_softcapping": fields.decimal("final_logit_softcapping", 0.0) or None,
    }


def _rope_scaling(
    fields: GgufFields, config: Mapping[str, Any], rope_factors: Sequence[float] | None
) -> dict[str, Any] | None:
    factor = fields.decimal("rope.scaling.factor", fields.decimal("rope.scale_linear", 1.0)) or 1.0
    kind = fields.get("rope.scaling.type", "linear")  # what a factor without a type means
    if kind not in ("none", "linear"):
        raise CheckpointError(
            f"{fields.source}: RoPE scaling of type {kind!r} cannot be translated from GGUF exactly; "
            "use the safetensors checkpoint of this model"
        )
    linear = {"rope_type": "linear", "factor": float(factor)} if kind == "linear" and factor != 1.0 else None
    if rope_factors is None:
        return linear
    is_complete = len(rope_factors) == config["head_dim"] // 2
    for candidate in LLAMA3_FACTORS if is_complete and config["rope_theta"] > 0 else ():
        wanted = _llama3_factors(config["rope_theta"], config["head_dim"], candidate)
        is_same = bool(np.allclose(wanted, rope_factors, rtol=1e-5, atol=0))
        if is_same and linear is None:
            return {"rope_type": "llama3", "factor": candidate, **LLAMA3_BANDS}
    raise CheckpointError(
        f"{fields.source}: its RoPE factors ({ROPE_FACTORS}) are not those of Llama 3.1 or 3.2, so they cannot be "
        "translated from GGUF exactly; use the safetensors checkpoint of this model"
    )


def _llama3_factors(theta: float, head_dim: int, factor: float) -> list[float]:
    """What wavelengths are multiplied by, one number a rotated pair."""
    low, high = LLAMA3_BANDS["low_freq_factor"], LLAMA3_BANDS["high_freq_factor"]
    factors = []
    for pair in range(head_dim // 2):
        wavelength = 2 * math.pi * theta ** (2 * pair / head_dim)
        blend = (LLAMA3_BANDS["original_max_position_embeddings"] / wavelength - low) / (high - low)
        blend = min(max(blend, 0.0), 1.0)  # 0: long wave, 1: short wave
        factors.append(1 / ((1 - blend) / factor + blend))
    return factors

"""Architectures that can be imported from GGUF: their config.json, and the names and shapes of their tensors.

What llama.cpp computes without a field for it is written here in full: Gemma 3's local RoPE base, every sixth
layer global, and the query scale of its 27B.

Which tensors there are follows from the config as for any checkpoint; the `gguf` package knows their names in both.

Source: the fields as https://github.com/ggml-org/ggml/blob/master/docs/gguf.md names them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from minirksc.checkpoints.gguf_fields import GgufFields

ROPE_FACTORS = "rope_freqs.weight"

SIZES = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
}
"""Fields of config.json that every file has, and what GGUF calls them."""

KNOWN_FIELDS = (
    *SIZES.values(),
    *("attention.head_count_kv", "attention.key_length", "attention.value_length", "vocab_size", "context_length"),
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
"""Numbers as published with Llama 3.1 and 3.3 (factor 8) and Llama 3.2 (factor 32)."""

GEMMA3_PERIOD = 6
GEMMA3_LOCAL_BASE = 10000.0
GEMMA3_27B_LAYERS = 62


@dataclass(frozen=True)
class Architecture:
    """How GGUF files of one architecture differ from Hugging Face checkpoints.

    Attributes:
        name: GGUF's name for it.
        model_type, hf_class: values of config.json.
        activation: name and value of config.json's field.
        is_interleaved: whether rows of q and k have rotary pairs side by side, and not halves apart.
        fields: fields that it has beside KNOWN_FIELDS.
        end_tokens: tokens that end a turn without a field that says so.
    """

    name: str
    model_type: str
    hf_class: str
    activation: tuple[str, str] = ("hidden_act", "silu")
    is_interleaved: bool = False
    fields: tuple[str, ...] = ()
    end_tokens: tuple[str, ...] = ()


ARCHITECTURES = {
    "llama": Architecture("llama", "llama", "LlamaForCausalLM", is_interleaved=True),
    "qwen2": Architecture("qwen2", "qwen2", "Qwen2ForCausalLM", end_tokens=("<|im_end|>", "<|endoftext|>")),
    "gemma3": Architecture(
        "gemma3",
        "gemma3_text",
        "Gemma3ForCausalLM",
        activation=("hidden_activation", "gelu_pytorch_tanh"),
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
        arch: architecture of the file.
        fields: fields of the file below the architecture's prefix.
        shapes: shapes of the file's tensors by their names.
        rope_factors: content of rope_freqs.weight, one number a rotated pair; None if there is none.

    Raises:
        CheckpointError: a field is missing, impossible, or cannot be translated exactly.
    """
    fields.check_known((*KNOWN_FIELDS, *arch.fields), NEUTRAL_FIELDS)
    sizes = {name: fields.integer(field) for name, field in SIZES.items()}
    if sizes["num_hidden_layers"] > MAX_LAYERS:
        raise fields.error("block_count", f"is {sizes['num_hidden_layers']}, no model has over {MAX_LAYERS}")
    heads = sizes["num_attention_heads"]
    head_dim = fields.integer("attention.key_length", sizes["hidden_size"] // heads)
    for name in ("attention.value_length", "rope.dimension_count"):
        if fields.integer(name, head_dim) != head_dim:
            raise fields.error(name, f"is {fields[name]}, only the head size {head_dim} is supported")
    config: dict[str, Any] = {
        "architectures": [arch.hf_class],
        "model_type": arch.model_type,
        arch.activation[0]: arch.activation[1],
        **sizes,
        "num_key_value_heads": fields.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "vocab_size": (shapes.get("token_embd.weight") or (1,))[0],  # that it is missing is told with all others
        "max_position_embeddings": fields.integer("context_length"),
        "rope_theta": fields.decimal("rope.freq_base", 10000.0),
        "rms_norm_eps": fields.decimal("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in shapes,
    }
    config["rope_scaling"] = _rope_scaling(fields, config, rope_factors)
    if arch.name == "llama":
        biases = [name for name in shapes if name.endswith(".bias")]
        config["attention_bias"] = any(".attn_" in name for name in biases)
        config["mlp_bias"] = any(".ffn_" in name for name in biases)
    if arch.name == "gemma3":
        config |= _gemma3(fields, config)
    return config


def expected_shapes(arch: Architecture, config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor that a file of this config has, by its GGUF name."""
    for name, _, shape in expected_tensors(arch, config):
        yield name, shape


def expected_tensors(arch: Architecture, config: Mapping[str, Any]) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(GGUF name, Hugging Face name, shape) of every tensor that a file of this config has."""
    import gguf  # here, and torch with the two below: to say where a folder is needs none of them

    from minirksc.models.families import spec_from_config
    from minirksc.models.weights.rules import weight_rules

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.name.upper()], config["num_hidden_layers"])
    for rule in weight_rules(spec_from_config(config)):
        for hf_name, shape in rule.sources:
            yield names.get_name(hf_name, try_suffixes=(".weight", ".bias")) or hf_name, hf_name, shape


def _gemma3(fields: GgufFields, config: Mapping[str, Any]) -> dict[str, Any]:
    num_layers = config["num_hidden_layers"]
    pattern = fields.get("attention.sliding_window_pattern", GEMMA3_PERIOD)
    if isinstance(pattern, list):  # whether each layer slides
        slides = [bool(layer) for layer in pattern]
    else:
        period = fields.integer("attention.sliding_window_pattern", GEMMA3_PERIOD)
        slides = [(layer + 1) % period != 0 for layer in range(num_layers)]
    if len(slides) != num_layers:
        raise fields.error("attention.sliding_window_pattern", f"has {len(slides)} layers, the model has {num_layers}")
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
        raise fields.untranslatable(f"RoPE scaling of type {kind!r} cannot be translated from GGUF exactly")
    linear = {"rope_type": "linear", "factor": float(factor)} if kind == "linear" and factor != 1.0 else None
    if rope_factors is None:
        return linear
    for candidate in LLAMA3_FACTORS if linear is None else ():
        wanted = _llama3_factors(config["rope_theta"], config["head_dim"], candidate)
        if len(wanted) == len(rope_factors) and np.allclose(wanted, rope_factors, rtol=1e-5, atol=0):
            return {"rope_type": "llama3", "factor": candidate, **LLAMA3_BANDS}
    raise fields.untranslatable(
        f"its RoPE factors ({ROPE_FACTORS}) are not those of Llama 3.1 or 3.2, so they cannot be translated from GGUF "
        "exactly"
    )


def _llama3_factors(theta: float, head_dim: int, factor: float) -> Any:
    """What wavelengths are multiplied by: `[head_dim / 2]`, one number a rotated pair."""
    from minirksc.models.rope import inv_freq
    from minirksc.models.spec import RopeSpec

    bands = (("factor", factor), *LLAMA3_BANDS.items())
    plain, scaled = RopeSpec("default", theta, head_dim), RopeSpec("llama3", theta, head_dim, bands)
    return (inv_freq(plain) / inv_freq(scaled)).numpy()

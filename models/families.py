"""From config.json to `ArchSpec`: one small pure function a family.

No module but this one knows a family by name. A field of config.json that would change the mathematics and
that nothing here reads is an error, so that no checkpoint runs silently wrong.
"""

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from minirksc.models.rope import KINDS
from minirksc.models.spec import ArchSpec, RopeSpec

from minirksc.errors import CheckpointError, UnsupportedModelError

MAX_CONFIG_BYTES = 10 << 20
MAX_SIZE = 10**8
"""No real model has a dimension as large; a config that says so is damaged or hostile."""

MAX_LAYERS = 10_000
"""Less than MAX_SIZE: a spec and its weight rules have entries for every layer."""

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu": "gelu",
}

HARMLESS = frozenset(
    {
        # read by every family
        "bos_token_id", "dtype", "eos_token_id", "model_type", "pretraining_tp", "rope_interleaved", "rope_parameters",
        "rope_scaling", "rope_theta", "tie_word_embeddings", "torch_dtype", "vocab_size",
        # where the file comes from, and how others run it
        "_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "_flash_attn_2_enabled",
        "_name_or_path", "architectures", "attn_implementation", "cache_implementation", "is_decoder",
        "is_llama_config", "max_sequence_length", "output_attentions", "output_hidden_states", "return_dict",
        "tokenizer_class", "transformers.js_config", "transformers_version", "unsloth_fixed", "unsloth_version",
        "use_cache",
        # training
        "attention_dropout", "gradient_checkpointing", "hidden_dropout", "initializer_range", "neftune_noise_alpha",
        "resid_pdrop",
        # labels and other tokens
        "cls_token_id", "decoder_start_token_id", "id2label", "label2id", "mask_token_id", "pad_token_id",
        "problem_type", "sep_token_id", "unk_token_id",
        # sampling defaults of old files; generation_config.json is where they are read from
        "diversity_penalty", "do_sample", "early_stopping", "length_penalty", "max_length", "min_length",
        "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences", "repetition_penalty",
        "temperature", "top_k", "top_p", "typical_p",
    }
)  # fmt: skip
"""Fields that do not change the mathematics, or that every family reads."""

ROPE_FIELDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
Config = Mapping[str, Any]


def load_config(folder: Path) -> dict[str, Any]:
    """Reads config.json.

    Raises:
        CheckpointError: it is absent, too large, not JSON or not an object.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; a checkpoint folder needs a config.json")
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise CheckpointError(f"{path} has {path.stat().st_size} bytes, more than {MAX_CONFIG_BYTES}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {type(config).__name__}")
    return config


def spec_from_config(config: Config) -> ArchSpec:
    """The architecture that a config.json describes.

    Raises:
        UnsupportedModelError: its family, or something that it asks for, is not implemented.
        CheckpointError: a field is missing or impossible.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise UnsupportedModelError(f"model_type {model_type!r} is not supported; known: {known}")
    if config.get("quantization_config"):
        method = config["quantization_config"]
        name = method.get("quant_method", method) if isinstance(method, Mapping) else method
        raise UnsupportedModelError(
            f"the checkpoint is quantised ({name}); only float32, float16 and bfloat16 weights are read"
        )
    return FAMILIES[model_type](config)


def _llama(config: Config) -> ArchSpec:
    """Llama 1 to 3.3, SmolLM2, Falcon3 and others that say `llama`."""
    own = (
        "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
        "max_position_embeddings hidden_act rms_norm_eps attention_bias mlp_bias"
    )
    _check_unread(config, own)
    if config.get("pretraining_tp", 1) != 1:
        raise UnsupportedModelError(f"pretraining_tp {config['pretraining_tp']} is not supported; only 1 is")
    if config.get("rope_interleaved"):
        raise UnsupportedModelError("rope_interleaved is not supported")
    num_layers = _size(config, "num_hidden_layers", limit=MAX_LAYERS)
    num_heads = _size(config, "num_attention_heads")
    hidden_size = _size(config, "hidden_size")
    head_dim = _head_dim(config, hidden_size, num_heads)
    attention_bias = _flag(config, "attention_bias")
    return ArchSpec(
        model_type=config["model_type"],
        vocab_size=_size(config, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_size(config, "intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=_size(config, "num_key_value_heads", num_heads),
        head_dim=head_dim,
        max_position_embeddings=_size(config, "max_position_embeddings", 2048),
        activation=_activation(config, "hidden_act"),
        norm_eps=_number(config, "rms_norm_eps", 1e-6),
        windows=(None,) * num_layers,
        ropes=(_rope(config, head_dim, default_theta=10000.0),) * num_layers,
        tie_word_embeddings=_flag(config, "tie_word_embeddings"),
        eos_token_ids=_token_ids(config, "eos_token_id"),
        bos_token_id=next(iter(_token_ids(config, "bos_token_id")), None),
        query_scale=head_dim**-0.5,
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        mlp_bias=_flag(config, "mlp_bias"),
    )


FAMILIES: dict[str, Callable[[Config], ArchSpec]] = {"llama": _llama}


def _check_unread(config: Config, own: str) -> None:
    read = HARMLESS | set(own.split())
    unread = {
        name: value
        for name, value in config.items()
        if name not in read and value not in (None, False, [], {}) and name != "quantization_config"
    }
    if unread:
        listed = ", ".join(f"{name}={value!r:.60}" for name, value in unread.items())
        raise UnsupportedModelError(
            f"config.json of model_type {config['model_type']!r} has fields that nothing reads: {listed}; "
            "they may change what the model computes"
        )


def _size(config: Config, name: str, default: int | None = None, limit: int = MAX_SIZE) -> int:
    value = config.get(name)
    if value is None:
        value = default
    if value is None:
        raise CheckpointError(f"config.json lacks {name}")
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= limit:
        raise CheckpointError(f"config.json: {name} {value!r:.80} must be an integer from 1 to {limit}")
    return value


def _head_dim(config: Config, hidden_size: int, num_heads: int) -> int:
    if config.get("head_dim") is None and hidden_size % num_heads:
        raise CheckpointError(
            f"config.json: hidden_size {hidden_size} is no multiple of num_attention_heads {num_heads}, and there is "
            "no head_dim"
        )
    return _size(config, "head_dim", hidden_size // num_heads)


def _number(config: Config, name: str, default: float | None = None) -> float:
    value = config.get(name)
    if value is None:
        value = default
    if value is None:
        raise CheckpointError(f"config.json lacks {name}")
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    # Compared, not converted: an integer may be too large for a float. NaN compares false.
    if not is_number or not 0 < value <= sys.float_info.max:
        raise CheckpointError(f"config.json: {name} {value!r:.80} must be a positive number")
    return float(value)


def _flag(config: Config, name: str) -> bool:
    value = config.get(name) or False
    if not isinstance(value, bool):
        raise CheckpointError(f"config.json: {name} {value!r:.80} must be true or false")
    return value


def _activation(config: Config, name: str) -> str:
    value = config.get(name, "silu")
    if not isinstance(value, str) or value not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise UnsupportedModelError(f"{name} {value!r:.80} is not supported; known: {known}")
    return ACTIVATIONS[value]


def _token_ids(config: Config, name: str) -> tuple[int, ...]:
    value = config.get(name)
    if value is None:
        return ()
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in values):
        raise CheckpointError(f"config.json: {name} {value!r:.80} must be a token id or a list of them")
    return tuple(values)


def _rope(config: Config, head_dim: int, default_theta: float) -> RopeSpec:
    """Reads both spellings: rope_parameters, or rope_theta with rope_scaling (`type` or `rope_type`)."""
    spellings = [config[name] for name in ("rope_parameters", "rope_scaling") if config.get(name)] or [{}]
    ropes = [_rope_from(config, raw, head_dim, default_theta) for raw in spellings]
    if ropes[0] != ropes[-1]:
        raise CheckpointError(
            f"config.json: rope_parameters {spellings[0]!r:.200} and rope_scaling {spellings[-1]!r:.200} contradict "
            "each other; keep the right one"
        )
    return ropes[0]


def _rope_from(config: Config, raw: Any, head_dim: int, default_theta: float) -> RopeSpec:
    if not isinstance(raw, Mapping):
        raise CheckpointError(f"config.json: rope parameters {raw!r:.80} must be an object")
    defaults = {
        "rope_theta": config.get("rope_theta"),
        "original_max_position_embeddings": config.get("max_position_embeddings"),
    }
    merged = defaults | {name: value for name, value in raw.items() if value is not None}
    kind = merged.get("rope_type") or merged.get("type") or "default"
    if kind not in KINDS:
        raise UnsupportedModelError(f"rope type {kind!r:.80} is not supported; known: {', '.join(KINDS)}")
    needed = ROPE_FIELDS[kind]
    unread = set(merged) - set(needed) - {"rope_theta", "rope_type", "type"}
    if unread := unread - {"original_max_position_embeddings"}:
        raise UnsupportedModelError(f"rope type {kind!r} has parameters that nothing reads: {sorted(unread)}")
    return RopeSpec(
        kind=kind,
        theta=_number(merged, "rope_theta", default_theta),
        rotary_dim=head_dim,
        parameters=tuple((name, _number(merged, name)) for name in needed),
    )

"""Mistral's own layout: params.json and consolidated.safetensors, in the terms of config.json and Hugging Face names.

Tensors are read by `safetensors_file`. Rows of q and k are stored with rotary pairs side by
side. Defaults of params.json that published readers of it disagree about are asked for, not guessed.

Source: the conversions of transformers (convert_mistral_weights_to_hf, convert_ministral3_weights_to_hf) and
mistral-inference's TransformerArgs, for what the fields and names mean.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minirksc.errors import CheckpointError, UnsupportedModelError, listing
from minirksc.json_file import read_json_object
from minirksc.models.config.fields import positive
from minirksc.models.config.quantised import NEUTRAL, refusal

PARAMS_FILE = "params.json"
MAX_PARAMS_BYTES = 10 << 20

SIZES = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "hidden_dim": "intermediate_size",
    "n_heads": "num_attention_heads",
    "head_dim": "head_dim",
    "vocab_size": "vocab_size",
    "norm_eps": "rms_norm_eps",
}
READ = frozenset(
    {
        *SIZES,
        *("n_kv_heads", "rope_theta", "sliding_window", "_sliding_window", "max_seq_len", "max_position_embeddings"),
        *("tied_embeddings", "yarn", "llama_4_scaling", "quantization", "moe", "model_type", "activation", "causal"),
        *("vision_encoder", "multimodal", "max_batch_size"),
    }
)
YARN = {
    "factor": "factor",
    "original_max_position_embeddings": "original_max_position_embeddings",
    "beta": "beta_fast",
    "alpha": "beta_slow",
}
DEFAULT_LENGTH = 32768
TOP_NAMES = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_NAMES = {
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}
KINDS = {"weight": "weight", "qscale_weight": "weight_scale_inv", "qscale_act": "activation_scale"}
"""Last parts of the names of a layer's tensors."""

SCHEMES: tuple[dict[str, Any], ...] = ({}, *({"qscheme_act": scheme} for scheme in (None, "TENSOR", "NO_SCALES")))
"""What is done to activations elsewhere."""

FP8 = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}
Params = Mapping[str, Any]


def load_config(folder: Path) -> dict[str, Any]:
    """Reads config.json, or params.json where there is none.

    Raises:
        CheckpointError: it is absent, too large, not JSON or not an object.
    """
    path = folder / "config.json"
    if os.path.lexists(path):
        return read_json_object(path)
    if (folder / PARAMS_FILE).is_file():
        return config_from_params(read_params(folder))
    raise CheckpointError(f"{path} does not exist, and it is where a checkpoint says what it is")


def read_params(folder: Path) -> dict[str, Any]:
    """Reads params.json.

    Raises:
        CheckpointError: it is absent, too large, not JSON or not an object.
    """
    path = folder / PARAMS_FILE
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; consolidated.safetensors cannot be read without it")
    return read_json_object(path, max_bytes=MAX_PARAMS_BYTES)


def config_from_params(params: Params) -> dict[str, Any]:
    """The config.json that says what a params.json says.

    Args:
        params: content of params.json.

    Returns:
        A config of model_type mistral; ministral where layers have different windows, ministral3 with YaRN. The text
        model of a multimodal one is inside a mistral3.

    Raises:
        UnsupportedModelError: it is quantised, has experts, or has a field that nothing reads.
        CheckpointError: a field is missing or impossible.
    """
    _check(params)
    config = {hf: params[name] for name, hf in SIZES.items() if params.get(name) is not None}
    if missing := [name for name, hf in SIZES.items() if hf not in config and name != "head_dim"]:
        raise CheckpointError(f"{PARAMS_FILE} lacks {', '.join(missing)}")
    for name in SIZES:
        if name in params:
            positive(params[name], f"{PARAMS_FILE}: {name}")
    rope = _rope(params)
    yarn = rope.get("rope_parameters", {})
    factor, original = yarn.get("factor", 1), yarn.get("original_max_position_embeddings", DEFAULT_LENGTH)
    length = params.get("max_position_embeddings") or params.get("max_seq_len") or int(factor * original)
    positive(length, f"{PARAMS_FILE}: max_position_embeddings or max_seq_len")
    text = {
        "model_type": "mistral",
        **config,
        "num_key_value_heads": params.get("n_kv_heads") or params["n_heads"],
        "max_position_embeddings": length,
        "hidden_act": "silu",
        "dtype": "bfloat16",  # as all of them are published
        "tie_word_embeddings": bool(params.get("tied_embeddings")),
        "bos_token_id": 1,
        "eos_token_id": 2,
        **_windows(params, length),
        **rope,
    }
    quantised = _quantised(params)
    if _is_multimodal(params):
        return {"model_type": "mistral3", "dtype": text.pop("dtype"), "text_config": text, **quantised}
    return text | quantised


def hf_name(name: str, params: Params) -> tuple[str, int | None]:
    """How Hugging Face names a tensor, and how many heads have rows with rotary pairs side by side.

    Args:
        name: name in consolidated.safetensors.
        params: content of params.json.

    Returns:
        (name, heads): the name is the same for what is not of the text model, heads is None but for q and k.
    """
    begin, _, rest = name.partition(".")
    layer, _, part = rest.partition(".")
    module, _, kind = part.rpartition(".")
    found = TOP_NAMES.get(name)
    if begin == "layers" and layer.isdecimal() and module in LAYER_NAMES and kind in KINDS:
        found = f"model.layers.{layer}.{LAYER_NAMES[module]}.{KINDS[kind]}"
    if found is None:
        return name, None
    if _is_multimodal(params) and found.startswith("model."):
        found = f"language_model.{found}"
    heads = {"attention.wq.weight": params.get("n_heads"), "attention.wk.weight": params.get("n_kv_heads")}
    return found, heads[part] or params.get("n_heads") if part in heads else None


def _quantised(params: Params) -> dict[str, Any]:
    """What config.json says of FP8 weights; each has one scale."""
    given = params.get("quantization")
    if not given:
        return {}
    if given in [{"qformat_weight": "fp8_e4m3", **scheme} for scheme in SCHEMES]:
        return {"quantization_config": FP8}
    raise refusal("the checkpoint", f"{PARAMS_FILE}: quantization {given!r:.200}")


def _check(params: Params) -> None:
    if params.get("moe"):
        raise UnsupportedModelError(f"{PARAMS_FILE}: moe: a mixture of experts is not supported")
    for name, neutral in (("model_type", "transformer"), ("activation", "silu"), ("causal", True)):
        if params.get(name, neutral) != neutral:
            raise UnsupportedModelError(f"{PARAMS_FILE}: {name} {params[name]!r:.80} is not supported")
    unread = {name: value for name, value in params.items() if name not in READ and value not in NEUTRAL}
    if unread:
        listed = listing([f"{name}={value!r:.60}" for name, value in unread.items()], ", ")
        raise UnsupportedModelError(
            f"{PARAMS_FILE} has fields that nothing reads: {listed}; they may change what the model computes"
        )


def _is_multimodal(params: Params) -> bool:
    multimodal = params.get("multimodal")
    inner = multimodal.get("vision_encoder_args") if isinstance(multimodal, Mapping) else multimodal
    return bool(params.get("vision_encoder") or inner)


def _rope_theta(params: Params) -> float:
    theta = params.get("rope_theta")
    if theta is None and params.get("sliding_window") is None:
        # transformers takes 1e4 then and mistral-inference 1e6; with a window both mean the first Mistral 7B.
        raise CheckpointError(f"{PARAMS_FILE} lacks rope_theta; add the value that the model was trained with")
    return 1e4 if theta is None else theta


def _rope(params: Params) -> dict[str, Any]:
    """What config.json says of the rotation; YaRN makes it a ministral3."""
    yarn, growth = params.get("yarn"), params.get("llama_4_scaling")
    if growth and not yarn:
        raise UnsupportedModelError(f"{PARAMS_FILE}: llama_4_scaling {growth!r:.200} without yarn")
    if not yarn:
        return {"rope_theta": _rope_theta(params)}
    if not isinstance(yarn, Mapping) or set(yarn) != {*YARN, "apply_scale"}:
        raise CheckpointError(f"{PARAMS_FILE}: yarn {yarn!r:.200} must have {', '.join(YARN)} and apply_scale")
    numbers = {hf: positive(yarn[name], f"{PARAMS_FILE}: yarn: {name}") for name, hf in YARN.items()}
    rope = {"rope_type": "yarn", "rope_theta": _rope_theta(params), **numbers}
    if not yarn["apply_scale"]:
        rope |= {"mscale": 1.0, "mscale_all_dim": 1.0}  # their ratio multiplies cosines and sines
    if growth:
        length = yarn["original_max_position_embeddings"]
        beta = growth.get("beta") if isinstance(growth, Mapping) else None
        if growth != {"original_max_position_embeddings": length, "beta": beta}:
            raise UnsupportedModelError(
                f"{PARAMS_FILE}: llama_4_scaling {growth!r:.200} is not supported; known: beta, and "
                f"original_max_position_embeddings as yarn has it ({length})"
            )
        rope["llama_4_scaling_beta"] = beta
    return {"model_type": "ministral3", "rope_parameters": rope}


def _windows(params: Params, length: int) -> dict[str, Any]:
    """Of all layers the same, or a list of layers that repeats."""
    given = params.get("sliding_window")
    given = params.get("_sliding_window") if given is None else given
    if not isinstance(given, Sequence) or isinstance(given, str):
        return {"sliding_window": None if given is None else _window(given)}
    pattern = [None if window is None or _window(window) >= length else _window(window) for window in given]
    num_layers = params["n_layers"]
    sizes = {*pattern} - {None}
    if not pattern or num_layers % len(pattern) or len(sizes) > 1:
        raise UnsupportedModelError(
            f"{PARAMS_FILE}: sliding_window {given!r:.200} is not supported: it must repeat evenly over {num_layers} "
            "layers and have one size"
        )
    if len({*pattern}) == 1:
        return {"sliding_window": pattern[0]}
    kinds = ["full_attention" if window is None else "sliding_attention" for window in pattern]
    return {
        "model_type": "ministral",
        "sliding_window": sizes.pop(),
        "layer_types": kinds * (num_layers // len(pattern)),
    }


def _window(value: Any) -> int:
    """Some files have it as text."""
    try:
        return int(value)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{PARAMS_FILE}: sliding_window {value!r:.80} must be an integer") from error

"""From config.json to `ArchSpec`: one small function a family, each saying how it departs from Llama.

No module but this one and `gemma.py` knows a family by name. A field of config.json that would change the mathematics
and that nothing reads is an error, so that no checkpoint runs silently wrong. Defaults are those that a published file
leaves out, as transformers' configuration classes have them.
"""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

from minirksc.errors import CheckpointError, ConfigError, UnsupportedModelError
from minirksc.models import gemma
from minirksc.models.config.consolidated import load_config
from minirksc.models.config.fields import Fields, positive
from minirksc.models.config.quantised import fp8_of
from minirksc.models.plain import (
    default_rope,
    either,
    plain,
    with_biases,
    with_each,
    with_windows,
    within_one_chunk,
    without_windows,
)
from minirksc.models.spec import ArchSpec, WeightLayout

__all__ = ["FAMILIES", "load_config", "spec_from_config"]

BOTH_WAYS = re.compile(r"Bidirec|[a-z0-9]Bi(Model|For)")
"""What the name of a class has that is a causal model no more."""

Config = Mapping[str, Any]


def spec_from_config(config: Config, ignored: Collection[str] = ()) -> ArchSpec:
    """The architecture that a config.json describes.

    Args:
        config: content of the file.
        ignored: names of fields that change nothing, as the caller knows, though nothing here reads them.

    Raises:
        UnsupportedModelError: its family, or something that it asks for, is not implemented.
        CheckpointError: a field is missing or impossible.
        ConfigError: one of `ignored` is not there, or is read.
    """
    text = _text_config(config)
    model_type = text.get("model_type")
    for each in (config, text):
        _refuse_both_ways(each)
    fp8 = fp8_of(config) or fp8_of(text)
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        why = f": it has {REFUSED[model_type]}" if isinstance(model_type, str) and model_type in REFUSED else ""
        known = ", ".join(sorted(FAMILIES | WRAPPERS))
        raise UnsupportedModelError(f"model_type {model_type!r:.80} is not supported{why}; known: {known}")
    fields = Fields(text, ignored=frozenset(ignored))
    fields.get("is_causal")  # seen to above
    spec = FAMILIES[model_type](fields)
    fields.check_all_read()
    if wrong := sorted(set(ignored) - fields.passed):
        raise ConfigError(
            f"ignore_config_keys (--ignore-config-key) names {wrong[0]!r:.80}, which config.json does not have, or "
            "which is read or known to be harmless; leave it out"
        )
    return replace(spec, layout=replace(spec.layout, is_wrapped=text is not config, fp8=fp8))


def _text_config(config: Config) -> Config:
    """The config itself; of a multimodal model that of the text model inside it."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in WRAPPERS:
        return config
    text = config.get("text_config")
    if not isinstance(text, Mapping):
        raise CheckpointError(f"config.json of model_type {model_type!r} lacks the object text_config")
    outer = {name: config[name] for name in ("eos_token_id", "bos_token_id") if config.get(name) is not None}
    tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings", True))
    return {"model_type": WRAPPERS[model_type], **text, **outer, "tie_word_embeddings": tied}


def _refuse_both_ways(config: Config) -> None:
    """Models that look at what follows too, as those that make embeddings do: none here does."""
    names = config.get("architectures")
    names = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
    found = [f"architectures {name!r:.80}" for name in names if BOTH_WAYS.search(name)]
    if config.get("is_causal", True) is not True:
        found.append(f"is_causal {config['is_causal']!r:.80}")
    if found:
        raise UnsupportedModelError(
            f"config.json: {found[0]} is not supported: the model attends both ways, and only causal ones run here"
        )


# The families


def _llama(f: Fields) -> ArchSpec:
    """Llama 1 to 3.3, SmolLM2, Falcon3 and others that say so: what all others depart from."""
    f.only("rope_interleaved")
    f.only("activation", "swiglu")  # Falcon3's second word for the same
    return without_windows(f, with_biases(f))


def _internlm3(f: Fields) -> ArchSpec:
    """InternLM3: Llama with other names for its two switches of biases."""
    f.default(num_key_value_heads=2, head_dim=128, max_position_embeddings=32768, rms_norm_eps=1e-5)
    f.default(eos_token_id=2, bos_token_id=1)
    qkv_bias, bias = either(f, "qkv_bias", "attention_bias"), either(f, "bias", "mlp_bias")
    return without_windows(f, plain(f, qkv_bias=qkv_bias, o_bias=bias, mlp_bias=bias))


def _iquestcoder(f: Fields) -> ArchSpec:
    """IQuest-Coder: Llama by another name."""
    f.default(num_key_value_heads=8, head_dim=128, max_position_embeddings=131072, rms_norm_eps=1e-5)
    f.default(eos_token_id=2, bos_token_id=1)
    f.only("use_sliding_window")
    for name in ("sliding_window", "max_window_layers"):
        f.get(name)  # of what is off
    return _llama(f)


def _seed_oss(f: Fields) -> ArchSpec:
    """Seed-OSS: biases on q, k and v, and a switch of its own for o's."""
    f.default(head_dim=128, num_key_value_heads=8, max_position_embeddings=524288, attention_bias=True)
    o_bias, mlp_bias = f.flag("attention_out_bias"), f.flag("mlp_bias")
    return without_windows(f, plain(f, qkv_bias=f.flag("attention_bias"), o_bias=o_bias, mlp_bias=mlp_bias))


def _smollm3(f: Fields) -> ArchSpec:
    """SmolLM3: every fourth layer has no positions."""
    f.default(rope_theta=2e6, num_key_value_heads=4, max_position_embeddings=32768, tie_word_embeddings=True)
    f.only("rope_interleaved")
    spec = with_biases(f)
    f.get("max_window_layers")  # in the files, and without meaning there
    interval = f.size("no_rope_layer_interval", 4)
    turns = f.per_layer("no_rope_layers", spec.num_layers, (0, 1)) or [
        int((i + 1) % interval != 0) for i in range(spec.num_layers)
    ]
    spec = with_windows(f, spec, lambda i: bool(turns[i]), f.flag("use_sliding_window"))
    rope = spec.layers[0].rope
    return with_each(spec, "rope", [rope if turning else None for turning in turns])


def _cwm(f: Fields) -> ArchSpec:
    """Code World Model: three layers with a window to each full one."""
    f.default(num_key_value_heads=8, head_dim=128, rms_norm_eps=1e-5, sliding_window=8192, rope_theta=1e6)
    f.default(max_position_embeddings=131072, eos_token_id=[128001, 128008, 128009], bos_token_id=128000)
    bands = {"factor": 16.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192}
    default_rope(f, rope_type="llama3", **bands)
    spec = plain(f, mlp_bias=f.flag("mlp_bias"))
    return with_windows(f, spec, lambda i: i % 4 == 0)


def _qwen2(f: Fields) -> ArchSpec:
    """Qwen 2 and 2.5: biases on q, k and v; a window only where a switch asks for it."""
    f.default(num_key_value_heads=32, max_position_embeddings=32768)
    return _with_qwen_windows(f, plain(f, qkv_bias=True))


def _qwen3(f: Fields) -> ArchSpec:
    """Qwen 3: a norm on each head's query and key, no biases, head_dim of its own."""
    f.default(num_key_value_heads=32, max_position_embeddings=32768, head_dim=128)
    bias = f.flag("attention_bias")
    return _with_qwen_windows(f, plain(f, qkv_bias=bias, o_bias=bias, qk_norm=True))


def _with_qwen_windows(f: Fields, spec: ArchSpec) -> ArchSpec:
    f.default(sliding_window=4096, max_window_layers=28)
    first = f.size("max_window_layers", minimum=0)
    return within_one_chunk(f, with_windows(f, spec, lambda i: i < first, f.flag("use_sliding_window")))


def _mistral(f: Fields, **changes: Any) -> ArchSpec:
    """Mistral 7B, Nemo, Small: a window in all layers, unless the file says null. Absent it is 4096."""
    spec = _ministral(f, **changes)
    if len({layer.window for layer in spec.layers}) > 1:
        raise UnsupportedModelError(
            f"{f.where}: layer_types mixes windows, which model_type {spec.model_type!r} does not do elsewhere; if the "
            "model does, its model_type is 'ministral'"
        )
    return spec


def _ministral(f: Fields, **changes: Any) -> ArchSpec:
    """Ministral 8B: Mistral with full layers between those with a window."""
    f.default(num_key_value_heads=8, max_position_embeddings=131072, sliding_window=4096)
    f.default(eos_token_id=2, bos_token_id=1)
    return with_windows(f, plain(f, **changes))


def _ministral3(f: Fields) -> ArchSpec:
    """Ministral 3: Mistral with YaRN, and queries that grow with the position."""
    f.default(sliding_window=None, head_dim=128, max_position_embeddings=262144, rms_norm_eps=1e-5)
    yarn = {"factor": 16.0, "original_max_position_embeddings": 16384, "mscale": 1.0, "mscale_all_dim": 1.0}
    default_rope(f, rope_type="yarn", **yarn, rope_theta=1e6, llama_4_scaling_beta=0.1)
    given = f.given("rope_parameters") or f.get("rope_scaling")
    spec = _mistral(f, others=("llama_4_scaling_beta", "max_position_embeddings"))
    rope = spec.layers[0].rope
    beta = given.get("llama_4_scaling_beta") if isinstance(given, Mapping) else None
    if beta is None or beta == 0 or rope is None:
        return spec
    beta = positive(beta, f"{f.where}: llama_4_scaling_beta")
    length = dict(rope.parameters).get("original_max_position_embeddings")
    length = given.get("original_max_position_embeddings", spec.max_position_embeddings) if length is None else length
    return replace(spec, query_growth=(beta, positive(length, f"{f.where}: original_max_position_embeddings")))


def _phi3(f: Fields) -> ArchSpec:
    """Phi-3 and Phi-4-mini: fused projections; only part of each head turns; a factor a pair on long sequences."""
    f.default(max_position_embeddings=4096, rms_norm_eps=1e-5, eos_token_id=32000, bos_token_id=1)
    f.default(original_max_position_embeddings=4096)
    for name in ("interpolate_factor", "full_attn_mod"):
        f.only(name, 1)
    return with_windows(f, plain(f, is_partial=True, layout=WeightLayout(fused_qkv=True, fused_gate_up=True)))


WRAPPERS = {
    "gemma3": "gemma3_text",
    "gemma4": "gemma4_text",
    "gemma4_unified": "gemma4_unified_text",
    "mistral3": "mistral",
}
"""Multimodal types, and what their text model is where it does not say."""

FAMILIES: dict[str, Callable[[Fields], ArchSpec]] = {
    "llama": _llama,
    "internlm3": _internlm3,
    "iquestcoder": _iquestcoder,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "mistral": _mistral,
    "ministral": _ministral,
    "ministral3": _ministral3,
    "gemma": gemma.gemma,
    "gemma2": gemma.gemma2,
    "gemma3_text": gemma.gemma3,
    "gemma4_text": gemma.gemma4,
    "gemma4_unified_text": gemma.gemma4_unified,
    "vaultgemma": gemma.vaultgemma,
    "phi3": _phi3,
    "smollm3": _smollm3,
    "cwm": _cwm,
    "seed_oss": _seed_oss,
}

REASONS = {
    "a mixture of experts": (
        "mixtral qwen2_moe qwen3_moe olmoe granitemoe phimoe gpt_oss llama4 llama4_text ernie4_5_moe glm4_moe "
        "mistral_large4"
    ),
    "latent attention and a mixture of experts": "deepseek_v2 deepseek_v3 mistral4",
    "recurrent layers": (
        "mamba mamba2 falcon_mamba rwkv recurrent_gemma xlstm jamba bamba zamba2 falcon_h1 nemotron_h granitemoehybrid"
    ),
    "recurrent layers (Gated DeltaNet)": "qwen3_next qwen3_5 qwen3_5_text qwen3_5_moe",
    "alternating updates and sparse activations": "gemma3n gemma3n_text",
    "LayerNorm with biases": "phi starcoder2 gpt2 gpt_neox opt falcon",
    "convolutions": "lfm2",
    "an encoder, which attends both ways": (
        "bert roberta xlm-roberta distilbert mpnet electra deberta-v2 modernbert nomic_bert"
    ),
    "an encoder and a decoder": "t5 mt5 bart mbart pegasus marian t5gemma whisper",
}
REFUSED = {model_type: reason for reason, types in REASONS.items() for model_type in types.split()}
"""Types that are brought, and which of their properties is not implemented."""

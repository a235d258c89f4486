"""From config.json to `ArchSpec`: one small function a family, each saying how it departs from Llama.

No module but this one knows a family by name. A field of config.json that would change the mathematics and that
nothing reads is an error, so that no checkpoint runs silently wrong. Defaults are those that a published file leaves
out, as transformers' configuration classes have them.
"""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

from minirksc.errors import CheckpointError, ConfigError, UnsupportedModelError
from minirksc.models.config.fields import Fields, load_config, positive
from minirksc.models.config.quantised import fp8_of
from minirksc.models.config.rope import read_rope
from minirksc.models.plain import (
    ACTIVATIONS,
    FULL,
    SLIDING,
    default_rope,
    plain,
    with_ropes,
    with_windows,
    within_one_chunk,
    without_windows,
)
from minirksc.models.spec import ArchSpec, LayerSpec, WeightLayout

__all__ = ["FAMILIES", "load_config", "spec_from_config"]

BOTH_WAYS = re.compile(r"Bidirec|[a-z0-9]Bi(Model|For)")
"""In the name of a class: it is a causal model no more."""

GEMMA_ACTIVATIONS = ACTIVATIONS | {"gelu": "gelu_tanh"}
"""Gemma's first files say "gelu" and mean its tanh form."""

Config = Mapping[str, Any]


def spec_from_config(config: Config, ignored: Collection[str] = ()) -> ArchSpec:
    """The architecture that a config.json describes.

    Args:
        config: its content.
        ignored: fields that change nothing, as the caller knows, though nothing here reads them.

    Raises:
        UnsupportedModelError: its family, or something that it asks for, is not implemented.
        CheckpointError: a field is missing or impossible.
        ConfigError: one of `ignored` is not there, or is read.
    """
    spec, passed = _read(config, frozenset(ignored))
    if wrong := sorted(set(ignored) - passed):
        raise ConfigError(
            f"ignore_config_keys (--ignore-config-key) names {wrong[0]!r:.80}, which config.json does not have, or "
            "which is read or known to be harmless; leave it out"
        )
    return spec


def _read(config: Config, ignored: frozenset[str]) -> tuple[ArchSpec, set[str]]:
    """(the spec, those of the fields to be ignored that were met)."""
    _refuse_other_tools(config)
    _refuse_both_ways(config)
    fp8 = fp8_of(config)
    spec, passed = _unquantised(config, ignored)
    return spec if fp8 is None else replace(spec, layout=replace(spec.layout, fp8=fp8)), passed


def _unquantised(config: Config, ignored: frozenset[str]) -> tuple[ArchSpec, set[str]]:
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type in WRAPPERS:
        return _unwrapped(config, WRAPPERS[model_type], ignored)
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        why = f": it has {REFUSED[model_type]}" if isinstance(model_type, str) and model_type in REFUSED else ""
        known = ", ".join(sorted(FAMILIES | WRAPPERS))
        raise UnsupportedModelError(f"model_type {model_type!r:.80} is not supported{why}; known: {known}")
    fields = Fields(config, ignored=ignored)
    fields.get("is_causal")
    spec = FAMILIES[model_type](fields)
    fields.check_all_read()
    return spec, fields.passed


def _unwrapped(config: Config, text_type: str, ignored: frozenset[str]) -> tuple[ArchSpec, set[str]]:
    """The text model inside a multimodal one."""
    text = config.get("text_config")
    if not isinstance(text, Mapping):
        raise CheckpointError(f"config.json of model_type {config['model_type']!r} lacks the object text_config")
    outer = {name: config[name] for name in ("eos_token_id", "bos_token_id") if config.get(name) is not None}
    tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings", True))
    spec, passed = _read({"model_type": text_type, **text, **outer, "tie_word_embeddings": tied}, ignored)
    return replace(spec, layout=replace(spec.layout, is_wrapped=True)), passed


def _refuse_other_tools(config: Config) -> None:
    """Quantised checkpoints that say so elsewhere than most."""
    for name, tool in (("quantization", "MLX"), ("compression_config", "compressed-tensors")):
        if config.get(name) is not None and config.get("quantization_config") is None:
            raise UnsupportedModelError(
                f"the checkpoint is quantised ({tool}: {name} {config[name]!r:.80}); its weights are not read: take "
                "the checkpoint that it was made from"
            )


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
    return without_windows(f, _with_biases(f))


def _internlm3(f: Fields) -> ArchSpec:
    """InternLM3: Llama with other names for its two switches of biases."""
    f.default(num_key_value_heads=2, head_dim=128, max_position_embeddings=32768, rms_norm_eps=1e-5)
    f.default(eos_token_id=2, bos_token_id=1)
    qkv_bias, bias = _either(f, "qkv_bias", "attention_bias"), _either(f, "bias", "mlp_bias")
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
    spec = _with_biases(f)
    f.get("max_window_layers")  # in the files, and without meaning there
    interval = f.size("no_rope_layer_interval", 4)
    turns = f.per_layer("no_rope_layers", spec.num_layers, (0, 1)) or [
        int((i + 1) % interval != 0) for i in range(spec.num_layers)
    ]
    spec = with_windows(f, spec, [FULL if turning else SLIDING for turning in turns], f.flag("use_sliding_window"))
    return with_ropes(
        spec, [layer.rope if turning else None for layer, turning in zip(spec.layers, turns, strict=True)]
    )


def _cwm(f: Fields) -> ArchSpec:
    """Code World Model: three layers with a window to each full one."""
    f.default(num_key_value_heads=8, head_dim=128, rms_norm_eps=1e-5, sliding_window=8192, rope_theta=1e6)
    f.default(max_position_embeddings=131072, eos_token_id=[128001, 128008, 128009], bos_token_id=128000)
    bands = {"factor": 16.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192}
    default_rope(f, rope_type="llama3", **bands)
    spec = plain(f, mlp_bias=f.flag("mlp_bias"))
    return with_windows(f, spec, [FULL if i % 4 == 0 else SLIDING for i in range(spec.num_layers)])


def _qwen2(f: Fields) -> ArchSpec:
    """Qwen 2 and 2.5: biases on q, k and v; a window only where a switch asks for it."""
    f.default(num_key_value_heads=32, max_position_embeddings=32768)
    return _with_qwen_windows(f, plain(f, qkv_bias=True))


def _qwen3(f: Fields) -> ArchSpec:
    """Qwen 3: a norm on each head's query and key, no biases, head_dim of its own."""
    f.default(num_key_value_heads=32, max_position_embeddings=32768, head_dim=128)
    bias = f.flag("attention_bias")
    return _with_qwen_windows(f, plain(f, qkv_bias=bias, o_bias=bias, qk_norm=True))


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
    spec = plain(f, **changes)
    return with_windows(f, spec, [SLIDING] * spec.num_layers)


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
    spec = plain(f, is_partial=True, layout=WeightLayout(fused_qkv=True, fused_gate_up=True))
    return with_windows(f, spec, [SLIDING] * spec.num_layers)


def _gemma(f: Fields) -> ArchSpec:
    """Gemma 1: norms by 1 + w, scaled embeddings, tanh-GELU, head_dim of its own."""
    f.default(num_key_value_heads=16, max_position_embeddings=8192)
    return without_windows(f, _plain_gemma(f))


def _gemma2(f: Fields) -> ArchSpec:
    """Gemma 2: soft caps, a window in every other layer, norms after the branches too."""
    return replace(_vaultgemma(f), sandwich_norms=True)


def _vaultgemma(f: Fields) -> ArchSpec:
    """VaultGemma: Gemma 2 without the norms after the branches."""
    f.default(num_key_value_heads=4, max_position_embeddings=8192, sliding_window=4096, query_pre_attn_scalar=256)
    f.default(attn_logit_softcapping=50.0, final_logit_softcapping=30.0)
    f.only("sliding_window_size", f.get("sliding_window"))  # said twice in Gemma 2's files
    spec = _plain_gemma(
        f,
        query_scale=f.number("query_pre_attn_scalar") ** -0.5,
        attn_softcap=f.optional_number("attn_logit_softcapping"),
        final_softcap=f.optional_number("final_logit_softcapping"),
        layout=WeightLayout(mlp_norm="pre_feedforward_layernorm"),
    )
    return with_windows(f, spec, [FULL if i % 2 else SLIDING for i in range(spec.num_layers)])


def _gemma3(f: Fields) -> ArchSpec:
    """Gemma 3: norms on queries and keys; five layers with a window, which turn faster, to each full one."""
    f.default(vocab_size=262208, hidden_size=2304, intermediate_size=9216, num_hidden_layers=26)
    f.default(num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=131072)
    f.default(query_pre_attn_scalar=256, sliding_window=4096, rope_theta=1e6, rope_local_base_freq=1e4)
    f.only("attn_logit_softcapping")  # named in the files, never applied
    pattern = f.size("sliding_window_pattern", f.size("_sliding_window_pattern", 6))
    nested = f.get("rope_parameters") or {}
    if nested and isinstance(nested, Mapping) and FULL not in nested:
        raise CheckpointError(f"{f.where}: rope_parameters {nested!r:.200} lacks {FULL}, whose rotation is its own")
    spec = _plain_gemma(
        f,
        layer_type=FULL,
        query_scale=f.number("query_pre_attn_scalar") ** -0.5,
        final_softcap=f.optional_number("final_logit_softcapping"),
        qk_norm=True,
        sandwich_norms=True,
        layout=WeightLayout(mlp_norm="pre_feedforward_layernorm"),
    )
    spec = with_windows(f, spec, [SLIDING if (i + 1) % pattern else FULL for i in range(spec.num_layers)])
    inner = Fields({"rope_parameters": nested.get(SLIDING)}, f.where)
    inner.default(rope_theta=f.get("rope_local_base_freq"), max_position_embeddings=spec.max_position_embeddings)
    slow, fast = spec.layers[0].rope, read_rope(inner, spec.layers[0].head_dim)
    return with_ropes(spec, [slow if layer.window is None else fast for layer in spec.layers])


def _gemma4(f: Fields) -> ArchSpec:
    """Gemma 4, dense: full layers of another shape, plain norms, a number a layer; in the small ones inputs a layer."""
    f.default(vocab_size=262144, hidden_size=2304, intermediate_size=9216, num_hidden_layers=30)
    f.default(num_attention_heads=8, num_key_value_heads=4, sliding_window=512, max_position_embeddings=131072)
    f.default(global_head_dim=512, hidden_size_per_layer_input=256, num_kv_shared_layers=0)
    f.only("enable_moe_block")
    for name in ("num_experts", "top_k_experts", "moe_intermediate_size"):
        f.get(name)  # of a part that is not there
    input_size = _count(f, "hidden_size_per_layer_input") or None
    if f.get("vocab_size_per_layer_input") is not None and input_size is not None:
        f.only("vocab_size_per_layer_input", f.size("vocab_size"))
    default_rope(
        f,
        **{
            SLIDING: {"rope_type": "default", "rope_theta": 1e4},
            FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
        },
    )
    _check_both_ropes(f)
    spec = _plain_gemma(
        f,
        layer_type=SLIDING,
        query_scale=1.0,
        final_softcap=f.optional_number("final_logit_softcapping"),
        norm_offset=0.0,
        qk_norm=True,
        v_norm=True,
        sandwich_norms=True,
        layer_scale=True,
        layer_input_size=input_size,
        layout=WeightLayout(mlp_norm="pre_feedforward_layernorm"),
    )
    spec = with_windows(f, spec, [SLIDING if (i + 1) % 6 else FULL for i in range(spec.num_layers)])
    layers = [
        layer if layer.window is not None else _gemma4_full(f, layer, str(i)) for i, layer in enumerate(spec.layers)
    ]
    if layers[-1].window is not None:
        layers[-1] = _gemma4_full(f, replace(layers[-1], window=None), str(len(layers) - 1))
    num_own = spec.num_layers - _count(f, "num_kv_shared_layers")
    width = 2 if f.flag("use_double_wide_mlp") else 1
    for i in range(max(num_own, 0), spec.num_layers):
        source = next((j for j in reversed(range(num_own)) if layers[j].window == layers[i].window), -1)
        layers[i] = replace(layers[i], kv_layer=source, intermediate_size=width * layers[i].intermediate_size)
    return replace(spec, layers=tuple(layers))


def _count(f: Fields, name: str) -> int:
    """How many or how large something is that need not be there; null is 0."""
    return 0 if f.get(name) is None else f.size(name, minimum=0)


def _check_both_ropes(f: Fields) -> None:
    """Its two kinds of layers turn so differently that neither has a plain value."""
    given = f.given("rope_parameters")
    for kind in (SLIDING, FULL):
        own = given.get(kind) if isinstance(given, Mapping) else None
        if not isinstance(own, Mapping) or own.get("rope_theta") is None:
            raise CheckpointError(f"{f.where}: rope_parameters {given!r:.200} lacks {kind} with its rope_theta")


def _gemma4_full(f: Fields, layer: LayerSpec, index: str) -> LayerSpec:
    """A layer without a window: its head_dim, KV heads and rotation are its own."""
    value_is_key = f.flag("attention_k_eq_v")
    own = {"head_dim": f.get("global_head_dim")}
    if value_is_key:
        own["num_key_value_heads"] = f.get("num_global_key_value_heads")
    if "per_layer_config" in f:  # the newer spelling, complete where it is there
        of_layers = f.get("per_layer_config") or {}
        own = of_layers.get(index, {}) if isinstance(of_layers, Mapping) else of_layers
    if not isinstance(own, Mapping) or own.keys() - {"head_dim", "num_key_value_heads"}:
        raise UnsupportedModelError(f"{f.where}: per_layer_config {own!r:.80} is not supported")
    shape = Fields(own, f.where)
    shape.default(head_dim=layer.head_dim, num_key_value_heads=layer.num_kv_heads)
    head_dim = shape.size("head_dim")
    return replace(
        layer,
        head_dim=head_dim,
        num_kv_heads=shape.size("num_key_value_heads"),
        rope=read_rope(f, head_dim, FULL),
        value_is_key=value_is_key,
    )


def _gemma4_unified(f: Fields) -> ArchSpec:
    """Gemma 4 without a tower for images and sound: its text model never has embeddings a layer."""
    f.default(sliding_window=1024, max_position_embeddings=262144, hidden_size_per_layer_input=0)
    return _gemma4(f)


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
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "gemma4_text": _gemma4,
    "gemma4_unified_text": _gemma4_unified,
    "vaultgemma": _vaultgemma,
    "phi3": _phi3,
    "smollm3": _smollm3,
    "cwm": _cwm,
    "seed_oss": _seed_oss,
}

EXPERTS, RECURRENT = "a mixture of experts", "recurrent layers"
REFUSED = {
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "phimoe", "gpt_oss"), EXPERTS),
    **dict.fromkeys(("llama4", "llama4_text", "ernie4_5_moe", "glm4_moe", "mistral_large4"), EXPERTS),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "mistral4"), f"latent attention and {EXPERTS}"),
    **dict.fromkeys(("mamba", "mamba2", "falcon_mamba", "rwkv", "recurrent_gemma", "xlstm"), RECURRENT),
    **dict.fromkeys(("qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe"), f"{RECURRENT} (Gated DeltaNet)"),
    **dict.fromkeys(("jamba", "bamba", "zamba2", "falcon_h1", "nemotron_h", "granitemoehybrid"), RECURRENT),
    **dict.fromkeys(("gemma3n", "gemma3n_text"), "alternating updates and sparse activations"),
    **dict.fromkeys(("phi", "starcoder2", "gpt2", "gpt_neox", "opt", "falcon"), "LayerNorm with biases"),
    "lfm2": "convolutions",
    **dict.fromkeys(
        ("bert", "roberta", "xlm-roberta", "distilbert", "mpnet", "electra", "deberta-v2", "modernbert", "nomic_bert"),
        "an encoder, which attends both ways",
    ),
    **dict.fromkeys(
        ("t5", "mt5", "bart", "mbart", "pegasus", "marian", "t5gemma", "whisper"), "an encoder and a decoder"
    ),
}
"""Types that people bring, and which of their properties is not implemented."""

# What several of them have in common


def _plain_gemma(f: Fields, **changes: Any) -> ArchSpec:
    """What all Gemmas have in common."""
    f.default(head_dim=256, tie_word_embeddings=True, eos_token_id=1, bos_token_id=2)
    f.default(hidden_act="gelu_pytorch_tanh", hidden_activation=f.get("hidden_act"))
    f.only("use_bidirectional_attention", "vision")
    bias = f.flag("attention_bias")
    values = {
        "activation": f.choice(
            "hidden_act" if f.get("hidden_activation") is None else "hidden_activation", GEMMA_ACTIVATIONS
        ),
        "qkv_bias": bias,
        "o_bias": bias,
        "norm_offset": 1.0,
        "norm_in_float32": True,
        "embed_scale": f.size("hidden_size") ** 0.5,
    }
    return plain(f, **(values | changes))


def _with_biases(f: Fields) -> ArchSpec:
    """A Llama with a switch for the biases of attention and one for those of the MLP."""
    return plain(f, qkv_bias=f.flag("attention_bias"), o_bias=f.flag("attention_bias"), mlp_bias=f.flag("mlp_bias"))


def _either(f: Fields, name: str, other: str) -> bool:
    """A switch with two names."""
    if name in f and other in f and f.flag(name) != f.flag(other):
        raise CheckpointError(f"{f.where}: {name} {f.flag(name)} and {other} {f.flag(other)} contradict each other")
    return f.flag(name) or f.flag(other)


def _with_qwen_windows(f: Fields, spec: ArchSpec) -> ArchSpec:
    f.default(sliding_window=4096)
    f.default(max_window_layers=28)
    first = f.size("max_window_layers", minimum=0)
    kinds = [SLIDING if i >= first else FULL for i in range(spec.num_layers)]
    return within_one_chunk(f, with_windows(f, spec, kinds, f.flag("use_sliding_window")))

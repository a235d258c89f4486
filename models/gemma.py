"""The Gemma families, from config.json to `ArchSpec`; see `families.py`."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from minirksc.errors import CheckpointError, UnsupportedModelError
from minirksc.models.config.fields import Fields
from minirksc.models.config.rope import read_rope
from minirksc.models.plain import (
    ACTIVATIONS,
    FULL,
    SLIDING,
    default_rope,
    plain,
    with_each,
    with_windows,
    without_windows,
)
from minirksc.models.spec import ArchSpec, LayerSpec, WeightLayout

GEMMA_ACTIVATIONS = ACTIVATIONS | {"gelu": "gelu_tanh"}
"""Gemma's first files say "gelu" and mean its tanh form."""


def gemma(f: Fields) -> ArchSpec:
    """Gemma 1: norms by 1 + w, scaled embeddings, tanh-GELU, head_dim of its own."""
    f.default(num_key_value_heads=16, max_position_embeddings=8192)
    return without_windows(f, _plain_gemma(f))


def gemma2(f: Fields) -> ArchSpec:
    """Gemma 2: soft caps, a window in every other layer, norms after the branches too."""
    return replace(vaultgemma(f), sandwich_norms=True)


def vaultgemma(f: Fields) -> ArchSpec:
    """VaultGemma: Gemma 2 without the norms after the branches."""
    f.default(num_key_value_heads=4, max_position_embeddings=8192, sliding_window=4096, query_pre_attn_scalar=256)
    f.default(attn_logit_softcapping=50.0, final_logit_softcapping=30.0)
    f.only("sliding_window_size", f.get("sliding_window"))  # said twice in Gemma 2's files
    spec = _later_gemma(
        f,
        query_scale=f.number("query_pre_attn_scalar") ** -0.5,
        attn_softcap=f.optional_number("attn_logit_softcapping"),
    )
    return with_windows(f, spec, lambda i: i % 2 == 1)


def gemma3(f: Fields) -> ArchSpec:
    """Gemma 3: norms on queries and keys; five layers with a window, which turn faster, to each full one."""
    f.default(vocab_size=262208, hidden_size=2304, intermediate_size=9216, num_hidden_layers=26)
    f.default(num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=131072)
    f.default(query_pre_attn_scalar=256, sliding_window=4096, rope_theta=1e6, rope_local_base_freq=1e4)
    f.only("attn_logit_softcapping")  # named in the files, never applied
    pattern = f.size("sliding_window_pattern", f.size("_sliding_window_pattern", 6))
    nested = f.get("rope_parameters") or {}
    if nested and isinstance(nested, Mapping) and FULL not in nested:
        raise CheckpointError(f"{f.where}: rope_parameters {nested!r:.200} lacks {FULL}, whose rotation is its own")
    spec = _later_gemma(
        f,
        layer_type=FULL,
        query_scale=f.number("query_pre_attn_scalar") ** -0.5,
        qk_norm=True,
        sandwich_norms=True,
    )
    spec = with_windows(f, spec, lambda i: (i + 1) % pattern == 0)
    inner = Fields({"rope_parameters": nested.get(SLIDING)}, f.where)
    inner.default(rope_theta=f.get("rope_local_base_freq"), max_position_embeddings=spec.max_position_embeddings)
    slow, fast = spec.layers[0].rope, read_rope(inner, spec.layers[0].head_dim)
    return with_each(spec, "rope", [slow if layer.window is None else fast for layer in spec.layers])


def gemma4(f: Fields) -> ArchSpec:
    """Gemma 4, dense: full layers of another shape, plain norms, a number a layer; in the small ones inputs a layer."""
    f.default(vocab_size=262144, hidden_size=2304, intermediate_size=9216, num_hidden_layers=30)
    f.default(num_attention_heads=8, num_key_value_heads=4, sliding_window=512, max_position_embeddings=131072)
    f.default(global_head_dim=512, hidden_size_per_layer_input=256, num_kv_shared_layers=0)
    f.only("enable_moe_block")
    for name in ("num_experts", "top_k_experts", "moe_intermediate_size"):
        f.get(name)  # of a part that is not there
    input_size = f.count("hidden_size_per_layer_input") or None
    if f.get("vocab_size_per_layer_input") is not None and input_size is not None:
        f.only("vocab_size_per_layer_input", f.size("vocab_size"))
    full = {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6}
    default_rope(f, **{SLIDING: {"rope_type": "default", "rope_theta": 1e4}, FULL: full})
    _check_both_ropes(f)
    spec = _later_gemma(
        f,
        layer_type=SLIDING,
        query_scale=1.0,
        norm_offset=0.0,
        qk_norm=True,
        v_norm=True,
        sandwich_norms=True,
        layer_scale=True,
        layer_input_size=input_size,
    )
    spec = with_windows(f, spec, lambda i: (i + 1) % 6 == 0)
    layers = list(spec.layers)
    layers[-1] = replace(layers[-1], window=None)  # whatever the file says
    layers = [layer if layer.window is not None else _gemma4_full(f, layer, str(i)) for i, layer in enumerate(layers)]
    num_own = spec.num_layers - f.count("num_kv_shared_layers")
    width = 2 if f.flag("use_double_wide_mlp") else 1
    for i in range(max(num_own, 0), spec.num_layers):
        source = next((j for j in reversed(range(num_own)) if layers[j].window == layers[i].window), -1)
        layers[i] = replace(layers[i], kv_layer=source, intermediate_size=width * layers[i].intermediate_size)
    return replace(spec, layers=tuple(layers))


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


def gemma4_unified(f: Fields) -> ArchSpec:
    """Gemma 4 without a tower for images and sound: its text model never has embeddings a layer."""
    f.default(sliding_window=1024, max_position_embeddings=262144, hidden_size_per_layer_input=0)
    return gemma4(f)


def _plain_gemma(f: Fields, **changes: Any) -> ArchSpec:
    """A Gemma 1 of the file's sizes, which all others depart from."""
    f.default(head_dim=256, tie_word_embeddings=True, eos_token_id=1, bos_token_id=2)
    f.default(hidden_act="gelu_pytorch_tanh", hidden_activation=f.get("hidden_act"))
    f.only("use_bidirectional_attention", "vision")
    bias = f.flag("attention_bias")
    act = "hidden_act" if f.get("hidden_activation") is None else "hidden_activation"
    values = {
        "activation": f.choice(act, GEMMA_ACTIVATIONS),
        "qkv_bias": bias,
        "o_bias": bias,
        "norm_offset": 1.0,
        "norm_in_float32": True,
        "embed_scale": f.size("hidden_size") ** 0.5,
    }
    return plain(f, **(values | changes))


def _later_gemma(f: Fields, **changes: Any) -> ArchSpec:
    """What Gemma 2 and its successors have in common beside that."""
    layout = WeightLayout(mlp_norm="pre_feedforward_layernorm")
    return _plain_gemma(f, final_softcap=f.optional_number("final_logit_softcapping"), layout=layout, **changes)

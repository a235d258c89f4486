"""The rows of the zoo: what is built, and what each is there for. See `zoo.py`."""

from collections.abc import Mapping
from typing import Any

from zoo import Row

WINDOW, ORIGINAL = 16, 32  # less than zoo.LONG, more than zoo.SHORT

SIZES: dict[str, Any] = {
    "vocab_size": 260,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GEMMA_EMBED_STD = 0.03  # scaled by sqrt(hidden): more would drown the layers and repeat the last token
# 48 has no whole square root: an embedding scale that is rounded wrongly shows.
GEMMA = {**SIZES, "hidden_size": 48, "head_dim": 20, "bos_token_id": 2, "eos_token_id": 1}
SOFTCAPS = {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 0.5, "query_pre_attn_scalar": 13}
SOFTCAP_BITES = {
    "attn_logit_softcapping": {"attn_logit_softcapping": None},
    "final_logit_softcapping": {"final_logit_softcapping": None},
    "query_pre_attn_scalar": {"query_pre_attn_scalar": 20},
}
NO_WINDOW = {"window": {"sliding_window": 4096}}
SLIDING, FULL = "sliding_attention", "full_attention"


def rope(kind: str, theta: float = 10000.0, **parameters: Any) -> dict[str, Any]:
    """A rope_parameters field."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **parameters}}


DEFAULT_ROPE = {"rope type": rope("default")}
YARN = {"factor": 4.0, "original_max_position_embeddings": ORIGINAL}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": ORIGINAL}


def _llama(name: str, fields: Mapping[str, Any] | None = None, **options: Any) -> Row:
    return Row(f"llama-{name}", "llama", {**SIZES, **(fields or {})}, **options)


LLAMA_2 = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 96,
    "max_position_embeddings": 256,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.31.0.dev0",
    "use_cache": True,
    "vocab_size": 260,
}
LLAMA_ROWS = [
    _llama("plain"),
    _llama(
        "biases",
        {"attention_bias": True, "mlp_bias": True},
        bites={"attention_bias": {"attention_bias": False}, "mlp_bias": {"mlp_bias": False}},
    ),
    # As Falcon3: heads wider than hidden / heads, three queries a KV head, an odd base.
    _llama(
        "falcon3",
        {"hidden_size": 48, "num_attention_heads": 6, "head_dim": 32, **rope("default", 1000042.0)},
        bites={"rope_theta": rope("default", 1e4)},
    ),
    _llama(
        "gelu-one-kv-head-tied",
        {"num_key_value_heads": 1, "hidden_act": "gelu", "tie_word_embeddings": True, "num_hidden_layers": 6},
        bites={"activation": {"hidden_act": "gelu_pytorch_tanh"}},
        weight_std=0.4,
    ),
    _llama("large-eps", {"rms_norm_eps": 0.1}, bites={"rms_norm_eps": {"rms_norm_eps": 1e-6}}),
    _llama("linear", rope("linear", factor=3.0), bites=DEFAULT_ROPE),
    _llama(
        "dynamic",
        {"max_position_embeddings": ORIGINAL, **rope("dynamic", factor=4.0)},
        bites=DEFAULT_ROPE,
        oracle="stepwise",
    ),
    _llama("yarn", rope("yarn", **YARN), bites=DEFAULT_ROPE),
    _llama(
        "yarn-mscale",
        rope("yarn", **YARN, mscale=0.7, mscale_all_dim=1.9),
        bites={"mscale": rope("yarn", **YARN), **DEFAULT_ROPE},
    ),
    _llama(
        "yarn-no-truncate",
        rope("yarn", **YARN, truncate=False, beta_fast=3.0),
        bites={"truncate": rope("yarn", **YARN, beta_fast=3.0), **DEFAULT_ROPE},
    ),
    _llama(
        "yarn-attention-factor",
        rope("yarn", **YARN, attention_factor=1.3, beta_fast=4.0, beta_slow=0.25),
        bites={
            "attention_factor": rope("yarn", **YARN, beta_fast=4.0, beta_slow=0.25),
            "betas": rope("yarn", **YARN, attention_factor=1.3),
        },
    ),
    _llama("llama3", rope("llama3", **LLAMA3), bites=DEFAULT_ROPE),
    _llama(
        "llama3-published",
        {"head_dim": 16, **rope("llama3", 500000.0, **LLAMA3)},
        bites={"rope type": rope("default", 500000.0), "rope_theta": rope("llama3", 1e4, **LLAMA3)},
        published={
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 1,
            "eos_token_id": [2, 5, 6],
            "hidden_act": "silu",
            "hidden_size": 64,
            "initializer_range": 0.02,
            "intermediate_size": 96,
            "max_position_embeddings": 256,
            "mlp_bias": False,
            "model_type": "llama",
            "num_attention_heads": 4,
            "num_hidden_layers": 3,
            "num_key_value_heads": 2,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-06,
            "rope_scaling": {"rope_type": "llama3", **LLAMA3},
            "rope_theta": 500000.0,
            "tie_word_embeddings": False,
            "torch_dtype": "float32",
            "transformers_version": "4.42.3",
            "use_cache": True,
            "vocab_size": 260,
        },
    ),
    _llama("published", {"head_dim": 16, "num_key_value_heads": 4}, published=LLAMA_2),
    # As the first long-context Llamas: "type", no num_key_value_heads, no rope_theta.
    _llama(
        "linear-published",
        {"head_dim": 16, "num_key_value_heads": 4, **rope("linear", factor=4.0)},
        bites=DEFAULT_ROPE,
        published=LLAMA_2 | {"rope_scaling": {"type": "linear", "factor": 4.0}},
    ),
    # Says that head and embedding are one, and has two: the tensors win.
    _llama(
        "own-head-called-tied",
        {"head_dim": 16, "num_key_value_heads": 4},
        published=LLAMA_2 | {"tie_word_embeddings": True},
    ),
    _llama("bf16", dtype="bfloat16"),
    _llama("fp16-tied", {"tie_word_embeddings": True}, dtype="float16"),
    _llama("mixed-dtypes", {"attention_bias": True}, dtype="mixed"),
    _llama("sharded", max_shard_size="60KB"),
    _llama("sharded-bf16-tied", {"tie_word_embeddings": True}, dtype="bfloat16", max_shard_size="40KB"),
]


def _qwen(name: str, fields: Mapping[str, Any] | None = None, **options: Any) -> Row:
    return Row(name, name.partition("-")[0], {**SIZES, "num_hidden_layers": 4, **(fields or {})}, **options)


QWEN_SLIDING = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2}
QWEN_BITES = {"window": {"use_sliding_window": False}, "max_window_layers": {"max_window_layers": 1}}
QWEN_ROWS = [
    _qwen("qwen2-plain", {"rms_norm_eps": 1e-5}),
    _qwen("qwen2-sliding", QWEN_SLIDING, bites=QWEN_BITES),
    # The published files of Qwen 2 and 2.5 have a window that is switched off.
    _qwen(
        "qwen2-published",
        {"head_dim": 16, "tie_word_embeddings": True, **rope("yarn", 1e6, **YARN)},
        bites={"rope type": rope("default", 1e6)},
        published={
            "architectures": ["Qwen2ForCausalLM"],
            "attention_dropout": 0.0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "hidden_act": "silu",
            "hidden_size": 64,
            "initializer_range": 0.02,
            "intermediate_size": 96,
            "max_position_embeddings": 256,
            "max_window_layers": 2,
            "model_type": "qwen2",
            "num_attention_heads": 4,
            "num_hidden_layers": 4,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-06,
            "rope_scaling": {"type": "yarn", **YARN},
            "rope_theta": 1000000.0,
            "sliding_window": WINDOW,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.43.1",
            "use_cache": True,
            "use_sliding_window": False,
            "vocab_size": 260,
        },
    ),
    _qwen(
        "qwen2-layer-types",
        {**QWEN_SLIDING, "layer_types": [SLIDING, FULL, FULL, SLIDING]},
        bites={"layer_types": {"layer_types": [FULL, FULL, SLIDING, SLIDING]}},
    ),
    _qwen("qwen3-plain"),
    _qwen("qwen3-tied-bf16", {"tie_word_embeddings": True, **rope("default", 1e6)}, dtype="bfloat16"),
    _qwen("qwen3-sliding", QWEN_SLIDING, bites=QWEN_BITES),
    _qwen("qwen3-biases", {"attention_bias": True}, bites={"attention_bias": {"attention_bias": False}}),
]


def _mistral(name: str, fields: Mapping[str, Any], **options: Any) -> Row:
    return Row(name, name.partition("-")[0], {**SIZES, **fields}, **options)


MINISTRAL3_ROPE = {"mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32.0, "beta_slow": 1.0, **YARN}
MINISTRAL3_BITES = {
    "query scale": rope("yarn", **MINISTRAL3_ROPE, llama_4_scaling_beta=0.0),
    "rope type": rope("default", llama_4_scaling_beta=0.5, original_max_position_embeddings=ORIGINAL),
    "mscale": rope("yarn", **{**MINISTRAL3_ROPE, "mscale": None}, llama_4_scaling_beta=0.5),
}
PIXTRAL = {
    "model_type": "pixtral",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "head_dim": 8,
    "image_size": 28,
    "patch_size": 14,
}
MISTRAL3 = ("mistral3", {"vision_config": PIXTRAL, "image_token_index": 255, "tie_word_embeddings": False})
MISTRAL_ROWS = [
    _mistral("mistral-no-window", {"sliding_window": None}),
    _mistral("mistral-window", {"sliding_window": WINDOW}, bites=NO_WINDOW),
    _mistral(
        "mistral-v0.1-published",
        {"head_dim": 16, "sliding_window": WINDOW, "rms_norm_eps": 1e-5},
        bites=NO_WINDOW,
        published={
            "architectures": ["MistralForCausalLM"],
            "bos_token_id": 1,
            "eos_token_id": 2,
            "hidden_act": "silu",
            "hidden_size": 64,
            "initializer_range": 0.02,
            "intermediate_size": 96,
            "max_position_embeddings": 256,
            "model_type": "mistral",
            "num_attention_heads": 4,
            "num_hidden_layers": 3,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-05,
            "rope_theta": 10000.0,
            "sliding_window": WINDOW,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.34.0.dev0",
            "use_cache": True,
            "vocab_size": 260,
        },
    ),
    _mistral("ministral-mixed", {"sliding_window": WINDOW, "layer_types": [FULL, SLIDING, SLIDING]}, bites=NO_WINDOW),
    _mistral(
        "ministral3-yarn",
        rope("yarn", **MINISTRAL3_ROPE, llama_4_scaling_beta=0.5),
        bites=MINISTRAL3_BITES,
    ),
    _mistral(
        "ministral3-window",
        {"sliding_window": WINDOW, **rope("yarn", **MINISTRAL3_ROPE, llama_4_scaling_beta=0.1)},
        bites=NO_WINDOW,
    ),
    _mistral("mistral-wrapped", {"sliding_window": None, **rope("default", 1e9)}, wrapper=MISTRAL3),
    _mistral(
        "ministral3-wrapped",
        {**rope("yarn", **MINISTRAL3_ROPE, llama_4_scaling_beta=0.5)},
        bites=MINISTRAL3_BITES,
        wrapper=MISTRAL3,
        dtype="bfloat16",
        max_shard_size="80KB",
    ),
]


def _gemma(name: str, fields: Mapping[str, Any] | None = None, **options: Any) -> Row:
    return Row(name, name.partition("-")[0], {**GEMMA, **(fields or {})}, embed_std=GEMMA_EMBED_STD, **options)


GEMMA2 = {"num_hidden_layers": 4, "sliding_window": WINDOW, **SOFTCAPS}
GEMMA2_BITES = {**NO_WINDOW, **SOFTCAP_BITES, "layer_types": {"layer_types": [FULL, SLIDING, FULL, SLIDING]}}
GEMMA3 = {"num_hidden_layers": 7, "sliding_window": WINDOW, "query_pre_attn_scalar": 13, "vocab_size": 260}
SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
GEMMA3_OUTER = {
    "vision_config": SIGLIP,
    "mm_tokens_per_image": 4,
    "boi_token_index": 256,
    "eoi_token_index": 257,
    "image_token_index": 258,
}


def gemma3_ropes(full: Mapping[str, Any], local_theta: float = 10000.0) -> dict[str, Any]:
    """rope_parameters of Gemma 3: one entry a kind of layer."""
    return {
        "rope_parameters": {
            FULL: {"rope_theta": 1e6, **full},
            SLIDING: {"rope_type": "default", "rope_theta": local_theta},
        }
    }


LINEAR_8 = {"rope_type": "linear", "factor": 8.0}
GEMMA3_BITES = {
    **NO_WINDOW,
    "query_pre_attn_scalar": SOFTCAP_BITES["query_pre_attn_scalar"],
    "local theta": gemma3_ropes({"rope_type": "default"}, 1e6),
    "global theta": gemma3_ropes({"rope_type": "default", "rope_theta": 1e4}),
}
GEMMA_ROWS = [
    # "gelu" in Gemma's first files means the tanh form.
    _gemma("gemma-gelu", {"hidden_act": "gelu", "num_key_value_heads": 1}),
    _gemma("gemma-biases", {"attention_bias": True}, bites={"attention_bias": {"attention_bias": False}}),
    _gemma("gemma-bf16", dtype="bfloat16"),
    _gemma("gemma2-softcaps", GEMMA2, bites=GEMMA2_BITES),
    _gemma(
        "gemma2-no-softcaps",
        {**GEMMA2, "attn_logit_softcapping": None, "final_logit_softcapping": None},
        bites={"final_logit_softcapping": {"final_logit_softcapping": 0.5}, **NO_WINDOW},
    ),
    _gemma("gemma2-bf16", GEMMA2, bites=GEMMA2_BITES, dtype="bfloat16"),
    _gemma(
        "gemma2-published",
        GEMMA2,
        bites=GEMMA2_BITES,
        published={
            "architectures": ["Gemma2ForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "attn_logit_softcapping": 3.0,
            "bos_token_id": 2,
            "cache_implementation": "hybrid",
            "eos_token_id": [1, 107],
            "final_logit_softcapping": 0.5,
            "head_dim": 20,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": "gelu_pytorch_tanh",
            "hidden_size": 48,
            "initializer_range": 0.02,
            "intermediate_size": 96,
            "max_position_embeddings": 256,
            "model_type": "gemma2",
            "num_attention_heads": 4,
            "num_hidden_layers": 4,
            "num_key_value_heads": 2,
            "pad_token_id": 0,
            "query_pre_attn_scalar": 13,
            "rms_norm_eps": 1e-06,
            "rope_theta": 10000.0,
            "sliding_window": WINDOW,
            "sliding_window_size": WINDOW,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.42.0.dev0",
            "use_cache": True,
            "vocab_size": 260,
        },
    ),
    _gemma("gemma3_text-plain", GEMMA3, bites=GEMMA3_BITES),
    _gemma(
        "gemma3_text-linear",
        {**GEMMA3, **gemma3_ropes(LINEAR_8)},
        bites={
            "full rope": gemma3_ropes({"rope_type": "default"}),
            "linear for full layers only": {
                "rope_parameters": {
                    FULL: {"rope_theta": 1e6, **LINEAR_8},
                    SLIDING: {"rope_theta": 1e4, **LINEAR_8},
                }
            },
        },
    ),
    _gemma(
        "gemma3_text-softcap",
        {**GEMMA3, "final_logit_softcapping": 0.5, "num_hidden_layers": 3, "layer_types": [FULL, SLIDING, FULL]},
        bites={"final_logit_softcapping": {"final_logit_softcapping": None}, **NO_WINDOW},
        dtype="bfloat16",
    ),
    _gemma(
        "gemma3_text-published",
        {**GEMMA3, "num_key_value_heads": 1, "layer_types": [SLIDING, FULL] * 3 + [SLIDING]},
        bites=GEMMA3_BITES,
        published={
            "architectures": ["Gemma3ForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "attn_logit_softcapping": None,
            "bos_token_id": 2,
            "cache_implementation": "hybrid",
            "eos_token_id": [1, 106],
            "final_logit_softcapping": None,
            "head_dim": 20,
            "hidden_activation": "gelu_pytorch_tanh",
            "hidden_size": 48,
            "initializer_range": 0.02,
            "intermediate_size": 96,
            "max_position_embeddings": 256,
            "model_type": "gemma3_text",
            "num_attention_heads": 4,
            "num_hidden_layers": 7,
            "num_key_value_heads": 1,
            "pad_token_id": 0,
            "query_pre_attn_scalar": 13,
            "rms_norm_eps": 1e-06,
            "rope_local_base_freq": 10000,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "sliding_window": WINDOW,
            "sliding_window_pattern": 2,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.50.0.dev0",
            "use_cache": True,
            "vocab_size": 260,
        },
    ),
    Row(
        "gemma3-wrapped",
        "gemma3_text",
        {**GEMMA, **GEMMA3, **gemma3_ropes(LINEAR_8)},
        bites={**NO_WINDOW, "full rope": gemma3_ropes({"rope_type": "default"})},
        wrapper=("gemma3", GEMMA3_OUTER),
        dtype="bfloat16",
        embed_std=GEMMA_EMBED_STD,
    ),
    # As the files of 4B and more: most of text_config is left to the defaults of the class.
    Row(
        "gemma3-wrapped-published",
        "gemma3_text",
        {
            **{"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 7, "sliding_window": WINDOW},
            **{"vocab_size": 260, **gemma3_ropes(LINEAR_8)},
        },
        bites={**NO_WINDOW, "full rope": gemma3_ropes({"rope_type": "default"})},
        wrapper=("gemma3", GEMMA3_OUTER),
        published={
            "architectures": ["Gemma3ForConditionalGeneration"],
            "boi_token_index": 256,
            "eoi_token_index": 257,
            "eos_token_id": [1, 106],
            "image_token_index": 258,
            "initializer_range": 0.02,
            "mm_tokens_per_image": 4,
            "model_type": "gemma3",
            "text_config": {
                "hidden_size": 48,
                "intermediate_size": 96,
                "model_type": "gemma3_text",
                "num_hidden_layers": 7,
                "rope_scaling": LINEAR_8,
                "sliding_window": WINDOW,
                "vocab_size": 260,
            },
            "torch_dtype": "bfloat16",
            "transformers_version": "4.50.0.dev0",
            "vision_config": {**SIGLIP, "vision_use_head": False},
        },
        embed_std=GEMMA_EMBED_STD,
    ),
    _gemma("vaultgemma-sliding", GEMMA2, bites=GEMMA2_BITES),
    # The published file: a window that no layer uses.
    _gemma(
        "vaultgemma-full",
        {**GEMMA2, "layer_types": [FULL] * 4},
        bites={**SOFTCAP_BITES, "layer_types": {"layer_types": None}},
    ),
]

GEMMA4 = {
    **GEMMA,
    "num_hidden_layers": 5,
    "layer_types": [SLIDING, FULL, SLIDING, SLIDING, FULL],
    "sliding_window": WINDOW,
    "global_head_dim": 32,
    "num_global_key_value_heads": 1,
    "final_logit_softcapping": 0.5,
}
GEMMA4_VISION = {
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2},
    **{"num_key_value_heads": 2, "head_dim": 16, "patch_size": 4},
}
GEMMA4_TEXT = {**GEMMA4, "hidden_size_per_layer_input": 0}


def gemma4_ropes(**full: Any) -> dict[str, Any]:
    """rope_parameters of Gemma 4."""
    return {
        "rope_parameters": {
            FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6, **full},
            SLIDING: {"rope_type": "default", "rope_theta": 1e4},
        }
    }


GEMMA4_BITES = {
    **NO_WINDOW,
    "final_logit_softcapping": {"final_logit_softcapping": None},
    "partial rotary": gemma4_ropes(partial_rotary_factor=1.0),
    "global theta": gemma4_ropes(rope_theta=1e4),
}
GEMMA4_ROWS = [
    _gemma("gemma4_text-dense", GEMMA4_TEXT, bites=GEMMA4_BITES),
    _gemma("gemma4_text-k-is-v", {**GEMMA4_TEXT, "attention_k_eq_v": True}, bites=GEMMA4_BITES),
    _gemma(
        "gemma4_text-shared-kv",
        {
            **{**GEMMA4_TEXT, "num_kv_shared_layers": 3, "use_double_wide_mlp": True, "num_hidden_layers": 6},
            "layer_types": [SLIDING, FULL, SLIDING, SLIDING, SLIDING, FULL],
        },
        bites=NO_WINDOW,
        oracle="stepwise",  # on longer input transformers needs per-layer embeddings when layers share KV
    ),
    _gemma(
        "gemma4_text-layer-inputs",
        {
            **{**GEMMA4, "hidden_size_per_layer_input": 12, "vocab_size_per_layer_input": GEMMA["vocab_size"]},
            **{"num_kv_shared_layers": 3, "use_double_wide_mlp": True, "num_hidden_layers": 6},
            "layer_types": [SLIDING, FULL, SLIDING, SLIDING, SLIDING, FULL],
        },
        bites=NO_WINDOW,
    ),
    _gemma(
        "gemma4_text-wrapped",
        {**GEMMA4, "hidden_size_per_layer_input": 12, "vocab_size_per_layer_input": GEMMA["vocab_size"]},
        bites=NO_WINDOW,
        wrapper=("gemma4", {"vision_config": GEMMA4_VISION, "audio_config": None}),
    ),
    # save_pretrained writes an empty per_layer_config, and no global_head_dim at all.
    _gemma("gemma4_text-one-shape", {**GEMMA4_TEXT, "global_head_dim": GEMMA["head_dim"]}, bites=GEMMA4_BITES),
    _gemma("gemma4_unified_text-dense", GEMMA4, bites=GEMMA4_BITES, dtype="bfloat16"),
    _gemma(
        "gemma4_unified_text-k-is-v",
        {**GEMMA4, "attention_k_eq_v": True, "final_logit_softcapping": None, **gemma4_ropes(factor=2.0)},
        bites={**NO_WINDOW, "proportional factor": gemma4_ropes()},
    ),
]

PHI3 = {**SIZES, "head_dim": 16, "hidden_act": "silu", "original_max_position_embeddings": 256}
LONG_FACTORS = [1.0 + 0.7 * i for i in range(6)]
SHORT_FACTORS = [1.0 + 0.1 * i for i in range(6)]
LONGROPE = {
    "partial_rotary_factor": 0.75,
    "long_factor": LONG_FACTORS,
    "short_factor": SHORT_FACTORS,
    "original_max_position_embeddings": ORIGINAL,
}
PHI3_LONG = {**PHI3, "original_max_position_embeddings": ORIGINAL}
OTHER_ROWS = [
    Row("phi3-plain", "phi3", PHI3),
    Row(
        "phi3-partial",
        "phi3",
        {**PHI3, **rope("default", partial_rotary_factor=0.5)},
        bites={"partial rotary": rope("default", partial_rotary_factor=1.0)},
    ),
    Row("phi3-window", "phi3", {**PHI3, "sliding_window": WINDOW}, bites=NO_WINDOW, dtype="bfloat16"),
    Row(
        "phi3-longrope",
        "phi3",
        {**PHI3_LONG, **rope("longrope", **LONGROPE)},
        bites={
            "long factors": rope("longrope", **{**LONGROPE, "long_factor": SHORT_FACTORS}),
            "attention factor": rope("longrope", **LONGROPE, attention_factor=1.0),
        },
    ),
    Row(
        "phi3-longrope-published",
        "phi3",
        {**PHI3_LONG, "sliding_window": 24, **rope("longrope", **LONGROPE)},
        bites={"window": {"sliding_window": None}},
        published={
            "_name_or_path": "Phi-3-mini-128k-instruct",
            "architectures": ["Phi3ForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "auto_map": {
                "AutoConfig": "configuration_phi3.Phi3Config",
                "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
            },
            "bos_token_id": 1,
            "embd_pdrop": 0.0,
            "eos_token_id": 2,
            "hidden_act": "silu",
            "hidden_size": 64,
            "initializer_range": 0.02,
            "intermediate_size": 96,
            "max_position_embeddings": 256,
            "model_type": "phi3",
            "num_attention_heads": 4,
            "num_hidden_layers": 3,
            "num_key_value_heads": 2,
            "original_max_position_embeddings": ORIGINAL,
            "pad_token_id": 0,
            "partial_rotary_factor": 0.75,
            "resid_pdrop": 0.0,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {"long_factor": LONG_FACTORS, "short_factor": SHORT_FACTORS, "type": "longrope"},
            "rope_theta": 10000.0,
            "sliding_window": 24,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.43.1",
            "use_cache": True,
            "vocab_size": 260,
        },
    ),
    Row(
        "smollm3-default",
        "smollm3",
        {**SIZES, "num_hidden_layers": 5},
        bites={"no_rope_layers": {"no_rope_layers": [1] * 5}, "theta": rope("default")},
    ),
    Row(
        "smollm3-layers",
        "smollm3",
        {**SIZES, "no_rope_layers": [0, 1, 1], "attention_bias": True, "mlp_bias": True},
        bites={"no_rope_layers": {"no_rope_layers": [1, 1, 0]}, "mlp_bias": {"mlp_bias": False}},
    ),
    Row(
        "smollm3-sliding",
        "smollm3",
        {**SIZES, "num_hidden_layers": 4, "use_sliding_window": True, "sliding_window": WINDOW},
        bites={"window": {"use_sliding_window": False}},
    ),
    Row(
        "cwm-default",
        "cwm",
        {**SIZES, "num_hidden_layers": 5, "sliding_window": WINDOW, **rope("llama3", 1e6, **LLAMA3)},
        bites={**NO_WINDOW, "rope type": rope("default", 1e6), "layer_types": {"layer_types": [SLIDING] * 5}},
    ),
    Row("seed_oss-default", "seed_oss", SIZES, bites={"attention_bias": {"attention_bias": False}}),
    Row(
        "seed_oss-biases",
        "seed_oss",
        {**SIZES, "attention_out_bias": True, "mlp_bias": True, "attention_bias": False},
        bites={"attention_out_bias": {"attention_out_bias": False}, "mlp_bias": {"mlp_bias": False}},
    ),
    Row("internlm3-plain", "internlm3", SIZES),
    Row(
        "internlm3-published",
        "internlm3",
        {**SIZES, "attention_bias": True, "mlp_bias": True, **rope("llama3", 5e7, **LLAMA3)},
        bites={"biases": {"attention_bias": False, "mlp_bias": False}, "rope type": rope("default", 5e7)},
        published={
            "architectures": ["InternLM3ForCausalLM"],
            "attention_dropout": 0.0,
            "auto_map": {"AutoModelForCausalLM": "modeling_internlm3.InternLM3ForCausalLM"},
            "bias": True,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "head_dim": 24,
            "hidden_act": "silu",
            "hidden_size": 64,
            "initializer_range": 0.02,
            "intermediate_size": 96,
            "max_position_embeddings": 256,
            "model_type": "internlm3",
            "num_attention_heads": 4,
            "num_hidden_layers": 3,
            "num_key_value_heads": 2,
            "pad_token_id": 0,
            "qkv_bias": True,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {"rope_type": "llama3", **LLAMA3},
            "rope_theta": 50000000,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.47.1",
            "use_cache": True,
            "vocab_size": 260,
        },
    ),
    Row("iquestcoder-plain", "iquestcoder", {**SIZES, **rope("default", 5e5)}, bites={"rope_theta": rope("default")}),
]

ROWS: list[Row] = [*LLAMA_ROWS, *QWEN_ROWS, *MISTRAL_ROWS, *GEMMA_ROWS, *GEMMA4_ROWS, *OTHER_ROWS]
BY_ID = {row.id: row for row in ROWS}

"""config.json to spec: every spelling is read, and what cannot be honoured is refused."""

import json
from dataclasses import replace

import pytest
import torch

from minirksc.errors import CheckpointError, UnsupportedModelError
from minirksc.models.families import load_config, spec_from_config
from minirksc.models.rope import inv_freq
from minirksc.models.spec import RopeSpec

BASE = {
    "model_type": "llama", "vocab_size": 100, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
}  # fmt: skip
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}

# The fields that published configs of these models are known to carry: (fields, head_dim, kinds of RoPE).
# The names are the point; single values may differ from a given file's.
PUBLISHED = {
    "SmolLM2": (
        {
            "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
            "hidden_act": "silu", "hidden_size": 576, "initializer_range": 0.041666666666666664,
            "intermediate_size": 1536, "is_llama_config": True, "max_position_embeddings": 8192, "mlp_bias": False,
            "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3, "pad_token_id": 2,
            "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_interleaved": False, "rope_scaling": None,
            "rope_theta": 100000, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
            "transformers.js_config": {"kv_cache_dtype": {"fp16": "float16", "q4f16": "float16"}},
            "transformers_version": "4.42.3", "use_cache": True, "vocab_size": 49152,
        },
        64,
        {"default"},
    ),
    "Llama 1 and 2": (
        {
            "_name_or_path": "somewhere/llama", "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
            "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 11008, "max_sequence_length": 2048,
            "max_position_embeddings": 4096, "num_attention_heads": 32, "num_hidden_layers": 32, "pad_token_id": -1,
            "num_key_value_heads": 32, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None,
            "tie_word_embeddings": False, "torch_dtype": "float16", "transformers_version": "4.31.0.dev0",
            "use_cache": True, "vocab_size": 32000,
        },
        128,
        {"default"},
    ),
    "Llama 3.2": (
        {
            "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000,
            "eos_token_id": [128001, 128008, 128009], "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048,
            "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 131072,
            "mlp_bias": False, "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8,
            "pretraining_tp": 1, "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192, "rope_type": "llama3",
            },
            "rope_theta": 500000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
            "transformers_version": "4.45.0.dev0", "use_cache": True, "vocab_size": 128256,
        },
        64,
        {"llama3"},
    ),
    "Falcon3": (
        {
            "activation": "swiglu", "attention_bias": False, "attention_dropout": 0.0, "eos_token_id": 11,
            "head_dim": 256, "hidden_act": "silu", "hidden_size": 3072, "initializer_range": 0.02,
            "intermediate_size": 23040, "max_position_embeddings": 32768, "mlp_bias": False,
            "num_attention_heads": 12, "num_hidden_layers": 28, "num_key_value_heads": 4, "pretraining_tp": 1,
            "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000042, "tie_word_embeddings": False,
            "torch_dtype": "bfloat16", "transformers_version": "4.46.1", "use_cache": True, "vocab_size": 131072,
        },
        256,
        {"default"},
    ),
    "SmolLM3": (
        {
            "model_type": "smollm3", "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000,
            "eos_token_id": 128012, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
            "intermediate_size": 11008, "max_position_embeddings": 65536, "max_window_layers": 28, "mlp_bias": False,
            "no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0] * 9, "num_attention_heads": 16,
            "num_hidden_layers": 36, "num_key_value_heads": 4, "pad_token_id": 128004, "pretraining_tp": 2,
            "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 5000000.0, "sliding_window": None,
            "layer_types": ["full_attention"] * 36, "torch_dtype": "bfloat16", "use_sliding_window": False,
            "transformers_version": "4.54.0.dev0", "use_cache": True, "vocab_size": 128256,
        },
        128,
        {"default", None},
    ),
    "Qwen2.5": (
        {
            "model_type": "qwen2", "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645,
            "hidden_act": "silu", "hidden_size": 3584, "initializer_range": 0.02, "intermediate_size": 18944,
            "max_position_embeddings": 32768, "max_window_layers": 28, "num_attention_heads": 28,
            "num_hidden_layers": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
            "sliding_window": 131072, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_mrope": False,
            "transformers_version": "4.43.1", "use_cache": True, "use_sliding_window": False, "vocab_size": 152064,
        },
        128,
        {"default"},
    ),
    "Mistral Nemo": (
        {
            "model_type": "mistral", "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
            "head_dim": 128, "hidden_act": "silu", "hidden_size": 5120, "initializer_range": 0.02,
            "intermediate_size": 14336, "max_position_embeddings": 1024000, "num_attention_heads": 32,
            "num_hidden_layers": 40, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0,
            "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
            "transformers_version": "4.43.0.dev0", "use_cache": True, "vocab_size": 131072,
        },
        128,
        {"default"},
    ),
    "Phi-4-mini": (
        {
            "model_type": "phi3", "attention_bias": False, "attention_dropout": 0.0,
            "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}, "bos_token_id": 199999, "embd_pdrop": 0.0,
            "eos_token_id": 199999, "full_attn_mod": 1, "hidden_act": "silu", "hidden_size": 3072,
            "initializer_range": 0.02, "intermediate_size": 8192, "interpolate_factor": 1, "lm_head_bias": False,
            "max_position_embeddings": 131072, "mlp_bias": False, "num_attention_heads": 24, "num_hidden_layers": 32,
            "num_key_value_heads": 8, "original_max_position_embeddings": 4096, "pad_token_id": 199999,
            "partial_rotary_factor": 0.75, "resid_pdrop": 0.0, "rms_norm_eps": 1e-05,
            "rope_scaling": {"long_factor": [1.5] * 48, "short_factor": [1.0] * 48, "type": "longrope"},
            "rope_theta": 10000.0, "sliding_window": 262144, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
            "transformers_version": "4.45.0", "use_cache": True, "vocab_size": 200064,
        },
        128,
        {"longrope"},
    ),
    "Gemma 3 1B": (
        {
            "model_type": "gemma3_text", "attention_bias": False, "attention_dropout": 0.0,
            "attn_logit_softcapping": None, "bos_token_id": 2, "cache_implementation": "hybrid",
            "eos_token_id": [1, 106], "final_logit_softcapping": None, "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152, "initializer_range": 0.02,
            "intermediate_size": 6912, "max_position_embeddings": 32768, "num_attention_heads": 4,
            "num_hidden_layers": 26, "num_key_value_heads": 1, "pad_token_id": 0, "query_pre_attn_scalar": 256,
            "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000,
            "sliding_window": 512, "sliding_window_pattern": 6, "torch_dtype": "bfloat16",
            "transformers_version": "4.50.0.dev0", "use_cache": True, "vocab_size": 262144,
        },
        256,
        {"default"},
    ),
}  # fmt: skip


def spec(**fields):
    return spec_from_config({**BASE, **fields})


def test_plain_llama():
    plain = spec()
    layer = plain.layers[0]
    assert (layer.head_dim, layer.num_kv_heads, plain.query_scale) == (16, 2, 0.25)
    assert not (plain.qkv_bias or plain.o_bias or plain.mlp_bias or plain.tie_word_embeddings)
    assert layer.rope.theta == 10000.0 and layer.window is None and plain.layers == (layer, layer)
    assert spec(num_key_value_heads=None).layers[0].num_kv_heads == 4


def test_explicit_values_win():
    own = spec(head_dim=24, attention_bias=True, mlp_bias=True, tie_word_embeddings=True, eos_token_id=[2, 7])
    assert (own.layers[0].head_dim, own.query_scale) == (24, 24**-0.5)
    assert own.qkv_bias and own.o_bias and own.mlp_bias and own.tie_word_embeddings
    assert own.eos_token_ids == (2, 7) and spec(eos_token_id=2).eos_token_ids == (2,)


def test_all_spellings_of_rope_give_the_same_spec():
    old = spec(rope_theta=5e5, rope_scaling={"type": "llama3", **LLAMA3})
    newer = spec(rope_theta=5e5, rope_scaling={"rope_type": "llama3", **LLAMA3})
    newest = spec(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3})
    assert old.layers == newer.layers == newest.layers
    assert spec(rope_parameters={"rope_type": "default", "rope_theta": 77.0}).layers[0].rope.theta == 77.0


@pytest.mark.oracle
@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 3.0},
        {"rope_type": "llama3", **LLAMA3},
        {"rope_type": "llama3", **LLAMA3, "factor": 2.7, "original_max_position_embeddings": 100},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0},
        {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 20, "truncate": False},
        {"rope_type": "yarn", "factor": 4.0, "beta_fast": 8.0, "beta_slow": 2.0, "attention_factor": 1.7},
        {"rope_type": "yarn", "factor": 40.0, "mscale": 0.7, "mscale_all_dim": 1.0},
    ],
)
def test_frequencies_are_those_of_transformers(parameters):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    fields = {**BASE, "rope_parameters": {"rope_theta": 5e5, **parameters}}
    expected = LlamaRotaryEmbedding(LlamaConfig(**{k: v for k, v in fields.items() if k != "model_type"}))
    assert spec_from_config(fields).layers[0].rope.attention_factor == pytest.approx(expected.attention_scaling)
    expected = expected.inv_freq
    torch.testing.assert_close(inv_freq(spec_from_config(fields).layers[0].rope), expected, atol=0, rtol=2e-7)


def test_the_original_length_falls_back_to_the_models_own():
    llama3 = {name: value for name, value in LLAMA3.items() if name != "original_max_position_embeddings"}
    rope = spec(rope_scaling={"rope_type": "llama3", **llama3}).layers[0].rope
    assert rope.number("original_max_position_embeddings") == BASE["max_position_embeddings"]


def test_rope_kinds_that_are_not_implemented_are_refused():
    with pytest.raises(UnsupportedModelError, match=r"'spiral'.*known: default"):
        inv_freq(RopeSpec("spiral", 1e4, 16))


@pytest.mark.parametrize("published", PUBLISHED)
def test_published_configs_are_read(published):
    fields, head_dim, kinds = PUBLISHED[published]
    read = spec_from_config({"architectures": ["SomeForCausalLM"], "model_type": "llama", **fields})
    found = {(layer.head_dim, layer.rope.kind if layer.rope else None) for layer in read.layers}
    assert found == {(head_dim, kind) for kind in kinds}


@pytest.mark.oracle
@pytest.mark.parametrize("fields", [{}, {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 7.0}}])
def test_whatever_transformers_saves_is_read(tmp_path, fields):
    from transformers import LlamaConfig

    config = LlamaConfig(**{k: v for k, v in BASE.items() if k != "model_type"}, **fields)
    config.save_pretrained(tmp_path)
    (tmp_path / "all.json").write_text(config.to_json_string(use_diff=False))
    assert load_config(tmp_path) and spec_from_config(load_config(tmp_path)) == spec_from_config(
        json.loads((tmp_path / "all.json").read_text())
    )


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"model_type": "mamba"}, UnsupportedModelError, "'mamba' is not supported: it has recurrent.*known: .*llama"),
        ({"model_type": "mixtral"}, UnsupportedModelError, "it has a mixture of experts"),
        ({"model_type": "my_own"}, UnsupportedModelError, "'my_own' is not supported; known: "),
        ({"model_type": None}, UnsupportedModelError, "known: "),
        ({"hidden_size": None}, CheckpointError, "lacks hidden_size"),
        ({"hidden_size": "64"}, CheckpointError, "hidden_size '64'"),
        ({"hidden_size": 10**12}, CheckpointError, "hidden_size"),
        ({"hidden_size": 66}, CheckpointError, "hidden_size 66 is no multiple of num_attention_heads 4"),
        ({"num_hidden_layers": -1}, CheckpointError, "num_hidden_layers -1"),
        ({"num_hidden_layers": 10**7}, CheckpointError, "from 1 to 10000"),
        ({"vocab_size": True}, CheckpointError, "vocab_size True"),
        ({"vocab_size": 3.5}, CheckpointError, "vocab_size 3.5"),
        ({"num_key_value_heads": 3}, CheckpointError, "4 attention heads cannot share 3"),
        ({"rms_norm_eps": 0}, CheckpointError, "rms_norm_eps"),
        ({"rms_norm_eps": float("nan")}, CheckpointError, "rms_norm_eps"),
        ({"rms_norm_eps": 10**400}, CheckpointError, "rms_norm_eps"),
        ({"attention_bias": "yes"}, CheckpointError, "attention_bias"),
        ({"head_dim": 7}, CheckpointError, "rotary dimension 7"),
        ({"hidden_act": "relu"}, UnsupportedModelError, "hidden_act 'relu'"),
        ({"hidden_act": None}, UnsupportedModelError, "hidden_act None"),
        ({"eos_token_id": "x"}, CheckpointError, "eos_token_id"),
        ({"eos_token_id": [2, -1]}, CheckpointError, "eos_token_id"),
        ({"rope_scaling": {"type": "spiral", "factor": 2.0}}, UnsupportedModelError, "'spiral'"),
        ({"rope_scaling": {"type": "yarn", "factor": 0}}, CheckpointError, "yarn rope: factor 0 must be a positive"),
        ({"rope_scaling": {"type": "linear"}}, CheckpointError, "lacks factor"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "beta": 1}}, UnsupportedModelError, "beta"),
        ({"rope_scaling": [1]}, CheckpointError, "rope"),
        ({"rope_scaling": {"type": ["yarn"]}}, UnsupportedModelError, r"rope type \['yarn'\]"),
        ({"rope_scaling": {"type": "longrope", "short_factor": 2, "long_factor": [1]}}, CheckpointError, "a list"),
        ({"model_type": "qwen2", "max_window_layers": "x"}, CheckpointError, "max_window_layers 'x' must be"),
        (
            {"model_type": "gemma3_text", "rope_parameters": {"sliding_attention": 5, "full_attention": {}}},
            CheckpointError,
            "rope parameters 5 must be an object",
        ),
        ({"model_type": "gemma4_text", "per_layer_config": [1]}, UnsupportedModelError, "per_layer_config"),
        ({"rope_scaling": {"type": "llama3", **LLAMA3, "low_freq_factor": 4.0}}, CheckpointError, "low_freq_factor 4"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}},
            CheckpointError,
            "contradict",
        ),
        ({"rope_theta": -1.0}, CheckpointError, "rope_theta"),
        ({"rope_interleaved": True}, UnsupportedModelError, "rope_interleaved True"),
        ({"quantization_config": {"quant_method": "gptq"}}, UnsupportedModelError, "gptq"),
        ({"sliding_window": 128}, UnsupportedModelError, "nothing reads: sliding_window=128"),
        ({"attn_logit_softcapping": 50.0}, UnsupportedModelError, "attn_logit_softcapping"),
    ],
)
def test_what_cannot_be_honoured_is_refused(fields, error, message):
    with pytest.raises(error, match=message):
        spec(**fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": ()}, "num_layers 0"),
        ({"norm_eps": 0.0}, "norm_eps"),
        ({"attn_softcap": 0.0}, "attn_softcap"),
        ({"activation": "tanh"}, "activation 'tanh'"),
        ({"norm_offset": 1.0}, "norm_offset 1.0 is added to norm weights in float32 only"),
        ({"layers": (replace(spec().layers[0], num_kv_heads=3),)}, "4 attention heads cannot share 3"),
        ({"layers": (replace(spec().layers[0], kv_layer=0),)}, "layer 0 cannot read"),
        ({"layers": (spec().layers[0], replace(spec().layers[0], kv_layer=0, window=4))}, "of another kind"),
    ],
)
def test_a_spec_that_contradicts_itself_is_refused(change, message):
    with pytest.raises(CheckpointError, match=message):
        replace(spec(), **change)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("default", 1e4, 7), "rotary dimension 7"),
        (("default", 1e4, 0), "rotary dimension 0"),
        (("default", float("inf"), 16), "rope_theta inf"),
        (("default", float("nan"), 16), "rope_theta nan"),
        (("llama3", 1e4, 16), "low_freq_factor"),
    ],
)
def test_an_impossible_rope_is_refused(arguments, message):
    with pytest.raises(CheckpointError, match=message):
        RopeSpec(*arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_kv_heads": 0}, "num_kv_heads 0"),
        ({"head_dim": -1}, "head_dim -1"),
        ({"window": 0}, "window 0"),
        ({"rope": RopeSpec("default", 1e4, 18)}, "rotary dimension 18 is more than head_dim 16"),
    ],
)
def test_a_layer_that_contradicts_itself_is_refused(change, message):
    with pytest.raises(CheckpointError, match=message):
        replace(spec().layers[0], **change)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "does not exist"), ("{", "not readable JSON"), ("[]", "JSON object"), ("[" * 100_000, "JSON")],
)
def test_unreadable_config_files(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        load_config(tmp_path)


def test_a_config_of_absurd_size_is_not_parsed(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"a": "x" * (17 << 20)}))
    with pytest.raises(CheckpointError, match="more than"):
        load_config(tmp_path)

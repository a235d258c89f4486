"""config.json to spec: every spelling is read, and what cannot be honoured is refused."""

import json

import pytest
import torch
from minirksc.models.decoder import _check_supported
from minirksc.models.families import load_config, spec_from_config
from minirksc.models.rope import inv_freq

from minirksc.errors import CheckpointError, UnsupportedModelError

BASE = {
    "model_type": "llama", "vocab_size": 100, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
}  # fmt: skip
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}


def spec(**fields):
    return spec_from_config({**BASE, **fields})


def test_plain_llama():
    plain = spec()
    assert (plain.head_dim, plain.num_kv_heads, plain.query_scale) == (16, 2, 0.25)
    assert not (plain.qkv_bias or plain.o_bias or plain.mlp_bias or plain.tie_word_embeddings)
    assert plain.ropes[0].theta == 10000.0 and plain.windows == (None, None)
    assert spec(num_key_value_heads=None).num_kv_heads == 4


def test_explicit_values_win():
    own = spec(head_dim=24, attention_bias=True, mlp_bias=True, tie_word_embeddings=True, eos_token_id=[2, 7])
    assert (own.head_dim, own.query_scale, own.q_size, own.kv_size) == (24, 24**-0.5, 96, 48)
    assert own.qkv_bias and own.o_bias and own.mlp_bias and own.tie_word_embeddings
    assert own.eos_token_ids == (2, 7) and spec(eos_token_id=2).eos_token_ids == (2,)


def test_all_spellings_of_rope_give_the_same_spec():
    old = spec(rope_theta=5e5, rope_scaling={"type": "llama3", **LLAMA3})
    newer = spec(rope_theta=5e5, rope_scaling={"rope_type": "llama3", **LLAMA3})
    newest = spec(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3})
    assert old.ropes == newer.ropes == newest.ropes
    assert spec(rope_parameters={"rope_type": "default", "rope_theta": 77.0}).ropes[0].theta == 77.0


@pytest.mark.oracle
@pytest.mark.parametrize(
    "parameters",
    [{"rope_type": "default"}, {"rope_type": "linear", "factor": 4.0}, {"rope_type": "llama3", **LLAMA3}],
)
def test_frequencies_are_those_of_transformers(parameters):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    fields = {**BASE, "rope_parameters": {"rope_theta": 5e5, **parameters}}
    expected = LlamaRotaryEmbedding(LlamaConfig(**{k: v for k, v in fields.items() if k != "model_type"})).inv_freq
    torch.testing.assert_close(inv_freq(spec_from_config(fields).ropes[0]), expected, atol=0, rtol=1e-6)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"model_type": "mamba"}, UnsupportedModelError, "'mamba'.*known: llama"),
        ({"model_type": None}, UnsupportedModelError, "known: llama"),
        ({"hidden_size": None}, CheckpointError, "lacks hidden_size"),
        ({"hidden_size": "64"}, CheckpointError, "hidden_size '64'"),
        ({"hidden_size": 10**12}, CheckpointError, "hidden_size"),
        ({"num_hidden_layers": -1}, CheckpointError, "num_hidden_layers -1"),
        ({"num_key_value_heads": 3}, CheckpointError, "4 attention heads cannot share 3"),
        ({"rms_norm_eps": 0}, CheckpointError, "rms_norm_eps"),
        ({"rms_norm_eps": float("nan")}, CheckpointError, "rms_norm_eps"),
        ({"attention_bias": "yes"}, CheckpointError, "attention_bias"),
        ({"head_dim": 7}, CheckpointError, "rotary dimension 7"),
        ({"hidden_act": "relu"}, UnsupportedModelError, "hidden_act 'relu'"),
        ({"eos_token_id": "x"}, CheckpointError, "eos_token_id"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, UnsupportedModelError, "'yarn'"),
        ({"rope_scaling": {"type": "linear"}}, CheckpointError, "lacks factor"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "beta": 1}}, UnsupportedModelError, "beta"),
        ({"rope_scaling": [1]}, CheckpointError, "rope"),
        ({"rope_theta": -1.0}, CheckpointError, "rope_theta"),
        ({"pretraining_tp": 2}, UnsupportedModelError, "pretraining_tp 2"),
        ({"quantization_config": {"quant_method": "gptq"}}, UnsupportedModelError, "gptq"),
        ({"sliding_window": 128}, UnsupportedModelError, "nothing reads: sliding_window=128"),
        ({"attn_logit_softcapping": 50.0}, UnsupportedModelError, "attn_logit_softcapping"),
    ],
)
def test_what_cannot_be_honoured_is_refused(fields, error, message):
    with pytest.raises(error, match=message):
        spec(**fields)


def test_the_decoder_refuses_what_it_does_not_implement():
    from dataclasses import replace

    with pytest.raises(UnsupportedModelError, match="qk_norm, final_softcap"):
        _check_supported(replace(spec(), qk_norm=True, final_softcap=30.0))


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
    (tmp_path / "config.json").write_text(json.dumps({"a": "x" * (11 << 20)}))
    with pytest.raises(CheckpointError, match="more than"):
        load_config(tmp_path)

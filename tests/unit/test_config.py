"""Options are checked when they are made, and unknown ones never ignored."""

import math

import pytest

from minirksc.errors import ConfigError
from minirksc.options import EngineConfig, SamplingParams, parse_bytes

BAD_SAMPLING = [
    ({"n": 0}, "n 0"), ({"n": True}, "n True"), ({"n": 10**6}, "out of range"), ({"temperature": -0.1}, "temperature"),
    ({"temperature": math.nan}, "temperature"), ({"temperature": "hot"}, "number"), ({"top_p": 0}, "above 0"),
    ({"top_p": 1.01}, "at most 1"), ({"top_k": -2}, "top_k"), ({"top_k": 1.5}, "integer"), ({"min_p": 1.5}, "min_p"),
    ({"repetition_penalty": 0}, "repetition_penalty"), ({"presence_penalty": 3}, "presence"),
    ({"frequency_penalty": -3}, "frequency"), ({"max_tokens": 0}, "max_tokens"),
    ({"min_tokens": 9, "max_tokens": 3}, "min_tokens 9"), ({"stop": [""]}, "non-empty"), ({"stop": [5]}, "non-empty"),
    ({"stop": "x", "detokenize": False}, "detokenize"), ({"stop_token_ids": [-1]}, "stop_token_ids"),
    ({"seed": -1}, "seed"), ({"logprobs": -1}, "logprobs"), ({"prompt_logprobs": 10**4}, "prompt_logprobs"),
    ({"logit_bias": {-1: 1.0}}, "logit_bias"), ({"logit_bias": {1: math.inf}}, "logit_bias"),
    ({"n": 2, "temperature": 0}, "equal samples"), ({"n": None}, "n None"), ({"min_tokens": None}, "min_tokens None"),
    ({"presence_penalty": None}, "presence_penalty None"), ({"stop": 5}, "a list"),
    ({"stop": ["a"] * 65}, "more than 64"), ({"stop": "a" * 257}, "257 characters"), ({"stop_token_ids": 5}, "a list"),
    ({"stop_token_ids": [None]}, "stop_token_ids: token id None"), ({"logit_bias": [1]}, "map token ids"),
    ({"logit_bias": {1: None}}, "logit_bias.1. None"), ({"logit_bias": {1: 1e300}}, r"at most 1e\+30"),
    ({"temperature": 10**400}, "out of range"), ({"ignore_eos": "false"}, "True or False"),
    ({"detokenize": 0}, "True or False"),
]  # fmt: skip
BAD_ENGINE = [
    ({"dtype": "int4"}, "float32"), ({"device": "tpu"}, "cuda"), ({"backend": "cuda"}, "torch"),
    ({"kv_cache_dtype": "int4"}, "auto, int8"), ({"kv_cache_dtype": None}, "kv_cache_dtype None"),
    ({"eviction": "random"}, "lru"), ({"block_size": 0}, "block_size"), ({"block_size": 257}, "block_size"),
    ({"kv_cache_bytes": "lots"}, "size"), ({"kv_cache_bytes": 0}, "kv_cache_bytes"), ({"threads": 0}, "threads"),
    ({"max_batch_tokens": 0}, "max_batch_tokens"), ({"max_model_len": -5}, "max_model_len"), ({"seed": 1.5}, "seed"),
    ({"block_size": None}, "block_size None"), ({"seed": None}, "seed None"), ({"device": None}, "device None"),
    ({"prefix_caching": "no"}, "True or False"), ({"kv_cache_bytes": "9" * 400}, "size"), ({"model": ""}, "model ''"),
    ({"model": None}, "model None must be"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "message"), BAD_SAMPLING)
def test_bad_sampling_values(options, message):
    with pytest.raises(ConfigError, match=message):
        SamplingParams(**options)


@pytest.mark.parametrize(("options", "message"), BAD_ENGINE)
def test_bad_engine_values(options, message):
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**{"model": "m", **options})


def test_unknown_names_suggest_what_was_meant():
    with pytest.raises(ConfigError, match=r"max_token'.*did you mean max_tokens"):
        SamplingParams.from_dict({"max_token": 5})
    with pytest.raises(ConfigError, match="did you mean kv_cache_bytes"):
        EngineConfig.from_dict({"model": "m", "kv_cache_byte": 5})
    with pytest.raises(ConfigError, match="known:"):
        EngineConfig.from_dict({"model": "m", "zzz": 5})
    with pytest.raises(ConfigError, match="'model' is missing"):
        EngineConfig.from_dict({"dtype": "auto"})


def test_none_is_a_value_where_the_type_says_so():
    params = SamplingParams(max_tokens=None, temperature=None, seed=None, logprobs=None, logit_bias=None)
    assert params.max_tokens is None
    assert EngineConfig(model="m", kv_cache_bytes=None, max_model_len=None, threads=None).threads is None


def test_the_kv_cache_is_not_rounded_unless_asked():
    assert EngineConfig(model="m").kv_cache_dtype == "auto"
    assert EngineConfig.from_dict({"model": "m", "kv_cache_dtype": "int8"}).kv_cache_dtype == "int8"
    with pytest.raises(ConfigError, match="did you mean kv_cache_dtype"):
        EngineConfig.from_dict({"model": "m", "kv_cache_dtyp": "int8"})


def test_what_was_checked_stays_as_it_was():
    bias = {1: 2.0}
    params = SamplingParams(logit_bias=bias)
    bias[1] = math.nan
    assert params.logit_bias == {1: 2.0}


def test_from_dict_takes_what_json_gives():
    params = SamplingParams.from_dict({"max_new_tokens": 7, "logit_bias": {"5": 1.5}, "stop": ["a", "b"]})
    assert (params.max_tokens, params.logit_bias, params.stop) == (7, {5: 1.5}, ("a", "b"))
    with pytest.raises(ConfigError, match="same option"):
        SamplingParams.from_dict({"max_new_tokens": 7, "max_tokens": 7})


def test_the_callers_value_wins_over_the_checkpoints_and_that_over_neutral():
    params = SamplingParams(temperature=0.5).resolved({"temperature": 0.9, "top_k": 40})
    assert (params.temperature, params.top_k, params.top_p, params.repetition_penalty) == (0.5, 40, 1.0, 1.0)
    assert params.resolved({"top_k": 3}) is params


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("512", 512),
        ("1KB", 1000),
        ("2 KiB", 2048),
        ("1.5GiB", 3 << 29),
        ("3mb", 3_000_000),
        ("7B", 7),
        ("2G", 2 * 10**9),
    ],
)
def test_sizes(text, value):
    assert parse_bytes(text) == value

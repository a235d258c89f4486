"""Options are checked when they are made, and unknown ones never ignored."""

import argparse
import inspect
import math
import pickle
import re
from dataclasses import fields, replace
from pathlib import Path

import pytest

from minirksc.cli.generate import build_parser
from minirksc.cli.parser import add_options
from minirksc.errors import ConfigError
from minirksc.option_fields import REQUIRED, Option
from minirksc.options import EngineConfig, SamplingParams, parse_bytes
from minirksc.rksc.solver_config import SolverConfig

CLASSES = (SamplingParams, EngineConfig, SolverConfig)
README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")

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


@pytest.mark.parametrize("cls", CLASSES)
def test_every_option_is_explained_once(cls):
    source = inspect.getsource(cls)
    assert list(cls.declared) == [one.name for one in fields(cls)]
    for name, one in cls.declared.items():
        assert one.text and len(re.findall(rf"^ {{8}}{name}: ", source, re.MULTILINE)) == 1, name
        assert f"\n    {name}: {one.text[:40]}" in cls.__doc__
        assert all(choice in cls.__doc__ for choice in one.choices)
    assert not [text for text in cls.declared.values() if "default" in text.text]
    assert inspect.signature(cls).parameters.keys() == cls.declared.keys()


@pytest.mark.parametrize("cls", CLASSES)
def test_a_default_is_right_as_it_is(cls):
    for name, one in cls.declared.items():
        assert one.default is REQUIRED or cls.checked(name, one.default) is one.default


def test_an_explanation_names_values_and_default():
    explain = SamplingParams.declared["top_p"].explained
    assert explain().endswith("the likeliest first (above 0 to 1)")
    assert SamplingParams.declared["n"].explained().endswith("(default: 1)")
    assert SamplingParams.declared["n"].explained(default="as told").endswith("(default: as told)")
    kv_split, threads = EngineConfig.declared["kv_split"], EngineConfig.declared["threads"]
    assert kv_split.explained(show_choices=True).endswith("(fixed, adaptive; default: fixed)")
    assert threads.explained().startswith("threads of the CPU (default: one a physical core ")
    assert Option(text="x", default=True).explained() == "x (default: True)"
    assert Option(text="x", default=False).explained() == "x"


def test_an_option_can_be_added_to_any_parser():
    parser = argparse.ArgumentParser()
    add_options(
        parser, EngineConfig, ["dtype", "ignore_config_keys"], {"dtype": "ours"}, {"dtype": ("auto", "float16")}
    )
    assert "(default: ours)" in " ".join(parser.format_help().split()) and "{auto,float16}" in parser.format_help()
    found = parser.parse_args(["--dtype", "half", "--ignore-config-key", "a", "--ignore-config-key", "b"])
    assert vars(found) == {"dtype": "float16", "ignore_config_keys": ["a", "b"]}
    assert vars(parser.parse_args([])) == {"dtype": None, "ignore_config_keys": None}


def test_readme_has_every_flag_in_one_row():
    table = README.partition("## Command line")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`--.*?) \| .+ \|$", table, re.MULTILINE)
    named = [flag for row in rows for flag in re.findall(r"--[a-z-]+", row)]
    flags = {flag for action in build_parser()._actions for flag in action.option_strings if flag.startswith("--")}
    assert sorted(named) == sorted(flags - {"--help", "--version"})


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (SamplingParams, dict(best_of=None)), (SamplingParams, dict(best_of=1, length_penalty=1.0)),
        (SamplingParams, dict(use_beam_search=False, early_stopping=False, logits_processors=None, bad_words=[])),
        (SamplingParams, dict(guided_decoding=None, truncate_prompt_tokens=None, spaces_between_special_tokens=True)),
        (SamplingParams, dict(stop=None, stop_token_ids=None)),
        (EngineConfig, dict(tensor_parallel_size=1, pipeline_parallel_size=1, trust_remote_code=False)),
        (EngineConfig, dict(enable_lora=False, swap_space=0, enable_chunked_prefill=True, quantization=None)),
        (EngineConfig, dict(load_format="auto", revision=None, tokenizer=None, disable_log_stats=True)),
    ],
)  # fmt: skip
def test_what_changes_nothing_is_taken_from_users_of_vllm(cls, options):
    own = {"model": "m"} if cls is EngineConfig else {}
    assert cls(**own, **options) == cls.from_dict({**own, **options}) == cls(**own)


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (SamplingParams, dict(best_of=2), "best_of=2 is not an option here: .* use n"),
        (SamplingParams, dict(best_of=True), "best_of=True is not"),
        (SamplingParams, dict(use_beam_search=True), "Solver"),
        (SamplingParams, dict(guided_json={}), "guided_json={} is not"),
        (SamplingParams, dict(bad_words=["x"]), "use logit_bias"),
        (SamplingParams, dict(temperatur=1), "did you mean temperature"),
        (SolverConfig, dict(brances=1), "did you mean branches"),
        (EngineConfig, dict(max_num_seqs=8), "vLLM calls it max_num_seqs, here it is max_batch_requests"),
        (EngineConfig, dict(max_num_batched_tokens=8), "here it is max_batch_tokens"),
        (EngineConfig, dict(enable_prefix_caching=True), "here it is prefix_caching"),
        (EngineConfig, dict(quantization="awq"), "here it is quantize"),
        (EngineConfig, dict(gpu_memory_utilization=0.9), "use kv_cache_bytes"),
        (EngineConfig, dict(tensor_parallel_size=2), "tensor_parallel_size=2 .* one device; leave it out"),
        (EngineConfig, dict(trust_remote_code=True), "trust_remote_code=True"),
        (EngineConfig, dict(swap_space=4), "anew"),
    ],
)  # fmt: skip
def test_other_names_of_vllm_are_refused_with_what_to_do(cls, options, message):
    own = {"model": "m"} if cls is EngineConfig else {}
    for make in (lambda: cls(**own, **options), lambda: cls.from_dict({**own, **options})):
        with pytest.raises(ConfigError, match=message):
            make()


@pytest.mark.parametrize("cls", CLASSES)
def test_theirs_are_no_names_of_ours(cls):
    assert not set(cls.theirs) & set(cls.declared) and not set(cls.aliases) & {*cls.declared, *cls.theirs}
    assert set(cls.aliases.values()) <= set(cls.declared)


@pytest.mark.parametrize(("given", "meant"), [("half", "float16"), ("float", "float32"), ("bfloat16", "bfloat16")])
def test_dtypes_have_the_names_that_vllm_takes(given, meant):
    assert EngineConfig(model="m", dtype=given).dtype == meant
    assert build_parser().parse(["--dtype", given]).dtype == meant


def test_an_option_has_one_value_whatever_it_is_called():
    assert SamplingParams(max_new_tokens=7).max_tokens == 7
    with pytest.raises(ConfigError, match="max_tokens and max_new_tokens are the same option"):
        SamplingParams(max_new_tokens=7, max_tokens=7)


def test_options_can_be_copied_changed_and_compared():
    params = SamplingParams(stop="a", logit_bias={1: 2.0}, n=2)
    assert replace(params, n=3) == SamplingParams(stop=["a"], logit_bias={1: 2.0}, n=3)
    assert pickle.loads(pickle.dumps(params)) == params and hash(params) == hash(replace(params))

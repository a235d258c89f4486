"""Values of config.json that look like nothing and are something: read as transformers does, or refused by name."""

import importlib
import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minirksc import LLM
from minirksc.cli.generate import main as generate_main
from minirksc.cli.models import main as models_main
from minirksc.errors import CheckpointError, ConfigError, MinirkscError, UnsupportedModelError
from minirksc.models.families import FAMILIES, spec_from_config
from minirksc.models.rope import inv_freq

BASE = {
    "model_type": "llama", "vocab_size": 100, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
CHUNKS = {"chunk_size": 100, "local_size": 30, "original_max_position_embeddings": 90}


def spec(**fields):
    return spec_from_config({**BASE, **fields})


# Fields that nothing reads

HARMLESS = {
    "model_max_length": 4096, "tokenizer_padding_side": "right", "name_or_path": "x", "loss_type": "ForCausalLMLoss",
    "bos_token": "<s>", "num_labels": 1, "task_specific_params": {"a": 1}, "license": "mit", "use_flash_attn": True,
    "suppress_tokens": [1], "gradient_checkpointing_kwargs": {"use_reentrant": False}, "chat_template": "{{ x }}",
    "use_bfloat16": True, "chunk_size_feed_forward": 4, "stop_strings": ["a"], "hidden_dropout_prob": 0.1,
}  # fmt: skip
NEUTRAL = [
    *(("is_causal", True), ("causal", True), ("use_rope", True), ("pre_norm", True), ("scale_attn_weights", True)),
    *(("partial_rotary_factor", 1.0), ("partial_rotary_factor", None), ("rotary_pct", 1), ("logit_scale", 1.0)),
    *(("residual_multiplier", 1), ("use_moe", False), ("clip_qkv", None), ("num_experts", 0), ("mlp_only_layers", [])),
    *(("pruned_heads", {}), ("router_jitter_noise", 0.0), ("layer_types", ["full_attention"] * 2)),
]
SOMETHING = [
    *(("is_causal", value) for value in (False, None, 0, [], {}, "true", 1)),
    *(("causal", False), ("use_causal_mask", False), ("autoregressive", False), ("use_rope", False), ("rotary", None)),
    *(("pre_norm", False), ("rms_norm", False), ("use_gated_mlp", False), ("scale_attn_weights", False)),
    *(("partial_rotary_factor", value) for value in (0, 0.5, False, True, "1", {}, [])),
    *(("residual_multiplier", 0), ("logit_scale", 0.0), ("embedding_multiplier", 12), ("routed_scaling_factor", 0)),
    *(("attention_multiplier", 1.0), ("some_config", {}), ("use_moe", True), ("pruned_heads", {"0": [1]})),
    *(("quantization_config", value) for value in ({}, False, [], "awq")),
    *(("quantization", {"bits": 4}), ("compression_config", {"format": "pack-quantized"}), ("sinks", "")),
    *(("layer_types", value) for value in (False, 0, [], {}, ["sliding_attention"] * 2, [None] * 2)),
    *(("architectures", [name]) for name in ("LlamaBidirectionalModel", "LlamaBiModel", "MistralBiForMNTP")),
]


@pytest.mark.parametrize(("name", "value"), [*HARMLESS.items(), *NEUTRAL], ids=str)
def test_what_changes_nothing_is_passed_over(name, value):
    assert spec(**{name: value}) == spec()


@pytest.mark.parametrize(("name", "value"), SOMETHING, ids=str)
def test_what_says_something_is_refused_by_name(name, value):
    with pytest.raises(CheckpointError, match="quantised" if name == "quantization_config" else name):
        spec(**{name: value})


def test_a_multimodal_model_that_attends_both_ways_is_refused():
    text = {name: value for name, value in BASE.items() if name != "model_type"}
    for outer in ({"is_causal": False, "text_config": text}, {"text_config": {**text, "is_causal": False}}):
        with pytest.raises(UnsupportedModelError, match="is_causal False is not supported"):
            spec_from_config({"model_type": "mistral3", **outer})


def test_an_unknown_field_is_passed_over_by_its_exact_name():
    with pytest.raises(UnsupportedModelError, match=r"my_field=5.*--ignore-config-key my_field"):
        spec(my_field=5)
    assert spec_from_config({**BASE, "my_field": 5}, ["my_field"]) == spec()
    with pytest.raises(UnsupportedModelError) as told:
        spec(**{"a" * 100_000: "b" * 100_000, "model_type": BASE["model_type"]})
    assert len(str(told.value)) < 2000
    rope = {"rope_scaling": {**YARN, "my_part": 2.0}}
    with pytest.raises(UnsupportedModelError, match=r"'my_part'.*--ignore-config-key my_part"):
        spec(**rope)
    assert spec_from_config({**BASE, **rope}, ["my_part"]) == spec(rope_scaling=YARN)
    for name in ("my_fields", "hidden_size", "use_cache", "is_causal"):  # absent, read, harmless, known
        with pytest.raises(ConfigError, match=f"names '{name}'"):
            spec_from_config({**BASE, "my_field": 5, "use_cache": True, "is_causal": True}, ["my_field", name])
    with pytest.raises(UnsupportedModelError, match="is_causal False is not supported"):
        spec_from_config({**BASE, "is_causal": False}, ["is_causal"])
    text = {name: value for name, value in BASE.items() if name != "model_type"}
    inner = {"model_type": "mistral3", "text_config": {**text, "my_field": 5}}
    assert spec_from_config(inner, ["my_field"]).layout.is_wrapped


def test_a_long_list_of_unknown_fields_ends():
    with pytest.raises(UnsupportedModelError, match="unknown_019=1, and 980 more; they may"):
        spec(**{f"unknown_{i:03}": 1 for i in range(1000)})


def test_what_is_passed_over_is_told(tiny_llama, tmp_path):
    folder = shutil.copytree(tiny_llama(), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"my_field": 5}))
    with LLM(str(folder), kv_cache_bytes="1MiB", ignore_config_keys=["my_field"]) as llm:
        assert llm.stats()["ignored_config_keys"] == ["my_field"]
    with pytest.raises(ConfigError, match="names 'other'"):
        LLM(str(folder), ignore_config_keys=("my_field", "other"))
    with pytest.raises(ConfigError, match="must be a list of names"):
        LLM(str(folder), ignore_config_keys="my_field")


def test_the_command_lines_pass_a_field_over(tiny_llama, tmp_path, capsys):
    folder = shutil.copytree(tiny_llama(tokenizer=True), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"my_field": 5}))
    generate = ["--model", str(folder), "--max-tokens", "1", "--kv-cache-bytes", "1MiB", "--stats", "a"]
    for main, arguments in ((generate_main, generate), (models_main, [str(folder)])):
        assert main(arguments) == 1
        assert "--ignore-config-key my_field" in capsys.readouterr().err
        assert main([*arguments, "--ignore-config-key", "my_field"]) == 0
        said = capsys.readouterr()
        assert main is models_main or "passed over in config.json: my_field" in said.err


# Rotations


def rope_of(**scaling):
    return spec(rope_scaling=scaling).layers[0].rope


def test_yarn_multiplies_its_own_factor_in():
    usual = 0.1 * math.log(4) + 1
    assert rope_of(**YARN).attention_factor == pytest.approx(usual)
    assert rope_of(**YARN, attn_factor=0.5).attention_factor == pytest.approx(usual / 2)
    assert rope_of(**YARN, attn_factor=0.8782488562869419).attention_factor == pytest.approx(1.0)
    both = rope_of(**YARN, mscale=0.7, mscale_all_dim=1.9).attention_factor
    assert rope_of(**YARN, mscale=0.7, mscale_all_dim=1.9, attn_factor=2).attention_factor == pytest.approx(2 * both)
    assert rope_of(**YARN, attention_factor=1.3, attn_factor=1.0).attention_factor == 1.3
    with pytest.raises(CheckpointError, match="attention_factor and attn_factor contradict"):
        rope_of(**YARN, attention_factor=1.3, attn_factor=0.5)


@pytest.mark.parametrize(
    ("scaling", "plainer"),
    [
        ({**YARN, "finetuned": True}, YARN),
        ({**YARN, "finetuned": False, "extrapolation_factor": 1.0, "partial_rotary_factor": 1.0}, YARN),
        ({"rope_type": "default", "mrope_section": [2, 3, 3]}, {}),
        ({"type": "mrope", "mrope_section": [2, 3, 3]}, {}),
        ({**YARN, "mrope_section": [2, 3, 3], "mrope_interleaved": True}, YARN),
        ({"rope_type": "default", "factor": 1.0, "attention_factor": 1, "attn_factor": 1.0}, {}),
        ({}, {}),
    ],
)
def test_parts_of_a_rotation_that_change_nothing(scaling, plainer):
    assert spec(rope_scaling=scaling) == spec(rope_scaling=plainer or None)
    assert spec(rope_parameters=scaling) == spec(rope_parameters=plainer or None)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        *(({"rope_scaling": value}, "must be an object") for value in (0, "", [], False)),
        *(({"rope_parameters": value}, "must be an object") for value in (0, "", [], False)),
        ({"rope_scaling": {"rope_type": "default", "factor": 4.0}}, "nothing reads: 'factor'"),
        ({"rope_scaling": {"rope_type": "default", "finetuned": True}}, "finetuned"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "attn_factor": 0.5}}, "attn_factor"),
        ({"rope_scaling": {**YARN, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_scaling": {**YARN, "truncate": None}}, "truncate None must be true or false"),
        ({"rope_scaling": {**YARN, "truncate": 0}}, "truncate 0 must be true or false"),
        ({"rope_scaling": {**YARN, "beta_fast": False}}, "beta_fast False must be a positive number"),
        ({"rope_scaling": {**YARN, "factor": True}}, "factor True must be a positive number"),
        ({"rope_scaling": {**YARN, "factor": 1e30}}, "reaches to position"),
        ({"rope_scaling": {**YARN, "factor": 1e300}}, "factor 1e.300 must be"),
        ({"rope_scaling": YARN, "rope_theta": 1}, "rope_theta 1.0 turns all pairs alike"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}, "head_dim": 2}, "at least 4"),
        ({"rope_scaling": YARN, "original_max_position_embeddings": 0}, "original_max_position_embeddings 0 must"),
        ({"model_type": "phi3", "partial_rotary_factor": 1e30}, "at most 1"),
        *(({"rope_scaling": {**YARN, "rope_type": value}}, "rope type") for value in ("", 0, False, [], {})),
        *(({"model_type": name, "rope_parameters": {}}, "empty") for name in ("cwm", "ministral3", "gemma4_text")),
        ({"model_type": "gemma4_text", "rope_parameters": {"full_attention": {}}}, "lacks sliding_attention"),
        ({"model_type": "gemma3_text", "rope_parameters": {"rope_type": "default"}}, "lacks full_attention"),
    ],
    ids=str,
)
def test_rotations_that_say_nothing_clear_are_refused(fields, message):
    with pytest.raises(CheckpointError, match=message):
        spec(**fields)


@pytest.mark.parametrize("model_type", ["cwm", "ministral3", "gemma4_text"])
def test_null_is_a_family_s_own_rotation(model_type):
    sizes = {**BASE, "model_type": model_type, "head_dim": 16}
    assert spec_from_config({**sizes, "rope_parameters": None}) == spec_from_config(sizes)
    assert {layer.rope.kind for layer in spec_from_config(sizes).layers} != {"default"}


@pytest.mark.parametrize("model_type", ["internlm3", "qwen2", "qwen3", "ministral3"])
def test_null_sizes_follow_from_others(model_type):
    made = spec(model_type=model_type, num_key_value_heads=None, head_dim=None)
    assert {(layer.num_kv_heads, layer.head_dim) for layer in made.layers} == {(4, 16)}


# Windows and chunks


@pytest.mark.parametrize("fields", [{"sliding_window": None}, {"use_sliding_window": False, "sliding_window": 8}])
def test_layers_that_slide_without_a_window_are_refused(fields):
    kinds = ["full_attention", "sliding_attention"]
    with pytest.raises(CheckpointError, match="layer_types names sliding_attention"):
        spec(**{"model_type": "qwen2", "layer_types": kinds, "use_sliding_window": True, **fields})


def test_dual_chunks_end_where_they_would_begin_to_differ():
    for chunks, length in ((CHUNKS, 70), (CHUNKS | {"original_max_position_embeddings": 50}, 50)):
        chunked = spec(model_type="qwen2", dual_chunk_attention_config=chunks)
        assert chunked == spec(model_type="qwen2", max_position_embeddings=length)
    for wrong in ({}, CHUNKS | {"local_size": 100}, CHUNKS | {"chunk_size": "100"}, CHUNKS | {"more": 1}, [1], False):
        with pytest.raises(CheckpointError, match="dual_chunk_attention_config"):
            spec(model_type="qwen2", dual_chunk_attention_config=wrong)
    with pytest.raises(UnsupportedModelError, match="nothing reads: dual_chunk_attention_config"):
        spec(dual_chunk_attention_config=CHUNKS)


def test_the_two_names_of_a_switch():
    ours = spec(model_type="internlm3", qkv_bias=True, bias=True, head_dim=16)
    assert (ours.qkv_bias, ours.o_bias, ours.mlp_bias) == (True, True, True)
    assert ours == spec(model_type="internlm3", attention_bias=True, mlp_bias=True, head_dim=16)
    with pytest.raises(CheckpointError, match="qkv_bias False and attention_bias True contradict"):
        spec(model_type="internlm3", attention_bias=True, qkv_bias=False)


# Whatever a file may hold

SCALARS = [None, False, True, 0, 1, -1, 2, 0.0, 0.5, 1.0, 1e300, -0.0, float("nan"), float("inf"), 10**30, -(10**30)]
values = st.recursive(
    st.sampled_from([*SCALARS, "", "1", "false", "yarn", "silu", "full_attention", "x" * 300]),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["rope_type", "factor", "full_attention", "0", "a"]), inner, max_size=3),
    ),
    max_leaves=4,
)
NAMES = [
    *BASE, "head_dim", "rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "layer_types",
    "sliding_window", "use_sliding_window", "max_window_layers", "tie_word_embeddings", "hidden_act", "eos_token_id",
    "bos_token_id", "attention_bias", "mlp_bias", "query_pre_attn_scalar", "attn_logit_softcapping", "is_causal",
    "final_logit_softcapping", "original_max_position_embeddings", "per_layer_config", "no_rope_layers", "text_config",
    "num_kv_shared_layers", "hidden_size_per_layer_input", "sliding_window_pattern", "dual_chunk_attention_config",
    "architectures", "torch_dtype", "quantization", "rope_local_base_freq", "num_global_key_value_heads", "qkv_bias",
]  # fmt: skip
PARTS = ["rope_type", "factor", "rope_theta", "beta_fast", "beta_slow", "truncate", "attention_factor", "attn_factor"]
PARTS += ["mscale", "mscale_all_dim", "low_freq_factor", "high_freq_factor", "short_factor", "long_factor"]
PARTS += ["original_max_position_embeddings", "partial_rotary_factor", "llama_4_scaling_beta", "mrope_section"]
ropes = st.fixed_dictionaries(
    {"rope_type": st.sampled_from(["yarn", "llama3", "dynamic", "linear", "longrope", "proportional", "default"])},
    optional={name: st.one_of(st.sampled_from(SCALARS), st.floats(0.1, 100), values) for name in PARTS[1:]},
)


@settings(max_examples=400)
@given(
    st.sampled_from([*FAMILIES, "mistral3", "gemma3"]),
    st.dictionaries(st.sampled_from(NAMES), values, max_size=3),
    st.one_of(st.none(), ropes),
)
def test_nothing_but_a_spec_or_an_error_of_ours_comes_of_a_config(model_type, changes, rope):
    config = {**BASE, "model_type": model_type, **({"rope_parameters": rope} if rope else {}), **changes}
    try:
        made = spec_from_config(config)
    except MinirkscError:
        return
    for rope in {layer.rope for layer in made.layers} - {None}:
        if rope.rotary_dim < 10**4:
            assert len(inv_freq(rope)) == rope.rotary_dim // 2


# transformers as the oracle: whatever loads gives its logits

CHANGES = [
    ("llama-yarn", ["rope_parameters", "truncate"]), ("llama-yarn", ["rope_parameters"]),
    ("llama-yarn", ["rope_scaling"]), ("llama-yarn", ["is_causal"]), ("llama-yarn", ["partial_rotary_factor"]),
    ("llama-plain", ["layer_types"]),
    ("cwm-default", ["rope_parameters"]), ("cwm-default", ["original_max_position_embeddings"]),
    ("ministral3-yarn", ["rope_parameters"]), ("ministral3-yarn", ["original_max_position_embeddings"]),
    ("mistral-window", ["sliding_window"]), ("mistral-wrapped", ["text_config", "is_causal"]),
    ("gemma4_text-dense", ["rope_parameters"]),
]  # fmt: skip
ODD = [None, False, 0, 1, {}, [], "", 64, "absent"]


@pytest.mark.oracle
@pytest.mark.parametrize(("row_id", "path"), CHANGES, ids=str)
def test_what_loads_is_what_transformers_computes(row_id, path, zoo_dir, tmp_path):
    pytest.importorskip("transformers")
    sys.path.append(str(Path(__file__).parent))
    zoo, row = importlib.import_module("zoo"), importlib.import_module("zoo_rows").BY_ID[row_id]
    prompt, num_loaded = zoo.make_prompt(zoo.LONG), 0
    folder = shutil.copytree(zoo.build(row, zoo_dir / row_id), tmp_path / "model")
    original = (folder / "config.json").read_text()
    for value in ODD:
        config = json.loads(original)
        inner = config
        for name in path[:-1]:
            inner = inner[name]
        inner.pop(path[-1], None) if value == "absent" else inner.update({path[-1]: value})
        (folder / "config.json").write_text(json.dumps(config))
        try:
            with LLM(str(folder), kv_cache_bytes="8MiB", dtype="float32") as llm:
                ours = llm.logits(prompt)
            theirs = zoo.oracle_logits(row, zoo.load_oracle(row, folder), prompt)
        except MinirkscError:
            continue
        except (KeyError, TypeError, ValueError):  # transformers reads no such file
            assert value is None  # which counts as absent here
            continue
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)
        num_loaded += 1
    assert num_loaded

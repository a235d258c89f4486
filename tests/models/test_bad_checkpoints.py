"""Checkpoints that cannot be run: refused by name, before memory is spent on them."""

import json
import os
import shutil
import struct
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from minirksc import LLM, SamplingParams
from minirksc.errors import CheckpointError, UnsupportedModelError
from minirksc.models.config.consolidated import config_from_params
from minirksc.models.config.quantised import quantisation_of
from minirksc.models.families import spec_from_config
from minirksc.models.weights.safetensors_file import MAX_HEADER_BYTES, read_entries

WEIGHT = "model.layers.0.mlp.up_proj"
ONES = torch.ones(2, 2)
INTEGERS = torch.ones(2, 2, dtype=torch.int32)
BYTES = torch.ones(2, 2, dtype=torch.uint8)
F8 = ONES.to(torch.float8_e4m3fn)

QUANTISED = {
    "GPTQ": {"qweight": INTEGERS, "qzeros": INTEGERS, "scales": ONES.half(), "g_idx": INTEGERS},
    "AWQ": {"qweight": INTEGERS, "qzeros": INTEGERS, "scales": ONES.half()},
    "fp8": {"weight": F8},
    "fp8 with scales": {"weight": F8, "weight_scale_inv": ONES},
    "fp8 or int8": {"weight": BYTES, "weight_scale": ONES},
    "bitsandbytes, 8 bits": {"weight": BYTES, "SCB": ONES},
    "bitsandbytes, 4 bits": {"weight": BYTES, "weight.absmax": ONES, "weight.quant_map": ONES},
    "compressed-tensors": {"weight_packed": INTEGERS, "weight_scale": ONES, "weight_shape": INTEGERS},
    "mxfp4": {"weight_blocks": BYTES, "weight_scales": BYTES},
}


@pytest.mark.parametrize("method", QUANTISED)
def test_quantised_tensors_name_their_method(tmp_path, method):
    save_file(
        {
            "model.norm.weight": ONES.bfloat16(),
            **{f"{WEIGHT}.{part}": t.clone() for part, t in QUANTISED[method].items()},
        },
        tmp_path / "model.safetensors",
    )
    name = method.split(",")[0].split(" with")[0]
    with pytest.raises(UnsupportedModelError, match=rf"model\.safetensors is quantised \({name}: tensor {WEIGHT}\."):
        read_entries(tmp_path)


def test_quantised_mistral_files_name_their_method(tmp_path):
    tensors = {"layers.0.attention.wq.weight": F8, "layers.0.attention.wq.qscale_weight": torch.ones(())}
    save_file(tensors, tmp_path / "consolidated.safetensors")
    with pytest.raises(UnsupportedModelError, match=r"quantised \(fp8: tensor layers\.0\.attention\.wq\.qscale_weight"):
        read_entries(tmp_path)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_ordinary_tensors_show_no_method(dtype):
    names = ("model.embed_tokens.weight", "model.layers.0.layer_scalar", f"{WEIGHT}.weight", f"{WEIGHT}.bias")
    assert quantisation_of(dict.fromkeys(names, dtype)) is None


def header_of(num_bytes):
    """A safetensors file of empty tensors whose header has about so many bytes."""
    entry = b'"%09d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    header = b"{" + b",".join(entry % i for i in range(num_bytes // len(entry % 0 + b","))) + b"}"
    return struct.pack("<Q", len(header)) + header


def test_a_header_of_100_mb_is_refused_unread(tmp_path):
    content = header_of(100_000_000)
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"header of {len(content) - 8} bytes, more than {MAX_HEADER_BYTES}"):
        read_entries(tmp_path)


MEASURE = """
import resource, sys
from pathlib import Path
from minirksc.models.weights.safetensors_file import read_entries
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
entries = read_entries(Path(sys.argv[1]))
print(len(entries), peak() - before)
"""


@pytest.mark.slow
def test_the_largest_header_is_read_in_little_memory(tmp_path):
    pytest.importorskip("resource")
    (tmp_path / "model.safetensors").write_bytes(header_of(MAX_HEADER_BYTES))
    done = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, check=True)
    num_tensors, peak = map(int, done.stdout.split())
    assert num_tensors > 200_000 and peak < 1 << 30


@pytest.fixture()
def sharded(tmp_path):
    """A folder of two shards with an index, and a function that rewrites the index."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for name in ("a", "b"):
        save_file({name: ONES}, folder / f"{name}.safetensors")

    def index(**names):
        content = {"weight_map": {"a": "a.safetensors", "b": "b.safetensors"} | names}
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))

    index()
    return folder, index


@pytest.mark.parametrize(
    "name",
    [
        *("../b.safetensors", "/etc/passwd", "sub/b.safetensors", "./b.safetensors", "..", ".", ""),
        *("b.safetensors/", "..\\b.safetensors", 7, None, ["b.safetensors"]),
    ],
)
def test_an_index_names_files_of_its_own_folder_only(sharded, name):
    folder, index = sharded
    save_file({"b": ONES}, folder.parent / "b.safetensors")
    index(b=name)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        read_entries(folder)


def test_links_as_the_hub_cache_makes_them_are_followed(sharded):
    folder, _ = sharded
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    for file in list(folder.iterdir()):
        file.rename(blobs / f"blob-{file.name}")
        file.symlink_to(f"../blobs/blob-{file.name}")
    assert set(read_entries(folder)) == {"a", "b"}


@pytest.mark.parametrize("file", ["b.safetensors", "model.safetensors.index.json"])
@pytest.mark.parametrize("target", ["nowhere", "itself"])
def test_links_to_nothing_and_loops_are_named(sharded, file, target):
    folder, _ = sharded
    (folder / file).unlink()
    (folder / file).symlink_to("nowhere" if target == "nowhere" else file)
    with pytest.raises(CheckpointError, match=rf"{file}.* is a link to a file that does not exist, or to itself"):
        read_entries(folder)


@pytest.mark.parametrize("target", ["nowhere", "model.safetensors"])
def test_a_single_file_that_is_a_bad_link_is_named(tmp_path, target):
    (tmp_path / "model.safetensors").symlink_to(target)
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        read_entries(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes here")
def test_a_pipe_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_entries(tmp_path)


def test_a_missing_shard_and_a_huge_index(sharded):
    folder, _ = sharded
    (folder / "b.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"index\.json names the shard b\.safetensors, which is not in .*checkpoint"
    ):
        read_entries(folder)
    with (folder / "model.safetensors.index.json").open("ab") as file:
        file.truncate(MAX_HEADER_BYTES + 1)
    with pytest.raises(CheckpointError, match=rf"has {MAX_HEADER_BYTES + 1} bytes, more than {MAX_HEADER_BYTES}"):
        read_entries(folder)


LLAMA = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "vocab_size": 300,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
}  # fmt: skip
GEMMA = LLAMA | {"model_type": "gemma3_text", "head_dim": 16, "sliding_window": 8}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LLAMA | {"num_hidden_layers": 10**9}, r"num_hidden_layers 1000000000"),
        (LLAMA | {"num_hidden_layers": 0}, "num_hidden_layers 0"),
        (LLAMA | {"hidden_size": -64}, "hidden_size -64"),
        (LLAMA | {"vocab_size": 10**12}, "vocab_size 1000000000000"),
        (LLAMA | {"intermediate_size": 96.5}, "intermediate_size 96.5"),
        (LLAMA | {"head_dim": -1}, "head_dim -1"),
        (LLAMA | {"head_dim": 15}, "15"),
        (LLAMA | {"num_attention_heads": 6}, "num_attention_heads 6"),
        (LLAMA | {"num_key_value_heads": 3}, "4 attention heads.* 3 KV heads"),
        (LLAMA | {"rms_norm_eps": 0}, "rms_norm_eps 0"),
        (LLAMA | {"rms_norm_eps": float("nan")}, "rms_norm_eps nan"),
        (LLAMA | {"rope_theta": -1e4}, "rope_theta -10000.0"),
        (LLAMA | {"rope_scaling": {"rope_type": "spiral", "factor": 2.0}}, "rope type 'spiral'"),
        (LLAMA | {"rope_scaling": {"rope_type": "linear", "factor": 0}}, "factor 0"),
        (LLAMA | {"rope_scaling": {"rope_type": "linear"}}, "lacks factor"),
        (LLAMA | {"rope_parameters": {"rope_type": "yarn", "factor": 0.0, "rope_theta": 1e4}}, "factor 0.0"),
        (LLAMA | {"rope_scaling": "linear"}, "'linear'"),
        (LLAMA | {"hidden_act": "sine"}, "hidden_act 'sine'"),
        (LLAMA | {"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"quantised \(gptq\)"),
        (LLAMA | {"model_type": "mixtral"}, "'mixtral'.*mixture of experts"),
        (GEMMA | {"layer_types": ["full_attention"] * 3}, "layer_types.*4 layers.*3"),
        (GEMMA | {"layer_types": ["full_attention"] * 3 + ["chunked_attention"]}, "layer_types.*'chunked_attention'"),
        (GEMMA | {"layer_types": "full_attention"}, "layer_types"),
        (GEMMA | {"sliding_window": -8}, "sliding_window -8"),
        (GEMMA | {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar 0"),
        ({"model_type": None}, "model_type None"),
        ({}, "model_type None"),
    ],
)
def test_impossible_configs_are_refused_by_name(config, message):
    with pytest.raises(CheckpointError, match=message):
        spec_from_config(config)


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-(10**20), 10**20), st.floats(), st.text(max_size=3),
    st.lists(st.integers(), max_size=3), st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)  # fmt: skip
PARAMS = {
    "dim": 64, "n_layers": 2, "head_dim": 24, "hidden_dim": 96, "n_heads": 4, "n_kv_heads": 2, "norm_eps": 1e-5,
    "vocab_size": 300, "rope_theta": 1e6, "sliding_window": None, "yarn": None, "max_seq_len": 512, "moe": None,
}  # fmt: skip
YARN = {"original_max_position_embeddings": 16384, "factor": 16, "apply_scale": False, "beta": 32, "alpha": 1}
GROWTH = {"original_max_position_embeddings": 16384, "beta": 0.1}


@settings(max_examples=300)
@given(name=st.sampled_from(sorted(GEMMA)), value=VALUES)
def test_whatever_a_config_holds_the_error_is_one_of_ours(name, value):
    for config in (LLAMA, GEMMA):
        try:
            spec = spec_from_config(config | {name: value})
        except CheckpointError as error:
            assert len(str(error)) < 2000
        else:
            assert spec.num_layers < 10**5


@settings(max_examples=300)
@given(
    name=st.sampled_from(sorted(PARAMS)),
    part=st.sampled_from(["", "factor", "original_max_position_embeddings", "beta", "alpha", "growth"]),
    value=VALUES,
)
def test_whatever_params_hold_the_error_is_one_of_ours(name, part, value):
    changed = PARAMS | {name: value}
    if part:
        changed = PARAMS | {"max_seq_len": None, "yarn": YARN | {part: value}, "llama_4_scaling": GROWTH}
    if part == "growth":
        changed |= {"yarn": YARN, "llama_4_scaling": GROWTH | {"beta": value}}
    try:
        spec_from_config(config_from_params(changed))
    except CheckpointError as error:
        assert len(str(error)) < 2000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"temperature": "0.7"}, "temperature '0.7' must be a number"),
        ({"temperature": -1}, "temperature -1 is out of range"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"temperature": 10**400}, "temperature 1000"),
        ({"top_p": True}, "top_p True"),
        ({"top_k": 10**30}, "top_k 1000"),
        ({"top_k": 2.5}, "top_k 2.5 must be an integer"),
        ({"min_p": []}, r"min_p \[\]"),
        ({"repetition_penalty": 0}, "repetition_penalty 0 is out of range"),
        ({"do_sample": "false"}, "do_sample 'false' must be true or false"),
        ({"eos_token_id": "2"}, "eos_token_id '2' must be a token id"),
        ({"eos_token_id": [True]}, "eos_token_id"),
        ({"eos_token_id": 2.0}, r"eos_token_id 2\.0"),
    ],
    ids=str,
)
def test_sampling_defaults_that_mean_nothing_are_refused(tiny_llama, tmp_path, content, message):
    folder = shutil.copytree(tiny_llama(), tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=rf"generation_config\.json: {message}"):
        LLM(str(folder), kv_cache_bytes="1MiB")


def test_end_tokens_that_no_token_is_are_left_out(tiny_llama, tmp_path):
    folder = shutil.copytree(tiny_llama(), tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 10**30], "top_k": None}))
    with LLM(str(folder), kv_cache_bytes="1MiB") as llm:
        assert llm.engine.eos_token_ids == {2, 3}
        params = SamplingParams(min_tokens=2, max_tokens=3, detokenize=False)
        assert len(llm.generate({"prompt_token_ids": [5, 6]}, params)[0].outputs[0].token_ids) >= 2

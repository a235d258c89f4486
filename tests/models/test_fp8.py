"""FP8 checkpoints: widened to what their numbers and scales say, and every way in which the two do not fit."""

import importlib
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from minirksc import LLM
from minirksc.errors import CheckpointError, UnsupportedModelError
from minirksc.models.config.consolidated import LAYER_NAMES, TOP_NAMES
from minirksc.models.explain.explain import explain_folder
from minirksc.models.explain.page import model_page
from minirksc.models.families import load_config, spec_from_config
from minirksc.models.weights import safetensors_file
from minirksc.models.weights.rules import checkpoint_report, iter_weights
from minirksc.models.weights.safetensors_file import widened

LARGEST = 448.0
HIDDEN, SIZES = 160, {"hidden": 160, "head_dim": 48, "intermediate": 200}  # none a multiple of 128
QWEN = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
MINISTRAL = {
    "quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None, "dequantize": False,
    "modules_to_not_convert": ["model.vision_tower", "model.multi_modal_projector", "lm_head"],
}  # fmt: skip


def compressed(strategy, **weights):
    """What llm-compressor writes."""
    scheme = {
        "actorder": None, "block_structure": None, "dynamic": False, "group_size": None, "num_bits": 8,
        "observer": "minmax", "observer_kwargs": {}, "strategy": strategy, "symmetric": True, "type": "float",
    } | weights  # fmt: skip
    tokens = scheme | {"dynamic": True, "strategy": "token", "observer": None}
    group = {"input_activations": tokens, "output_activations": None, "targets": ["Linear"], "weights": scheme}
    return {
        "config_groups": {"group_0": group}, "format": "float-quantized", "global_compression_ratio": None,
        "ignore": ["lm_head"], "kv_cache_scheme": None, "quant_method": "compressed-tensors",
        "quantization_status": "compressed", "sparsity_config": {}, "transform_config": {}, "version": "0.12.2",
    }  # fmt: skip


# name: (quantization_config, name of a scale, rows and columns that share one, its shape where that is fixed, its
# dtype, what lies beside it)
FORMS = {
    "qwen3": (QWEN, "weight_scale_inv", (128, 128), None, torch.bfloat16, ()),
    "deepseek": ({**QWEN, "scale_fmt": "ue8m0"}, "weight_scale_inv", (128, 128), None, torch.float8_e8m0fnu, ()),
    "small blocks": ({**QWEN, "weight_block_size": [16, 24]}, "weight_scale_inv", (16, 24), None, torch.float32, ()),
    "ministral3": (MINISTRAL, "weight_scale_inv", (None, None), (), torch.bfloat16, ("activation_scale",)),
    "autofp8": (
        {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]},
        *("weight_scale", (None, None), (1,), torch.float32, ("input_scale", "output_scale")),
    ),
    "channels": (compressed("channel"), "weight_scale", (1, None), None, torch.bfloat16, ()),
    "compressed tensors": (compressed("tensor"), "weight_scale", (None, None), (1,), torch.float32, ("input_scale",)),
    "compressed blocks": (
        compressed("block", block_structure=[128, 128]),
        *("weight_scale", (128, 128), None, torch.float32, ()),
    ),
}


def blocks_of(shape, extent):
    rows, columns = (of_scale or size for of_scale, size in zip(extent, shape, strict=True))
    return [
        [(slice(i, i + rows), slice(j, j + columns)) for j in range(0, shape[1], columns)]
        for i in range(0, shape[0], rows)
    ]


def quantise(weight, extent, dtype):
    """(FP8 numbers, scales of all blocks, their product in float32), block by block."""
    blocks = blocks_of(weight.shape, extent)
    stored, wide = torch.empty(weight.shape, dtype=torch.float8_e4m3fn), torch.empty(weight.shape)
    scales = torch.empty(len(blocks), len(blocks[0]), dtype=dtype)
    for i, row in enumerate(blocks):
        for j, block in enumerate(row):
            scales[i, j] = weight[block].abs().max() / LARGEST
            scale = scales[i, j].float()
            stored[block] = (weight[block] / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
            wide[block] = stored[block].float() * scale
    return stored, scales, wide


def quantise_folder(source, folder, form, *, shards=1, linears=("_proj",)):
    """Writes a folder in FP8 and, beside it, one of the same numbers in float32.

    Returns:
        (the folder, the other one).
    """
    config, scale_name, extent, fixed, dtype, others = FORMS[form]
    tensors = {}
    for file in source.glob("*.safetensors"):
        tensors |= load_file(file)
    stored, plain = {}, {}
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        if kind == "weight" and module.endswith(linears) and "vision" not in name:
            stored[name], scales, plain[name] = quantise(tensor.float(), extent, dtype)
            stored[f"{module}.{scale_name}"] = scales if fixed is None else scales.reshape(fixed)
            stored |= {f"{module}.{other}": torch.tensor(0.02) for other in others}
        else:
            stored[name] = plain[name] = tensor
    for to, content in ((folder, stored), (folder.with_name(f"{folder.name}-plain"), plain)):
        to.mkdir()
        _save(content, to, shards)
        shutil.copy(source / "config.json", to)
    change_config(folder, quantization_config=config)
    return folder, folder.with_name(f"{folder.name}-plain")


def _save(tensors, folder, shards):
    """Scales and weights in turn: with two shards none lies in the file of its weight."""
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return
    names = list(tensors)
    weight_map = {name: f"model-{i % shards}.safetensors" for i, name in enumerate(names)}
    for i in range(shards):
        save_file({name: tensors[name] for name in names[i::shards]}, folder / f"model-{i}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def change_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def load(folder, dtype=torch.float32):
    return dict(iter_weights(folder, spec_from_config(load_config(folder)), dtype))


# The numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("form", FORMS)
def test_a_weight_is_its_numbers_times_their_scales(tiny_llama, tmp_path, monkeypatch, form, shards, dtype):
    monkeypatch.setattr(safetensors_file, "PIECE_NUMBERS", 7 * HIDDEN)  # pieces end inside blocks
    folder, plain = quantise_folder(tiny_llama(**SIZES), tmp_path / "fp8", form, shards=shards)
    actual, expected = load(folder, dtype), load(plain)
    assert list(actual) == list(expected)
    for name, tensor in expected.items():
        assert actual[name].dtype == dtype
        assert torch.equal(actual[name], tensor.to(dtype)), name  # rounded once


@settings(max_examples=60)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    first=st.integers(0, 8),
    extent=st.tuples(*[st.integers(1, 9)] * 2),
)
def test_any_rows_of_any_blocks(rows, columns, first, extent):
    whole = (first + rows, columns)
    stored, scales, wide = quantise(torch.randn(whole), extent, torch.float32)
    assert torch.equal(widened(stored[first:], scales, extent, first), wide[first:])


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("row_id", "form"),
    [
        ("llama-biases", "small blocks"),
        ("qwen3-plain", "qwen3"),
        ("qwen3-tied-bf16", "channels"),
        ("ministral3-wrapped", "ministral3"),
        ("ministral3-wrapped", "small blocks"),
        ("phi3-partial", "small blocks"),
        ("phi3-plain", "compressed tensors"),
        ("gemma3-wrapped", "channels"),
    ],
)
def test_logits_are_those_of_transformers_with_the_same_numbers(zoo_dir, tmp_path, row_id, form):
    pytest.importorskip("transformers")
    sys.path.append(str(Path(__file__).parent))
    zoo, rows = importlib.import_module("zoo"), importlib.import_module("zoo_rows")
    row = rows.BY_ID[row_id]
    source = zoo.build(row, zoo_dir / row.id)
    folder, plain = quantise_folder(source, tmp_path / "fp8", form)
    prompt = zoo.make_prompt(zoo.LONG)
    expected = zoo.oracle_logits(row, zoo.load_oracle(row, plain), prompt)
    with LLM(folder, kv_cache_bytes="8MiB", dtype="float32") as llm:
        torch.testing.assert_close(llm.logits(prompt), expected, atol=2e-4, rtol=0)
    original = zoo.oracle_logits(row, zoo.load_oracle(row, source), prompt)
    assert (expected - original).abs().max() > 0.01  # rounding to FP8 shows


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ("qwen3", "fp8 (128x128 blocks)"),
        ("ministral3", "fp8 (per tensor)"),
        ("channels", "fp8 (per channel)"),
    ],
)
def test_stats_and_the_explanation_name_it(tiny_llama, tmp_path, form, said):
    source = tiny_llama()
    folder, _ = quantise_folder(source, tmp_path / "fp8", form)
    with LLM(folder, kv_cache_bytes="1MiB") as llm, LLM(source, kv_cache_bytes="1MiB") as other:
        assert llm.stats()["checkpoint_precision"] == said
        assert other.stats()["checkpoint_precision"] is None
    explained = explain_folder("x", folder)
    assert explained.weights.stored["F8_E4M3"] == 14
    assert "layout.fp8" in {departure.field for departure in explained.departures}
    assert said in model_page(explained)


def test_bytes_are_those_in_the_files_and_activations_are_skipped(tiny_llama, tmp_path):
    folder, _ = quantise_folder(tiny_llama(), tmp_path / "fp8", "ministral3")
    report = checkpoint_report(folder, spec_from_config(load_config(folder)))
    raw = load_file(folder / "model.safetensors")
    skipped = {name for name in raw if name.endswith("activation_scale")}
    assert set(report.skipped) == skipped and len(skipped) == 14
    assert report.num_bytes == sum(tensor.nbytes for name, tensor in raw.items() if name not in skipped)


def test_scales_of_the_kv_cache_are_skipped(tiny_llama, tmp_path):
    folder, plain = quantise_folder(tiny_llama(), tmp_path / "fp8", "compressed tensors")
    names = [f"model.layers.0.self_attn.{name}" for name in ("k_scale", "v_scale", "attn.q_scale", "kv_scale")]
    change_tensors(folder, lambda tensors: tensors.update({name: torch.tensor(0.5) for name in names}))
    assert {name for name, _ in load(folder).items()} == {name for name, _ in load(plain).items()}


def test_mistral_s_own_files(tiny_llama, tmp_path):
    """One scale a tensor; rows of q and k are put in order after they are widened."""
    heads, kv_heads, head_dim, hidden = 4, 2, 24, 64
    source, plain = quantise_folder(tiny_llama(tie=False), tmp_path / "fp8", "ministral3")
    names = {f"{hf.removesuffix('.weight')}.": f"{own.removesuffix('.weight')}." for own, hf in TOP_NAMES.items()}
    for layer in range(2):
        names |= {f"model.layers.{layer}.{hf}.": f"layers.{layer}.{own}." for own, hf in LAYER_NAMES.items()}
    kinds = {"weight": "weight", "weight_scale_inv": "qscale_weight", "activation_scale": "qscale_act"}
    made = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        module, _, kind = name.rpartition(".")
        if kind == "weight" and (count := {"q_proj": heads, "k_proj": kv_heads}.get(module.rpartition(".")[2])):
            rows = tensor.view(torch.uint8).view(count, 2, -1, hidden).transpose(1, 2)
            tensor = rows.reshape(tensor.shape).view(torch.float8_e4m3fn)
        made[f"{names[f'{module}.']}{kinds[kind]}"] = tensor
    folder = tmp_path / "own"
    folder.mkdir()
    save_file(made, folder / "consolidated.safetensors")
    params = {
        "dim": hidden, "n_layers": 2, "head_dim": head_dim, "hidden_dim": 96, "n_heads": heads, "n_kv_heads": kv_heads,
        "norm_eps": 1e-5, "vocab_size": 300, "rope_theta": 1e6,
        "quantization": {"qformat_weight": "fp8_e4m3", "qscheme_act": "TENSOR"},
    }  # fmt: skip
    (folder / "params.json").write_text(json.dumps(params))
    actual, expected = load(folder), load(plain)
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())
    assert list(actual) == list(expected)


def test_weights_are_widened_one_by_one_as_they_are_asked_for(tiny_llama, tmp_path, monkeypatch):
    folder, _ = quantise_folder(tiny_llama(**SIZES), tmp_path / "fp8", "qwen3")
    monkeypatch.setattr(safetensors_file, "PIECE_NUMBERS", 1000)
    numbers = []

    def counted(values, *args):
        numbers.append(values.numel())
        return widened(values, *args)

    monkeypatch.setattr(safetensors_file, "widened", counted)
    weights = iter_weights(folder, spec_from_config(load_config(folder)), torch.bfloat16)
    for name, tensor in weights:
        in_fp8 = any(part in name for part in (".qkv.", ".o.", ".gate_up.", ".down."))
        assert sum(numbers) == (tensor.numel() if in_fp8 else 0), name
        assert max(numbers, default=0) <= 1000
        numbers.clear()


def test_a_tied_head_in_fp8_is_the_embedding_or_one_of_its_own(tiny_llama, tmp_path):
    linears = ("_proj", "embed_tokens")
    folder, plain = quantise_folder(tiny_llama(), tmp_path / "fp8", "qwen3", linears=linears)
    embed = "model.embed_tokens.weight"

    def add_copy(tensors):
        tensors["lm_head.weight"] = tensors[embed].clone()
        tensors["lm_head.weight_scale_inv"] = tensors[f"{embed}_scale_inv"].clone()

    change_tensors(folder, add_copy)
    weights = load(folder)
    assert "lm_head.weight" not in weights
    assert torch.equal(weights["embed.weight"], load_file(plain / "model.safetensors")[embed])
    change_tensors(folder, lambda tensors: tensors["lm_head.weight_scale_inv"].mul_(2))
    weights = load(folder)
    assert torch.equal(weights["lm_head.weight"], 2 * weights["embed.weight"])


@pytest.mark.parametrize("begin", ["module.", "language_model."])
def test_scales_are_named_as_their_weights_are(tiny_llama, tmp_path, begin):
    source, linears = tiny_llama(tie=False), ("_proj", "lm_head")
    folder, plain = quantise_folder(source, tmp_path / "fp8", "channels", shards=2, linears=linears)
    (folder / "model.safetensors.index.json").unlink()
    for file in folder.glob("*.safetensors"):
        save_file({f"{begin}{name}": tensor for name, tensor in load_file(file).items()}, file)
    actual, expected = load(folder), load(plain)
    assert list(actual) == list(expected) and "lm_head.weight" in actual
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


# What does not fit

MODULE = "model.layers.1.mlp.down_proj"
WEIGHT, SCALE = f"{MODULE}.weight", f"{MODULE}.weight_scale_inv"


def put(name, value):
    return lambda tensors: tensors.update({name: value(tensors) if callable(value) else value})


def scaled_by(value):
    return put(SCALE, lambda tensors: tensors[SCALE].float().index_fill(1, torch.tensor(1), value))


DAMAGES = {
    "a scale is missing": (lambda t: t.pop(SCALE), rf"{WEIGHT} in .* has 0 scales beside it"),
    "a scale without weight": (lambda t: t.pop(WEIGHT), rf"{SCALE} in .* is a scale without {WEIGHT}"),
    "a weight that is not in FP8": (put(WEIGHT, torch.ones(160, 200)), rf"{SCALE} .* scales a weight of F32"),
    "two scales": (put(f"{MODULE}.weight_scale", torch.ones(2, 2)), "has 2 scales"),
    "one block too few": (put(SCALE, torch.ones(1, 2)), r"mis-shaped scale of .*down_proj.* \[1, 2\].* has \[2, 2\]"),
    "transposed": (
        put("model.layers.1.self_attn.v_proj.weight_scale_inv", torch.ones(2, 1)),
        r"\[2, 1\].* has \[1, 2\]",
    ),
    "one scale in all": (put(SCALE, torch.ones(())), r"mis-shaped scale .* \[\];"),
    "a scale a row": (put(SCALE, torch.ones(160, 1)), r"mis-shaped scale .* \[160, 1\]"),
    "a scale of integers": (put(SCALE, torch.ones(2, 2, dtype=torch.int32)), "unsupported dtype I32 of the scale"),
    "a NaN": (scaled_by(float("nan")), rf"{SCALE} holds a scale that is not positive and finite"),
    "infinity": (scaled_by(float("inf")), f"{SCALE} holds a scale"),
    "zero": (scaled_by(0.0), f"{SCALE} holds a scale"),
    "below zero": (scaled_by(-1.0), f"{SCALE} holds a scale"),
    "too large": (scaled_by(3e38), rf"{WEIGHT} has a NaN, or numbers too large for torch\.float32"),
    "a NaN among the numbers": (lambda t: t[WEIGHT].view(torch.uint8)[3, 4:5].fill_(0x7F), f"{WEIGHT} has a NaN"),
    "e5m2": (put(WEIGHT, lambda t: t[WEIGHT].float().to(torch.float8_e5m2)), r"scales a weight of F8_E5M2"),
    "a norm in FP8": (
        put("model.norm.weight", lambda t: t["model.norm.weight"].to(torch.float8_e4m3fn)),
        r"model\.norm\.weight in .* \[160\]; only matrices",
    ),
    "a bias in FP8": (
        put(f"{MODULE}.bias", torch.ones(1, 160).to(torch.float8_e4m3fn)),
        r"down_proj\.bias in .* only matrices",
    ),
    "widened already": (
        lambda t: [t.update({n: v.float()}) if n.endswith("weight") else t.pop(n) for n, v in list(t.items())],
        "no weight is of F8_E4M3.* remove its quantization_config",
    ),
    "packed in 4 bits": (put(f"{MODULE}.weight_packed", torch.ones(2, 2)), r"quantised \(compressed-tensors"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_scales_that_do_not_fit_are_named(tiny_llama, tmp_path, name):
    folder, _ = quantise_folder(tiny_llama(**SIZES), tmp_path / "fp8", "qwen3")
    change, message = DAMAGES[name]
    change_tensors(folder, change)
    with pytest.raises(CheckpointError, match=message) as error:
        load(folder)
    assert "model.safetensors" in str(error.value)


def test_what_float16_cannot_hold_is_not_made_infinite(tiny_llama, tmp_path):
    folder, _ = quantise_folder(tiny_llama(**SIZES), tmp_path / "fp8", "qwen3")
    change_tensors(folder, scaled_by(200.0))
    assert load(folder)
    with pytest.raises(CheckpointError, match=f"{WEIGHT} has a NaN, or numbers too large for torch.float16"):
        load(folder, torch.float16)


def test_fp8_tensors_that_config_json_does_not_tell_of(tiny_llama, tmp_path):
    folder, _ = quantise_folder(tiny_llama(), tmp_path / "fp8", "qwen3")
    change_config(folder, quantization_config=None)
    with pytest.raises(UnsupportedModelError, match=r"quantised \(fp8: tensor .*no quantization_config that says how"):
        load(folder)


GROUP = compressed("channel")["config_groups"]["group_0"]
INT4 = {"weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True}}


@pytest.mark.parametrize(
    ("quantised", "message"),
    [
        ({**QWEN, "fmt": "e5m2"}, "fmt 'e5m2'"),
        ({**QWEN, "activation_scheme": "odd"}, "activation_scheme 'odd'"),
        ({**QWEN, "scale_fmt": "int"}, "scale_fmt 'int'"),
        ({**QWEN, "expert_dtype": "fp4"}, "expert_dtype 'fp4'"),
        ({**QWEN, "rotation": {"kind": "hadamard"}}, "'rotation'"),
        *(
            ({**QWEN, "weight_block_size": size}, "weight_block_size .* two positive integers")
            for size in (
                [128],
                [0, 128],
                [-1, 1],
                [128.0, 128],
                [True, 128],
                [128] * 3,
                "128",
                128,
                ["a", "b"],
                {},
                [],
                [128, 2**31],
            )
        ),
        ({**compressed("channel"), "format": "int-quantized"}, r"quantised \(compressed-tensors, format int-quantized"),
        ({**compressed("channel"), "format": "nvfp4-pack-quantized"}, "format nvfp4-pack-quantized"),
        ({**compressed("channel"), "transform_config": {"config_groups": {"u": {}}}}, "'transform_config'"),
        ({**compressed("channel"), "sparsity_config": {"format": "sparse-24-bitmask"}}, "'sparsity_config'"),
        ({**compressed("channel"), "config_groups": {"a": GROUP, "b": INT4}}, r"quantised \(compressed-tensors"),
        ({**compressed("channel"), "config_groups": {}}, r"quantised \(compressed-tensors"),
        (compressed("group", group_size=128), "'group_size' 128"),
        (compressed("tensor_group"), "strategy 'tensor_group'"),
        (compressed("channel", symmetric=False), "symmetric False"),
        (compressed("block"), "block_structure None"),
        (compressed("channel", num_bits=4, type="int"), r"quantised \(compressed-tensors"),
        ({"quant_method": "gptq", "bits": 4}, r"quantised \(gptq\)"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, r"quantised \(modelopt, quant_algo NVFP4\)"),
        ({"quant_method": "fbgemm_fp8"}, r"quantised \(fbgemm_fp8\)"),
        ({"group_size": 64, "bits": 4}, r"quantised \(MLX\)"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, r"quantised \(bitsandbytes\)"),
        ({"quant_method": ["fp8"]}, r"quantised \(\['fp8'\]\)"),
        ("fp8", r"quantised \('fp8'\)"),
        ({"weird": 1}, r"quantised \(\{'weird': 1\}\)"),
    ],
)
def test_other_forms_are_refused_by_name(tiny_llama, quantised, message):
    config = load_config(tiny_llama())
    with pytest.raises(UnsupportedModelError, match=message) as error:
        spec_from_config(config | {"quantization_config": quantised})
    assert len(str(error.value)) < 1000


def test_a_multimodal_config_says_it_outside_or_inside():
    text = {
        "model_type": "ministral3", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300,
    }  # fmt: skip
    outside = {"model_type": "mistral3", "text_config": text, "quantization_config": MINISTRAL}
    inside = {"model_type": "mistral3", "text_config": {**text, "quantization_config": MINISTRAL}}
    assert spec_from_config(outside) == spec_from_config(inside)
    assert str(spec_from_config(outside).layout.fp8) == "fp8 (per tensor)"


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300)
@given(form=st.sampled_from(sorted(FORMS)), data=st.data(), value=VALUES)
def test_whatever_quantization_config_holds_the_error_is_one_of_ours(tiny_llama, form, data, value):
    config = json.loads(json.dumps(FORMS[form][0]))
    place = config
    while True:
        name = data.draw(st.sampled_from(sorted(place)))
        if not (isinstance(place[name], dict) and place[name] and data.draw(st.booleans())):
            break
        place = place[name]
    place[name] = value
    try:
        spec_from_config(load_config(tiny_llama()) | {"quantization_config": config})
    except CheckpointError as error:
        assert len(str(error)) < 2000

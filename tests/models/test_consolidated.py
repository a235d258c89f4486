"""Mistral's own layout: the same model as in Hugging Face files, tensor for tensor."""

import json
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from minirksc.errors import CheckpointError, UnsupportedModelError
from minirksc.models.config.consolidated import LAYER_NAMES, TOP_NAMES, config_from_params, hf_name, read_params
from minirksc.models.families import spec_from_config
from minirksc.models.weights.rules import checkpoint_report, iter_weights
from minirksc.models.weights.safetensors_file import read_entries, read_into

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, LAYERS = 4, 2, 24, 64, 2
PARAMS = {
    "dim": HIDDEN, "n_layers": LAYERS, "head_dim": HEAD_DIM, "hidden_dim": 96, "n_heads": HEADS,
    "n_kv_heads": KV_HEADS, "norm_eps": 1e-5, "vocab_size": 300, "rope_theta": 1e6,
}  # fmt: skip
YARN = {"original_max_position_embeddings": 16384, "factor": 16, "apply_scale": False, "beta": 32, "alpha": 1}
GROWTH = {"original_max_position_embeddings": 16384, "beta": 0.1}
VISION = {"vision_encoder": {"hidden_size": 8, "num_hidden_layers": 1}}


def interleaved(rows, heads):
    """Rows of each head from halves apart to rotary pairs side by side."""
    return rows.view(heads, 2, -1, rows.shape[-1]).transpose(1, 2).reshape(rows.shape)


def consolidated(tensors):
    """Tensors by their Hugging Face names -> in Mistral's layout."""
    own = {hf: name for name, hf in TOP_NAMES.items()}
    for layer in range(LAYERS):
        own |= {
            f"model.layers.{layer}.{hf}.weight": f"layers.{layer}.{name}.weight" for name, hf in LAYER_NAMES.items()
        }
    heads = {"q_proj": HEADS, "k_proj": KV_HEADS}
    made = {}
    for name, tensor in tensors.items():
        part = name.split(".")[-2]
        made[own[name]] = interleaved(tensor, heads[part]).contiguous() if part in heads else tensor.contiguous()
    return made


@pytest.fixture()
def folder(tmp_path, tiny_llama):
    """A folder with params.json and consolidated.safetensors; the tensors of a Mistral are those of a Llama."""
    shutil.copy(tiny_llama(tie=False) / "model.safetensors", tmp_path / "of-hf.safetensors")
    folder = tmp_path / "mistral"
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps(PARAMS))
    save_file(consolidated(load_file(tmp_path / "of-hf.safetensors")), folder / "consolidated.safetensors")
    return folder


def load(folder):
    spec = spec_from_config(config_from_params(read_params(folder)))
    return dict(iter_weights(folder, spec, torch.float32))


def assert_same(first, second):
    assert list(first) == list(second)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.oracle
def test_a_model_of_transformers_comes_back_tensor_for_tensor(tmp_path):
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        hidden_size=HIDDEN, num_hidden_layers=LAYERS, head_dim=HEAD_DIM, intermediate_size=96, vocab_size=300,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, rms_norm_eps=1e-5, sliding_window=None,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6}, max_position_embeddings=512,
    )  # fmt: skip
    torch.manual_seed(0)
    model = MistralForCausalLM(config)
    model.save_pretrained(tmp_path / "hf")
    own = tmp_path / "own"
    own.mkdir()
    (own / "params.json").write_text(json.dumps({**PARAMS, "max_seq_len": 512}))
    save_file(consolidated(model.state_dict()), own / "consolidated.safetensors")
    spec = spec_from_config(json.loads((tmp_path / "hf" / "config.json").read_text()))
    assert spec_from_config(config_from_params(read_params(own))) == spec
    assert_same(load(own), dict(iter_weights(tmp_path / "hf", spec, torch.float32)))


def test_a_config_json_beside_it_is_enough_for_the_engine(folder, tiny_llama):
    from minirksc import LLM

    source = tiny_llama(tie=False)
    shutil.copy(source / "config.json", folder)
    ids = [5, 60, 7, 7, 33, 2]
    with LLM(folder, kv_cache_bytes="1MiB") as own, LLM(source, kv_cache_bytes="1MiB") as hf:
        assert torch.equal(own.logits(ids), hf.logits(ids))


def test_the_permutation_is_the_one_of_the_published_conversion(folder):
    rows = load_file(folder / "consolidated.safetensors")["layers.0.attention.wk.weight"]
    entry = read_entries(folder)["model.layers.0.self_attn.k_proj.weight"]
    out = torch.empty(rows.shape)
    read_into(entry, out)
    # As convert_mistral_weights_to_hf of transformers does it.
    expected = rows.view(KV_HEADS, HEAD_DIM // 2, 2, HIDDEN).transpose(1, 2).reshape(rows.shape)
    assert torch.equal(out, expected) and not torch.equal(out, rows)


@settings(max_examples=30)
@given(
    heads=st.integers(1, 5),
    pairs=st.integers(1, 6),
    columns=st.integers(1, 7),
    stored=st.sampled_from([torch.float32, torch.bfloat16]),
    wanted=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_reading_interleaved_rows_undoes_the_interleaving(tmp_path_factory, heads, pairs, columns, stored, wanted):
    folder = tmp_path_factory.mktemp("rows")
    rows = torch.arange(heads * 2 * pairs * columns).view(heads * 2 * pairs, columns).to(stored)
    save_file(
        {"layers.0.attention.wq.weight": interleaved(rows, heads).contiguous()}, folder / "consolidated.safetensors"
    )
    (folder / "params.json").write_text(json.dumps({"n_heads": heads}))
    out = torch.empty(rows.shape, dtype=wanted)
    read_into(read_entries(folder)["model.layers.0.self_attn.q_proj.weight"], out)
    assert torch.equal(out, rows.to(wanted))


def test_shards_and_their_index(folder):
    whole = load(folder)
    file = folder / "consolidated.safetensors"
    tensors = load_file(file)
    file.unlink()
    names = sorted(tensors)
    weight_map = {}
    for i in range(2):
        shard = f"consolidated-0000{i + 1}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names[i::2]}, folder / shard)
        weight_map |= dict.fromkeys(names[i::2], shard)
    assert_same(load(folder), whole)
    (folder / "consolidated.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_same(load(folder), whole)


@pytest.mark.parametrize("name", ["model.safetensors", "model-00001-of-00001.safetensors"])
def test_hugging_face_files_come_first(folder, name):
    whole = load(folder)
    shutil.copy(folder.parent / "of-hf.safetensors", folder / name)
    (folder / "consolidated.safetensors").write_bytes(b"never read")
    assert_same(load(folder), whole)


def test_images_are_left_out_and_counted(folder):
    whole = load(folder)
    tensors = load_file(folder / "consolidated.safetensors")
    extra = ("vision_encoder.patch_conv.weight", "vision_language_adapter.w_in.weight", "patch_merger.x.weight")
    save_file(tensors | {name: torch.ones(2) for name in extra}, folder / "consolidated.safetensors")
    with pytest.raises(CheckpointError, match=r"unexpected vision_encoder\.patch_conv\.weight"):
        load(folder)
    (folder / "params.json").write_text(json.dumps(PARAMS | VISION))
    assert_same(load(folder), whole)
    spec = spec_from_config(config_from_params(PARAMS | VISION))
    assert sorted(checkpoint_report(folder, spec).skipped) == sorted(extra)


def test_names_are_matched_whole():
    assert hf_name("layers.3.attention.wk.weight", PARAMS) == ("model.layers.3.self_attn.k_proj.weight", KV_HEADS)
    assert hf_name("layers.3.attention.wk.weight", {"n_heads": 4})[1] == 4
    assert hf_name("layers.3.attention.wv.weight", PARAMS)[1] is None
    for strange in ("layers.x.attention.wq.weight", "layers.0.attention.wq.bias", "blayers.0.ffn_norm.weight", "norm"):
        assert hf_name(strange, PARAMS) == (strange, None)


def test_the_config_says_what_params_say():
    config = config_from_params(PARAMS)
    spec = spec_from_config(config)
    assert config["model_type"] == "mistral" and config["sliding_window"] is None
    assert (spec.eos_token_ids, spec.bos_token_id, spec.tie_word_embeddings) == ((2,), 1, False)
    assert spec.max_position_embeddings == 32768
    assert {layer.window for layer in spec.layers} == {None} and spec.layers[0].rope.theta == 1e6


def test_the_first_mistral_has_a_window_and_no_theta():
    params = {name: value for name, value in PARAMS.items() if name != "rope_theta"}
    spec = spec_from_config(config_from_params({**params, "sliding_window": "4096"}))
    assert {layer.window for layer in spec.layers} == {4096} and spec.layers[0].rope.theta == 1e4
    with pytest.raises(CheckpointError, match="lacks rope_theta"):
        config_from_params(params)


def test_layers_with_different_windows():
    params = {**PARAMS, "n_layers": 4, "sliding_window": [None, 8], "max_seq_len": 64}
    assert [layer.window for layer in spec_from_config(config_from_params(params)).layers] == [None, 8, None, 8]
    params["sliding_window"] = [64, 8, 8, 8]  # a window that never hides anything
    assert [layer.window for layer in spec_from_config(config_from_params(params)).layers] == [None, 8, 8, 8]
    for wrong in ([4, 8], [None, 8, 8], []):
        with pytest.raises(UnsupportedModelError, match="sliding_window"):
            config_from_params({**params, "sliding_window": wrong})


@pytest.mark.oracle
@pytest.mark.parametrize("apply_scale", [False, True])
def test_yarn_and_growing_queries_are_what_transformers_computes(apply_scale):
    from transformers import Ministral3Config
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    from minirksc.models.rope import inv_freq

    params = {**PARAMS, "yarn": {**YARN, "apply_scale": apply_scale}, "llama_4_scaling": GROWTH}
    config = config_from_params({**params, "max_position_embeddings": 262144})
    assert config["model_type"] == "ministral3" and config == config_from_params(params)
    theirs = Ministral3Config(**{name: value for name, value in config.items() if name != "model_type"})
    expected, factor = ROPE_INIT_FUNCTIONS["yarn"](theirs, "cpu")
    spec = spec_from_config(config)
    rope = spec.layers[0].rope
    torch.testing.assert_close(inv_freq(rope), expected, rtol=1e-6, atol=0)
    assert rope.attention_factor == pytest.approx(factor)
    assert (factor == 1) is not apply_scale
    assert spec.query_growth == (0.1, 16384)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quantization": {"qformat_weight": "nvfp4", "qscheme_act": "TENSOR"}}, r"quantised .*nvfp4"),
        ({"quantization": {"qformat_weight": "fp8_e4m3", "qscheme_act": "BLOCK"}}, r"quantised .*BLOCK"),
        ({"quantization": 7}, r"quantised .*7"),
        ({"moe": {"num_experts": 8}}, "moe: a mixture of experts"),
        ({"model_type": "mamba"}, "model_type 'mamba'"),
        ({"activation": "gelu"}, "activation 'gelu'"),
        ({"causal": False}, "causal False"),
        ({"q_lora_rank": 12}, r"fields that nothing reads: q_lora_rank=12"),
        ({"dim": None}, "lacks dim"),
        ({"sliding_window": "wide"}, "sliding_window 'wide' must be an integer"),
        ({"max_seq_len": "long", "sliding_window": [4, None]}, "max_seq_len 'long' must be a positive number"),
        ({"yarn": {"factor": 16}}, "yarn .* must have factor"),
        ({"yarn": {**YARN, "mscale": 2}}, "yarn .* must have factor"),
        ({"yarn": YARN, "llama_4_scaling": {**GROWTH, "original_max_position_embeddings": 1}}, "llama_4_scaling"),
        ({"yarn": YARN, "llama_4_scaling": {**GROWTH, "gamma": 1}}, "llama_4_scaling"),
        ({"llama_4_scaling": GROWTH}, "llama_4_scaling .* without yarn"),
    ],
)
def test_params_that_would_change_the_mathematics_are_refused(change, message):
    with pytest.raises(CheckpointError, match=message):
        config_from_params({**PARAMS, **change})


def test_missing_or_damaged_params(folder):
    (folder / "params.json").write_text(json.dumps({**PARAMS, "n_kv_heads": 7}))
    with pytest.raises(CheckpointError, match=r"attention\.wk\.weight has 48 rows, which 7 heads"):
        read_entries(folder)
    shapeless = {"layers.0.attention.wq.weight": torch.ones(())}
    save_file(shapeless, folder / "consolidated.safetensors")
    with pytest.raises(CheckpointError, match=r"attention\.wq\.weight has 0 rows"):
        read_entries(folder)
    for text, message in (("[]", "must hold a JSON object"), ("{", "not readable JSON"), ("[" * 10**5, "not readable")):
        (folder / "params.json").write_text(text)
        with pytest.raises(CheckpointError, match=message):
            read_params(folder)
    (folder / "params.json").unlink()
    with pytest.raises(CheckpointError, match=r"params\.json does not exist"):
        read_entries(folder)

"""The whole engine on the Triton kernels, in Triton's interpreter on the CPU: the tokens of the torch backend.

Checkpoints are as small as they can be and contexts short: a step takes tens of milliseconds here.
"""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from integrity import check_integrity

from minirksc import LLM, SamplingParams
from minirksc.errors import CacheFullError, ConfigError
from minirksc.kernels.backend import choose_backend
from minirksc.kernels.native.ops import native

pytest.importorskip("transformers")
pytest.importorskip("triton")
sys.path.append(str(Path(__file__).parents[1] / "models"))  # in importlib mode pytest does not add it
zoo, rows = importlib.import_module("zoo"), importlib.import_module("zoo_rows")

NEW_TOKENS = 3
WINDOW = 8
SMALL = {**rows.SIZES, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16}
GEMMA = {**rows.GEMMA, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "sliding_window": WINDOW}
MIXED = {"layer_types": [rows.SLIDING, rows.FULL]}


def gemma(model_type, fields):
    return zoo.Row(f"triton-{model_type}", model_type, {**GEMMA, **fields}, embed_std=rows.GEMMA_EMBED_STD)


ROWS = {
    row.model_type: row
    for row in (
        zoo.Row("triton-llama", "llama", {**SMALL, "attention_bias": True, "mlp_bias": True}),
        zoo.Row("triton-qwen3", "qwen3", {**SMALL, "num_attention_heads": 6, "head_dim": 20}),  # norms of q and k
        zoo.Row("triton-mistral", "mistral", {**SMALL, "sliding_window": WINDOW}),
        gemma("gemma2", {**MIXED, **rows.SOFTCAPS, "head_dim": 16}),
        gemma("gemma3_text", {**MIXED, "num_key_value_heads": 1, "head_dim": 32, "query_pre_attn_scalar": 13}),
    )
}
# Layers that read another's keys, norms of values, a vector a layer and token, a scale a layer.
GEMMA4 = gemma(
    "gemma4_text",
    {
        **rows.GEMMA4_TEXT,
        **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "sliding_window": WINDOW},
        **{"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": GEMMA["vocab_size"]},
        **{"layer_types": [rows.SLIDING, rows.FULL, rows.FULL], "num_kv_shared_layers": 1},
    },
)
ROOT = zoo.make_prompt(11, 3)
TAILS = [zoo.make_prompt(length, length) for length in (1, 3, 6)]
PROMPTS = [ROOT + tail for tail in TAILS]
OTHERS = [zoo.make_prompt(length, length) for length in (7, 8, 6)]  # two reach into a second block when continued


def greedy(num_tokens):
    return SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)


GREEDY = greedy(NEW_TOKENS)


@pytest.fixture(scope="module", params=ROWS)
def case(request, zoo_dir):
    """(folder, tokens of the torch backend by the dtype of the cache)."""
    row = ROWS[request.param]
    folder = zoo.build(row, zoo_dir / row.id)
    expected = {}
    for kv_cache_dtype in ("auto", "int8"):
        with open_llm(folder, backend="torch", kv_cache_dtype=kv_cache_dtype) as llm:
            expected[kv_cache_dtype] = tokens(llm.generate(PROMPTS, GREEDY))
    assert all(len(set(one)) > 1 for one in expected["auto"])  # a model that repeats itself would prove little
    return folder, expected


def open_llm(folder, **options):
    options = {"kv_cache_bytes": "1MiB", "dtype": "float32", "backend": "triton", "block_size": 8, **options}
    llm = LLM(folder, **options)
    for layer in llm.engine.runner.cache.layers:
        if layer.scales is None:
            layer.kv.fill_(torch.nan)  # what nobody has written must not be read
        else:
            layer.scales.fill_(torch.nan)
    return llm


def tokens(outputs):
    return [out.outputs[0].token_ids for out in outputs]


def test_batched_chunked_and_cached(case):
    folder, expected = case
    with open_llm(folder, max_batch_tokens=9) as llm:
        assert llm.stats()["backend"] == "triton"
        assert tokens(llm.generate(PROMPTS[:2], GREEDY)) == expected["auto"][:2]
        assert tokens(llm.generate(PROMPTS[2:], GREEDY)) == expected["auto"][2:]
        assert llm.stats()["num_cached_tokens"] > 0
        check_integrity(llm.engine.blocks)


def test_keys_split_by_how_much_there_is_to_do(zoo_dir):
    folder = zoo.build(ROWS["llama"], zoo_dir / ROWS["llama"].id)
    with open_llm(folder, backend="torch") as llm:
        expected = tokens(llm.generate(PROMPTS[:1], GREEDY))
    with open_llm(folder, kv_split="adaptive") as llm:
        assert tokens(llm.generate(PROMPTS[:1], GREEDY)) == expected
    with pytest.raises(ConfigError, match="kv_split 'adaptive' is for the triton backend"):
        open_llm(folder, kv_split="adaptive", backend="torch")


def test_an_int8_cache_chunked_and_forked_within_a_block(case):
    folder, expected = case
    with open_llm(folder, max_batch_tokens=9, block_size=16, kv_cache_dtype="int8") as llm:
        root = llm.branch(ROOT)
        kids = root.fork(len(TAILS))
        for kid, tail in zip(kids, TAILS, strict=True):
            kid.append(tail)
        llm.extend(kids, GREEDY)
        assert [kid.output_token_ids for kid in kids] == expected["int8"]
        check_integrity(llm.engine.blocks)


@pytest.mark.parametrize("model_type", ["qwen3", "gemma3_text"])  # one pool, two pools
def test_preempted(zoo_dir, model_type):
    row = ROWS[model_type]
    folder = zoo.build(row, zoo_dir / row.id)
    with open_llm(folder, backend="torch") as llm:
        expected = tokens(llm.generate(OTHERS, GREEDY))
    with open_llm(folder, kv_cache_bytes=smallest_pool(folder, 4)) as llm:
        assert tokens(llm.generate(OTHERS, GREEDY)) == expected
        assert llm.stats()["num_preemptions"] > 0
        check_integrity(llm.engine.blocks)


def smallest_pool(folder, num_blocks):
    """Bytes of a cache with so many blocks of 8 tokens."""
    num_bytes = 5_000  # too little for so many
    while True:
        try:
            with open_llm(folder, kv_cache_bytes=num_bytes) as llm:
                if llm.stats()["num_blocks_total"] >= num_blocks:
                    return num_bytes
        except CacheFullError:
            pass  # nor for a window
        num_bytes += num_bytes // 16


def test_gemma_4(zoo_dir):
    folder = zoo.build(GEMMA4, zoo_dir / GEMMA4.id)
    found = []
    for backend in ("torch", "triton"):
        with open_llm(folder, backend=backend, kv_cache_dtype="int8", max_batch_tokens=9) as llm:
            found.append(tokens(llm.generate(PROMPTS[:1], GREEDY)))
    assert found[0] == found[1]


def test_many_branches_read_one_long_prefix(zoo_dir):
    """Long enough for the shared run to be an item of its own."""
    row = ROWS["llama"]
    folder = zoo.build(row, zoo_dir / row.id)
    found = []
    for backend in ("torch", "triton"):
        with open_llm(folder, backend=backend) as llm:
            kids = llm.branch(zoo.make_prompt(37, 4)).fork(3)
            for index, kid in enumerate(kids):
                kid.append([10 + index])
            llm.extend(kids, greedy(2))
            scores = llm.score(kids[:2], [7, 8], [[9], [11]])
            found.append(([kid.output_token_ids for kid in kids], scores))
    assert found[0][0] == found[1][0]
    torch.testing.assert_close(found[0][1], found[1][1], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_logits_in_float16_are_near_those_of_the_reference(zoo_dir, model_type):
    row = ROWS[model_type]
    folder = zoo.build(row, zoo_dir / row.id)
    found = []
    for options in ({"backend": "reference", "dtype": "float32"}, {"backend": "reference"}, {"backend": "triton"}):
        with open_llm(folder, **{"dtype": "float16", **options}) as llm:
            found.append(llm.logits(PROMPTS[0]))
    exact, reference, triton = found
    assert (triton - exact).square().mean() < 2 * (reference - exact).square().mean()


# Which backend runs

MODEL = (torch.float32, {64})
FASTEST = "torch" if native is None else "native"
"""Of a CPU, in float32."""


def test_the_devices_backend_is_chosen():
    assert choose_backend("auto", torch.device("cpu"), *MODEL).name == FASTEST
    assert choose_backend("auto", torch.device("cuda", 1), *MODEL).name == "triton"
    assert choose_backend("reference", torch.device("cuda"), *MODEL).name == "reference"
    with pytest.raises(ConfigError, match=r"'torch' runs on cpu, not on cuda:0.*backend='auto'"):
        choose_backend("torch", torch.device("cuda", 0), *MODEL)
    with pytest.raises(ConfigError, match=r"'cuda' is unknown.*auto, triton, torch, native, reference"):
        choose_backend("cuda", torch.device("cpu"), *MODEL)


def test_triton_on_a_cpu_needs_the_interpreter(monkeypatch):
    import triton

    assert choose_backend("triton", torch.device("cpu"), *MODEL).name == "triton"
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    assert choose_backend("triton", torch.device("cuda"), *MODEL).name == "triton"
    with pytest.raises(ConfigError, match=r"'triton' runs on cuda, not on cpu.*backend='auto'"):
        choose_backend("triton", torch.device("cpu"), *MODEL)


@pytest.mark.parametrize("name", ["triton", "auto"])
def test_triton_that_is_not_installed(monkeypatch, name):
    monkeypatch.setattr("minirksc.kernels.backend.triton", object())
    with pytest.raises(ConfigError, match=r"not installed; pip install 'minirksc\[gpu\]'"):
        choose_backend(name, torch.device("cuda"), *MODEL)
    assert choose_backend("auto", torch.device("cpu"), *MODEL).name == FASTEST


@pytest.mark.parametrize(
    ("dtype", "head_dims", "reason"),
    [
        (torch.float16, {64}, "it computes in float32 and bfloat16, not in float16"),
        (torch.float32, {64, 20, 12}, "head_dim 12 is no multiple of 8"),
    ],
)
def test_what_the_compiled_operations_do_not_serve_is_left_to_torch(dtype, head_dims, reason):
    cpu = torch.device("cpu")
    reason = reason if native is not None else "not built|no AVX2"
    assert choose_backend("auto", cpu, dtype, head_dims).name == "torch"
    with pytest.raises(ConfigError, match=rf"'native' cannot serve this model: .*({reason}).*backend='auto'"):
        choose_backend("native", cpu, dtype, head_dims)
    with pytest.raises(ConfigError, match=r"'native' runs on cpu, not on cuda"):
        choose_backend("native", torch.device("cuda"), dtype, head_dims)


@pytest.mark.parametrize("block_size", [1, 4, 12, 24, 256])
def test_block_sizes_that_no_kernel_has(tiny_llama, block_size):
    with pytest.raises(ConfigError, match=rf"block_size {block_size} .*triton.* one of 8, 16, 32, 64, 128"):
        LLM(tiny_llama(), backend="triton", block_size=block_size)
    with LLM(tiny_llama(), block_size=block_size, kv_cache_bytes="1MiB") as llm:
        assert llm.stats()["backend"] == FASTEST

"""An int8 KV cache, end to end: near the model's own, the same tokens however they were computed, and less memory.

Keys of equal tokens may differ in their last bit from batch to batch, as they do in any dtype; where that moves one
across the border between two int8 numbers, it becomes one step of 127. So logits of two ways to compute the same are
not held to the rounding of float32, but to a quarter of what int8 itself changes.
"""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from integrity import check_integrity

from minirksc import LLM, SamplingParams

pytest.importorskip("transformers")
sys.path.append(str(Path(__file__).parents[1] / "models"))  # in importlib mode pytest does not add it
zoo, rows = importlib.import_module("zoo"), importlib.import_module("zoo_rows")

NEW_TOKENS = 20
GREEDY = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)
ROOT = zoo.make_prompt(2 * rows.WINDOW + 5, 1)
TAILS = [zoo.make_prompt(length, length) for length in (1, 9, 16, 35)]
PROMPTS = [ROOT + tail for tail in TAILS]
LONG = zoo.make_prompt(zoo.LONG)

# Root mean square of what int8 changes in the logits, in parts of their standard deviation. These checkpoints are
# made to react to everything; those with wild norms of keys react most.
TOLERANCE = {
    "llama-plain": 0.1,
    "mistral-window": 0.1,
    "gemma2-softcaps": 0.05,
    "gemma3_text-linear": 0.05,
    "gemma4_text-shared-kv": 0.2,
}


@pytest.fixture(scope="module", params=TOLERANCE)
def case(request, zoo_dir):
    """(name, folder, tokens that each prompt alone gives in the plainest engine with an int8 cache)."""
    row = rows.BY_ID[request.param]
    folder = zoo.build(row, zoo_dir / row.id)
    with open_llm(folder, backend="reference", prefix_caching=False) as llm:
        alone = [tokens(llm.generate([prompt], GREEDY))[0] for prompt in PROMPTS]
    assert all(len(set(one)) > 2 for one in alone)  # a model that repeats itself would prove little
    return row.id, folder, alone


def open_llm(folder, **options):
    llm = LLM(folder, **{"kv_cache_bytes": "8MiB", "dtype": "float32", "kv_cache_dtype": "int8", **options})
    for layer in llm.engine.runner.cache.layers:
        if layer.scales is not None:
            layer.kv.fill_(99)
            layer.scales.fill_(torch.nan)  # what nobody has written must not be read
    return llm


def tokens(outputs):
    return [out.outputs[0].token_ids for out in outputs]


def rms(x):
    return x.square().mean().sqrt().item()


@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_alone_batched_and_cached(case, block_size):
    _, folder, expected = case
    with open_llm(folder, block_size=block_size) as llm:
        assert tokens(llm.generate(PROMPTS[:1], GREEDY)) == expected[:1]
        llm.reset_prefix_cache()
        assert tokens(llm.generate(PROMPTS, GREEDY)) == expected
        cached = llm.generate(PROMPTS, GREEDY)
        assert tokens(cached) == expected
        assert any(output.num_cached_tokens for output in cached)
        check_integrity(llm.engine.blocks)


@pytest.mark.parametrize("max_batch_tokens", [1, 7])
def test_chunked_prefill(case, max_batch_tokens):
    _, folder, expected = case
    with open_llm(folder, max_batch_tokens=max_batch_tokens, block_size=4) as llm:
        assert tokens(llm.generate(PROMPTS, GREEDY)) == expected


@pytest.mark.parametrize("block_size", [4, 16])
def test_forked_within_a_block(case, block_size):
    """The last block of the root is copied for each branch, numbers and scales."""
    _, folder, expected = case
    assert len(ROOT) % block_size
    with open_llm(folder, block_size=block_size) as llm:
        root = llm.branch(ROOT)
        kids = root.fork(len(TAILS))
        for kid, tail in zip(kids, TAILS, strict=True):
            kid.append(tail)
        llm.extend(kids, GREEDY)
        assert [kid.output_token_ids for kid in kids] == expected
        again = root.fork(1)[0]  # what the branches wrote is not the root's
        again.append(TAILS[1])
        llm.extend([again], GREEDY)
        assert again.output_token_ids == expected[1]
        check_integrity(llm.engine.blocks)


def test_preempted(case):
    _, folder, expected = case
    num_blocks = (max(map(len, PROMPTS)) + NEW_TOKENS) // 4 + 2  # one request and little more
    scarce = smallest_pool(folder, num_blocks)
    with open_llm(folder, block_size=4, kv_cache_bytes=scarce) as llm:
        assert tokens(llm.generate(PROMPTS, GREEDY)) == expected
        assert llm.stats()["num_preemptions"] > 0
        check_integrity(llm.engine.blocks)


def smallest_pool(folder, num_blocks):
    """Bytes of a cache with so many blocks of 4 tokens."""
    num_bytes = 20_000  # enough for any window, too little for so many blocks
    while blocks_in(folder, block_size=4, kv_cache_bytes=num_bytes) < num_blocks:
        num_bytes += num_bytes // 16
    return num_bytes


def test_logits_are_near_those_of_the_models_own_cache(case):
    name, folder, _ = case
    with open_llm(folder, kv_cache_dtype="auto") as llm:
        own = llm.logits(LONG)
    with open_llm(folder) as llm:
        whole = llm.logits(LONG)
    error = rms(whole - own)
    assert 0 < error < TOLERANCE[name] * own.std().item()
    for options in ({"max_batch_tokens": 13}, {"max_batch_tokens": 1, "block_size": 4}, {"backend": "reference"}):
        with open_llm(folder, **options) as llm:
            assert rms(llm.logits(LONG) - whole) < 0.25 * error


def test_the_two_tensors_take_what_the_engine_says(case):
    """Bytes by the closed form: 1 a number and 4 a scale, for each token, and for its key and its value a head."""
    _, folder, _ = case
    block_size = 8
    with open_llm(folder, block_size=block_size) as llm:
        stats, spec = llm.stats(), llm.spec
        own = [index for index, layer in enumerate(spec.layers) if layer.kv_layer is None]
        layers = [llm.engine.runner.cache.layers[index] for index in own]
        for layer, index in zip(layers, own, strict=True):
            kind = spec.layers[index]
            has_pool_apart = stats["num_window_blocks_total"] > 0 and kind.window is not None
            num_blocks = stats["num_window_blocks_total" if has_pool_apart else "num_blocks_total"]
            num_bytes = num_blocks * block_size * 2 * kind.num_kv_heads * (kind.head_dim + 4)
            assert layer.kv.nbytes + layer.scales.nbytes == num_bytes
        assert sum(layer.kv.nbytes + layer.scales.nbytes for layer in layers) == stats["kv_cache_bytes"]


@pytest.mark.parametrize(("dtype", "head_dim"), [("float32", 24), ("float32", 64), ("bfloat16", 64), ("float16", 128)])
def test_the_same_bytes_hold_more_tokens(tiny_llama, dtype, head_dim):
    folder = tiny_llama(head_dim=head_dim)
    own, int8 = (blocks_in(folder, dtype=dtype, kv_cache_dtype=name) for name in ("auto", "int8"))
    itemsize = getattr(torch, dtype).itemsize
    assert int8 / own == pytest.approx(head_dim * itemsize / (head_dim + 4), rel=0.01)
    assert int8 > 1.8 * own


def blocks_in(folder, **options):
    with open_llm(folder, **options) as llm:
        return llm.stats()["num_blocks_total"]


def test_it_is_off_by_default_and_reported(tiny_llama):
    with LLM(tiny_llama(), kv_cache_bytes="1MiB", dtype="bfloat16") as llm:
        assert llm.stats()["kv_cache_dtype"] == "bfloat16"
        assert all(layer.scales is None for layer in llm.engine.runner.cache.layers)
    with open_llm(tiny_llama(), kv_cache_bytes="1MiB") as llm:
        assert llm.stats()["kv_cache_dtype"] == "int8"
        assert llm.config.kv_cache_dtype == "int8"
        assert {layer.kv.dtype for layer in llm.engine.runner.cache.layers} == {torch.int8}

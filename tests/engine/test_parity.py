"""Greedy tokens equal those of transformers, in every situation that must not change them."""

import pytest
import torch
from integrity import check_integrity

from minirksc import LLM, SamplingParams
from minirksc.kernels.native.ops import native, why_not

needs_native = pytest.mark.skipif(native is None, reason=f"nothing is compiled: {why_not(torch.float32, [])}")
NATIVE = pytest.param("native", marks=needs_native)
NUM_PROMPTS = 6
NEW_TOKENS = 24
GREEDY = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)


def make_prompts(vocab_size, seed=0):
    """Prompts of odd lengths; all begin alike, so that prefixes can be shared."""
    gen = torch.Generator().manual_seed(seed)
    shared = torch.randint(5, vocab_size, (21,), generator=gen).tolist()
    return [shared + torch.randint(5, vocab_size, (7 * i + 1,), generator=gen).tolist() for i in range(NUM_PROMPTS)]


@pytest.fixture(scope="module")
def case(tiny_llama):
    """(folder, prompts, transformers' greedy tokens)."""
    transformers = pytest.importorskip("transformers")
    folder = tiny_llama()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompts = make_prompts(model.config.vocab_size)
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            eos_token_id=None,
            pad_token_id=0,
        )
        expected.append(out[0, len(prompt) :].tolist())
    return folder, prompts, expected


def tokens(outputs):
    return [out.outputs[0].token_ids for out in outputs]


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("block_size", "backend"),
    [
        *(pytest.param(size, "native", marks=needs_native) for size in (1, 8, 16, 64)),
        *((1, "torch"), (16, "torch")),
        *((8, "reference"), (64, "reference")),
    ],
)
def test_alone_batched_and_cached(case, block_size, backend):
    folder, prompts, expected = case
    with LLM(folder, block_size=block_size, kv_cache_bytes="4MiB", backend=backend) as llm:
        assert [tokens(llm.generate([p], GREEDY))[0] for p in prompts] == expected
        llm.reset_prefix_cache()
        assert tokens(llm.generate(prompts, GREEDY)) == expected
        before = llm.stats()["num_cached_tokens"]
        assert tokens(llm.generate(prompts, GREEDY)) == expected
        assert llm.stats()["num_cached_tokens"] - before > sum(len(prompt) // 2 for prompt in prompts)


@pytest.mark.oracle
@pytest.mark.parametrize("max_batch_tokens", [1, 3, 17])
@pytest.mark.parametrize("backend", [NATIVE, "torch"])
def test_chunked_prefill(case, max_batch_tokens, backend):
    folder, prompts, expected = case
    with LLM(folder, kv_cache_bytes="4MiB", max_batch_tokens=max_batch_tokens, backend=backend) as llm:
        assert tokens(llm.generate(prompts, GREEDY)) == expected


@pytest.mark.oracle
@pytest.mark.parametrize("prefix_caching", [True, False])
@pytest.mark.parametrize("backend", [NATIVE, "torch"])
def test_preempted(case, prefix_caching, backend):
    folder, prompts, expected = case
    with LLM(folder, block_size=4, kv_cache_bytes="4MiB") as llm:
        block_bytes = llm.stats()["kv_cache_bytes"] // llm.stats()["num_blocks_total"]
    longest = max(map(len, prompts)) + NEW_TOKENS
    pool = (longest // 4 + 6) * block_bytes
    options = {"block_size": 4, "prefix_caching": prefix_caching, "backend": backend}
    with LLM(folder, kv_cache_bytes=pool, **options) as llm:
        assert tokens(llm.generate(prompts, GREEDY)) == expected
        assert llm.stats()["num_preemptions"] > 0
        assert llm.stats()["num_blocks_used"] == 0
        check_integrity(llm.engine.blocks)


@pytest.mark.oracle
@pytest.mark.parametrize("backend", [NATIVE, "torch"])
def test_forked(case, backend):
    folder, prompts, expected = case
    with LLM(folder, block_size=8, kv_cache_bytes="4MiB", backend=backend) as llm:
        root = llm.branch(prompts[0][:21])
        kids = root.fork(len(prompts))
        for kid, prompt in zip(kids, prompts, strict=True):
            kid.append(prompt[21:])
        llm.extend(kids, GREEDY)
        assert [kid.output_token_ids for kid in kids] == expected
        check_integrity(llm.engine.blocks)


@pytest.mark.oracle
def test_logits(case):
    transformers = pytest.importorskip("transformers")
    folder, prompts, _ = case
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = model(torch.tensor([prompts[-1]])).logits[0]
    for options in ({}, {"max_batch_tokens": 5}, {"backend": "torch"}, {"backend": "reference"}):
        with LLM(folder, kv_cache_bytes="4MiB", **options) as llm:
            torch.testing.assert_close(llm.logits(prompts[-1]), expected, atol=2e-4, rtol=1e-4)


@needs_native
@pytest.mark.parametrize("head_dim", [24, 32])  # prompts through torch, and all compiled
def test_logits_in_bfloat16_are_as_near_as_those_of_the_reference(tiny_llama, head_dim):
    folder = tiny_llama(head_dim=head_dim, attention_bias=True)
    prompt = make_prompts(64)[-1]
    found = []
    for backend, dtype in (("reference", "float32"), ("reference", "bfloat16"), ("native", "bfloat16")):
        with LLM(folder, kv_cache_bytes="4MiB", backend=backend, dtype=dtype) as llm:
            found.append(llm.logits(prompt).float())
    exact, reference, compiled = found
    assert (compiled - exact).square().mean() < 1.5 * (reference - exact).square().mean()


@needs_native
def test_logits_on_a_processor_of_256_bits(tiny_llama, monkeypatch):
    """There, bfloat16 weights are widened as they are multiplied."""
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX2")
    folder, prompt = tiny_llama(dtype="bfloat16", shards=3), make_prompts(64)[-1]
    found = []
    for backend in ("reference", "native"):
        with LLM(folder, kv_cache_bytes="4MiB", backend=backend, dtype="float32") as llm:
            found.append(llm.logits(prompt))
    torch.testing.assert_close(found[1], found[0], atol=2e-4, rtol=1e-4)


@pytest.mark.oracle
@pytest.mark.parametrize(
    "kwargs",
    [
        {"tie": False, "attention_bias": True, "mlp_bias": True},
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"hidden": 80, "heads": 5, "kv_heads": 1, "head_dim": 24},
        {"dtype": "bfloat16", "shards": 3},
    ],
    ids=["biases-untied", "llama3-rope", "linear-rope", "odd-heads", "bf16-shards"],
)
def test_variants_of_the_family(tiny_llama, kwargs):
    transformers = pytest.importorskip("transformers")
    folder = tiny_llama(**kwargs)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = make_prompts(model.config.vocab_size)[-1]
    with torch.no_grad():
        expected = model(torch.tensor([prompt])).logits[0]
    with LLM(folder, kv_cache_bytes="4MiB", dtype="float32") as llm:
        torch.testing.assert_close(llm.logits(prompt), expected, atol=2e-4, rtol=1e-4)

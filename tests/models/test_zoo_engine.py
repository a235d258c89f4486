"""Greedy tokens are the same in every situation that must not change them, for every kind of window and rotation."""

import importlib
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from integrity import check_integrity

from minirksc import LLM, SamplingParams
from minirksc.kernels.native.ops import native, why_not

pytest.importorskip("transformers")
sys.path.append(str(Path(__file__).parent))  # in importlib mode pytest does not add it
zoo, rows = importlib.import_module("zoo"), importlib.import_module("zoo_rows")

pytestmark = pytest.mark.oracle
needs_native = pytest.mark.skipif(native is None, reason=f"nothing is compiled: {why_not(torch.float32, [])}")
BACKENDS = [
    *(pytest.param(size, "native", marks=needs_native) for size in (1, 4, 16)),
    *((1, "torch"), (16, "torch")),
    (4, "reference"),
]
NEW_TOKENS = 24
GREEDY = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)
ROOT = zoo.make_prompt(21)  # beyond every window, within every original length
TAILS = [zoo.make_prompt(length, length) for length in (1, 9, 16, 35)]  # some begin, some end beyond the latter
PROMPTS = [ROOT + tail for tail in TAILS]

ROW_IDS = [
    "llama-dynamic",
    "llama-yarn",
    "qwen2-sliding",
    "mistral-window",
    "ministral3-yarn",
    "gemma2-softcaps",
    "gemma3_text-linear",
    "gemma4_text-k-is-v",
    "gemma4_text-shared-kv",
    "phi3-longrope",
    "phi3-longrope-published",
    "smollm3-sliding",
    "cwm-default",
]


def build(row_id, zoo_dir):
    """The folder of a checkpoint that the compiled operations serve: with heads of 8 n numbers."""
    row = rows.BY_ID[row_id]
    if row.fields["head_dim"] % 8:
        row = replace(row, id=f"{row.id}-16", fields={**row.fields, "head_dim": 16})
    return zoo.build(row, zoo_dir / row.id)


@pytest.fixture(scope="module", params=ROW_IDS)
def case(request, zoo_dir):
    """(folder, tokens that each prompt alone gives in the plainest engine)."""
    folder = build(request.param, zoo_dir)
    with open_llm(folder, backend="reference", prefix_caching=False) as llm:
        alone = [tokens(llm.generate([prompt], GREEDY))[0] for prompt in PROMPTS]
    assert all(len(set(one)) > 4 for one in alone)  # a model that repeats itself would prove little
    return folder, alone


def open_llm(folder, **options):
    return LLM(folder, **{"kv_cache_bytes": "8MiB", "dtype": "float32", **options})


def tokens(outputs):
    return [out.outputs[0].token_ids for out in outputs]


@pytest.mark.parametrize(("block_size", "backend"), BACKENDS)
def test_alone_batched_and_cached(case, block_size, backend):
    folder, expected = case
    with open_llm(folder, block_size=block_size, backend=backend) as llm:
        assert tokens(llm.generate(PROMPTS[:1], GREEDY)) == expected[:1]
        llm.reset_prefix_cache()
        assert tokens(llm.generate(PROMPTS, GREEDY)) == expected
        cached = llm.generate(PROMPTS, GREEDY)
        assert tokens(cached) == expected
        assert any(output.num_cached_tokens for output in cached)
        check_integrity(llm.engine.blocks)


@pytest.mark.parametrize("max_batch_tokens", [1, 7])
def test_chunked_prefill(case, max_batch_tokens):
    folder, expected = case
    with open_llm(folder, max_batch_tokens=max_batch_tokens, block_size=4) as llm:
        assert tokens(llm.generate(PROMPTS, GREEDY)) == expected
        check_integrity(llm.engine.blocks)


def test_logits_of_chunks_are_those_of_the_whole(case):
    folder, _ = case
    whole, prompt = [], zoo.make_prompt(zoo.LONG)
    for max_batch_tokens in (2048, 13):
        with open_llm(folder, max_batch_tokens=max_batch_tokens) as llm:
            whole.append(llm.logits(prompt))
    assert (whole[0] - whole[1]).abs().max() < 1e-4 * min(1.0, whole[0].std().item())


@pytest.mark.parametrize(("block_size", "backend"), [(1, "auto"), (4, "torch"), (16, "auto")])
def test_forked(case, block_size, backend):
    """The branches go beyond the original length one after the other, the root stays within it."""
    folder, expected = case
    with open_llm(folder, block_size=block_size, backend=backend) as llm:
        root = llm.branch(ROOT)
        kids = root.fork(len(TAILS))
        for kid, tail in zip(kids, TAILS, strict=True):
            kid.append(tail)
        llm.extend(kids, GREEDY)
        assert [kid.output_token_ids for kid in kids] == expected
        check_integrity(llm.engine.blocks)
        again = root.fork(1)[0]  # what the branches wrote is not the root's
        again.append(TAILS[1])
        llm.extend([again], GREEDY)
        assert again.output_token_ids == expected[1]
        check_integrity(llm.engine.blocks)


def test_forked_while_decoding(case):
    folder, expected = case
    half = SamplingParams(temperature=0, max_tokens=NEW_TOKENS // 2, ignore_eos=True, detokenize=False)
    with open_llm(folder, block_size=4) as llm:
        branch = llm.branch(PROMPTS[1])
        llm.extend([branch], half)
        kids = branch.fork(3)
        kids[1].append([5, 6, 7])
        llm.extend(kids, half)
        assert branch.output_token_ids == expected[1][: NEW_TOKENS // 2]
        for kid in (kids[0], kids[2]):
            assert kid.output_token_ids[-NEW_TOKENS // 2 :] == expected[1][NEW_TOKENS // 2 :]
        check_integrity(llm.engine.blocks)


@pytest.mark.parametrize(("prefix_caching", "backend"), [(True, "auto"), (False, "torch")])
def test_preempted(case, prefix_caching, backend):
    folder, expected = case
    num_blocks = (max(map(len, PROMPTS)) + NEW_TOKENS) // 4 + 6  # one request and little more
    options = {"block_size": 4, "prefix_caching": prefix_caching, "backend": backend}
    with open_llm(folder, kv_cache_bytes=smallest_pool(folder, num_blocks), **options) as llm:
        assert tokens(llm.generate(PROMPTS, GREEDY)) == expected
        # Longrope starts requests anew at the original length, which may make all the room that is needed.
        assert llm.stats()["num_preemptions"] > 0 or llm.spec.switch_len is not None
        assert llm.stats()["num_blocks_used"] == 0
        check_integrity(llm.engine.blocks)


def smallest_pool(folder, num_blocks):
    """Bytes of a cache with so many blocks of 4 tokens."""
    num_bytes = 1 << 16  # enough for any window, too little for so many blocks
    while True:
        with open_llm(folder, block_size=4, kv_cache_bytes=num_bytes) as llm:
            if llm.stats()["num_blocks_total"] >= num_blocks:
                return num_bytes
        num_bytes += num_bytes // 16


# Random traffic

STEMS = [zoo.make_prompt(50, seed) for seed in (11, 12)]
STEMS.append(STEMS[0][:29] + STEMS[1][29:])
prompts = st.builds(lambda stem, length: tuple(STEMS[stem][:length]), st.integers(0, 2), st.integers(1, 50))


def check_random_traffic(zoo_dir, num_examples):
    """Waves of requests and forks in engines of any shape; each result is compared with the request alone."""

    @cache
    def alone(row_id, prompt):
        with open_llm(build(row_id, zoo_dir), backend="reference") as llm:
            return tokens(llm.generate([list(prompt)], GREEDY))[0]

    @settings(max_examples=num_examples, suppress_health_check=list(HealthCheck))
    @given(
        st.sampled_from(ROW_IDS),
        st.integers(1, 9),
        st.integers(1, 60),
        st.booleans(),
        st.sampled_from(["auto", "torch"]),
        st.lists(st.lists(st.tuples(prompts, st.integers(1, NEW_TOKENS)), min_size=1, max_size=5), max_size=3),
        prompts,
        st.lists(prompts, min_size=1, max_size=4),
    )
    def check(row_id, block_size, max_batch_tokens, is_scarce, backend, waves, root_prompt, tails):
        folder = build(row_id, zoo_dir)
        options = {"block_size": block_size, "max_batch_tokens": max_batch_tokens, "backend": backend}
        if is_scarce:
            options["kv_cache_bytes"] = "512KiB"
        with open_llm(folder, **options) as llm:
            for wave in waves:
                params = [
                    SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, detokenize=False) for _, n in wave
                ]
                outputs = tokens(llm.generate([list(prompt) for prompt, _ in wave], params))
                for (prompt, n), output in zip(wave, outputs, strict=True):
                    assert output == alone(row_id, prompt)[:n]
                check_integrity(llm.engine.blocks)
            kids = llm.branch(list(root_prompt)).fork(len(tails))
            for kid, tail in zip(kids, tails, strict=True):
                kid.append(list(tail))
            llm.extend(kids, GREEDY)
            for kid, tail in zip(kids, tails, strict=True):
                assert kid.output_token_ids == alone(row_id, root_prompt + tail)
            check_integrity(llm.engine.blocks)

    check()


def test_random_traffic(zoo_dir):
    check_random_traffic(zoo_dir, 20)


@pytest.mark.slow
def test_much_random_traffic(zoo_dir):
    check_random_traffic(zoo_dir, 150)

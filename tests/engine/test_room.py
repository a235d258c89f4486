"""A pool that is too small: refused at once, used to its last token, and nothing that was decoded is lost."""

import pytest
from integrity import check_integrity

from minirksc import LLM, SamplingParams
from minirksc.errors import CacheFullError, TokenizerError

BLOCK, NUM_BLOCKS = 16, 4
PROMPT = list(range(5, 45))
LAST = NUM_BLOCKS * BLOCK - len(PROMPT) + 1
"""Tokens that fit behind the prompt: the last one needs no room, since nothing follows it."""


def greedy(max_tokens):
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)


@pytest.fixture(scope="module", params=["native", "torch"])
def small(request, tiny_llama):
    """(LLM with such a pool, what follows the prompt in an ample one)."""
    folder = tiny_llama()
    options = {"dtype": "float32", "threads": 1, "block_size": BLOCK, "backend": request.param}
    with LLM(folder, kv_cache_bytes="1MiB", **options) as ample:
        expected = ample.generate([PROMPT], greedy(LAST))[0].outputs[0].token_ids
        stats = ample.stats()
    budget = NUM_BLOCKS * (stats["kv_cache_bytes"] // stats["num_blocks_total"])
    with LLM(folder, kv_cache_bytes=budget, **options) as llm:
        assert llm.stats()["num_blocks_total"] == NUM_BLOCKS
        yield llm, expected


@pytest.mark.parametrize("max_tokens", [LAST, LAST - 1, None])
def test_the_pool_is_used_to_its_last_token(small, max_tokens):
    llm, expected = small
    (output,) = llm.generate([PROMPT], greedy(max_tokens))[0].outputs
    assert (output.token_ids, output.finish_reason) == (expected[: max_tokens or LAST], "length")


def test_what_can_never_fit_is_refused_before_anything_is_computed(small):
    llm, expected = small
    before = llm.stats()["num_steps"]
    with pytest.raises(CacheFullError, match=f"max_tokens {LAST + 1} needs the KV of {NUM_BLOCKS * BLOCK + 1} tokens"):
        llm.generate([PROMPT, PROMPT[:9]], [greedy(LAST + 1), greedy(4)])
    with pytest.raises(CacheFullError, match="raise kv_cache_bytes"):
        llm.branch(list(range(5, 5 + NUM_BLOCKS * BLOCK + 1)))
    assert llm.stats()["num_steps"] == before and not llm.engine.has_work
    wrong, right = llm.generate([PROMPT, PROMPT], [greedy(LAST + 1), greedy(LAST)], return_errors=True)
    assert isinstance(wrong.error, CacheFullError) and wrong.outputs == []
    assert right.outputs[0].token_ids == expected


def test_requests_that_fit_one_by_one_all_end(small):
    llm, expected = small
    results = llm.generate([PROMPT] * 3, greedy(LAST))
    assert [result.outputs[0].token_ids for result in results] == [expected] * 3


def test_what_is_pinned_leaves_less_room_and_loses_nothing(small):
    llm, expected = small
    pinned = llm.branch(list(range(50, 50 + BLOCK)))
    pinned.pin()
    pinned.prune()
    (output,) = llm.generate([PROMPT], greedy(LAST))[0].outputs
    assert (output.token_ids, output.finish_reason) == (expected[: LAST - BLOCK], "length")
    branch = llm.branch(PROMPT)
    llm.extend([branch], greedy(LAST))
    assert (branch.output_token_ids, branch.finish_reason) == (expected[: LAST - BLOCK], "length")
    branch.prune()
    with pytest.raises(CacheFullError, match=r"1 pinned sequences stay in it: unpin\(\) some"):
        llm.generate([[*PROMPT, *range(50, 60)]], greedy(1))
    llm.reset_prefix_cache()
    assert llm.generate([PROMPT], greedy(LAST))[0].outputs[0].token_ids == expected


def test_a_tokenizer_that_fails_at_the_end_fails_that_request_alone(tiny_llama, monkeypatch):
    with LLM(tiny_llama(tokenizer=True), kv_cache_bytes="1MiB", threads=1) as llm:
        engine = llm.engine
        params = greedy(4)
        broken, well = (engine.add_request(engine.new_sequence(PROMPT), params) for _ in range(2))
        engine.step()

        def fail():
            raise TokenizerError("no text")

        monkeypatch.setattr(broken.checker, "flush", fail)
        engine.abort(broken)
        assert isinstance(broken.error, TokenizerError) and broken.finish_reason == "abort"
        while engine.has_work:
            engine.step()
        assert well.finish_reason == "length" and len(well.output_token_ids) == 4
        check_integrity(engine.blocks)
        assert llm.stats()["num_blocks_used"] == 0

"""Sliding windows, and rotations that switch, end to end: the tokens of transformers in no more room than is needed."""

import contextlib
import importlib
import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from integrity import check_integrity

from minirksc import LLM, SamplingParams
from minirksc.cache.hybrid import min_blocks
from minirksc.errors import CacheFullError, PromptError

pytest.importorskip("transformers")
sys.path.append(str(Path(__file__).parents[1] / "models"))  # in importlib mode pytest does not add it
zoo, rows = importlib.import_module("zoo"), importlib.import_module("zoo_rows")

NEW_TOKENS = 16


def greedy(num_tokens):
    return SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)


GREEDY = greedy(NEW_TOKENS)
WINDOW = rows.WINDOW
ROOT = zoo.make_prompt(5 * WINDOW + 1, 1)
TAILS = [zoo.make_prompt(length, 1000 + length) for length in (1, 8, WINDOW, 50)]
PROMPTS = [ROOT + tail for tail in TAILS]
OTHERS = [zoo.make_prompt(length, 100 + length) for length in (60, 77, 90)]

BIG = zoo.Row(
    "gemma3_text-five-to-one",
    "gemma3_text",
    {
        **rows.GEMMA3,
        **rows.GEMMA,
        **rows.gemma3_ropes(rows.LINEAR_8),
        "num_hidden_layers": 6,
        "head_dim": 16,
        "sliding_window": 512,
        "max_position_embeddings": 8192,
    },
    embed_std=rows.GEMMA_EMBED_STD,
)
# Windows of other heads than the full layers, and enough of them that their pool is the first to run out.
GEMMA4 = zoo.Row(
    "gemma4_text-seven-to-one",
    "gemma4_text",
    {
        **rows.GEMMA4_TEXT,
        "attention_k_eq_v": True,
        "final_logit_softcapping": None,  # saturated logits would be too much alike
        "num_hidden_layers": 8,
        "head_dim": 16,
        "layer_types": [rows.SLIDING] * 7 + [rows.FULL],
    },
    embed_std=rows.GEMMA_EMBED_STD,
)
# Heads of 8 n numbers, which the compiled operations serve.
GEMMA3 = rows.BY_ID["gemma3_text-linear"]
GEMMA3 = replace(GEMMA3, id=f"{GEMMA3.id}-16", fields={**GEMMA3.fields, "head_dim": 16})
ROWS = {row.id: row for row in (GEMMA3, GEMMA4)}


@pytest.fixture(scope="module", params=ROWS)
def case(request, zoo_dir):
    """(folder, transformers' model, its greedy tokens after each prompt)."""
    row = ROWS[request.param]
    folder = zoo.build(row, zoo_dir / row.id)
    oracle = zoo.load_oracle(row, folder)
    expected = [zoo.oracle_greedy(row, oracle, prompt, NEW_TOKENS) for prompt in PROMPTS]
    assert all(len(set(one)) > 4 for one in expected)  # a model that repeats itself would prove little
    return folder, oracle, expected


@pytest.fixture(scope="module")
def big(zoo_dir):
    return zoo.build(BIG, zoo_dir / BIG.id)


def open_llm(folder, num_rooms=None, **options):
    """With `num_rooms`, a cache of so many blocks for the windows and as many bytes for the other layers."""
    options = {"kv_cache_bytes": "8MiB", "dtype": "float32", "block_size": 4, **options}
    if num_rooms is not None:
        with LLM(folder, **options) as llm:
            options["kv_cache_bytes"] = 2 * num_rooms * llm.engine.block_bytes.window
    llm = LLM(folder, **options)
    for layer in llm.engine.runner.cache.layers:
        layer.kv.fill_(torch.nan)  # what nobody has written must not be read
    assert num_rooms in (None, llm.stats()["num_window_blocks_total"])
    return llm


def tokens(outputs):
    return [out.outputs[0].token_ids for out in outputs]


def check_idle(llm):
    """Nothing is used and nothing is lost."""
    check_integrity(llm.engine.blocks)
    stats = llm.stats()
    assert stats["num_blocks_used"] == stats["num_window_blocks_used"] == 0
    assert stats["kv_bytes_used_full"] == stats["kv_bytes_used_window"] == 0
    llm.reset_prefix_cache()
    stats = llm.stats()
    assert stats["num_blocks_free"] == stats["num_blocks_total"]
    assert stats["num_window_blocks_free"] == stats["num_window_blocks_total"]


# The tokens of transformers


@pytest.mark.oracle
@pytest.mark.parametrize(("block_size", "max_batch_tokens"), [(1, 2048), (4, 2048), (5, 50), (16, 23)])
def test_alone_batched_chunked_and_from_the_cache(case, block_size, max_batch_tokens):
    folder, _, expected = case
    with open_llm(folder, block_size=block_size, max_batch_tokens=max_batch_tokens) as llm:
        assert tokens(llm.generate(PROMPTS[3:], GREEDY)) == expected[3:]
        llm.reset_prefix_cache()
        before = llm.stats()["num_prefilled_tokens"]
        assert tokens(llm.generate(PROMPTS, GREEDY)) == expected
        # The root is computed once, though most of it leaves the first one's window before the others begin.
        num_prefilled = llm.stats()["num_prefilled_tokens"] - before
        assert num_prefilled <= len(ROOT) + sum(map(len, TAILS)) + len(PROMPTS) * block_size
        again = llm.generate(PROMPTS, GREEDY)
        assert tokens(again) == expected
        # Of short blocks the window before the end is there; a longer one may have lost the last token's block.
        assert all(out.num_cached_tokens >= len(ROOT) - block_size for out in again)
        check_idle(llm)


@pytest.mark.oracle
def test_from_the_cache_after_the_window_was_evicted(case):
    """The full layers still have the prompt; of the layers with a window nothing, or only a part, is left."""
    folder, _, expected = case
    adopted = []
    for num_others in (0, 1, len(OTHERS)):
        with open_llm(folder, num_rooms=38) as llm:
            assert tokens(llm.generate(PROMPTS[3:], GREEDY)) == expected[3:]
            llm.generate(OTHERS[:num_others], GREEDY)
            again = llm.generate(PROMPTS[3:], GREEDY)
            adopted.append(again[0].num_cached_tokens)
            assert tokens(again) == expected[3:]
            check_idle(llm)
    assert adopted == sorted(adopted, reverse=True) and adopted[0] > len(ROOT) and adopted[-1] < WINDOW


@pytest.mark.oracle
@pytest.mark.parametrize("prefix_caching", [True, False])
def test_preempted_for_want_of_window_blocks(case, prefix_caching):
    folder, _, expected = case
    num_preemptions = 0
    for spare in (0, 5):
        with open_llm(folder, num_rooms=min_blocks(WINDOW, 4) + spare, prefix_caching=prefix_caching) as llm:
            assert tokens(llm.generate(PROMPTS, GREEDY)) == expected
            num_preemptions += llm.stats()["num_preemptions"]
            check_idle(llm)
    assert num_preemptions > 0


@pytest.mark.oracle
@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_forked_beyond_the_window_and_pruned(case, block_size):
    folder, _, expected = case
    half = greedy(NEW_TOKENS // 2)
    with open_llm(folder, block_size=block_size) as llm:
        root = llm.branch(ROOT)
        kids = [*root.fork(len(TAILS)), *root.fork(3)]
        for kid, tail in zip(kids, [*TAILS, *TAILS[:3]], strict=True):
            kid.append(tail)
        llm.extend(kids, half)
        for kid in kids[len(TAILS) :]:
            kid.prune()
        root.prune()
        check_integrity(llm.engine.blocks)
        llm.generate(OTHERS, GREEDY)  # whoever takes what the pruned ones gave back must harm nobody
        grandchild = kids[2].fork(1)[0]
        llm.extend([kids[3], grandchild, kids[0], kids[1]], half)
        kids[2] = grandchild
        assert [kid.output_token_ids for kid in kids[: len(TAILS)]] == expected
        for kid in kids:
            kid.prune()
        check_integrity(llm.engine.blocks)


@pytest.mark.oracle
def test_forked_branches_that_lose_their_blocks_are_recomputed(case):
    folder, _, expected = case
    with open_llm(folder, num_rooms=min_blocks(WINDOW, 4) + 8) as llm:
        root = llm.branch(ROOT)
        kids = root.fork(len(TAILS))
        for kid, tail in zip(kids, TAILS, strict=True):
            kid.append(tail)
        llm.generate(OTHERS[:2], GREEDY)
        llm.extend(kids, GREEDY)
        assert [kid.output_token_ids for kid in kids] == expected
        assert llm.stats()["num_preemptions"] > 0
        for branch in (root, *kids):
            branch.prune()
        check_idle(llm)


@pytest.mark.oracle
@pytest.mark.parametrize("num_rooms", [None, min_blocks(WINDOW, 4) + 1])
@pytest.mark.parametrize("choices", [[[7], [9], [30]], [[7, 8], [9], [30, 31, 32]]])
@pytest.mark.parametrize("question", [zoo.make_prompt(11, 5), []], ids=["question", "no question"])
def test_score(case, question, choices, num_rooms):
    folder, oracle, expected = case
    with open_llm(folder, num_rooms=num_rooms) as llm:
        branches = llm.branch(ROOT).fork(2)
        branches[1].append(TAILS[2])
        for _ in range(2):
            scores = llm.score(branches, question, choices)
            for branch, row in zip(branches, scores, strict=True):
                truth = true_scores(oracle_logits(oracle), branch.token_ids + question, choices)
                torch.testing.assert_close(row, truth, atol=1e-4, rtol=1e-3)
        llm.extend(branches[1:], GREEDY)  # the question is gone again
        assert branches[1].output_token_ids == expected[2]
        check_integrity(llm.engine.blocks)


def oracle_logits(oracle):
    """The model of transformers as a function of token ids."""

    @torch.no_grad()
    def logits(token_ids):
        return oracle(torch.tensor([token_ids]), use_cache=False).logits[0]

    return logits


def true_scores(logits_of, token_ids, choices):
    """What `score` promises, from the logits of each choice written out."""
    sums = []
    for choice in choices:
        logprobs = logits_of(token_ids + choice).log_softmax(-1)[len(token_ids) - 1 :]
        sums.append(sum(float(logprobs[i, token]) for i, token in enumerate(choice)))
    return torch.tensor(sums).softmax(-1)


@pytest.mark.oracle
def test_interrupted_steps_leave_no_block_that_was_promised_a_copy(case):
    folder, _, expected = case

    class Interrupted(Exception):
        pass

    def forward(batch, depth=None, mass=None):
        calls.append(batch)
        if len(calls) % 5 == 1:  # the first step, with the copies of the forks, among them
            raise Interrupted
        return intact(batch)

    with open_llm(folder, num_rooms=40) as llm:
        root = llm.branch(ROOT)
        kids = root.fork(len(TAILS))
        for kid, tail in zip(kids, TAILS, strict=True):
            kid.append(tail)
        calls, intact = [], llm.engine.runner.forward
        llm.engine.runner.forward = forward
        missing = NEW_TOKENS
        while missing:
            more = greedy(missing)
            with contextlib.suppress(Interrupted):
                llm.extend([kid for kid in kids if len(kid.output_token_ids) == NEW_TOKENS - missing], more)
            check_integrity(llm.engine.blocks)
            missing = NEW_TOKENS - min(len(kid.output_token_ids) for kid in kids)
        assert [kid.output_token_ids for kid in kids] == expected
        assert sum(1 for batch in calls if batch.copies) > 0
        for branch in (root, *kids):
            branch.prune()
        check_idle(llm)


def run_random_session(llm, plain, num_operations, seed):
    """Random calls on one engine, each answer against an engine that shares and keeps nothing."""
    rng = random.Random(seed)
    starts = [zoo.make_prompt(70, 31), zoo.make_prompt(50, 31) + zoo.make_prompt(20, 32), zoo.make_prompt(9, 33)]
    branches = []

    def some(most):
        return rng.sample(branches, min(len(branches), rng.randint(1, most)))

    for _ in range(num_operations):
        action = rng.random()
        if len(branches) > 10:
            for branch in some(8):
                branch.prune()
                branches.remove(branch)
        elif action < 0.2 or not branches:
            branches.append(llm.branch(rng.choice(starts)[: rng.randint(1, 70)]))
        elif action < 0.4:
            branches += rng.choice(branches).fork(rng.randint(1, 3))
        elif action < 0.55:
            for branch in some(4):
                branch.append([rng.randrange(3, 200) for _ in range(rng.choice([1, 2, 5, 20]))])
        elif action < 0.75:
            chosen = some(4)
            params, prompts = greedy(rng.randint(1, 8)), [branch.token_ids for branch in chosen]
            llm.extend(chosen, params)
            expected = tokens(plain.generate(prompts, params))
            assert [b.token_ids for b in chosen] == [p + e for p, e in zip(prompts, expected, strict=True)]
        elif action < 0.85:
            prompts = [
                [*rng.choice(starts)[: rng.randint(1, 70)], rng.choice([3, 4])] for _ in range(rng.randint(1, 4))
            ]
            params = greedy(rng.randint(1, 8))
            assert tokens(llm.generate(prompts, params)) == tokens(plain.generate(prompts, params))
        elif action < 0.93:
            chosen, question = some(3), [rng.randrange(3, 200) for _ in range(rng.randint(0, 6))]
            choices = [[7], [9, 10], [30]] if rng.random() < 0.5 else [[7], [9]]
            expected = [true_scores(plain.logits, branch.token_ids + question, choices) for branch in chosen]
            torch.testing.assert_close(
                llm.score(chosen, question, choices), torch.stack(expected), atol=1e-4, rtol=1e-3
            )
        elif action < 0.97:
            branch = rng.choice(branches)
            branch.prune()
            branches.remove(branch)
        else:
            llm.reset_prefix_cache()
        for branch in [branch for branch in branches if branch.num_tokens > 90]:
            branch.prune()
            branches.remove(branch)
        check_integrity(llm.engine.blocks)


@pytest.mark.parametrize(("block_size", "spare", "max_batch_tokens"), [(1, 9, 9), (4, 1, 2048), (4, 20, 30)])
@pytest.mark.parametrize("row", [*ROWS.values(), rows.BY_ID["phi3-longrope-published"]], ids=lambda row: row.id)
@pytest.mark.parametrize("num_operations", [25, pytest.param(400, marks=pytest.mark.slow)])
def test_random_sessions(zoo_dir, row, block_size, spare, max_batch_tokens, num_operations):
    folder = zoo.build(row, zoo_dir / row.id)
    options = {"block_size": block_size, "max_batch_tokens": max_batch_tokens}
    if row.id in ROWS:
        options["num_rooms"] = min_blocks(WINDOW, block_size) + spare
    with open_llm(folder, **options) as llm, open_llm(folder, prefix_caching=False) as plain:
        run_random_session(llm, plain, num_operations, seed=10 * block_size + spare)
        assert llm.stats()["num_cached_tokens"] > 0


# Memory


def test_a_sequence_takes_its_tokens_in_full_layers_and_its_window_in_the_others(big):
    num_tokens, per_token = 4096, 2 * BIG.fields["num_key_value_heads"] * BIG.fields["head_dim"] * 4  # bytes a layer
    prompt = zoo.make_prompt(num_tokens)
    with open_llm(big, block_size=16, kv_cache_bytes="16MiB") as llm:
        branch = llm.branch(prompt[:1024])
        window_bytes = set()
        for end in range(1024, num_tokens + 1, 256):
            branch.append(prompt[branch.num_tokens : end])
            llm.extend([branch], greedy(1))
            stats = llm.stats()
            window_bytes.add(stats["kv_bytes_used_window"])
            closed_form = (1 * branch.num_tokens + 5 * 512) * per_token
            used = stats["kv_bytes_used_full"] + stats["kv_bytes_used_window"]
            assert 0.9 * closed_form <= used <= 1.1 * closed_form
        assert branch.num_tokens > num_tokens - 256
        assert max(window_bytes) - min(window_bytes) <= 2 * llm.engine.block_bytes.window
        branch.prune()
        check_idle(llm)


def test_eight_forks_of_a_long_root_decode_exactly_and_share(big):
    root_ids = zoo.make_prompt(4096)
    hints = [[10 + i, 60 + i] for i in range(8)]
    few = greedy(12)
    with open_llm(big, block_size=16, kv_cache_bytes="64MiB", prefix_caching=False) as llm:
        expected = [tokens(llm.generate([root_ids + hint], few))[0] for hint in hints]
        assert len(set(map(tuple, expected))) > 1
    with open_llm(big, block_size=16, kv_cache_bytes="16MiB") as llm:
        root = llm.branch(root_ids)
        alone = llm.stats()
        kids = root.fork(8)
        for kid, hint in zip(kids, hints, strict=True):
            kid.append(hint)
        llm.extend(kids, few)
        assert [kid.output_token_ids for kid in kids] == expected
        stats = llm.stats()
        assert stats["num_blocks_used"] <= alone["num_blocks_used"] + 8
        assert stats["num_window_blocks_used"] <= alone["num_window_blocks_used"] + 8
        assert all(kid.num_shared_tokens == 4096 for kid in kids)
        for branch in (root, *kids):
            branch.prune()
        check_idle(llm)


def test_nothing_leaks_after_a_thousand_sequences(zoo_dir):
    folder = zoo.build(GEMMA4, zoo_dir / GEMMA4.id)
    gen = torch.Generator().manual_seed(0)
    few = greedy(2)
    num_sequences = 0
    with open_llm(folder, num_rooms=60) as llm:
        while num_sequences < 1000:
            lens = torch.randint(1, 50, (20,), generator=gen).tolist()
            llm.generate([ROOT[: n // 2] + zoo.make_prompt(n - n // 2, num_sequences + n) for n in lens], few)
            root = llm.branch(ROOT[: lens[0]])
            kids = root.fork(6)
            for kid in kids[:4]:
                kid.append([num_sequences % 200 + 3])
            llm.extend(kids[:5], few)
            llm.score(kids[:2], [5, 6], [[7], [8]])
            for branch in (kids[0], root, *kids[1:]):
                branch.prune()
            num_sequences += 20 + 7 + 2
            check_integrity(llm.engine.blocks)
        assert llm.stats()["num_evicted_blocks"] > 0
        check_idle(llm)


def test_a_cache_smaller_than_one_window_is_refused_at_load(case):
    folder, _, _ = case
    with open_llm(folder) as llm:
        size = llm.engine.block_bytes
    least = min_blocks(WINDOW, 4) * (size.full + size.window)
    for num_bytes in (1, size.full + size.window, least - 1):
        remedy = rf"kv_cache_bytes {num_bytes} is less than .* window of {WINDOW} tokens .* {least} bytes; raise"
        with pytest.raises(CacheFullError, match=remedy):
            open_llm(folder, kv_cache_bytes=num_bytes)
    with open_llm(folder, kv_cache_bytes=least) as llm:  # and the least is enough to run
        few = greedy(2)
        assert len(tokens(llm.generate([ROOT[: WINDOW + 5]], few))[0]) == 2
        with pytest.raises(CacheFullError, match="raise kv_cache_bytes"):
            llm.generate(PROMPTS[:1], few)
        check_idle(llm)


def test_a_window_as_long_as_any_sequence_needs_no_pool_apart(case):
    folder, _, _ = case
    with open_llm(folder, max_model_len=WINDOW) as llm:
        assert llm.stats()["num_window_blocks_total"] == llm.stats()["kv_bytes_used_window"] == 0
        few = greedy(6)
        short = tokens(llm.generate([ROOT[: WINDOW - 6]], few))
    with open_llm(folder, max_model_len=WINDOW + 1) as llm:
        assert llm.stats()["num_window_blocks_total"] > 0
        assert tokens(llm.generate([ROOT[: WINDOW - 6]], few)) == short


# Rotations that switch at the original length

ORIGINAL = rows.ORIGINAL
START = zoo.make_prompt(ORIGINAL - 8)
CROSSING = [START, [*START, 5], START + zoo.make_prompt(7, 7), START + zoo.make_prompt(8, 8), START + [9] * 9]


@pytest.fixture(scope="module", params=["phi3-longrope", "phi3-longrope-published"])
def longrope(request, zoo_dir):
    """(folder, a function: transformers' greedy tokens after a prompt)."""
    row = rows.BY_ID[request.param]
    folder = zoo.build(row, zoo_dir / row.id)
    oracle = zoo.load_oracle(row, folder)
    return folder, lambda prompt, n=NEW_TOKENS: zoo.oracle_greedy(row, oracle, prompt, n), oracle


@pytest.mark.oracle
@pytest.mark.parametrize(("block_size", "max_batch_tokens"), [(1, 2048), (4, 9), (16, 2048)])
def test_generation_across_the_switch(longrope, block_size, max_batch_tokens):
    folder, generated, _ = longrope
    expected = [generated(prompt) for prompt in CROSSING]
    with open_llm(folder, block_size=block_size, max_batch_tokens=max_batch_tokens) as llm:
        assert [tokens(llm.generate([prompt], GREEDY))[0] for prompt in CROSSING] == expected
        assert tokens(llm.generate(CROSSING, GREEDY)) == expected
        llm.reset_prefix_cache()
        assert tokens(llm.generate(CROSSING, GREEDY)) == expected
        check_idle(llm)


@pytest.mark.oracle
def test_a_branch_whose_append_crosses_the_switch(longrope):
    folder, generated, oracle = longrope
    few = greedy(4)
    with open_llm(folder) as llm:
        root = llm.branch(START)
        long, short = root.fork(2)
        long.append(TAILS[1] + [5])
        llm.extend([long, short], few)
        assert long.output_token_ids == generated(long.token_ids[:-4], 4)
        assert short.output_token_ids == generated(START, 4)
        again = long.fork(1)[0]
        llm.extend([again, short, root], few)
        assert again.output_token_ids == generated(again.token_ids[:-8], 8)
        # To the letter what generate() gives: it crosses with the tokens that it made before.
        assert short.output_token_ids == generated(START, 8)
        assert root.output_token_ids == generated(START, 4)

        question, choices = zoo.make_prompt(9, 3), [[7], [9]]  # the question crosses, the branch does not
        scores = llm.score([root, again], question, choices)
        for branch, row in zip([root, again], scores, strict=True):
            truth = true_scores(oracle_logits(oracle), branch.token_ids + question, choices)
            torch.testing.assert_close(row, truth, atol=1e-4, rtol=1e-3)
        llm.extend([root], few)
        assert root.output_token_ids == generated(START, 8)
        check_integrity(llm.engine.blocks)


def test_logprobs_of_a_prompt_are_those_of_the_prompt_alone(longrope):
    """However many tokens follow: what they turn the rotation into comes after."""
    folder, _, _ = longrope
    found = []
    with open_llm(folder) as llm:
        for max_tokens in (1, 20):
            params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, prompt_logprobs=0)
            (output,) = llm.generate([START], params)
            found.append([entry[token] for entry, token in zip(output.prompt_logprobs[1:], START[1:], strict=True)])
    assert found[0] == pytest.approx(found[1], abs=1e-4)


def test_the_prefix_cache_is_not_shared_across_the_switch(longrope):
    folder, _, _ = longrope
    one = greedy(1)

    def adopted(prompt):
        return llm.generate([prompt], one)[0].num_cached_tokens

    long = START + zoo.make_prompt(20, 20)
    with open_llm(folder) as llm:
        assert adopted(START) == 0
        assert adopted([*START, 5]) == len(START)
        assert adopted(long) == 0  # its keys are turned by other angles
        assert adopted([*long, 7]) == len(long) // 4 * 4
        assert adopted([*START, 6]) == len(START)
        assert adopted(long[:ORIGINAL]) >= len(START)  # as long as short ones may be
        assert adopted(long[: ORIGINAL + 1]) == ORIGINAL
        check_idle(llm)


@pytest.mark.oracle
def test_across_the_switch_in_a_cache_that_holds_little_more_than_one(longrope):
    folder, generated, _ = longrope
    with open_llm(folder) as llm:
        size = llm.engine.block_bytes.full
    expected = [generated(prompt) for prompt in CROSSING]
    with open_llm(folder, kv_cache_bytes=size * 16) as llm:
        assert tokens(llm.generate(CROSSING, GREEDY)) == expected
        check_idle(llm)
        with pytest.raises(CacheFullError):
            llm.generate([ROOT], GREEDY)
        with pytest.raises(PromptError):
            llm.generate([ROOT * 4], GREEDY)
        check_idle(llm)


def test_a_branch_is_cut_by_less_and_by_more_than_its_window_still_has(case):
    folder, _, _ = case
    with open_llm(folder) as llm:
        ways = set()
        for num_cut in (1, 2, 3, 5, WINDOW, 3 * WINDOW):
            branch = llm.branch(ROOT)
            sibling = branch.fork(1)[0]
            llm.extend([branch], GREEDY)
            sequence = branch.sequence
            ways.add(llm.engine.blocks.can_rewind(branch.seq_id, branch.num_tokens - num_cut))
            llm.engine.cut_kv(sequence, branch.num_tokens - num_cut)
            del sequence.token_ids[-num_cut:]
            check_integrity(llm.engine.blocks)
            fresh = llm.branch(branch.token_ids, share=False)
            llm.extend([branch, sibling, fresh], GREEDY)
            assert branch.token_ids == fresh.token_ids
            for one in (branch, sibling, fresh):
                one.prune()
        assert ways == {True, False}
        check_idle(llm)

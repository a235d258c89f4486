"""Branches: sharing that can be counted, independence, and clear errors."""

import math

import pytest
import torch
from integrity import check_integrity

from minirksc import LLM, SamplingParams
from minirksc.errors import BranchError, ConfigError, EngineClosedError, PromptError

PROMPT = [(7 * i) % 89 + 5 for i in range(100)]
SAMPLED = SamplingParams(temperature=1.0, max_tokens=12, ignore_eos=True, detokenize=False)


@pytest.fixture()
def llm(tiny_llama):
    with LLM(tiny_llama(), block_size=8, kv_cache_bytes="2MiB") as llm:
        yield llm
        check_integrity(llm.engine.blocks)


def test_forks_compute_the_root_once_and_own_only_their_tokens(llm):
    root = llm.branch(PROMPT)
    used = llm.stats()["num_blocks_used"]
    assert llm.stats()["num_prefilled_tokens"] == len(PROMPT)
    assert used == -(-len(PROMPT) // 8)
    kids = root.fork(8)
    assert llm.stats()["num_blocks_used"] == used
    for i, kid in enumerate(kids):
        kid.append([10 + i] * 5)
    llm.extend(kids, SAMPLED)
    stats = llm.stats()
    assert stats["num_prefilled_tokens"] == len(PROMPT) + 8 * 5
    assert stats["num_decoded_tokens"] == 8 * 12
    # 100 = 12 * 8 + 4: the partial block is copied once a branch; the last token has no KV yet.
    per_kid = -(-(4 + 5 + 11) // 8)
    assert stats["num_blocks_used"] == used + 8 * per_kid
    assert all(kid.num_shared_tokens == 96 for kid in kids)
    for kid in kids:
        kid.prune()
    assert llm.stats()["num_blocks_used"] == used
    root.prune()
    assert llm.stats()["num_blocks_used"] == 0


def test_cold_requests_that_start_together_cause_one_prefill(llm):
    prompts = [[*PROMPT, 5 + i, 6 + i] for i in range(6)]
    llm.generate(prompts, SamplingParams(temperature=0, max_tokens=2, ignore_eos=True, detokenize=False))
    # The first computes all; the others at most what lies beyond the last block that they share, 96.
    assert llm.stats()["num_prefilled_tokens"] <= 102 + 5 * 6
    assert llm.stats()["num_cached_tokens"] >= 5 * 96


def test_n_samples_cause_one_prefill(llm):
    params = SamplingParams(temperature=1.0, n=4, seed=3, max_tokens=5, ignore_eos=True, detokenize=False)
    (out,) = llm.generate([PROMPT], params)
    # The others find all but the last, partial block (100 = 12 * 8 + 4).
    assert llm.stats()["num_prefilled_tokens"] == len(PROMPT) + 3 * 4
    assert len({tuple(o.token_ids) for o in out.outputs}) > 1
    alone = SamplingParams(temperature=1.0, seed=5, max_tokens=5, ignore_eos=True, detokenize=False)
    assert llm.generate([PROMPT], alone)[0].outputs[0].token_ids == out.outputs[2].token_ids


def test_samples_do_not_depend_on_siblings_or_pruning(llm):
    def run(prune, only=None):
        root = llm.branch(PROMPT, seed=11)
        kids = root.fork(8)
        live = kids if only is None else [kids[only]]
        llm.extend(live, SAMPLED)
        for index in prune:
            kids[index].prune()
        live = [kid for kid in live if not kid.pruned]
        llm.extend(live, SAMPLED)
        tokens = {kid.path: kid.output_token_ids for kid in live}
        for kid in kids:
            kid.prune()
        root.prune()
        return tokens

    everyone = run([])
    pruned = run([0, 3, 7])
    alone = run([], only=5)
    assert len({tuple(t) for t in everyone.values()}) == 8
    assert pruned == {path: everyone[path] for path in pruned}
    assert len(pruned) == 5
    assert alone == {(5,): everyone[(5,)]}


def test_score_is_a_distribution_and_leaves_branches_alone(llm):
    root = llm.branch(PROMPT)
    kids = root.fork(3)
    llm.extend(kids, SAMPLED)
    before = [kid.token_ids for kid in kids]
    used = llm.stats()["num_blocks_used"]
    scores = llm.score(kids, [3, 9, 4], choices=[[20], [21], [22]])
    assert scores.shape == (3, 3)
    torch.testing.assert_close(scores.sum(-1), torch.ones(3))
    assert [kid.token_ids for kid in kids] == before
    assert llm.stats()["num_blocks_used"] == used
    for kid, row in zip(kids, scores, strict=True):
        logits = llm.logits([*kid.token_ids, 3, 9, 4])[-1]
        torch.testing.assert_close(row, logits[[20, 21, 22]].softmax(-1), atol=1e-4, rtol=1e-3)
    # And decoding goes on as if nothing had happened.
    llm.extend(kids, SAMPLED)


def test_score_of_choices_with_several_tokens(llm):
    root = llm.branch(PROMPT)
    scores = llm.score([root], [3], choices=[[20, 21], [22]])
    logprobs = llm.logits([*PROMPT, 3, 20]).log_softmax(-1)
    first = logprobs[-2, 20] + logprobs[-1, 21]
    second = logprobs[-2, 22]
    expected = torch.stack([first, second]).softmax(-1)
    torch.testing.assert_close(scores[0], expected, atol=1e-4, rtol=1e-3)


def test_fork_of_a_fork_has_path_depth_and_parent(llm):
    root = llm.branch(PROMPT)
    kid = root.fork(2)[1]
    grandkid = kid.fork(1)[0]
    assert (root.path, kid.path, grandkid.path) == ((), (1,), (1, 0))
    assert (root.depth, kid.depth, grandkid.depth) == (0, 1, 2)
    assert grandkid.parent is kid and kid.parent is root and root.parent is None
    assert [k.path for k in root.fork(1)] == [(2,)]
    assert math.isnan(root.confidence)


def test_a_branch_survives_losing_its_blocks(llm):
    root = llm.branch(PROMPT)
    kids = root.fork(2)
    llm.extend(kids, SAMPLED)
    expected = [kid.token_ids for kid in kids]
    while llm.engine.scheduler._reclaim():
        pass
    assert llm.stats()["num_blocks_used"] == 0
    llm.reset_prefix_cache()
    llm.extend(kids, SAMPLED)
    twin = llm.branch(PROMPT, seed=kids[0].sequence.branch_seed)
    twins = twin.fork(2)
    llm.extend(twins, SAMPLED)
    llm.extend(twins, SAMPLED)
    assert [kid.token_ids for kid in kids] == [t.token_ids for t in twins]
    assert [kid.token_ids[: len(e)] for kid, e in zip(kids, expected, strict=True)] == expected


def test_a_branch_survives_an_interruption_before_its_copies_are_made(llm, monkeypatch):
    def run(interrupt):
        root = llm.branch(PROMPT, seed=11)  # 100 = 12 * 8 + 4: every fork's first step copies the partial block
        kids = root.fork(3)
        if interrupt:
            with monkeypatch.context() as patch:
                patch.setattr(llm.engine.runner, "forward", interrupted)
                with pytest.raises(KeyboardInterrupt):
                    llm.extend(kids, SAMPLED)
            check_integrity(llm.engine.blocks)
            assert not llm.engine.has_work
            root.prune()
            llm.reset_prefix_cache()
            for layer in llm.engine.runner.cache.layers:
                layer.kv.fill_(float("nan"))  # nothing may rest on what was never written
        llm.extend(kids, SAMPLED)
        tokens = [kid.output_token_ids for kid in kids]
        for branch in (*kids, root):
            branch.prune()
        return tokens

    def interrupted(batch, depth, mass):
        assert batch.copies
        raise KeyboardInterrupt

    expected = run(interrupt=False)
    assert run(interrupt=True) == expected


def test_a_root_that_could_not_be_computed_leaves_nothing_behind(llm, monkeypatch):
    step, steps = llm.engine.step, []

    def interrupted():
        if steps:
            raise KeyboardInterrupt
        steps.append(step())

    llm.engine.scheduler.max_batch_tokens = 40  # the prompt takes three steps
    monkeypatch.setattr(llm.engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.branch(PROMPT)
    assert llm.stats()["num_blocks_used"] == 0 and not llm.engine.scheduler.idle


def test_unshared_branches_share_with_their_forks_alone(llm):
    first = llm.branch(PROMPT)
    private = llm.branch(PROMPT, share=False)
    assert private.num_shared_tokens == 0
    assert llm.stats()["num_prefilled_tokens"] == 2 * len(PROMPT)
    kid = private.fork(1)[0]
    assert kid.num_shared_tokens == len(PROMPT)
    third = llm.branch(PROMPT)
    assert third.num_shared_tokens == first.num_shared_tokens > 0
    assert llm.stats()["num_prefilled_tokens"] < 2 * len(PROMPT) + 16


def test_misuse_is_a_clear_error(llm, tiny_llama):
    root = llm.branch(PROMPT)
    kid = root.fork(1)[0]
    kid.prune()
    kid.prune()
    for use in (
        lambda: kid.fork(1),
        lambda: kid.append([1]),
        lambda: llm.extend([kid]),
        lambda: llm.score([kid], [1], [[2], [3]]),
    ):
        with pytest.raises(BranchError, match="pruned"):
            use()
    with pytest.raises(BranchError, match="twice"):
        llm.extend([root, root])
    with LLM(tiny_llama(), kv_cache_bytes="1MiB") as other, pytest.raises(BranchError, match="another LLM"):
        other.extend([root])
    for options in ({"n": 2}, {"logprobs": 3}, {"prompt_logprobs": 0}):
        with pytest.raises(ConfigError, match="extend"):
            llm.extend([root], SamplingParams(**options))
    with pytest.raises(PromptError, match="outside the vocabulary"):
        root.append([10**6])
    with pytest.raises(ConfigError, match="at least two"):
        llm.score([root], [1], [[2]])
    with pytest.raises(ValueError, match="at least 1"):
        root.fork(0)
    with pytest.raises(PromptError, match="empty"):
        llm.branch([])
    other = LLM(tiny_llama(), kv_cache_bytes="1MiB")
    other.close()
    other.close()
    with pytest.raises(EngineClosedError, match="closed"):
        other.generate([PROMPT])

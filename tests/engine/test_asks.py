"""Semantic sharing: what is accepted, what it saves, and that nothing leaks from it into exact results."""

import math

import pytest
from integrity import check_integrity

from minirksc import LLM, Solver, SolverConfig
from minirksc.engine.gates import Seat
from minirksc.errors import ConfigError
from minirksc.options import SamplingParams
from minirksc.rksc.asks import AFTER_SPLICE, MIN_RUN, Probe, num_probe_layers, reusable
from minirksc.rksc.similarity import MEASURES

STORY = "a baker bakes 12 loaves on monday and 7 on tuesday, and then gives 3 of them to a school nearby."
FIRST = f"please read this carefully: {STORY} how many are left?"
ALIKE = f"read this carefully, please: {STORY} how many are left?"
OTHER = ALIKE.replace("12", "13")
WORDINGS = [FIRST, ALIKE, OTHER, FIRST]
LONG = [wording.replace(STORY, " ".join([STORY] * 4)) for wording in WORDINGS]
LAYERS = 6
SEEDED = SamplingParams(temperature=0.8, top_p=0.95, seed=0)


@pytest.fixture()
def llm(tiny_llama):
    with LLM(tiny_llama(layers=LAYERS, tokenizer=True), block_size=8, kv_cache_bytes="4MiB") as llm:
        yield llm
        assert llm.stats()["num_blocks_used"] == 0
        check_integrity(llm.engine.blocks)


def solve(llm, wordings=WORDINGS, **options):
    llm.reset_prefix_cache()
    config = {"branches": len(wordings), "tokens_per_step": 6, "verify": "always", "sharing": "semantic"}
    config |= {"sampling": SEEDED} | options
    if config["sharing"] == "semantic":
        config = {"uncalibrated": True} | config
    return Solver(llm, SolverConfig(**config)).solve(wordings[0], wordings)


def tokens_and_scores(result):
    return [(b.token_ids, b.score, b.confidence, b.parsed) for b in result.branches]


def test_a_threshold_above_one_is_exact_sharing(llm):
    exact = solve(llm, sharing="exact")
    semantic = solve(llm, tau=1.01)
    assert tokens_and_scores(semantic) == tokens_and_scores(exact)
    assert semantic.best == exact.best
    assert all(b.sharing == "exact" for b in semantic.branches)
    assert [b.similarity is None for b in semantic.branches] == [True, False, True, True]
    assert all(b.num_saved_tokens == 0 for b in semantic.branches)


def test_substitute_is_the_first_wording_and_saves_the_rest_of_the_prefill(llm):
    result = solve(llm, tau=-9.0)
    expected = solve(llm, [FIRST, FIRST, OTHER, FIRST], sharing="exact")
    assert tokens_and_scores(result) == tokens_and_scores(expected)
    assert [b.sharing for b in result.branches] == ["exact", "semantic", "none", "exact"]
    _, alike, other, _ = result.branches
    assert alike.similarity is not None and other.similarity is None
    num_rows = len(llm.tokenizer.encode(ALIKE))  # it shares no block with the first
    assert alike.num_saved_tokens == pytest.approx(num_rows * (LAYERS - num_probe_layers(LAYERS)) / LAYERS)
    assert result.stats["num_saved_layer_rows"] == pytest.approx(alike.num_saved_tokens * LAYERS)


def test_the_guard_comes_first_and_says_why(llm):
    result = solve(llm, tau=-9.0)
    (guard,) = (gate for gate in result.trace["gates"] if gate["gate"] == "guard")
    assert guard["node"] == 2 and "13" in guard["reason"]
    (share,) = (gate for gate in result.trace["gates"] if gate["gate"] == "share")
    assert share["node"] == 1 and share["decision"] == "substitute" and share["layer"] == num_probe_layers(LAYERS)
    assert share["threshold"] == -9.0 and share["value"] == result.branches[1].similarity


def test_aligned_keeps_its_tokens_and_borrows_what_both_have(llm):
    result = solve(llm, LONG, tau=-9.0, sharing_mode="aligned")
    exact = solve(llm, LONG, sharing="exact")
    _, alike, *_ = result.branches
    assert alike.sharing == "semantic" and alike.num_saved_tokens > 0
    assert [b.token_ids for i, b in enumerate(result.branches) if i != 1] == [
        b.token_ids for i, b in enumerate(exact.branches) if i != 1
    ]
    assert result.trace["nodes"][1]["num_tokens"] == exact.trace["nodes"][1]["num_tokens"]
    # What was borrowed cannot be found by a later, exact run.
    config = SolverConfig(branches=1, tokens_per_step=6, verify="never", sampling=SEEDED)
    again = Solver(llm, config).solve(LONG[1])
    llm.reset_prefix_cache()
    fresh = Solver(llm, config).solve(LONG[1])
    assert again.branches[0].token_ids == fresh.branches[0].token_ids


def test_aligned_computes_what_would_borrow_little(llm):
    result = solve(llm, tau=-9.0, sharing_mode="aligned")
    exact = solve(llm, sharing="exact")
    assert tokens_and_scores(result) == tokens_and_scores(exact)
    (share,) = (gate for gate in result.trace["gates"] if gate["gate"] == "share")
    assert share["decision"] == "computed" and "too little" in share["reason"]


def test_who_judges_an_aligned_branch_reads_exact_kv(llm, monkeypatch):
    asked = []
    score = llm.session().score

    def noted(branches, *rest):
        asked.extend((branch.token_ids, llm.engine.blocks._tables[branch.seq_id].exact_len) for branch in branches)
        return score(branches, *rest)

    monkeypatch.setattr(llm.session(), "score", noted)
    result = solve(llm, LONG, tau=-9.0, sharing_mode="aligned")
    assert result.branches[1].sharing == "semantic"
    assert len(asked) == len(LONG)
    first = llm.tokenizer.encode(LONG[0])
    token_ids, _ = asked[1]
    assert token_ids[: len(first)] == first and token_ids[len(first) :][-6:] == result.branches[1].token_ids
    assert all(exact_len > len(token_ids) for token_ids, exact_len in asked)


def test_private_branches_are_no_ones_business(llm):
    # sharing="none" and "exact" never probe, whatever the wordings.
    for sharing in ("none", "exact"):
        assert all(b.similarity is None for b in solve(llm, sharing=sharing).branches)


def test_states_that_are_not_finite_let_the_wording_go_on(llm, monkeypatch):
    exact = solve(llm, sharing="exact")
    gate = MEASURES["alignment"]
    monkeypatch.setattr(type(gate), "similarity", lambda *_: math.nan)
    result = solve(llm, tau=-9.0)
    assert tokens_and_scores(result) == tokens_and_scores(exact)
    (share,) = (gate for gate in result.trace["gates"] if gate["gate"] == "share")
    assert share["decision"] == "computed" and "not finite" in share["reason"]


def test_a_model_without_a_tested_threshold_needs_insistence(llm):
    with pytest.raises(ConfigError, match="--uncalibrated"):
        solve(llm, uncalibrated=False)
    with pytest.raises(ConfigError, match="needs sharing='semantic'"):
        SolverConfig(tau=0.9)


def test_rope_that_cannot_be_moved_refuses_aligned_mode(tiny_llama):
    scaling = {"rope_type": "dynamic", "factor": 2.0}
    with LLM(tiny_llama(layers=LAYERS, tokenizer=True, rope_scaling=scaling), kv_cache_bytes="4MiB") as llm:
        assert solve(llm, tau=-9.0).branches[1].sharing == "semantic"
        with pytest.raises(ConfigError, match="substitute"):
            solve(llm, tau=-9.0, sharing_mode="aligned")


def test_a_root_whose_blocks_were_taken_lends_nothing(llm):
    ids = [llm.tokenizer.encode(wording) for wording in (FIRST, ALIKE)]
    probe = Probe(MEASURES["alignment"], 2, -9.0, aligned=True)
    for row, token_ids in enumerate(ids):
        probe.watch(row, token_ids)
    (root,) = llm.branches(ids[:1], seats=[Seat(probe, 0, sees_all=True)])
    probe.root = root
    while llm.engine.scheduler._reclaim():
        pass
    (branch,) = llm.branches(ids[1:], seats=[Seat(probe, 1)])
    assert probe.accepted == set() and "is gone" in probe.why_not(1)
    (expected,) = llm.branches(ids[1:], share=False)
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    llm.extend([branch, expected], params)
    assert branch.output_token_ids == expected.output_token_ids
    for one in (root, branch, expected):
        one.prune()


def test_a_cached_first_wording_is_looked_at_all_the_same(llm):
    first = solve(llm, tau=-9.0)
    config = SolverConfig(
        branches=4, tokens_per_step=6, verify="always", sharing="semantic", tau=-9.0, uncalibrated=True
    )
    again = Solver(llm, config).solve(FIRST, WORDINGS)  # nothing was reset
    assert again.branches[1].sharing == "semantic"
    assert again.branches[1].similarity == pytest.approx(first.branches[1].similarity, abs=0.05)


def test_what_the_cache_holds_beyond_the_end_of_the_first_phrasing_is_like_nothing(llm):
    phrasings = [FIRST, f"{ALIKE} {STORY}"]
    options = {"branches": 2, "tokens_per_step": 6, "sampling": SEEDED}
    exact = solve(llm, phrasings[1:])  # its prompt lies in the cache from now on
    semantic = SolverConfig(**options, sharing="semantic", policy="paper", tau=0.5)
    result = Solver(llm, semantic).solve(phrasings[0], phrasings)
    (share,) = (gate for gate in result.trace["gates"] if gate["gate"] == "share")
    assert (share["value"], share["decision"]) == (0.0, "computed")
    assert result.branches[1].sharing == "exact" and exact.branches[0].num_saved_tokens == 0


def test_probes_over_several_chunks(tiny_llama):
    results = []
    for max_batch_tokens in (2048, 64):
        model = tiny_llama(layers=LAYERS, tokenizer=True)
        with LLM(model, block_size=8, kv_cache_bytes="4MiB", max_batch_tokens=max_batch_tokens) as llm:
            results.append(solve(llm, tau=-9.0, gates=None))
    whole, chunks = results
    assert [b.token_ids for b in whole.branches] == [b.token_ids for b in chunks.branches]
    assert whole.branches[1].similarity == pytest.approx(chunks.branches[1].similarity, abs=1e-4)


@pytest.mark.parametrize("name", sorted(MEASURES))
def test_every_gate_works_in_a_probe(llm, name):
    ids = [llm.tokenizer.encode(wording) for wording in (FIRST, FIRST[:40] + FIRST[41:], STORY[::-1])]
    probe = Probe(MEASURES[name], 3, 2.0, aligned=False)
    for row, token_ids in enumerate(ids):
        probe.watch(row, token_ids)
    roots = llm.branches(ids[:1], seats=[Seat(probe, 0, sees_all=True)])
    probe.root = roots[0]
    roots += llm.branches(ids[1:], seats=[Seat(probe, row) for row in (1, 2)])
    assert probe.similarities[1] > probe.similarities[2] and probe.similarities[1] <= 1
    for root in roots:
        root.prune()


def test_what_may_be_borrowed():
    root = list(range(100, 200))
    assert reusable(root, root) == [(i, i) for i in range(100)]
    moved = [1, 2, 3, *root]
    assert reusable(moved, root) == [(i + 3, i) for i in range(AFTER_SPLICE, 100)]
    assert reusable([1, *root[: MIN_RUN - 1], 2], root) == []


def test_the_published_rule_is_sigma_over_all_layers_without_a_guard(llm):
    result = solve(llm, tau=-9.0, policy="paper", verify="auto", uncalibrated=False)
    assert [b.sharing for b in result.branches[1:3]] == ["semantic", "semantic"]  # a changed number too
    share = [gate for gate in result.trace["gates"] if gate["gate"] == "share"]
    assert [gate["layer"] for gate in share] == [LAYERS - 1] * 2
    for options in ({"tau": None}, {"tau": 0.9, "sharing_mode": "aligned"}):
        with pytest.raises(ConfigError, match="gives no value"):
            solve(llm, policy="paper", verify="auto", **options)

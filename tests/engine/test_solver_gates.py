"""The gates in a real solve: exact ones keep the answer, failures and small caches keep the result."""

import math

import pytest
import torch
from integrity import check_integrity

from minirksc import LLM, SamplingParams, Solver, SolverConfig
from minirksc.errors import NumericalError
from minirksc.rksc import solver, verify
from minirksc.rksc.cgee import EXACT_GATES, PAPER_GATES, DecodeRule, Gates, Lead
from minirksc.rksc.exits import MarginRule
from minirksc.rksc.node import Node

PROBLEM = "a baker bakes 12 loaves and gives 3 of them away. how many are left?"
LAYERS = 6
SEEDED = SamplingParams(temperature=0.8, top_p=0.95, seed=0)


@pytest.fixture(autouse=True)
def choices_of_one_token(monkeypatch):
    monkeypatch.setattr(verify, "_PLAIN_CHOICES", ("Y", "N"))


@pytest.fixture()
def llm(tiny_llama):
    with LLM(tiny_llama(layers=LAYERS, tokenizer=True), block_size=8, kv_cache_bytes="4MiB") as llm:
        yield llm
        assert llm.stats()["num_blocks_used"] == 0
        check_integrity(llm.engine.blocks)


def solve(llm, problem=PROBLEM, **options):
    llm.reset_prefix_cache()
    config = {"branches": 6, "tokens_per_step": 8, "answer_parser": lambda text: text[:1] or None, "sampling": SEEDED}
    config |= options
    return Solver(llm, SolverConfig(**config)).solve(problem)


def same_tokens(one, other):
    return [b.token_ids for b in one.branches] == [b.token_ids for b in other.branches]


@pytest.mark.parametrize("select", ["score", "vote", "weighted_vote"])
@pytest.mark.parametrize("verify_style", ["append", "standalone"])
@pytest.mark.parametrize("seed", range(4))
def test_exact_gates_give_the_answer_of_asking_everybody(llm, select, verify_style, seed):
    options = dict(select=select, verify_style=verify_style, sampling=SamplingParams(temperature=1.5, seed=seed))
    full = solve(llm, verify="always", **options)
    gated = solve(llm, gates=EXACT_GATES, decode_exit="off", **options)
    assert gated.parsed == full.parsed and gated.gates == "exact"
    if select != "vote":  # a vote may stop branches whose text then is shorter
        assert same_tokens(gated, full)
    for one, other in zip(gated.branches, full.branches, strict=True):
        if one.verification is not None:
            assert one.verification == pytest.approx(other.verification, abs=1e-5)
    assert all(b.exit_layer is None for b in gated.branches)


def test_layer_exit_saves_layers_and_says_so(llm):
    full = solve(llm, verify="always")
    gates = Gates(exact=False, layer_exit=MarginRule(margin=0.0, patience=1), source="uncalibrated")
    gated = solve(llm, gates=gates, decode_exit="off")
    assert same_tokens(gated, full)
    assert [b.exit_layer for b in gated.branches] == [LAYERS // 2 + 1] * 6
    assert gated.stats["num_saved_layer_rows"] > 0 and gated.gates == "uncalibrated"
    notes = [gate for gate in gated.trace["gates"] if gate["gate"] == "layer_exit"]
    assert len(notes) == 6 and all(note["calibrated"] is False for note in notes)


def test_never_clear_margins_change_nothing(llm):
    full = solve(llm, verify="always")
    gates = Gates(exact=False, layer_exit=MarginRule(margin=1e9), source="calibrated")
    gated = solve(llm, gates=gates, decode_exit="off")
    assert [(b.token_ids, b.score) for b in gated.branches] == [(b.token_ids, b.score) for b in full.branches]


def test_a_decode_exit_keeps_the_leader_whole(llm):
    full = solve(llm, verify="always", tokens_per_step=24)
    gates = Gates(decode_exit=(Lead(),), decode_min_tokens=5, source="uncalibrated")
    gated = solve(llm, gates=gates, tokens_per_step=24)
    best = gated.branches[gated.best]
    assert best.token_ids == full.branches[gated.best].token_ids
    stopped = [b for i, b in enumerate(gated.branches) if i != gated.best]
    assert {b.finish_reason for b in stopped} <= {"early_exit", "stop"}
    assert all(len(b.token_ids) >= 5 for b in stopped)
    assert gated.stats["num_decoded_tokens"] < full.stats["num_decoded_tokens"]
    assert gated.stats["verify_s"] == 0
    assert [note["decision"] for note in gated.trace["gates"]] == ["keep_leader"]


def test_the_published_policy_stops_everybody(llm):
    gates = Gates(exact=False, decode_exit=(Lead(),), decode_min_tokens=3, source="paper")
    gated = solve(llm, gates=gates, decode_exit="stop_all", tokens_per_step=24)
    assert all(len(b.token_ids) == 3 or b.finish_reason == "stop" for b in gated.branches)
    paper = solve(llm, policy="paper", verify_style="standalone")
    assert paper.gates == "paper" and Solver(llm, SolverConfig(policy="paper")).gates is PAPER_GATES
    # The notebook looks from step 3 on, and its first step is 0.
    assert PAPER_GATES.decode_min_tokens == 4
    # Whatever leaves by entropy is not said to have a clear margin.
    exits = [note for note in paper.trace["gates"] if note["gate"] == "layer_exit"]
    assert exits and all("entropy" in note["reason"] and note["threshold"] is None for note in exits)


def test_a_skip_asks_nobody(llm):
    gates = Gates(skip=(Lead(),), source="uncalibrated")
    gated = solve(llm, gates=gates, decode_exit="off", answer_parser=lambda text: None)
    assert all(b.verification is None and b.score is None for b in gated.branches)
    assert gated.branches[gated.best].confidence == max(b.confidence for b in gated.branches)
    assert gated.stats["verify_s"] == 0


def test_choices_of_several_tokens_are_scored_whole_and_have_no_layer_exit(llm, monkeypatch):
    monkeypatch.setattr(verify, "_PLAIN_CHOICES", (" no way", " no"))  # they begin alike
    gates = Gates(exact=False, layer_exit=MarginRule(margin=0.0, patience=1), source="uncalibrated")
    gated = solve(llm, gates=gates, decode_exit="off")
    full = solve(llm, verify="always")
    assert all(b.exit_layer is None for b in gated.branches)
    assert [b.score for b in gated.branches] == [b.score for b in full.branches]


def test_a_branch_that_fails_is_left_out_and_all_of_them_are_an_error(llm, monkeypatch):
    sample = llm.engine._sample
    broken = {"paths": {(1,), (4,)}}

    def spoil(logits, wanted):
        logits = logits.clone()
        for rows in wanted:
            if rows.item.request.sequence.path in broken["paths"] and rows.item.request.checker is not None:
                logits[rows.begin : rows.end] = math.nan
        return sample(logits, wanted)

    monkeypatch.setattr(llm.engine, "_sample", spoil)
    result = solve(llm)
    assert len(result.branches) == 6
    failed = [b for b in result.branches if b.error]
    assert [b.path for b in failed] == [(1,), (4,)] and all("NaN" in b.error for b in failed)
    assert all(b.finish_reason == "error" and b.parsed is None and b.score is None for b in failed)
    assert result.branches[result.best].error is None
    assert [node["error"] is not None for node in result.trace["nodes"]] == [i in (1, 4) for i in range(6)]
    broken["paths"] = {(i,) for i in range(6)}
    with pytest.raises(NumericalError, match="NaN"):
        solve(llm)


def test_the_leader_is_the_same_branch_where_another_one_failed(llm, monkeypatch):
    # Branch 0 fails in its second token: whoever leads stands one place earlier among those that are left.
    sample, leads = llm.engine._sample, []

    def spoil(logits, wanted):
        logits = logits.clone()
        for rows in wanted:
            request = rows.item.request
            if request.sequence.path == (0,) and len(request.output_token_ids) == 1:
                logits[rows.begin : rows.end] = math.nan
        return sample(logits, wanted)

    class Noted(DecodeRule):
        def __call__(self, progress):
            stopped = super().__call__(progress)
            if stopped:
                leads.append(progress[self.leader].branch.path)
            return stopped

    monkeypatch.setattr(llm.engine, "_sample", spoil)
    monkeypatch.setattr(solver, "DecodeRule", Noted)
    gates = Gates(decode_exit=(Lead(),), decode_min_tokens=3, source="uncalibrated")
    result = solve(llm, gates=gates, tokens_per_step=12)
    assert [b.path for b in result.branches if b.error] == [(0,)]
    assert len(leads) == 1 and result.branches[result.best].path == leads[0]
    (note,) = result.trace["gates"]
    assert tuple(result.trace["nodes"][note["node"]]["path"]) == leads[0]


def test_a_branch_that_finished_before_is_a_rival_that_nobody_stops_for(llm, monkeypatch):
    monkeypatch.setattr(Node, "finished", property(lambda node: node.branch.path == (0,) and node.text != ""))
    gates = Gates(decode_exit=(Lead(),), decode_min_tokens=1, source="uncalibrated")
    for select in ("score", "vote"):
        result = solve(llm, gates=gates, depth=2, beam=6, branches=6, select=select, tokens_per_step=6)
        assert (0,) in [b.path for b in result.branches]
        assert "early_exit" not in [b.finish_reason for b in result.branches]
        assert "consensus" not in [b.finish_reason for b in result.branches]


@pytest.mark.parametrize("others_fail", [False, True])
def test_one_that_finished_before_is_left_where_all_others_fail(llm, monkeypatch, others_fail):
    monkeypatch.setattr(Node, "finished", property(lambda node: node.branch.path == (0,) and node.text != ""))
    sample = llm.engine._sample

    def spoil(logits, wanted):
        fails = others_fail and any(len(rows.item.request.sequence.path) == 2 for rows in wanted)
        return sample(logits * math.nan if fails else logits, wanted)

    monkeypatch.setattr(llm.engine, "_sample", spoil)
    result = solve(llm, verify="always", depth=2, beam=6, tokens_per_step=6)
    assert (result.branches[result.best].path == (0,)) or not others_fail
    assert {b.path for b in result.branches if b.error is None} == {(0,)} or not others_fail


def test_an_error_of_no_branch_in_particular_is_not_swallowed(llm, monkeypatch):
    def fail(branches, params, on_step=None):
        raise NumericalError("somewhere")

    monkeypatch.setattr(llm.session(), "extend", fail)
    with pytest.raises(NumericalError, match="somewhere"):
        solve(llm)


@pytest.mark.parametrize("depth", [1, 2])
def test_a_cache_too_small_for_all_branches_at_once_gives_the_same_result(tiny_llama, depth):
    model = tiny_llama(layers=LAYERS, tokenizer=True)
    results = []
    for blocks in (400, 24):  # one sequence and its question need 19
        with LLM(model, block_size=8, kv_cache_bytes=f"{blocks * 8 * LAYERS * 2 * 2 * 24 * 4}") as llm:
            assert llm.stats()["num_blocks_total"] == blocks
            results.append(solve(llm, verify="always", tokens_per_step=10, depth=depth))
            preemptions = llm.stats()["num_preemptions"]
    assert preemptions > 0
    ample, small = results
    assert same_tokens(ample, small)
    assert [b.score for b in small.branches] == pytest.approx([b.score for b in ample.branches], abs=1e-5)
    assert small.parsed == ample.parsed


def test_a_gate_that_sees_nan_lets_its_row_go_on_and_reports_it(llm, monkeypatch):
    full = solve(llm, verify="always")
    lens = llm.lens([5, 6])
    monkeypatch.setattr(llm.session(), "lens", lambda token_ids: lambda hidden: lens(hidden) * math.nan)
    gates = Gates(exact=False, layer_exit=MarginRule(margin=0.0, patience=1), source="uncalibrated")
    gated = solve(llm, gates=gates, decode_exit="off")
    assert [b.score for b in gated.branches] == pytest.approx([b.score for b in full.branches])
    assert [gate["decision"] for gate in gated.trace["gates"]] == ["goes on"] * 6
    assert torch.isfinite(torch.tensor([b.score for b in gated.branches])).all()


UNTESTED = dict(source="uncalibrated")
NOBODY_ASKED = {
    "agreement": dict(gates=EXACT_GATES, decode_exit="off", answer_parser=lambda text: "7"),
    "skip": dict(gates=Gates(skip=(Lead(),), **UNTESTED), decode_exit="off"),
    "decode_exit": dict(gates=Gates(decode_exit=(Lead(),), decode_min_tokens=3, **UNTESTED), decode_exit="keep_leader"),
}


@pytest.mark.parametrize("gate", NOBODY_ASKED)
def test_where_nobody_is_asked_there_is_no_score_anywhere_and_the_surest_is_named(llm, gate):
    result = solve(llm, tokens_per_step=12, **NOBODY_ASKED[gate])
    assert gate in [note["gate"] for note in result.trace["gates"]] and result.stats["verify_s"] == 0
    branches, nodes = result.branches, result.trace["nodes"]
    assert {(b.score, b.verification) for b in branches} == {(None, None)}
    assert {(n["score"], n["verification"], n["verified"]) for n in nodes} == {(None, None, False)}
    assert [b["score"] for b in result.to_dict()["branches"]] == [None] * 6
    if gate in ("agreement", "skip"):
        assert branches[result.best].confidence == max(b.confidence for b in branches)
    if gate == "decode_exit":
        assert "nobody is asked" in result.trace["gates"][-1]["reason"]


@pytest.mark.parametrize("seed", range(3))
def test_where_the_vote_is_over_a_branch_that_ended_is_named_and_who_was_cut_off_has_no_answer(llm, seed):
    sampling = SamplingParams(temperature=1.0, seed=seed, stop=list("aeiou rstn"), ignore_eos=True)
    options = dict(select="vote", tokens_per_step=60, sampling=sampling, answer_parser=lambda text: "7")
    result = solve(llm, gates=EXACT_GATES, decode_exit="off", **options)
    cut = [b for b in result.branches if b.finish_reason == "consensus"]
    assert 0 < len(cut) < 3 and all(b.parsed is b.score is None for b in cut)
    assert result.branches[result.best].finish_reason == "stop" and result.parsed == "7"


def test_a_score_is_of_who_was_asked_and_with_verify_never_it_is_the_confidence(llm):
    gated = solve(llm, gates=EXACT_GATES, decode_exit="off", sampling=SamplingParams(temperature=1.5, seed=3))
    assert 0 < sum(b.score is None for b in gated.branches) < 6  # bound spared some
    for branch in gated.branches:
        expected = None if branch.verification is None else branch.verification * math.sqrt(branch.confidence)
        assert branch.score == expected
    never = solve(llm, verify="never")
    assert [b.score for b in never.branches] == [b.confidence for b in never.branches]
    assert all(b.verification is None for b in never.branches)


@pytest.mark.parametrize("options", [dict(verify="always"), dict(gates=EXACT_GATES, decode_exit="off")])
@pytest.mark.parametrize("depth", [1, 2])
def test_a_branch_whose_question_fails_is_left_out_and_all_of_them_are_an_error(llm, monkeypatch, options, depth):
    score, broken = llm.session().score, set()

    def fails(branches, *rest):
        rows = score(branches, *rest)
        if any(branch.path[:1] in broken for branch in branches):
            raise NumericalError("the model gave NaN for a choice")
        return rows

    monkeypatch.setattr(llm.session(), "score", fails)
    full = solve(llm, depth=depth, **options)
    assert full.branches[full.best].verification is not None
    broken.add(full.branches[full.best].path[:1])
    result = solve(llm, depth=depth, **options)
    failed = [b for b in result.branches if b.error]
    assert failed and all(b.path[:1] in broken and "NaN" in b.error for b in failed)
    assert all(b.score is b.verification is b.parsed is None for b in failed)
    assert result.branches[result.best].path[:1] not in broken
    broken.update((i,) for i in range(6))
    if options == dict(verify="always"):  # with the gates the last one that is left needs no asking
        with pytest.raises(NumericalError, match="NaN for a choice"):
            solve(llm, depth=depth, **options)


@pytest.mark.parametrize("leader_fails", [False, True])
def test_a_leader_that_fails_leaves_the_others_to_be_asked(llm, monkeypatch, leader_fails):
    sample = llm.engine._sample

    def spoil(logits, wanted):
        requests = [rows.item.request for rows in wanted]
        alone = leader_fails and len(requests) == 1 and requests[0].checker is not None
        return sample(logits * math.nan if alone else logits, wanted)

    monkeypatch.setattr(llm.engine, "_sample", spoil)
    gates = Gates(decode_exit=(Lead(),), decode_min_tokens=3, source="uncalibrated")
    result = solve(llm, gates=gates, tokens_per_step=12)
    (note,) = [note for note in result.trace["gates"] if note["gate"] == "decode_exit"]
    assert ("nobody is asked" in note["reason"]) is not leader_fails
    assert any(b.verification is not None for b in result.branches) is leader_fails
    assert result.branches[result.best].error is None

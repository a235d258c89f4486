"""Evidence, and that a replay of it is what the solver does."""

import json
import math
import random
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from integrity import check_integrity

from minirksc import LLM, SamplingParams
from minirksc.calibrate.collect import Collector
from minirksc.calibrate.evidence import BranchEvidence, Evidence, Failed
from minirksc.calibrate.replay import Replay, replay
from minirksc.cli.evidence_file import EvidenceFile, read_evidence
from minirksc.cli.resumable import GrowingFile
from minirksc.engine.signals import SIGNALS, TokenSignals
from minirksc.errors import ConfigError
from minirksc.rksc.cgee import EXACT_GATES, NO_GATES, PAPER_GATES, Gates, Lead
from minirksc.rksc.exits import MarginRule
from minirksc.rksc.solver import Solver, SolverConfig

LAYERS = 6
PROBLEMS = [f"Problem {i}: how many?" for i in range(5)]


def two_answers(text):
    """One of two, the first twice as often, or none."""
    return ("0", "0", "1", None)[sum(c.isascii() for c in text) % 4]


BASE = dict(
    branches=5,
    tokens_per_step=20,
    sampling=SamplingParams(temperature=1.0, seed=3, logit_bias={2: 3.5}),  # some end by themselves
    answer_parser=two_answers,
)


@pytest.fixture(scope="module")
def llm(tiny_llama):
    with LLM(tiny_llama(layers=LAYERS, chat=True), block_size=8, kv_cache_bytes="8MiB", threads=1) as llm:
        yield llm


@pytest.fixture(scope="module", params=["append", "standalone"])
def collected(llm, request):
    config = SolverConfig(verify_style=request.param, **BASE)
    return config, Collector(llm, config).collect([(problem, None) for problem in PROBLEMS], [3] * len(PROBLEMS))


leads = st.builds(
    Lead,
    top=st.sampled_from([0.0, 0.1]),
    gap=st.one_of(st.just(0.0), st.floats(0.001, 0.4)),
    is_relative=st.booleans(),
)
any_gates = st.builds(
    Gates,
    exact=st.booleans(),
    signal=st.sampled_from(sorted(SIGNALS)),
    skip=st.one_of(st.just(()), st.tuples(leads), st.tuples(leads, leads)),
    compares_answers=st.booleans(),
    layer_exit=st.one_of(st.none(), st.builds(MarginRule, margin=st.floats(0, 1.5), patience=st.integers(1, 3))),
    decode_exit=st.one_of(st.just(()), st.tuples(leads)),
    decode_min_tokens=st.integers(1, 14),
    source=st.just("uncalibrated"),
)
rules = st.sampled_from(["score", "vote", "weighted_vote"])
modes = st.sampled_from(["off", "keep_leader", "stop_all"])


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(index=st.integers(0, len(PROBLEMS) - 1), gates=any_gates, select=rules, mode=modes)
def test_a_replay_is_what_the_solver_does(llm, collected, index, gates, select, mode):
    config, found = collected
    evidence = found[index]
    live = Solver(llm, replace(config, gates=gates, select=select, decode_exit=mode)).solve(PROBLEMS[index])
    outcome = replay(evidence, gates, mode, select=select, answer_parser=two_answers)
    assert (outcome.best, outcome.answer) == (live.best, live.parsed)
    assert outcome.num_asked == sum(branch.verification is not None for branch in live.branches)
    assert outcome.exit_layers == [branch.exit_layer for branch in live.branches]
    assert outcome.num_decoded_tokens == live.stats["num_decoded_tokens"]
    if gates.exact and outcome.reason in ("asked", "bound", "agreement") and not any(outcome.exit_layers):
        before = Replay(evidence, select=select, answer_parser=two_answers).reference
        assert not outcome.differs(before)


@pytest.mark.parametrize("select", ["score", "vote", "weighted_vote"])
def test_without_gates_it_is_the_solve_that_asks_everybody(llm, collected, select):
    config, found = collected
    config = replace(config, select=select, verify="always")
    for problem, evidence in zip(PROBLEMS, found, strict=True):
        live = Solver(llm, config).solve(problem)
        outcome = replay(evidence, NO_GATES, select=select, answer_parser=two_answers)
        assert (outcome.best, outcome.answer, outcome.reason) == (live.best, live.parsed, "asked")
        for branch, seen in zip(live.branches, evidence.branches, strict=True):
            assert (branch.text, branch.token_ids) == (seen.text_after(len(seen.token_ids)), seen.token_ids)
            assert branch.verification == pytest.approx(seen.probability, abs=1e-5)
            assert branch.confidence == pytest.approx(SIGNALS["mean_top1"](seen.signals), abs=1e-5)
        assert (
            outcome.num_question_rows
            == outcome.num_question_rows_full
            == outcome.num_rows_full - (outcome.num_decoded_tokens_full * LAYERS)
        )


def test_the_solves_cover_every_gate(collected):
    """The property above would prove little if gates never decided."""
    _, found = collected
    seen = set()
    some = [
        EXACT_GATES,
        Gates(skip=(Lead(gap=0.02),), source="x"),
        Gates(layer_exit=MarginRule(0.05, 1), source="x"),
        Gates(decode_exit=(Lead(gap=0.1),), decode_min_tokens=1, source="x"),
    ]
    for evidence in found:
        for select in ("score", "vote", "weighted_vote"):
            for gates in some:
                outcome = replay(evidence, gates, select=select, answer_parser=two_answers)
                seen |= {outcome.reason, "layer_exit" if any(outcome.exit_layers) else "asked"}
    assert seen >= {"decode_exit", "consensus", "agreement", "skip", "bound", "asked", "layer_exit"}


def test_margins_are_noted_after_every_layer_but_the_last(collected):
    _, found = collected
    for evidence in found:
        assert evidence.num_layers == LAYERS
        for branch in evidence.branches:
            assert len(branch.margins) == LAYERS - 1 and all(map(math.isfinite, branch.margins))
            assert len(branch.ends) == len(branch.token_ids) == len(branch.signals.top1)
            assert branch.ends == sorted(branch.ends) and branch.ends[-1] == len(branch.text)
            assert len(branch.signals.self_certainty) == len(branch.token_ids)


def test_json_keeps_everything(collected):
    _, found = collected
    for evidence in found:
        assert Evidence.from_dict(json.loads(json.dumps(evidence.to_dict(), allow_nan=False))) == evidence


def test_collecting_leaves_nothing_behind_and_a_failure_harms_nobody(llm):
    collector = Collector(llm, SolverConfig(**BASE))
    too_long = "x" * 1000
    found = collector.collect([(PROBLEMS[0], None), (too_long, None), (PROBLEMS[1], "7")], [1, 2, 5])
    assert [isinstance(one, Failed) for one in found] == [False, True, False]
    assert "1000" in found[1].error or "512" in found[1].error
    assert [found[0].reference, found[2].reference] == [None, "7"]
    assert llm.stats()["num_blocks_used"] == 0
    check_integrity(llm.engine.blocks)
    alone, other = (collector.collect([(PROBLEMS[1], "7")], [seed])[0] for seed in (5, 6))
    assert [b.token_ids for b in alone.branches] == [b.token_ids for b in found[2].branches]
    assert [b.token_ids for b in alone.branches] != [b.token_ids for b in other.branches]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(depth=2), "depth=2"),
        (dict(verify="never"), "verify='never'"),
        (dict(sharing="semantic"), "semantic"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(llm, options, message):
    with pytest.raises(ConfigError, match=message):
        Collector(llm, SolverConfig(**{**BASE, **options}))


def branch(text="12", top1=(0.5, 0.6), probability=0.5, margins=(), **options):
    ends = list(range(1, len(text) + 1))
    signals = TokenSignals(list(top1), [1.0] * len(top1))
    return BranchEvidence(
        [0] * len(text), text, ends, options.get("hidden", 0), "stop", signals, probability, list(margins)
    )


def test_a_stop_string_is_not_part_of_the_answer_but_of_what_was_said_before():
    one = branch("12;;", (0.5,) * 4, hidden=2)
    assert [one.text_after(n) for n in range(5)] == ["", "1", "12", "12;", "12"]


def test_a_changed_decision_is_another_answer_or_another_branch_where_there_is_none():
    outcome = replay(Evidence([branch("12"), branch("13")], 4, 1.0), NO_GATES)
    assert not outcome.differs(replace(outcome, best=1))
    assert outcome.differs(replace(outcome, answer="13"))
    assert outcome.differs(replace(outcome, answer=None))
    without = replace(outcome, answer=None)
    assert without.differs(replace(without, best=1)) and not without.differs(without)


def test_a_margin_that_is_not_finite_lets_nobody_leave_and_survives_json():
    nan = [9.0, math.nan, math.nan, 9.0, 9.0]
    evidence = Evidence([branch("1", (0.5,), 0.2, nan), branch("2", (0.5,), 0.9, [9.0] * 5)], 6, 1.0)
    again = Evidence.from_dict(json.loads(json.dumps(evidence.to_dict(), allow_nan=False)))
    gates = Gates(exact=False, layer_exit=MarginRule(1.0, 2), source="uncalibrated")
    for one in (evidence, again):
        assert replay(one, gates).exit_layers == [5, 5]
        assert replay(one, replace(gates, layer_exit=MarginRule(1.0, 1))).exit_layers == [4, 4]
        assert replay(one, replace(gates, layer_exit=MarginRule(9.5, 1))).exit_layers == [None, None]


def test_the_papers_layer_exit_does_not_follow_from_margins():
    with pytest.raises(ConfigError, match="MarginRule"):
        replay(Evidence([branch(), branch()], 4, 1.0), PAPER_GATES)


def random_branches(seed):
    rng = random.Random(seed)
    branches = []
    for _ in range(rng.randint(1, 5)):
        size = rng.randint(1, 20)
        text = "".join(rng.choice("123 ") for _ in range(size))
        margins = [rng.gauss(0, 1) for _ in range(5)]
        branches.append(branch(text, [rng.random() for _ in range(size)], rng.random(), margins))
    return branches


@given(st.integers(0, 10_000), st.lists(any_gates, min_size=2, max_size=6), rules, modes)
def test_what_a_replay_remembers_of_other_gates_changes_nothing(seed, several, select, mode):
    evidence = Evidence(random_branches(seed), 6, 7.0)
    one = Replay(evidence, select=select, decode_mode=mode)
    for gates in several:
        assert one.outcome(gates) == replay(evidence, gates, mode, select=select)


@given(st.integers(0, 10_000), any_gates.map(lambda gates: replace(gates, exact=True)), rules, modes)
def test_costs_are_within_those_of_asking_everybody(seed, gates, select, mode):
    branches = random_branches(seed)
    outcome = replay(Evidence(branches, 6, 7.0), gates, mode, select=select)
    assert 0 <= outcome.num_asked <= len(branches)
    assert 0 <= outcome.num_question_rows <= outcome.num_question_rows_full
    assert len(branches) <= outcome.num_decoded_tokens <= outcome.num_decoded_tokens_full
    assert all(layer is None or 4 <= layer < 6 for layer in outcome.exit_layers)
    assert (outcome.reason in ("asked", "bound")) == (outcome.num_asked > 0)


def changed(values, place, value):
    for key in place[:-1]:
        values = values[key]
    values[place[-1]] = value


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("branches",), None), (("branches",), []), (("branches",), [5]), (("branches",), {}), (("num_layers",), "6"),
        (("num_layers",), 0), (("num_question_tokens",), "x"), (("num_question_tokens",), float("nan")),
        (("reference",), 5),
        *[(("branches", 0, "probability"), value) for value in (None, "x", -0.1, 1.1, float("nan"), [], True + 1)],
        *[(("branches", 0, "token_ids"), value) for value in (None, "12", [1], [1.5, 2], ["1", "2"], 5)],
        *[(("branches", 0, "ends"), value) for value in (None, [2, 1], [1, 99], [-1, 2], ["1", "2"], [1])],
        *[(("branches", 0, "num_hidden"), value) for value in (None, -1, 99, 1.5, "1")],
        *[(("branches", 0, "signals", "top1"), value)
            for value in (None, [0.5], [0.5, None], ["a", "b"], [0.5, float("nan")])],
        (("branches", 0, "signals"), None), (("branches", 0, "signals"), {"top1": []}), (("branches", 0, "text"), None),
        (("branches", 0, "margins"), ["a"] * 5), (("branches", 0, "margins"), [1.0]),
        (("branches", 0, "margins"), None),
        (("branches", 0, "finish_reason"), 5), (("more",), 5),
    ],
)  # fmt: skip
def test_a_file_of_other_evidence_is_refused_by_name(tmp_path, place, value):
    path = tmp_path / "evidence.jsonl"
    evidence = Evidence([branch(margins=[0.5] * 5)], LAYERS, 7.0)
    with GrowingFile(path, "evidence") as file:
        EvidenceFile(file, {}).add(0, evidence)
    assert read_evidence(path)[1] == [evidence]
    header, line = path.read_text().splitlines()
    values = json.loads(line)
    changed(values["evidence"], place, value)
    path.write_text(f"{header}\n{json.dumps(values)}\n")
    with pytest.raises(ConfigError, match="line 2 is no evidence"):
        read_evidence(path)


@pytest.mark.parametrize(
    "line", ["5", "[]", "null", '{"problem": "x", "error": "y"}', '{"problem": [], "error": "y"}', "{}", "["]
)
def test_a_line_that_is_none_is_refused_by_name(tmp_path, line):
    path = tmp_path / "evidence.jsonl"
    with GrowingFile(path, "evidence") as file:
        EvidenceFile(file, {}).add(0, Failed("lost"))
    path.write_text(f"{path.read_text()}{line}\n")
    with pytest.raises(ConfigError, match="line 3 is no evidence"):
        read_evidence(path)

"""The gates of CGEE: exact ones change no answer, approximate ones heed their thresholds, and NaN decides nothing."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minirksc.engine.gates import LEAVE, GateRows
from minirksc.engine.signals import GROUP, SIGNALS, TAIL, TokenSignals
from minirksc.rksc.answers import SELECT_RULES, choose
from minirksc.rksc.cgee import EXACT_GATES, PAPER_GATES, DecodeRule, Gates, Lead, leader_of, standing
from minirksc.rksc.exits import EntropyExit, LayerExit, MarginExit, MarginRule

NAN = math.nan


@st.composite
def candidates(draw):
    count = draw(st.integers(1, 7))
    answers = draw(st.lists(st.sampled_from([None, "1", "2", "3"]), min_size=count, max_size=count))
    grid = st.integers(0, 8).map(lambda n: n / 8)  # ties are likely
    probabilities = draw(st.lists(grid, min_size=count, max_size=count))
    bounds = draw(st.lists(grid, min_size=count, max_size=count))
    scores = [p * bound for p, bound in zip(probabilities, bounds, strict=True)]
    return answers, scores, bounds


def test_the_example_of_where_a_choice_stands():
    assert standing(["4", "7"], [0.4, None], [0.9, 0.5], "score") == (0, [1])  # 0.5 would be more than 0.4
    assert standing(["4", "7"], [0.4, None], [0.9, 0.3], "score") == (0, [])
    assert standing(["4", "7", "4"], [0.4, None, None], [0.9, 0.5, 0.8], "score") == (0, [1])
    assert standing(["4", "7", "4"], [0.4, None, None], [0.9, 0.5, 0.8], "weighted_vote") == (0, [2, 1])


@given(candidates(), st.sampled_from(SELECT_RULES), st.integers(1, 3), st.data())
def test_asking_while_it_is_open_gives_the_answer_of_asking_everybody(case, rule, num_first, data):
    answers, scores, bounds = case
    known = [None] * len(scores)
    num_asked = 0
    while True:
        best, threats = standing(answers, known, bounds, rule)
        if not threats:
            break
        assert all(known[i] is None for i in threats)
        assert [bounds[i] for i in threats] == sorted((bounds[i] for i in threats), reverse=True)
        for i in threats[:num_first]:
            known[i] = scores[i]
            num_asked += 1
    full = choose(answers, scores, rule)
    assert answers[best] == answers[full]
    if answers[full] is None:
        assert best == full or scores[best] == scores[full]


def test_nobody_is_asked_where_all_agree():
    assert standing(["4", "4", "4"], [None] * 3, [0.5, 0.9, 0.7], "score") == (1, [])
    assert standing(["4", "4", None], [None] * 3, [0.5, 0.9, 0.7], "vote") == (1, [])
    assert standing(["4", None], [None] * 2, [0.5, 0.9], "score")[1] == [1, 0]


def test_who_cannot_win_is_not_asked():
    # 1 leads with 0.6; 0 could reach 0.9, 2 no more than 0.5, and 3 gives the leader's answer.
    assert standing(["1", "2", "3", "2"], [None, 0.6, None, None], [0.9, 0.8, 0.5, 0.95], "score") == (1, [0])


def test_a_majority_needs_no_scores_and_a_tie_does():
    answers = ["1", "1", "2", "2", "3"]
    assert standing([*answers, "1"], [None] * 6, [0.5] * 6, "vote")[1] == []
    _, threats = standing(answers, [None] * 5, [0.5] * 5, "vote")
    assert sorted(threats) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("values", "answers", "lead", "expected"),
    [
        ([0.8, 0.7], None, Lead(0.7, 0.06, is_relative=False), 0),
        ([0.69, 0.5], None, Lead(0.7, 0.06, is_relative=False), None),
        ([0.8, 0.75], None, Lead(0.7, 0.06, is_relative=False), None),
        ([0.60, 0.64], None, Lead(0.63, 0.05), 1),
        ([0.60, 0.64], None, Lead(0.63, 0.08), None),
        ([0.8, 0.79, 0.5], ["1", "1", "2"], Lead(gap=0.3), 0),
        ([0.8, 0.79, 0.5], None, Lead(gap=0.3), None),
        ([0.8, 0.79, 0.5], [None, None, "2"], Lead(gap=0.3), None),
        ([0.8, 0.79], ["1", "1"], Lead(gap=0.3), 0),
        ([0.8, NAN], None, Lead(), None),
        ([NAN, NAN], None, Lead(), None),
        ([0.8], None, Lead(), 0),
    ],
)
def test_a_lead(values, answers, lead, expected):
    assert leader_of(values, answers, [lead]) == expected
    assert leader_of(values, answers, []) is None


def test_the_published_rules_are_alternatives():
    assert leader_of([0.65, 0.59], None, PAPER_GATES.skip) == 0  # the relative rule alone
    assert leader_of([0.90, 0.83], None, PAPER_GATES.skip) == 0  # the absolute rule alone
    assert leader_of([0.62, 0.3], None, PAPER_GATES.skip) is None


# Layer exit


def rows_of(names, ends=True, num=None):
    return GateRows(
        rows=names,
        ends=[ends] * len(names),
        positions=[range(3)] * len(names),
        last=lambda: torch.tensor(names, dtype=torch.float32)[:, None],
        hidden=lambda index: torch.zeros(3, 1),
    )


def run_exit(margins, ends=True, **options):
    """margins[row][layer]; returns exit_layers."""
    at = {"layer": 0}

    def lens(hidden):
        values = [margins[int(row)][at["layer"]] for row in hidden[:, 0]]
        return torch.tensor([[value, 0.0] for value in values])

    num_layers = len(margins[0])
    gate = LayerExit(lens, num_layers, **options)
    alive = list(range(len(margins)))
    for layer in range(num_layers):
        at["layer"] = layer
        if layer in gate.layers and alive:
            left = gate.after_layer(layer, rows_of(alive, ends))
            assert all(verdict is LEAVE for verdict in left.values())
            alive = [row for row in alive if row not in left]
    return gate


def test_a_row_leaves_once_its_margin_has_been_clear_for_some_layers():
    margins = [
        [9, 9, 9, 5, 5, 5, 5, 5],  # clear from the first layer that counts (4)
        [9, 9, 9, 9, 1, 5, 5, 5],  # a layer later
        [9, 9, 9, 9, 5, -5, 5, -5],  # its sign changes
        [1, 1, 1, 1, 1, 1, 1, 1],  # never
        [0, 0, 0, 0, -5, -5, -5, -5],  # NO
    ]
    gate = run_exit(margins, margin=4.0, patience=2)
    assert gate.exit_layers == {0: 6, 1: 7, 4: 6}
    assert gate.margins == {0: 5.0, 1: 5.0, 4: -5.0}
    assert gate.problems == set()


def test_patience_and_start():
    margins = [[5.0] * 8]
    assert run_exit(margins, margin=4.0, patience=1, start=0).exit_layers == {0: 1}
    assert run_exit(margins, margin=4.0, patience=3, start=2).exit_layers == {0: 5}
    # Leaving after the last layer would save nothing.
    assert run_exit(margins, margin=4.0, patience=8, start=0).exit_layers == {}


def test_a_layer_is_read_through_its_correction():
    margins = [[8.0] * 8, [-8.0] * 8]
    correction = [(0.0, 0.0)] * 5 + [(0.25, 1.0), (0.5, 1.0), (1.0, 0.0)]
    gate = run_exit(margins, margin=3.0, patience=1, start=0, correction=correction)
    assert gate.exit_layers == {0: 6, 1: 7}
    assert gate.margins == {0: 3.0, 1: -3.0}


@pytest.mark.parametrize("value", [NAN, math.inf, -math.inf])
def test_a_row_with_nan_goes_on_and_is_reported(value):
    gate = run_exit([[value] * 8, [5.0] * 8], margin=4.0, patience=2)
    assert gate.problems == {0}
    assert gate.exit_layers == {1: 6}


def test_before_the_last_token_nothing_is_decided():
    assert run_exit([[5.0] * 8], ends=False, margin=4.0, patience=1).exit_layers == {}


def test_entropy_exit_wants_it_low_and_stable():
    logits = {
        0: [[9.0, 0, 0, 0]] * 6,  # sure in every layer
        1: [[0.0, 0, 0, 0]] * 6,  # never sure
        2: [[0.0, 0, 0, 0], [9.0, 0, 0, 0], [0.0, 0, 0, 0], [9.0, 0, 0, 0], [9.0, 0, 0, 0], [9.0, 0, 0, 0]],
        3: [[NAN, 0, 0, 0]] * 6,
    }
    at = {"layer": 0}

    def lens(hidden):
        return torch.tensor([logits[int(row)][at["layer"]] for row in hidden[:, 0]])

    gate = EntropyExit(lens, (0, 1), 6, entropy=0.5, stability=0.1, start=2)
    alive = [0, 1, 2, 3]
    for layer in gate.layers:
        at["layer"] = layer
        left = gate.after_layer(layer, rows_of(alive))
        alive = [row for row in alive if row not in left]
    assert gate.exit_layers == {0: 2, 2: 5}
    assert gate.problems == {3}
    assert gate.margins[0] == pytest.approx(9.0)


# While decoding


def progress(*branches):
    return [
        SimpleNamespace(num_tokens=len(top1), signals=TokenSignals(list(top1)), text=text, finished=done)
        for top1, text, done in branches
    ]


def rule_of(mode="keep_leader", select="score", **options):
    gates = Gates(decode_exit=(Lead(gap=0.3),), decode_min_tokens=2, **options)
    return DecodeRule(gates, mode, select, lambda text: text or None)


def test_the_others_stop_once_one_leads():
    rule = rule_of()
    assert rule(progress(([0.9], "", False), ([0.2], "", False))) == {}  # too early
    state = progress(([0.9] * 2, "", False), ([0.2] * 2, "", False), ([0.2] * 2, "", True))
    assert rule(state) == {1: "early_exit"}
    assert rule.leader == 0
    assert rule(state) == {}  # once


def test_one_that_ended_early_keeps_nobody_waiting():
    rule = rule_of()
    assert rule(progress(([0.9] * 2, "", False), ([0.2], "", True))) == {}  # nobody is left to stop
    assert rule.leader == 0


def test_all_stop_as_published():
    rule = rule_of("stop_all")
    assert rule(progress(([0.9] * 3, "", False), ([0.2] * 3, "", False))) == {0: "early_exit", 1: "early_exit"}


def test_off_is_off():
    assert rule_of("off")(progress(([0.9] * 3, "", False), ([0.2] * 3, "", False))) == {}


def test_a_vote_that_is_over_stops_the_rest():
    rule = DecodeRule(EXACT_GATES, "off", "vote", lambda text: text or None)
    done, live = ([0.5], "7", True), ([0.5], "", False)
    assert rule(progress(done, done, live, live)) == {}  # two could still tie
    assert rule(progress(done, done, done, live, live)) == {3: "consensus", 4: "consensus"}
    assert rule.consensus == "7"
    other = DecodeRule(EXACT_GATES, "off", "vote", lambda text: text or None)
    assert other(progress(done, done, done, ([0.5], "8", True), live)) == {4: "consensus"}
    for select in ("score", "weighted_vote"):
        assert DecodeRule(EXACT_GATES, "off", select, str)(progress(done, done, done, live)) == {}


# Signals


@given(st.lists(st.floats(0, 1), min_size=1, max_size=60))
def test_signals(values):
    tokens = TokenSignals(values, [2 * value for value in values])
    assert SIGNALS["mean_top1"](tokens) == pytest.approx(sum(values) / len(values))
    assert SIGNALS["self_certainty"](tokens) == pytest.approx(2 * sum(values) / len(values))
    last = values[-TAIL:]
    assert SIGNALS["tail"](tokens) == pytest.approx(sum(last) / len(last))
    size = min(GROUP, len(values))
    groups = [sum(values[i : i + size]) / size for i in range(len(values) - size + 1)]
    assert SIGNALS["lowest_group"](tokens) == pytest.approx(min(groups))


def test_signals_of_nothing_are_nan():
    assert all(math.isnan(signal(TokenSignals())) for signal in SIGNALS.values())


def test_a_pass_that_is_computed_once_more_begins_anew():
    exits = MarginExit(MarginRule(margin=1.0, patience=2, start=3), num_layers=8)
    assert exits.leaving(3, {0: 5.0}) == []
    assert exits.leaving(3, {0: 5.0}) == []  # preempted in between: this is the first layer again
    assert exits.leaving(4, {0: 5.0}) == [0]

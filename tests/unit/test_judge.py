"""The judge alone: values in, rulings out."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minirksc.rksc.answers import SELECT_RULES, choose
from minirksc.rksc.cgee import EXACT_GATES, NO_GATES, Gates, Lead
from minirksc.rksc.judge import ASK_FIRST, FAILED, GateNote, Judge

grid = st.integers(0, 8).map(lambda n: n / 8)  # ties are likely
rules = st.sampled_from(SELECT_RULES)
any_known = st.sets(st.integers(0, 6))
any_gates = st.builds(
    Gates, exact=st.booleans(), skip=st.just(()) | st.tuples(st.builds(Lead, gap=grid)), compares_answers=st.booleans()
)


@st.composite
def solves(draw, may_fail=False):
    """Answers, confidences, and the scores that asking would give."""
    count = draw(st.integers(1, 7))
    answers = draw(st.lists(st.sampled_from([None, "1", "2", "3"]), min_size=count, max_size=count))
    confidences = draw(st.lists(grid, min_size=count, max_size=count))
    scores = [draw(grid) * math.sqrt(confidence) for confidence in confidences]
    return answers, confidences, [FAILED if may_fail and draw(st.booleans()) else score for score in scores]


def judged(gates, select, solve, known=(), leader=None):
    """Who wins, what was asked round by round, all notes, and the scores that were known in the end."""
    answers, confidences, scores = solve
    judge = Judge(gates, select, answers=answers, confidences=confidences, values=confidences, leader=leader)
    # What failed in an earlier round is not among the branches of the last.
    seen = [score if i in known and score != FAILED else None for i, score in enumerate(scores)]
    rounds, notes = [], []
    while True:
        ruling = judge.ruling(seen)
        notes += ruling.notes
        if not ruling.ask:
            return ruling.best, rounds, notes, seen
        rounds.append(ruling.ask)
        for i in ruling.ask:
            assert seen[i] is None, "it has been asked about before"
            seen[i] = scores[i]


@given(solves(), rules, any_known)
def test_exact_gates_give_the_answer_of_asking_everybody(solve, select, known):
    answers, _, scores = solve
    full = choose(answers, scores, select)
    assert judged(NO_GATES, select, solve)[0] == full
    best = judged(EXACT_GATES, select, solve, known)[0]
    assert answers[best] == answers[full]
    assert answers[full] is not None or scores[best] == scores[full]


@given(solves(may_fail=True), any_gates, rules, any_known)
def test_nobody_is_asked_twice(solve, gates, select, known):
    _, rounds, _, _ = judged(gates, select, solve, known)
    asked = [i for some in rounds for i in some]
    assert len(asked) == len(set(asked))
    assert all(len(some) <= ASK_FIRST for some in rounds[:1] if gates.exact)


@given(solves(may_fail=True), any_gates, rules, any_known)
def test_a_failed_branch_never_wins_while_another_is_well(solve, gates, select, known):
    best, _, _, seen = judged(gates, select, solve, known)
    assert seen[best] != FAILED or all(score == FAILED for score in seen)


@given(solves(), any_gates, rules)
def test_notes_tell_what_was_decided(solve, gates, select):
    _, rounds, notes, seen = judged(gates, select, solve)
    names = [note.gate for note in notes]
    assert names == [name for name in ("agreement", "skip", "bound") if name in names]
    assert ("bound" in names) == (bool(rounds) and None in seen)
    assert bool(rounds) == (not {"agreement", "skip"} & {n.gate for n in notes if n.decision == "nobody is asked"})


def test_a_leader_wins_unasked_and_unnoted():
    assert judged(Gates(skip=(Lead(),)), "score", (["1", "2"], [0.9, 0.2], [0.9, 0.2]), leader=1)[:3] == (1, [], [])


def test_the_surest_are_asked_first_then_whoever_can_still_win():
    solve = ["1", "2", "3", "4"], [0.25, 1.0, 0.81, 0.5], [0.1, 0.3, 0.2, 0.1]
    best, rounds, notes, _ = judged(EXACT_GATES, "score", solve)
    assert (best, rounds) == (1, [(1, 2), (3, 0)])
    solve = ["1", "2", "3", "4"], [0.25, 1.0, 0.81, 0.5], [0.1, 0.8, 0.2, 0.1]
    best, rounds, notes, _ = judged(EXACT_GATES, "score", solve)
    assert (best, rounds) == (1, [(1, 2)])
    assert notes == [GateNote("bound", "2 not asked", "whatever they would score, the answer stays", value=2)]


def test_of_several_leads_the_one_that_holds_is_noted():
    gates = Gates(skip=(Lead(top=0.9), Lead(gap=0.2)), source="uncalibrated")
    judge = Judge(gates, "score", answers=["1", "2"], confidences=[0.8] * 2, values=[0.8, 0.2])
    (note,) = judge.ruling([None] * 2).notes
    assert (note.decision, note.threshold) == ("nobody is asked", 0.2)
    assert note.value == pytest.approx(0.75)


def test_what_was_asked_in_vain_counts_nothing():
    judge = Judge(NO_GATES, "score", answers=["1", "2"], confidences=[None, 0.5], values=[math.nan, 0.5])
    assert judge.ruling([None, None]).ask == (0, 1)
    ruling = judge.ruling([None, 0.1])
    assert (ruling.best, ruling.ask) == (1, ())


@pytest.mark.parametrize(("compares", "best"), [(True, 0), (False, None)])
def test_a_lead_skips_asking(compares, best):
    gates = Gates(skip=(Lead(gap=0.5),), compares_answers=compares, source="uncalibrated")
    judge = Judge(gates, "score", answers=["1", "1", "2"], confidences=[0.8] * 3, values=[0.8, 0.7, 0.2])
    ruling = judge.ruling([None] * 3)
    assert (None if ruling.ask else ruling.best) == best
    (note,) = ruling.notes
    decision = "ask" if best is None else "nobody is asked"
    assert (note.gate, note.decision, note.reason) == ("skip", decision, "mean_top1 0.800, 0.700, 0.200")
    assert (note.threshold, note.calibrated) == (0.5, False)
    assert note.value == pytest.approx(0.75 if compares else 0.125)

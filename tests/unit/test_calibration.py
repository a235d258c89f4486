"""Binomial statistics against known values, and that calibration keeps its promise."""

import math
import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minirksc.calibrate.binomial import errors_allowed, problems_needed, smallest_budget, tail, upper_bound
from minirksc.calibrate.calibration import (
    GAPS,
    KINDS,
    MARGINS,
    Variant,
    calibrate,
    fit_correction,
    ordering_size,
    run_tests,
    sequence_of,
    step_of,
    variants,
)
from minirksc.calibrate.evidence import BranchEvidence, Evidence
from minirksc.calibrate.replay import Replay
from minirksc.calibrate.trials import Trials
from minirksc.engine.signals import TokenSignals
from minirksc.rksc.cgee import EXACT_GATES


def exact_tail(num_errors, total, rate):
    return sum(math.comb(total, k) * rate**k * (1 - rate) ** (total - k) for k in range(num_errors + 1))


# 95% one-sided Clopper-Pearson: budget -> fewest problems with 0, 1, 2, 3, 5 and 10 errors.
NEEDED = {
    0.005: (598, 947, 1258, 1549, 2100, 3389),
    0.01: (299, 473, 628, 773, 1049, 1693),
    0.02: (149, 236, 313, 386, 523, 845),
    0.05: (59, 93, 124, 153, 208, 336),
}


@pytest.mark.parametrize("budget", NEEDED)
def test_problems_needed_are_those_of_the_table(budget):
    assert tuple(problems_needed(budget, 0.95, k) for k in (0, 1, 2, 3, 5, 10)) == NEEDED[budget]


def test_known_bounds():
    assert upper_bound(0, 299, 0.95) == pytest.approx(0.009969, abs=1e-6)
    assert upper_bound(0, 298, 0.95) > 0.01
    assert upper_bound(0, 10, 0.95) == pytest.approx(1 - 0.05**0.1, abs=1e-12)
    assert upper_bound(2, 10, 0.95) == pytest.approx(0.506901, abs=1e-6)
    assert upper_bound(5, 5, 0.95) == 1.0
    assert upper_bound(0, 0, 0.95) == 1.0
    assert smallest_budget(299, 0.95) < 0.01 < smallest_budget(298, 0.95)


@given(st.integers(0, 60), st.integers(1, 60), st.floats(1e-4, 0.9999))
def test_the_tail_is_the_sum_of_its_terms(num_errors, total, rate):
    expected = exact_tail(min(num_errors, total), total, rate)
    assert tail(num_errors, total, rate) == pytest.approx(expected, rel=1e-9, abs=1e-300)


@given(st.integers(0, 40), st.integers(1, 2000), st.floats(0.5, 0.999))
def test_a_bound_is_where_the_tail_meets_the_level(num_errors, total, confidence):
    bound = upper_bound(num_errors, total, confidence)
    if num_errors >= total:
        assert bound == 1.0
    else:
        assert num_errors / total < bound < 1
        assert tail(num_errors, total, bound) == pytest.approx(1 - confidence, rel=1e-6)


@given(st.integers(1, 400), st.floats(0.01, 0.5), st.floats(0.6, 0.99))
def test_errors_allowed_and_problems_needed_agree(total, budget, confidence):
    allowed = errors_allowed(total, budget, confidence)
    assert problems_needed(budget, confidence, allowed + 1) > total
    if allowed >= 0:
        assert problems_needed(budget, confidence, allowed) <= total


def test_rates_outside_0_and_1_are_refused():
    with pytest.raises(ValueError, match="budget=0"):
        problems_needed(0, 0.95)


def test_a_candidate_passes_exactly_when_its_bound_is_within_the_budget():
    for total in (298, 299, 472, 473):
        for changed in (0, 1):
            step = step_of(EXACT_GATES, made_tally(changed, total), 0.01, 0.95)
            assert step.passed == (step.bound <= 0.01) == (total >= NEEDED[0.01][changed])


def made_tally(changed, total):
    class Made:
        num_changed, num_problems = changed, total

    return Made()


def evidence(rng, num_branches=3, num_tokens=20, num_layers=6, noise=1.0):
    """Branches whose confidence says something about p(YES), and margins that settle with depth."""
    branches = []
    for _ in range(num_branches):
        quality = rng.gauss(0, 1)
        values = [min(1.0, max(0.05, 0.7 + 0.1 * quality + rng.gauss(0, 0.1))) for _ in range(num_tokens)]
        final = 3 * quality + rng.gauss(0, noise)
        margins = [final + rng.gauss(0, 4 * (num_layers - layer) / num_layers) for layer in range(num_layers - 1)]
        answer = str(rng.randrange(3))
        text = " " * (num_tokens - 1) + answer
        signals = TokenSignals(values, [5 * value for value in values])
        probability = 1 / (1 + math.exp(-final))
        ends = list(range(1, num_tokens + 1))
        branches.append(BranchEvidence(list(range(num_tokens)), text, ends, 0, "length", signals, probability, margins))
    return Evidence(branches, num_layers, 10.0)


def replays(count, seed, **options):
    rng = random.Random(seed)
    return [Replay(evidence(rng, **options), answer_parser="number") for _ in range(count)]


@pytest.fixture(scope="module")
def trials():
    return Trials(replays(150, 3))


def test_a_tally_counts_what_replays_say(trials):
    gates = Variant(KINDS).gates(dict.fromkeys(KINDS, 8))
    among = [3, 17, 40, 41]
    outcomes = [trials.replays[i].outcome(gates) for i in among]
    for _ in range(2):  # the second time from what is remembered
        found = trials.tally(gates, among)
        assert found.num_problems == 4
        changed = [o.differs(trials.replays[i].reference) for i, o in zip(among, outcomes, strict=True)]
        assert found.num_changed == sum(changed)
        assert found.num_rows == sum(o.num_rows for o in outcomes)
        assert found.saved == pytest.approx(1 - found.num_rows / sum(o.num_rows_full for o in outcomes))
        assert sum(found.reasons.values()) == 4
    assert trials.tally(gates, []).num_problems == trials.tally(gates, []).num_rows == 0
    whole = trials.tally(gates)
    assert whole.num_problems == 150 and 3 < whole.mean_exit_layer <= 6


def test_every_variant_has_a_sequence_from_nothing_to_loose_without_repetitions():
    found = variants(["mean_top1", "tail"], KINDS, ((0.5, 1.0),) * 6)
    assert len(set(found)) == len(found)
    assert {one.kinds for one in found} >= {("skip",), ("layer_exit",), ("decode_exit",), KINDS}
    for variant in found:
        for limits in (
            {kind: 1 for kind in KINDS},
            {kind: len(GAPS) for kind in KINDS},
            dict(zip(KINDS, (3, 9, 16), strict=True)),
        ):
            sequence = sequence_of(variant, limits)
            assert not (sequence[0].skip or sequence[0].decode_exit or sequence[0].layer_exit)
            assert len(set(sequence)) == len(sequence)
            for before, after in pairwise(sequence):
                assert looseness(before) <= looseness(after)
            last = sequence[-1]
            used = {kind for kind in KINDS if getattr(last, kind)}
            assert used == set(variant.kinds)


def looseness(gates):
    skip = GAPS.index(gates.skip[0].gap) + 1 if gates.skip else 0
    decode = GAPS.index(gates.decode_exit[0].gap) + 1 if gates.decode_exit else 0
    layer = MARGINS.index(gates.layer_exit.margin) + 1 if gates.layer_exit else 0
    return skip + decode + layer


def test_grids_go_from_strict_to_loose():
    assert list(GAPS) == sorted(GAPS, reverse=True)
    assert list(MARGINS) == sorted(MARGINS, reverse=True)
    assert len(GAPS) == len(MARGINS)


def test_the_ordering_part_never_takes_what_the_test_needs():
    assert ordering_size(299, 0.01, 0.95) == 0
    assert ordering_size(350, 0.01, 0.95) == 51
    assert ordering_size(900, 0.01, 0.95) == 300
    assert ordering_size(10, 0.01, 0.95) == 0


@pytest.mark.parametrize("num_problems", [60, 150])
def test_calibration_stops_at_the_first_that_fails_and_certifies_the_one_before(trials, num_problems):
    found = calibrate(trials, 0.05, 0.95, among=range(num_problems), signals=["mean_top1"])
    assert [step.passed for step in found.steps[:-1]] == [True] * (len(found.steps) - 1)
    assert found.num_ordering + found.num_test == num_problems
    assert found.steps[0].tally.num_changed == 0
    certified = found.certified
    assert certified is not None and certified.bound <= 0.05
    if not found.steps[-1].passed:
        assert certified is found.steps[-2]
    assert certified.tally.saved >= found.steps[0].tally.saved


def test_too_few_problems_certify_nothing(trials):
    found = calibrate(trials, 0.05, 0.95, among=range(58))
    assert found.certified is None and len(found.steps) == 1


def test_the_division_depends_on_the_seed_alone(trials):
    options = dict(signals=["tail"], kinds=["skip", "layer_exit"])
    one, two, other = (calibrate(trials, 0.1, 0.9, seed=seed, **options) for seed in (1, 1, 2))
    assert one == two
    assert [step.tally for step in one.steps] != [step.tally for step in other.steps]


def test_a_gate_that_saves_nothing_is_left_out():
    # Without margins no question can leave early, whatever the layer exit's threshold.
    rng = random.Random(6)
    some = []
    for _ in range(100):
        made = evidence(rng)
        blind = [BranchEvidence(**{**vars(b), "margins": []}) for b in made.branches]
        some.append(Replay(Evidence(blind, 6, 10.0), answer_parser="number"))
    found = calibrate(Trials(some), 0.1, 0.9, signals=["mean_top1"])
    assert found.num_ordering > 0
    assert "layer_exit" not in found.variant.kinds


def test_where_gates_are_harmless_much_is_saved():
    # Margins do not move with depth, so that leaving early never changes a decision.
    rng = random.Random(5)
    some = []
    for _ in range(120):
        made = evidence(rng, noise=0.0)
        flat = [
            BranchEvidence(**{**vars(b), "margins": [math.log(b.probability / (1 - b.probability))] * 5})
            for b in made.branches
        ]
        some.append(Replay(Evidence(flat, 6, 10.0), answer_parser="number"))
    found = calibrate(Trials(some), 0.05, 0.95, kinds=["layer_exit"])
    assert found.certified.gates.layer_exit is not None
    assert found.certified.tally.saved_question > found.steps[0].tally.saved_question


@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_the_promise_holds_over_many_draws(confidence):
    """Candidates with known rates, nested changes: how often does one above the budget come to be certified?"""
    budget, num_problems, num_draws = 0.1, 80, 1500
    rates = [0.0, 0.01, 0.03, 0.06, 0.1001, 0.12, 0.2, 0.4]
    candidates = sequence_of(Variant(("skip",)), {"skip": 5})[: len(rates)]
    rng = random.Random(0)
    num_wrong = num_useful = 0
    for _ in range(num_draws):
        draws = [rng.random() for _ in range(num_problems)]
        tallies = {
            gates: made_tally(sum(draw < rate for draw in draws), num_problems)
            for gates, rate in zip(candidates, rates, strict=True)
        }
        passed = [step.gates for step in run_tests(candidates, tallies.get, budget, confidence) if step.passed]
        rate = rates[candidates.index(passed[-1])]
        num_wrong += rate > budget
        num_useful += rate >= 0.01
    # Three standard deviations above the rate that is promised, and not by certifying nothing.
    allowed = 1 - confidence
    assert num_wrong <= num_draws * allowed + 3 * math.sqrt(num_draws * allowed * (1 - allowed))
    assert num_wrong > 0
    assert num_useful > num_draws / 2


def test_thresholds_of_a_sample_hold_for_others(trials):
    """Certified on one half, the gates keep to the budget on the other, up to what chance does at most once in 1000."""
    indices = list(range(150))
    for seed in range(4):
        random.Random(seed).shuffle(indices)
        half, rest = indices[:75], indices[75:]
        found = calibrate(trials, 0.1, 0.9, among=half, seed=seed, signals=["mean_top1"], kinds=["skip", "layer_exit"])
        num_changed = trials.tally(found.certified.gates, rest).num_changed
        assert 1 - exact_tail(num_changed - 1, len(rest), 0.1) > 0.001


@settings(max_examples=60)
@given(st.integers(0, 10_000), st.sampled_from(["score", "vote", "weighted_vote"]))
def test_exact_gates_never_change_a_decision(seed, select):
    made = evidence(random.Random(seed), num_branches=5)
    replay = Replay(made, select=select, answer_parser="number")
    outcome = replay.outcome(Variant(KINDS).gates({}))
    assert not outcome.differs(replay.reference)
    assert outcome.num_rows <= outcome.num_rows_full == replay.reference.num_rows


def test_the_correction_is_the_line_from_a_layers_margin_to_the_last_ones():
    rng = random.Random(3)
    made = []
    for _ in range(40):
        branches = []
        for branch in evidence(rng).branches:
            last = math.log(branch.probability / (1 - branch.probability))
            margins = [7.0, 3 * last + 2, -last, last + rng.gauss(0, 0.01), math.inf if not made else last]
            branches.append(BranchEvidence(**{**vars(branch), "margins": margins}))
        made.append(Evidence(branches, 6, 12.0))
    constant, steep, turned, noisy, same, last = fit_correction(made)
    assert constant[0] == 0
    assert steep == pytest.approx((1 / 3, -2 / 3)) and turned == pytest.approx((-1, 0), abs=1e-9)
    assert noisy == pytest.approx((1, 0), abs=0.02) and same == pytest.approx((1, 0)) and last == (1.0, 0.0)
    assert fit_correction(made[:5]) is None  # too few


def test_without_enough_to_correct_by_there_is_no_layer_exit():
    trials = Trials(replays(60, 1))
    found = calibrate(trials, 0.2, 0.9, among=range(20))
    assert "layer_exit" not in found.variant.kinds

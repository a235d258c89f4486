import functools
import importlib.util
import random
import re
import sys
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minirksc.rksc.guard import refusal

# The repository is not on the path: the folder of that name in a test run is found by its file.
ROOT = Path(__file__).resolve().parents[2]
if "bench" not in sys.modules:
    _spec = importlib.util.spec_from_file_location("bench", ROOT / "bench" / "__init__.py")
    sys.modules["bench"] = importlib.util.module_from_spec(_spec)

from bench.adversarial import RULES, adversarial  # noqa: E402
from bench.intervals import clopper_pearson  # noqa: E402
from bench.phrasings import KINDS, LEVELS, MINOR, ROOT_TEMPLATE, paraphrase, phrasings  # noqa: E402
from bench.prompts import EXAMPLES  # noqa: E402
from bench.word_problems import Problem, numerals, sentences, single_numerals, to_number  # noqa: E402

PROBLEMS = [Problem(*example) for example in EXAMPLES]
SEEDS = range(8)


@functools.cache
def all_wordings():
    return [one for seed in SEEDS for one in phrasings(PROBLEMS, seed)]


def made(kind):
    return [one for one in all_wordings() if one.kind == kind]


def test_the_same_seed_gives_the_same_wordings():
    assert phrasings(PROBLEMS, 3) == phrasings(PROBLEMS, 3)
    assert phrasings(PROBLEMS, 3) != phrasings(PROBLEMS, 4)


@pytest.mark.parametrize("kind", [*LEVELS, *KINDS])
def test_wordings_differ_from_the_first_one(kind):
    found = made(kind)
    assert found or kind == "entities"
    for one in found:
        assert one.text != one.root
        assert one.root == ROOT_TEMPLATE.format(PROBLEMS[one.problem].question)
        assert "  " not in one.text
        assert not re.search(r"[{}]| [.,?]", one.text)


@pytest.mark.parametrize("level", LEVELS)
def test_a_paraphrase_has_all_numbers_of_the_problem(level):
    words = dict(zip("two three four five six seven eight nine ten eleven twelve".split(), range(2, 13), strict=True))  # noqa: SIM905

    def numbers(text):
        spoken = re.sub(r"[a-z]+", lambda m: str(words.get(m[0], m[0])), text)
        return sorted(re.findall(r"\d+(?:[.:]\d+)?", spoken))

    for one in made(level):
        assert numbers(one.text) == numbers(one.root), one.rule


def test_every_minor_rule_can_be_written_out():
    for name, pattern, replacement in MINOR:
        assert re.compile(pattern), name
        assert callable(replacement) or "\\2" not in replacement


@pytest.mark.parametrize("kind", RULES)
def test_adversarial_wordings_stay_in_the_template(kind):
    for one in made(kind):
        assert one.text.startswith(ROOT_TEMPLATE.partition("{}")[0])
        assert one.text.endswith(ROOT_TEMPLATE.partition("{}")[2])


def test_a_changed_number_changes_the_answer():
    found = made("number")
    for one in found:
        before, after = (to_number(text) for text in one.rule.split(" -> "))
        assert PROBLEMS[one.problem].recomputed({before: after}) != PROBLEMS[one.problem].answer


def test_the_guard_refuses_changed_numbers_units_and_names():
    for kind in ("number", "unit", "entities", "negation", "other problem"):
        for one in made(kind):
            assert refusal(one.root, one.text) is not None, one.rule


@given(st.integers(2, 500), st.integers(2, 500), st.integers(2, 500))
def test_the_chain_is_followed_with_other_numbers(boxes, each, given_away):
    problem = Problem(
        "There are 7 boxes of 30 pens. 15 pens are given away. How many pens are left?",
        "There are 7*30=<<7*30=210>>210 pens. So 210-15=<<210-15=195>>195 are left.\n#### 195",
    )
    changed = {Fraction(7): Fraction(boxes), Fraction(30): Fraction(each), Fraction(15): Fraction(given_away)}
    assert problem.answer == 195
    assert problem.recomputed(changed) == boxes * each - given_away


@pytest.mark.parametrize(
    ("solution", "changed"),
    [
        ("There are <<7*30=211>>211.\n#### 211", {7: 8}),  # wrong
        ("There are <<7*30=210>>210.\n#### 99", {7: 8}),  # leads elsewhere
        ("There are <<7*30=210>>210.\n#### 210", {9: 8}),  # not used
        ("No calculation.\n#### 210", {7: 8}),
        ("There are <<3+4=7>>7, so <<7*30=210>>210.\n#### 210", {7: 8}),  # 7 is also a result
        ("There are <<7**3=343>>343.\n#### 343", {7: 8}),  # nothing but + - * /
        ("There are <<1/0=5>>5.\n#### 5", {1: 8}),
    ],
)
def test_a_chain_that_cannot_be_followed_gives_no_answer(solution, changed):
    numbers = {Fraction(old): Fraction(new) for old, new in changed.items()}
    assert Problem("", solution).recomputed(numbers) is None


def test_a_percentage_is_a_share():
    problem = Problem("", "He keeps 50-20%*50=<<50-20%*50=40>>40.\n#### 40")
    assert problem.recomputed({Fraction(20): Fraction(50)}) == 25


def test_numerals_leave_out_fractions_times_and_ordinals():
    text = "At 9:20 the 3rd of 1,200 trains took 2/5 of 4.5 hours, 7-day tickets cost $8."
    assert [m[0] for m in numerals(text)] == ["1,200", "4.5", "7", "8"]
    assert [m[0] for m in single_numerals("3 and 3 and 1 and 5")] == ["5"]


def test_sentences_do_not_end_at_titles():
    assert sentences("Mr. Lee has 2.5 cups. He drinks 1. How much?") == [
        "Mr. Lee has 2.5 cups.",
        "He drinks 1.",
        "How much?",
    ]


NAMED = Problem(
    "Ann has 40 more goats than Bob. Ann did not sell any. If Bob has 140 goats, how many goats do they have in total?",
    "Ann has 140+40=<<140+40=180>>180 goats. Together they have 140+180=<<140+180=320>>320 goats.\n#### 320",
)


def test_names_change_the_sides_of_a_comparison():
    text, rule = adversarial(NAMED, "entities", random.Random(0))
    assert text.startswith("Bob has 40 more goats than Ann. Ann did not")
    assert rule == "Ann <-> Bob in a comparison"


def test_a_statement_that_the_answer_needs_is_denied():
    problem = Problem(
        "Dan buys 4 bags. He likes tea. Each bag weighs 50 pounds. How much is that?", "<<4*50=200>>\n#### 200"
    )
    texts = {adversarial(problem, "negation", random.Random(seed))[0] for seed in SEEDS}
    assert texts == {
        "Dan does not buy 4 bags. He likes tea. Each bag weighs 50 pounds. How much is that?",
        "Dan buys 4 bags. He likes tea. Each bag does not weigh 50 pounds. How much is that?",
    }


def test_a_condition_moves_to_the_end():
    question = "Tea costs 3 euros. If he buys 5 bags, how many euros does he pay?"
    texts = {paraphrase(question, "structure", random.Random(seed))[0] for seed in SEEDS}
    assert any("How many euros does he pay if he buys 5 bags?" in text for text in texts)
    assert any("Suppose he buys 5 bags. How many euros does he pay?" in text for text in texts)


def gates_module():
    return importlib.import_module("bench.asks_gates")


def test_bounds_are_those_of_the_binomial_distribution():
    def bound(count, total):
        found = clopper_pearson(count, total)
        return found.low, found.high

    assert bound(6, 1616) == pytest.approx((0.00136, 0.00807), abs=2e-5)
    assert bound(0, 300) == pytest.approx((0.0, 0.0122), abs=1e-4)
    assert bound(5, 5)[1] == 1.0


def test_auroc_counts_ties_half():
    auroc = gates_module().auroc
    assert auroc([3, 4], [1, 2]) == 1.0
    assert auroc([1], [1]) == 0.5
    assert auroc([1, 3], [2, 4]) == 0.25


@given(st.lists(st.sampled_from([0.1, 0.2, 0.5, 0.9, 1.0]), max_size=400), st.integers(0, 600))
def test_a_safe_threshold_accepts_few_and_none_lower_does(similarities, num_refused):
    gates = gates_module()
    total = len(similarities) + num_refused
    at_least = gates.threshold(similarities, total)
    accepted = sum(one >= at_least for one in similarities)

    def is_safe(count):
        return count <= gates.MAX_ACCEPTED * total and clopper_pearson(count, total).high <= gates.MAX_BOUND

    assert accepted == 0 or is_safe(accepted)
    lower = [one for one in similarities if one < at_least]
    if lower and total >= 200:
        assert not is_safe(sum(one >= max(lower) for one in similarities))

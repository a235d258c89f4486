import pytest
from hypothesis import given
from hypothesis import strategies as st

from minirksc.rksc.guard import facts, refusal

NAMES = ("Tom", "Anna", "Ravi", "Mei", "Otto")
THINGS = ("apples", "red hats", "books", "tickets")
UNITS = ("minutes", "hours", "days", "miles", "kilometers", "dollars", "percent", "pounds")
TEMPLATE = (
    "Solve the following problem.\n\nProblem: {first} gives {second} {number} {things} every day for {amount} {unit}. "
    "{second} does not sell them. How many {things} does {second} have?\n\nSolution:"
)

problems = st.fixed_dictionaries(
    {
        "first": st.sampled_from(NAMES[:2]),
        "second": st.sampled_from(NAMES[2:]),
        "number": st.integers(0, 10**6),
        "things": st.sampled_from(THINGS),
        "amount": st.integers(0, 99),
        "unit": st.sampled_from(UNITS),
    }
)


@given(st.text())
def test_any_text_may_stand_for_itself(text):
    assert refusal(text, text) is None


@given(st.text(), st.text())
def test_the_answer_is_the_same_either_way_round(one, two):
    assert (refusal(one, two) is None) == (refusal(two, one) is None)


@given(problems, st.integers(0, 10**6))
def test_another_number_is_refused(problem, other):
    changed = TEMPLATE.format(**problem | {"number": other})
    assert (refusal(TEMPLATE.format(**problem), changed) is None) == (other == problem["number"])


@given(problems)
def test_a_negation_taken_away_or_added_is_refused(problem):
    text = TEMPLATE.format(**problem)
    without = text.replace(" does not sell", " does sell")
    assert refusal(text, without) == "negation 'not' of the first wording is not in the second"
    assert refusal(without, text) == "negation 'not' is not in the first wording"


@given(problems)
def test_names_that_change_places_are_refused(problem):
    swapped = problem | {"first": problem["second"], "second": problem["first"]}
    assert refusal(TEMPLATE.format(**problem), TEMPLATE.format(**swapped)) is not None
    small = TEMPLATE.format(**problem).lower(), TEMPLATE.format(**swapped).lower()
    assert refusal(*small) is not None


@given(problems, st.sampled_from(UNITS))
def test_another_unit_is_refused(problem, other):
    changed = TEMPLATE.format(**problem | {"unit": other})
    assert (refusal(TEMPLATE.format(**problem), changed) is None) == (other == problem["unit"])


@given(st.integers(0, 999_999))
def test_a_number_in_words_is_that_number(number):
    assert facts(_in_words(number)) == facts(str(number)) == facts(f"{number:,}")


SMALL = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


def _in_words(number):
    if number < 20:
        return SMALL[number]
    if number < 100:
        tens = TENS[number // 10 - 2]
        return tens + (f"-{SMALL[number % 10]}" if number % 10 else "")
    for scale, name in ((1000, "thousand"), (100, "hundred")):
        if number >= scale:
            rest = f" and {_in_words(number % scale)}" if number % scale else ""
            return f"{_in_words(number // scale)} {name}{rest}"
    raise AssertionError(number)


@pytest.mark.parametrize(
    ("root", "branch"),
    [
        ("He has 3 apples.", "He has three apples."),
        ("It isn't his.", "It is not his."),
        ("It can't fly and won't swim.", "It cannot fly and will not swim."),
        ("$5 each day", "5 dollars a day"),
        ("It costs $1,250.50", "It costs $1250.5"),
        ("20% of them", "20 percent of them"),
        ("10ml", "10 milliliters"),
        ("½ of it", "a half of it"),
        ("How many cats does she have in total?", "What number of cats does she have altogether?"),
        ("How much money is left?", "What amount of money is remaining?"),
        ("Tom has 3 cats.", "Please help. Tom has 3 cats. Thank you!"),
        (
            "Solve this problem step by step.\n\nProblem: Tom has 3 cats.\nSolution:",
            "Question: Tom has 3 cats.\nAnswer:",
        ),
        ("2 × 3 ÷ 4 − 1", "2 * 3 / 4 - 1"),
        ("it's a well-known shop", "it is the well known shop"),
    ],
)
def test_harmless_paraphrases_pass(root, branch):
    assert refusal(root, branch) is None


@pytest.mark.parametrize(
    ("root", "branch", "named"),
    [
        ("2*(3+4)", "(2*3)+4", "operator '('"),
        ("2 + 3", "2 - 3", "operator '-'"),
        ("x - y", "y - x", "another order"),
        ("x = 5, y = 3. Find x.", "x = 5, y = 3. Find y.", "word 'y'"),
        ("He has 3 more than Ann.", "He has 3 fewer than Ann.", "comparison 'fewer'"),
        ("Pick one: (A) cat (B) dog", "Pick one: (A) dog (B) cat", "another order"),
        ("A. cat\nB. dog", "B. cat\nA. dog", "another order"),
        ('Print "a b" now.', 'Print "a c" now.', "quote 'a c'"),
        ("20 red hats and 24 blue hats", "20 blue hats and 24 red hats", "another order"),
        ("He gave it to Tom.", "He got it from Tom.", "word 'got'"),
        ("Meet at 9:20.", "Meet at 9:25.", "number '9:25'"),
        ("It opens at 9 am.", "It opens at 9 pm.", "word 'pm'"),
        ("the 1st of May", "the 2nd of May", "ordinal '2nd'"),
        ("the first of May", "the third of May", "ordinal '3rd'"),
        ("twice as many", "half as many", "number '1/2'"),
        ("5 miles", "5 km", "unit 'kilometer'"),
        ("Tom sold 5 and 5 more.", "Tom sold 5 more.", "less often"),
        ("not ( True ) and False", "not ( True and False )", "another order"),
        ("True and False", "True or False", "comparison 'or'"),
        ("Der Hund jagt die Katze.", "Die Katze jagt der Hund.", "another order"),
        ("Ann has 3 cats. She got them in May.", "Ann has 3 cats.", "of the first wording"),
        ("How many does he have?", "How many will he have?", "word 'will'"),
        ("He ate all but 3 cakes.", "He ate all 3 cakes.", "negation 'except'"),
        ('Write "answer".', 'Write "solution".', "quote 'solution'"),
        ("Find s.", "Find t.", "word 't'"),
        ("one hundred. Two", "one hundred two", "number '102'"),
    ],
)
def test_what_changes_the_problem_is_named(root, branch, named):
    reason = refusal(root, branch)
    assert reason is not None
    assert named in reason


def test_instructions_are_left_out_only_as_whole_sentences():
    assert facts("Read this and explain your answer.\nFind the solution:") == []
    assert [fact.text for fact in facts("How many books does she read?")] == ["books", "she", "read"]

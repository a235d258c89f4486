"""Answers are read out of text and compared by value."""

import math
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minirksc.errors import ConfigError
from minirksc.rksc.answers import SELECT_RULES, choose, parse_answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("... so 16 - 3 - 4 = 9\n#### 18", "18"),
        ("#### $1,234.50", "1234.5"),
        ("The answer is $1,234.50.", "1234.5"),
        ("The answer is 3 + 4 = 7. There are 2 more.", "7"),
        ("Answer: 12 apples, 3 pears", "12"),
        ("**Answer:** 12", "12"),
        ("First the answer is 5. No, the answer is 6.", "6"),
        (r"Hence \boxed{42}, as 6 * 7 shows.", "42"),
        (r"\boxed{\text{12 cm}}", "12"),
        (r"\boxed{\$1,000}", "1000"),
        ("She has 3 eggs and 10-3 are gone, which is 7", "7"),
        ("10-3", "3"),
        ("It is -3.0", "-3"),
        ("It is −3", "-3"),
        ("-$5 in total", "-5"),
        ("$-5 in total", "-5"),
        ("42.0", "42"),
        ("+042", "42"),
        ("-0.00", "0"),
        (".50", "0.5"),
        ("1,2,3", "3"),
        ("1,234,567 people", "1234567"),
        ("5km", "5"),
        ("100000000000000000000000000000000001.10", "100000000000000000000000000000000001.1"),
        ("step2 of v3", None),
        ("no digits", None),
        ("", None),
        ("The answer is unknown, but 7 is close", "7"),
    ],
)
def test_number(text, answer):
    assert parse_answer(text, "number") == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("(B)", "B"),
        ("(b)", "B"),
        ("B.", "B"),
        ("B) because", "B"),
        ("Comparing (A) with (C), the answer is (C).", "C"),
        ("The answer is option D", "D"),
        ("So it must be (A), not (C). Answer: (A)", "A"),
        ("Either (A) or (D)", "D"),
        (r"\boxed{\text{E}}", "E"),
        ("The answer is a dog", None),
        ("Because it rains", None),
        ("nothing", None),
    ],
)
def test_choice(text, answer):
    assert parse_answer(text, "choice") == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Yes", "yes"),
        ("No, since yes would be wrong.", "no"),
        ("not ( True ) is False", "no"),
        ("There is no way back, so the answer is True.", "yes"),
        ("**False**", "no"),
        ("nothing known", None),
    ],
)
def test_boolean(text, answer):
    assert parse_answer(text, "boolean") == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("  Paris\n is  nice ", "paris is nice"),
        ("Well. The answer is Paris. It is nice.", "paris"),
        (" \n ", None),
    ],
)
def test_text(text, answer):
    assert parse_answer(text, "text") == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("She makes 9 * 2 = $18 every day.\n#### 18", "18"),
        ("3 of 4 fit. The answer is (B).", "B"),
        ("(B)", "B"),
        ("A robe takes 3 bolts", "3"),
        ("Yes, 3 of them do.", "yes"),
        ("In 2 cases yes. The answer is no.", "no"),
        ("Only (C) remains", "C"),
        ("The capital is Paris", "the capital is paris"),
        ("", None),
    ],
)
def test_auto(text, answer):
    assert parse_answer(text) == answer


def test_a_function_replaces_the_parser():
    assert parse_answer("abc", lambda text: text[::-1]) == "cba"


def test_unknown_parser_and_rule():
    with pytest.raises(ConfigError, match=r"numbr.*number"):
        parse_answer("1", "numbr")
    with pytest.raises(ConfigError, match=r"best.*weighted_vote"):
        choose(["1"], [1.0], "best")


@pytest.mark.parametrize(
    ("answer", "texts"),
    [
        ("18", ["18", "18.0", "$18", "$ 18", "018", "1.8e1", "36/2", "18.", "**18**", "18 dollars", "18%", "１８", "١٨",
                "18\u200b", "\x1b[31m18\x1b[0m", r"\boxed{18}", r"\boxed{{18}}", r"\boxed{\$18}", r"\boxed{18\%}",
                r"$\boxed{18}$",
                r"\boxed{18^\circ}", r"\boxed{\mathbf{18}}", r"\boxed{x = 18}", "Answer:\n18", "#### **18**"]),
        ("1000", ["1,000", "1e3", "$1,000.00", r"\boxed{1{,}000}", r"\boxed{1\,000}", "1\u202f000", r"1 \times 10^3",
                  r"\boxed{1 \times 10^{3}}"]),
        ("0.75", ["3/4", ".75", "6/8", r"\boxed{\frac{3}{4}}", r"\boxed{\dfrac34}", r"\boxed{3/4}", "0.750"]),
        ("1.5", ["1 1/2", "3/2", r"\boxed{1\frac{1}{2}}"]),
        ("1/3", ["1/3", "2/6", r"\frac{1}{3}"]),
        ("-5", ["-5", "−5", "–5", "- 5", "-$5", "$-5", r"\boxed{-5}", "-5.0"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("frame", ["The answer is {}", "{}"])
def test_equal_answers_are_one_however_they_are_written(answer, texts, frame):
    skipped = ("- 5", "$ 18") if frame == "{}" else ("Answer:\n18", "#### **18**")
    for text in texts:
        if text not in skipped:
            assert (text, parse_answer(frame.format(text))) == (text, answer)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is 10:30.", "10:30"),
        ("The answer is 1/2/2024", "1/2/2024"),
        ("The answer is 1.2.3", "1.2.3"),
        (r"\boxed{\sqrt{2}}", r"\sqrt{2}"),
        (r"so x is \boxed{x^{2}+1}.", "x^{2}+1"),
        (r"\boxed{(1, 2)}", "(1, 2)"),
        ("5 * 3 = 15, so the answer is Paris.", "paris"),
        ("(A) dog (B) cat. The answer is a dog", "a dog"),
        ("The answer is 5. I checked it: the answer is", "5"),
        ("I have no idea", "i have no idea"),
        ("A train leaves", "a train leaves"),
        ("Answer: A because it is", "A"),
        ("\x00\u202e", None),
    ],
)
def test_different_answers_stay_different(text, answer):
    kind = "choice" if answer == "A" else "auto"
    assert parse_answer(text, kind) == answer


@pytest.mark.parametrize("answer", [7, 1.5, b"7", ["7"], True, {}])
def test_a_parser_that_gives_no_text_is_an_error(answer):
    with pytest.raises(ConfigError, match="it must give text, or None"):
        parse_answer("7", lambda text: answer)


@pytest.mark.parametrize("kind", [None, 5, ["number"], b"number"])
def test_a_parser_of_another_kind_is_an_error(kind):
    with pytest.raises(ConfigError, match="or a function of the text"):
        parse_answer("7", kind)


DECIMALS = st.decimals(allow_nan=False, allow_infinity=False, places=4, min_value=-(10**12), max_value=10**12)


@given(
    DECIMALS,
    st.sampled_from(["{}", "The answer is ${}.", "so\n#### {}", r"\boxed{{{}}}", "= {} eggs"]),
)
def test_a_number_has_one_form_however_it_is_written(number, frame):
    plain, grouped = (
        parse_answer(f"{number:f}", "number"),
        parse_answer(frame.format(f"{number:,f}"), "number"),
    )
    assert plain == grouped
    assert Decimal(plain) == number
    assert parse_answer(plain, "number") == plain


@given(st.text(), st.sampled_from(["auto", "number", "choice", "boolean", "text"]))
def test_any_text_gives_an_answer_or_none(text, kind):
    answer = parse_answer(text, kind)
    assert answer is None or answer
    if answer is not None and kind in ("number", "choice", "boolean"):
        assert parse_answer(answer, kind) == answer


def test_long_text_is_read_in_linear_time():
    pieces = ["1,", "1.", "1/", "(", " ", "* ", "-" * 3, "a" * 9, ". ", "1" * 20, ",000", "\x1b[", "- ", "$"]
    pieces += ["answer is ", "answer is\n", "#### ", "#", "\\boxed{", "\\text{", "\\frac1", "^{\\circ", "1 \\times 10^"]
    for piece in pieces:
        for kind in ("number", "choice", "boolean", "text", "auto"):
            parse_answer("1" + piece * 10_000, kind)


def test_choose():
    answers = ["1", "2", "2", None, "3"]
    scores = [0.5, 0.2, 0.25, 0.9, 0.1]
    assert choose(answers, scores, "score") == 3
    assert choose(answers, scores, "vote") == 2
    assert choose(answers, scores, "weighted_vote") == 0
    assert choose(["1", "2"], [0.1, 0.3], "vote") == 1  # a tie
    assert choose([None, None], [0.1, 0.3], "vote") == 1
    assert choose(["1", "1"], [0.3, 0.3], "vote") == 0


@given(st.lists(st.tuples(st.sampled_from(["1", "2", None]), st.floats(0, 1)), min_size=1))
def test_no_other_answer_beats_the_chosen_one(candidates):
    answers, scores = zip(*candidates, strict=True)
    assert scores[choose(answers, scores, "score")] == max(scores)
    votes = [answer for answer in answers if answer is not None]
    chosen = answers[choose(answers, scores, "vote")]
    if votes:
        assert votes.count(chosen) == max(map(votes.count, votes))


@pytest.mark.parametrize("rule", SELECT_RULES)
@pytest.mark.parametrize("answers", [["1", "1", "2"], [None, None, "2"], [None] * 3, ["1", "2", "3"]])
def test_a_score_that_is_no_number_never_wins_over_one_that_is(rule, answers):
    best = choose(answers, [math.nan, 0.2, 0.3], rule)
    assert best != 0
    assert choose(answers, [math.nan] * 3, rule) in range(3)

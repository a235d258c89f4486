"""Stop strings, ids, lengths, and text that is never taken back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minirksc.config import SamplingParams
from minirksc.stopping import StopChecker


class Letters:
    """A detokenizer whose tokens are indices into a list of strings."""

    def __init__(self, pieces):
        self.pieces = pieces

    def push(self, token_ids):
        return "".join(self.pieces[i] for i in token_ids)

    def flush(self):
        return ""


def run(pieces, eos=(), **options):
    params = SamplingParams(**{"max_tokens": len(pieces), **options})
    checker = StopChecker(params, frozenset(eos), Letters(pieces))
    shown = ""
    for token_id in range(len(pieces)):
        shown += checker.push(token_id)
        if checker.finish_reason is not None:
            break
    assert shown == checker.text
    return checker


def test_a_stop_string_may_span_tokens():
    checker = run(["Hel", "lo S", "TO", "P now"], stop="STOP")
    assert (checker.text, checker.finish_reason, checker.stop_reason) == ("Hello ", "stop", "STOP")
    kept = run(["Hel", "lo S", "TO", "P now"], stop="STOP", include_stop_str_in_output=True)
    assert kept.text == "Hello STOP"


def test_the_match_that_ends_first_wins():
    assert run(["abcdef"], stop=["cdef", "bc"]).text == "a"
    assert run(["xab"], stop=["ab", "b"]).stop_reason == "ab"


def test_what_could_begin_a_stop_string_is_held_back():
    checker = StopChecker(SamplingParams(stop="END", max_tokens=9), frozenset(), Letters(["aE", "N", "x"]))
    assert checker.push(0) == "a"
    assert checker.push(1) == ""
    assert checker.push(2) == "ENx"


def test_eos_and_stop_ids_end_without_text_of_their_own():
    checker = run(["a", "b", "c"], eos=[1])
    assert (checker.text, checker.finish_reason, checker.stop_reason) == ("a", "stop", None)
    assert run(["a", "b", "c"], eos=[1], ignore_eos=True).text == "abc"
    assert run(["a", "b", "c"], stop_token_ids=[2]).stop_reason == 2


def test_min_tokens_come_before_any_end():
    assert run(["a", "b", "a", "b"], stop="a", min_tokens=2).text == "ab"
    assert run(["a", "b", "c", "d"], eos=[0, 2], min_tokens=1).text == "ab"


def test_length():
    checker = run(["a", "b", "c"], max_tokens=2)
    assert (checker.text, checker.finish_reason) == ("ab", "length")
    assert run(["ab", "c"], max_tokens=2, stop="bcd").text == "abc"


def test_without_a_detokenizer_there_is_no_text():
    checker = StopChecker(SamplingParams(max_tokens=1, detokenize=False), frozenset(), None)
    assert checker.push(5) == "" and checker.text == "" and checker.finish_reason == "length"


def cut(text, stops, keep):
    """The rule, on the whole text at once."""
    ends = [(text.find(s) + len(s), text.find(s)) for s in stops if s in text]
    if not ends:
        return text
    end, begin = min(ends)
    return text[: end if keep else begin]


@given(
    pieces=st.lists(st.text("ab", max_size=3), min_size=1, max_size=12),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    keep=st.booleans(),
)
def test_any_split_gives_what_the_whole_text_gives(pieces, stops, keep):
    checker = run(pieces, stop=stops, include_stop_str_in_output=keep)
    whole = "".join(pieces)
    assert checker.text == cut(whole, stops, keep)
    assert checker.finish_reason == ("stop" if any(s in whole for s in stops) else "length")


@pytest.mark.parametrize("length", [200])
def test_long_texts_are_shown_whole(length):
    assert run(["ab"] * length, stop="ba!").text == "ab" * length

"""Stop strings, ids, lengths, and text that is never taken back."""

import codecs
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minirksc.engine.stopping import StopChecker
from minirksc.options import SamplingParams


class Letters:
    """A detokenizer whose tokens are indices into a list of strings."""

    def __init__(self, pieces):
        self.pieces = pieces

    def push(self, token_ids):
        return "".join(self.pieces[i] for i in token_ids)

    def flush(self):
        return ""


class Bytes:
    """A detokenizer whose tokens are pieces of UTF-8: half characters wait for their other half."""

    def __init__(self, pieces):
        self.pieces = pieces
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_ids):
        return "".join(self.decoder.decode(self.pieces[i]) for i in token_ids)

    def flush(self):
        return self.decoder.decode(b"", final=True)


def run(pieces, eos=(), source=Letters, **options):
    params = SamplingParams(**{"max_tokens": len(pieces), **options})
    checker = StopChecker(params, frozenset(eos), source(pieces))
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


def test_a_stop_string_from_before_min_tokens_is_passed_over_for_good():
    # The long one keeps the search far back, where the short one has already been shown.
    checker = run(["x", "y", "z"], stop=["abcdef", "x"], min_tokens=2)
    assert (checker.text, checker.finish_reason, checker.stop_reason) == ("xyz", "length", None)
    assert run(["x", "a", "bcd", "ef"], stop=["abcdef", "x"], min_tokens=2).text == "x"


def test_length():
    checker = run(["a", "b", "c"], max_tokens=2)
    assert (checker.text, checker.finish_reason) == ("ab", "length")
    assert run(["ab", "c"], max_tokens=2, stop="bcd").text == "abc"


def test_without_a_detokenizer_there_is_no_text():
    checker = StopChecker(SamplingParams(max_tokens=1, detokenize=False), frozenset(), None)
    assert checker.push(5) == "" and checker.text == "" and checker.finish_reason == "length"


def cut(text, stops, keep, num_exempt=0):
    """The rule, on the whole text at once: the first end beyond num_exempt, of the longest that ends there."""
    for end in range(num_exempt + 1, len(text) + 1):
        if found := [s for s in stops if text[:end].endswith(s)]:
            return text[: end if keep else end - max(map(len, found))]
    return text


@given(
    pieces=st.lists(st.text("ab", max_size=3), min_size=1, max_size=12),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    keep=st.booleans(),
    min_tokens=st.integers(0, 6),
)
def test_any_split_gives_what_the_whole_text_gives(pieces, stops, keep, min_tokens):
    min_tokens = min(min_tokens, len(pieces))
    checker = run(pieces, stop=stops, include_stop_str_in_output=keep, min_tokens=min_tokens)
    whole, exempt = "".join(pieces), len("".join(pieces[:min_tokens]))
    assert checker.text == cut(whole, stops, keep, exempt)
    ends = any(whole[:end].endswith(s) for s in stops for end in range(exempt + 1, len(whole) + 1))
    assert checker.finish_reason == ("stop" if ends else "length")


@given(
    text=st.text("aé€🙂", max_size=10),
    borders=st.sets(st.integers(1, 39)),
    stops=st.lists(st.text("aé€🙂", min_size=1, max_size=3), max_size=3),
    cut_off=st.booleans(),
)
def test_characters_split_over_tokens(text, borders, stops, cut_off):
    data = text.encode() + (b"\xe2\x82" if cut_off else b"")  # ends in half a character
    edges = [0, *sorted(b for b in borders if b < len(data)), len(data)]
    pieces = [data[begin:end] for begin, end in itertools.pairwise(edges)]
    assert run(pieces, source=Bytes, stop=stops).text == cut(data.decode(errors="replace"), stops, keep=False)


@pytest.mark.parametrize("length", [200])
def test_long_texts_are_shown_whole(length):
    assert run(["ab"] * length, stop="ba!").text == "ab" * length

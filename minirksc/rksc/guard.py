"""The content guard: may one phrasing of a problem stand for another, as far as that can be read off the text?

It is no statistic. Out of each phrasing it reads the facts on which an answer may hang, in their order: numbers,
operators, brackets, quoted strings, option letters, and every word but a short list of those that English can
exchange without saying something else. Each fact has one normal form: "three" is 3, "isn't" is "is not", "5 km" is
"5 kilometers". Two phrasings pass only if they give the same sequence. A fact too many is another problem, so is one
that is missing, and so are the same facts in another order: "Tom gives Anna 3" is not "Anna gives Tom 3".

Where in doubt it refuses. Synonyms, moved clauses and other languages than English come out as differences, which
costs the computation that would have been saved; the other mistake would cost the answer. What it cannot see are
differences that only words of the short list make, such as "a boat" for "the boat", and what a courtesy or an
instruction by itself adds, such as "Explain your answer.".
"""

import re
import tomllib
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple


class Fact(NamedTuple):
    """One thing on which an answer may hang.

    Attributes:
        kind: "number", "unit", "word", ...
        text: its normal form.
    """

    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.kind} {self.text!r}"


def refusal(root: str, branch: str) -> str | None:
    """Why the first phrasing must not stand for the second.

    Args:
        root: phrasing whose KV would be used.
        branch: phrasing that it would stand for.

    Returns:
        A short reason that names what differs; None if nothing does. It is None either way round or neither.
    """
    ours, theirs = facts(root), facts(branch)
    if ours == theirs:
        return None
    for fact in Counter(theirs) - Counter(ours):
        return f"{fact} is {_how_often(fact, ours)} the first wording"
    for fact in Counter(ours) - Counter(theirs):
        return f"{fact} of the first wording is {_how_often(fact, theirs)} the second"
    here, there = next((a, b) for a, b in zip(ours, theirs, strict=True) if a != b)
    return f"{here} and {there} come in another order"


def facts(text: str) -> list[Fact]:
    """The facts of one phrasing, in their order."""
    found: list[Fact] = []
    for pattern, replacement in _tables()["idioms"]:
        text = re.sub(pattern, replacement, text)
    for part in _PARTS.split(text):
        if not all(match.lastgroup == "word" and _is_empty(match[0]) for match in _TOKEN.finditer(part)):
            found += _facts_of_part(part)
    return found


# Numbers stand before words, so that "10ml" is a number and a unit. A minus is one only where a number or a variable
# follows: all other dashes are hyphens or punctuation.
_TOKEN = re.compile(
    r"""
    (?P<quote> "[^"\n]*" | “[^”\n]*” | «[^»\n]*» | `[^`\n]*` | (?<!\w)['‘][^'’\n]+['’](?!\w) )
    | (?P<option> \([A-J]\) | ^[A-J][.)](?=\s) )
    | (?P<ordinal> [0-9]+(?:st|nd|rd|th)\b )
    | (?P<number> \d+(?:,\d{3})+(?:\.\d+)?(?!\d) | \d+(?:[.:/]\d+)* | \.\d+ | [½⅓⅔¼¾⅕⅛] )
    | (?P<currency> [$€£¥₹] )
    | (?P<word> % | ° | [^\W\d_]+(?:['’][^\W\d_]+)* )
    | (?P<operator> [-−–](?=\s?[\d(.$]) | (?<=\b[a-z]\s)[-−–](?=\s[a-z]\b) | (?<=\d)! | [+*/×÷=<>^≤≥≠±√²³()\[\]{}] )
    """,
    re.VERBOSE,
)
_PARTS = re.compile(r"(?<=[.!?:])\s+|\n+")
_ENDINGS = frozenset(["s", "re"])  # "it's" is "it is"; but "he'll", "he'd"

_SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9}


@cache
def _tables() -> dict[str, Any]:
    """What guard_words.toml says."""
    return tomllib.loads(Path(__file__).with_name("guard_words.toml").read_text(encoding="utf-8"))


@cache
def _words() -> tuple[dict[str, Fact], frozenset[str], frozenset[str]]:
    """(word or sign -> its fact, words that may come and go, words of instructions), see guard_words.toml."""
    tables = _tables()
    entries = [(kind, *entry.partition("=")) for kind, words in tables["facts"].items() for entry in words.split()]
    known = {word: Fact(kind, form or word) for kind, word, _, form in entries}
    return known, frozenset(tables["ordinary"].split()), frozenset(tables["instructions"].split())


@cache
def _small_numbers() -> dict[str, int]:
    """Those below a hundred that are one word."""
    entries = (entry.partition("=") for entry in _tables()["numbers"].split())
    return {word: int(value) for word, _, value in entries}


def _facts_of_part(text: str) -> Iterator[Fact]:
    """Those of one sentence or line."""
    matches = list(_TOKEN.finditer(text))
    at = 0
    while at < len(matches):
        kind, token = str(matches[at].lastgroup), matches[at][0]
        number, length = _spoken_number(_run_of_words(text, matches, at))
        following = matches[at + 1] if at + 1 < len(matches) else None
        if length:
            yield Fact("number", str(number))
        elif kind == "word":
            yield from _facts_of_word(token)
        else:
            if kind == "currency" and following and following.lastgroup == "number":
                yield _fact("number", following[0])  # "$5" as "5 dollars"
                length = 2
            yield _fact(kind, token)
        at += length or 1


def _fact(kind: str, token: str) -> Fact:
    """The fact of a token that is no word."""
    if known := _words()[0].get(token):
        return known
    if kind == "number":
        return Fact(kind, _digits(token))
    if kind == "quote":
        return Fact(kind, " ".join(token[1:-1].split()))
    return Fact(kind, token.strip("().") or token)


def _facts_of_word(token: str) -> Iterator[Fact]:
    known, ordinary, _ = _words()
    base, *rest = re.split("['’]", token.lower())
    singular = base[:-1] if len(base) > 3 and base.endswith("s") else base
    if base not in ordinary:
        yield known.get(base) or known.get(singular) or Fact("word", base)
    yield from (Fact("word", ending) for ending in rest if ending not in _ENDINGS)


def _is_empty(word: str) -> bool:
    """Whether a sentence of such words only tells the problem nothing: "Show how you solve this."."""
    _, ordinary, instructions = _words()
    base, *rest = re.split("['’]", word.lower())
    return (base in ordinary or base in instructions) and _ENDINGS.issuperset(rest)


def _digits(token: str) -> str:
    """1,250.50 -> 1250.5; fractions and times of day stay what they are."""
    whole, point, decimals = token.replace(",", "").partition(".")
    decimals = decimals.rstrip("0")
    return (whole.lstrip("0") or "0") + (point + decimals if decimals else "")


def _run_of_words(text: str, matches: list[re.Match[str]], at: int) -> list[str]:
    """The words from a place on that only spaces and hyphens part, as far as a number in words may reach."""
    words: list[str] = []
    end = matches[at].start()
    for match in matches[at : at + 16]:
        if match.lastgroup != "word" or text[end : match.start()].strip(" -"):
            break
        words.append(match[0].lower())
        end = match.end()
    return words


def _spoken_number(words: list[str]) -> tuple[int, int]:
    """The number that a text begins with in words, and how many words that takes; (0, 0) for none."""
    total = current = length = 0
    small = _small_numbers()
    limit = 10**12  # what the next word must stay below: "twenty five" is one number, "five twenty" two
    for place, word in enumerate(words):
        if word in small and small[word] < limit:
            current += small[word]
            limit = 10 if small[word] >= 20 else 0
        elif word == "hundred" and current < 100:
            current, limit = 100 * (current or 1), 100
        elif word in _SCALES and (current or not length):
            total, current, limit = total + _SCALES[word] * (current or 1), 0, 1000
        elif word == "and" and length and limit >= 100 and words[place + 1 : place + 2] and words[place + 1] in small:
            continue
        else:
            break
        length = place + 1
    return total + current, length


def _how_often(fact: Fact, others: list[Fact]) -> str:
    return "less often in" if fact in others else "not in"

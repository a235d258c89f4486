r"""Final answers: read out of generated text, brought to one normal form, and voted on.

A text states its answer after "####" (GSM8K), in "\boxed{...}" or after "the answer is"; the last
such statement counts. Where there is none, each kind has its own fallback. Understands English
markers only.

Numbers are compared by value: 18, 18.0, $18, 1.8e1 and 36/2 are one answer; thousands are parted by commas (or LaTeX's
thin spaces), and a unit or % behind a number is left out, so that 18% is 18. 3/4 is 0.75; 1/3, which has no end, stays
1/3. What only looks like a number (10:30, 1/2/2024) is a text. Control and invisible characters are left out, other
scripts' digits are digits.
"""

import math
import re
import reprlib
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal, localcontext
from fractions import Fraction
from typing import Any

from minirksc.errors import ConfigError

AnswerParser = str | Callable[[str], str | None]
"""Name of a kind, or a function from text to the answer in normal form (None: no answer)."""

_NUMBER = re.compile(
    r"(?<![\w.])(?<![0-9][:/])"  # neither inside a word nor the rest of a version such as 1.2.3, a time or a date
    r"(?P<sign>(?<![)\]])[-+])?[$€£]?(?P<sign2>[-+])?"
    r"(?:(?P<whole>[0-9]{1,9}) (?=[0-9]{1,9}/[1-9]))?"
    r"(?P<digits>(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
    r"(?P<exponent>[eE][-+]?[0-9]{1,3}(?!\w))?(?:/(?P<below>[1-9][0-9]{0,8}))?(?![0-9.]*[.:/][0-9])"
)
_MARKER = re.compile(r"####|(?P<boxed>\\boxed\s*\{)|\banswer(?:\s+is\b|\s*[:=])", re.IGNORECASE)
_ARTICLE = re.compile(r"\s+[a-z]")
"""After a letter: then "A" and "I" are words."""

_UNSEEN = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[^\t-\r\x20-\x7e]")
"""A terminal's escape sequence, or a character of which `_seen` says more."""
_MINUS = re.compile(r"[−﹣－]|[–‐‑](?=[\d$.])")
_SPACED_SIGN = re.compile(r"^(\s*[-+])\s+(?=[\d.$])")
_LATEX = (
    (re.compile(r"(?<=\d)(?:\\[,!;]|\{,\}|[\u00a0\u2009\u202f])(?=\d{3}(?!\d))"), ","),
    (re.compile(r"(?<=\d)(?=\\[dt]?frac)"), " "),
    (re.compile(r"\\[dt]?frac\s*(?:\{\s*(\d+)\s*\}|(\d))\s*(?:\{\s*(\d+)\s*\}|(\d))"), r"\1\2/\3\4"),
    (re.compile(r"(?<=\d)\s{0,4}(?:\\times|\\cdot|×)\s{0,4}10\^\{?([-+]?\d{1,3})\}?"), r"e\1"),
    (re.compile(r"\^\s?\{?\s?\\circ\s?\}?|\\(?=[$%])"), ""),
)
_WRAPPER = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mathit|mbox)\s*\{([^{}]*)\}")
_NO_UNIT = re.compile(r"[\d+*/^{},\\_|<>-]")
"""Beside a number in a box: then it is a formula, a pair or the like."""

MAX_STATEMENTS = 4
"""So many from the end are looked at for one that was not cut off."""

MAX_FRACTION_DIGITS = 30
"""Above a stroke: fractions of longer numbers are not reduced."""

MAX_DECIMALS = 2000
"""More than a number here can have: its digits, and an exponent of three."""

_SENTENCE_END = re.compile(r"[.!?](?:\s|$)")
# Without brackets only capitals: "answer is a dog" chooses nothing.
_BARE_CHOICE = re.compile(r"[\s*]*(?i:option\s+|choice\s+)?(?:\(([A-Ja-j])\)|([A-J])(?![\w'’]))")
_BRACKETED_CHOICE = re.compile(r"\(([A-Ja-j])\)")
_YES_OR_NO = r"(yes|no|true|false)\b"
_BOOLEAN = re.compile(rf"\b{_YES_OR_NO}", re.IGNORECASE)
_LEADING_BOOLEAN = re.compile(rf"[\s*:\"']*{_YES_OR_NO}", re.IGNORECASE)


def parse_answer(text: str, kind: AnswerParser = "auto") -> str | None:
    """The answer that a text gives, in a normal form that can be compared with ==.

    Args:
        text: generated text, or a reference answer.
        kind: "number" ("$1,234.50" -> "1234.5"), "choice" ("(b)" -> "B"), "boolean" (true and yes
            -> "yes", false and no -> "no"), "text" (case and whitespace folded), "auto" (the first
            kind that fits), or a function that replaces all this.

    Returns:
        The answer, or None when the text gives none.

    Raises:
        ConfigError: unknown kind, or the function gave something else than text or None.
    """
    if callable(kind):
        answer: Any = kind(text)
        if answer is not None and not isinstance(answer, str):
            raise ConfigError(f"answer_parser gave {reprlib.repr(answer)}; it must give text, or None for no answer")
        return answer
    check_parser(kind)
    return _PARSERS[kind](_read(text))


def check_parser(kind: AnswerParser) -> AnswerParser:
    """The same kind, unless it is the name of one that does not exist.

    Raises:
        ConfigError: unknown kind.
    """
    if not callable(kind) and not (isinstance(kind, str) and kind in _PARSERS):
        raise ConfigError(
            f"answer_parser={reprlib.repr(kind)}; use one of {', '.join(_PARSERS)}, or a function of the text"
        )
    return kind


def choose(answers: Sequence[str | None], scores: Sequence[float], rule: str) -> int:
    """Which candidate to give as the answer.

    Args:
        answers: parsed answer of each candidate; None does not vote.
        scores: score of each candidate, larger is better; NaN is worse than any.
        rule: "score" (the best one), "vote" (the commonest answer; ties go to the larger sum of
            scores) or "weighted_vote" (the answer with the largest sum of scores). A vote is
            represented by the best candidate that gives the winning answer; the earlier one of
            equals.

    Returns:
        Index of the candidate. Where no candidate has an answer every rule is "score".

    Raises:
        ConfigError: unknown rule.
    """
    if rule not in SELECT_RULES:
        raise ConfigError(f"select={rule!r}; use one of {', '.join(SELECT_RULES)}")
    candidates = list(range(len(scores)))
    groups: dict[str, list[int]] = {}
    for index, answer in enumerate(answers):
        if answer is not None:
            groups.setdefault(answer, []).append(index)
    if rule != "score" and groups:

        def weight(group: list[int]) -> tuple[float, float]:
            total = sum(score for score in map(scores.__getitem__, group) if not math.isnan(score))
            return (len(group) if rule == "vote" else total, total)

        candidates = max(groups.values(), key=weight)
    return max(candidates, key=lambda index: -math.inf if math.isnan(scores[index]) else scores[index])


def agreement(answers: Sequence[str | None]) -> dict[str, Any]:
    """How far candidates agree, without knowing what is right.

    Returns:
        votes: answer -> how many give it, most first; num_without: how many give none; share: of all candidates, those
        with the commonest answer, 0 when there is none.
    """
    counts = Counter(answer for answer in answers if answer is not None)
    share = max(counts.values(), default=0) / max(len(answers), 1)
    return {"votes": dict(counts.most_common()), "num_without": answers.count(None), "share": share}


SELECT_RULES = ("score", "vote", "weighted_vote")


def _plain(text: str) -> str:
    """Without what cannot be seen; digits, minus signs and LaTeX's numbers in one form each."""
    text = _UNSEEN.sub(_seen, _MINUS.sub("-", text))
    for pattern, replacement in _LATEX:
        text = pattern.sub(replacement, text)
    return text


def _seen(match: re.Match[str]) -> str:
    char = match[0]
    if len(char) > 1 or unicodedata.category(char) in ("Cc", "Cf"):
        return ""
    digit = unicodedata.decimal(char, None)
    return char if digit is None else str(digit)


@dataclass(frozen=True)
class _Read:
    """A text in plain characters, and what it states.

    Attributes:
        text: all of it.
        statement: what the last statement of an answer says, to the end of its box or sentence; None: there is none.
        is_boxed: whether that is in a box.
    """

    text: str
    statement: str | None = None
    is_boxed: bool = False


def _read(text: str) -> _Read:
    """Looks for a statement that says something: of the others the text may have been cut off there."""
    text = _plain(text)
    for marker in reversed(list(_MARKER.finditer(text))[-MAX_STATEMENTS:]):
        rest, is_boxed = text[marker.end() :], marker["boxed"] is not None
        if statement := _in_box(rest) if is_boxed else _sentence(rest):
            return _Read(text, statement, is_boxed)
    return _Read(text)


def _sentence(text: str) -> str:
    """The first, at most a line."""
    return _SENTENCE_END.split(text.lstrip().partition("\n")[0], maxsplit=1)[0].strip()


def _in_box(text: str) -> str:
    r"""Up to the brace that closes the box, without \text{...} and the like."""
    nesting = 1
    for brace in re.finditer(r"[{}]", text):
        nesting += 1 if brace[0] == "{" else -1
        if nesting == 0:
            text = text[: brace.start()]
            break
    else:
        text = text.partition("\n")[0]
    for _ in range(3):  # they may be nested, but not without end
        text = _WRAPPER.sub(r"\1", text)
    text = text.strip("$ \n\t")
    return text[1:-1].strip() if text[:1] == "{" and text[-1:] == "}" else text


def _normal_number(match: re.Match[str]) -> str:
    sign = "-" if (match["sign"] == "-") != (match["sign2"] == "-") else ""
    digits = match["digits"].replace(",", "")
    value = Decimal(digits + (match["exponent"] or ""))
    if match["below"]:
        if len(digits) > MAX_FRACTION_DIGITS:
            return f"{sign}{digits}/{match['below']}"
        fraction = int(match["whole"] or 0) + Fraction(value) / int(match["below"])
        # Decimals end where the denominator divides a power of ten.
        if pow(10, MAX_DECIMALS, fraction.denominator) != 0:
            return f"{sign}{fraction}"
        with localcontext(prec=MAX_DECIMALS):
            value = Decimal(fraction.numerator) / Decimal(fraction.denominator)
    number = format(value, "f")
    if "." in number:
        number = number.rstrip("0").rstrip(".")
    return "0" if number in ("0", "") else sign + number


def _number(read: _Read) -> str | None:
    found = _stated_number(read.statement or "") or next(reversed(list(_NUMBER.finditer(read.text))), None)
    return _normal_number(found) if found else None


def _stated_number(statement: str) -> re.Match[str] | None:
    """The first one; "3 + 4 = 7" says 7."""
    return _NUMBER.search(_SPACED_SIGN.sub(r"\1", statement.rpartition("=")[2]))


def _choice(read: _Read) -> str | None:
    match = _BARE_CHOICE.match(read.statement or "") or _BARE_CHOICE.match(read.text)
    if match and (match.string is read.statement or not _is_word(match)):
        return _letter(match)
    letters = _BRACKETED_CHOICE.findall(read.text)
    return str(letters[-1]).upper() if letters else None


def _letter(match: re.Match[str]) -> str:
    return str(match[1] or match[2]).upper()


def _is_word(match: re.Match[str]) -> bool:
    """Whether a letter is none that was chosen: "A train leaves", "I think"."""
    return match[2] in ("A", "I") and _ARTICLE.match(match.string, match.end()) is not None


def _boolean(read: _Read) -> str | None:
    leading = _LEADING_BOOLEAN.match(read.statement or "") or _LEADING_BOOLEAN.match(read.text)
    words = [leading[1]] if leading else _BOOLEAN.findall(read.text)
    return _yes_or_no(words[-1]) if words else None


def _yes_or_no(word: str) -> str:
    return "yes" if word.lower() in ("yes", "true") else "no"


def _text(read: _Read) -> str | None:
    return " ".join((read.statement or read.text).casefold().split()) or None


def _auto(read: _Read) -> str | None:
    """The kind that the statement of the answer has; without one, that of the text."""
    stated = read.statement or read.text
    choice = _BARE_CHOICE.match(stated)
    if choice and (choice[1] or not stated[choice.end() :].strip(" .):*")):
        return _letter(choice)
    if leading := _LEADING_BOOLEAN.match(stated):
        return _yes_or_no(leading[1])
    if read.statement is None:
        return _number(read) or _choice(read) or _text(read)
    found = _stated_number(read.statement)
    if found and read.is_boxed:
        value = found.string
        beside = value[: found.start()] + value[found.end() :]
        found = None if _NO_UNIT.search(beside) else found
    return _normal_number(found) if found else _text(read)


_PARSERS: dict[str, Callable[[_Read], str | None]] = {
    "auto": _auto,
    "number": _number,
    "choice": _choice,
    "boolean": _boolean,
    "text": _text,
}
ANSWER_KINDS = tuple(_PARSERS)

r"""Final answers: read out of generated text, brought to one normal form, and voted on.

A text states its answer after "####" (GSM8K), in "\boxed{...}" or after "the answer is"; the last
such statement counts. Where there is none, each kind has its own fallback. Understands English
markers only.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any

from minirksc.errors import ConfigError

AnswerParser = str | Callable[[str], str | None]
"""Name of a kind, or a function from text to the answer in normal form (None: no answer)."""

_NUMBER = re.compile(
    r"(?<![\w.])"  # neither inside a word nor the rest of a version such as 1.2.3
    r"(?P<sign>(?<![)\]])[-+])?[$€£]?(?P<sign2>[-+])?"
    r"(?P<digits>(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
)
_MARKER = re.compile(r"####|(?P<boxed>\\boxed\s*\{(?:\\text\s*\{)?)|\banswer(?:\s+is\b|\s*[:=])", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.!?](?:\s|$)")
_BARE_CHOICE = re.compile(r"[\s*]*(?:option\s+|choice\s+)?(?:\(([A-Ja-j])\)|([A-J])(?![\w'’]))", re.I)
_BRACKETED_CHOICE = re.compile(r"\(([A-Ja-j])\)")
_BOOLEAN = re.compile(r"\b(yes|no|true|false)\b", re.IGNORECASE)
_LEADING_BOOLEAN = re.compile(r"[\s*:\"']*(yes|no|true|false)\b", re.IGNORECASE)


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
        ConfigError: unknown kind.
    """
    if callable(kind):
        return kind(text)
    check_parser(kind)
    return _PARSERS[kind](text)


def check_parser(kind: AnswerParser) -> None:
    """Rejects the name of a kind that does not exist.

    Raises:
        ConfigError: unknown kind.
    """
    if not callable(kind) and kind not in _PARSERS:
        raise ConfigError(f"answer_parser={kind!r}; use one of {', '.join(_PARSERS)}, or a function of the text")


def choose(answers: Sequence[str | None], scores: Sequence[float], rule: str) -> int:
    """Which candidate to give as the answer.

    Args:
        answers: parsed answer of each candidate; None does not vote.
        scores: of the same candidates, larger is better; NaN is worse than any.
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


def _marked(text: str) -> str | None:
    """What the last statement of an answer says, to the end of its sentence."""
    last = None
    for match in _MARKER.finditer(text):
        last = match
    if last is None:
        return None
    rest = text[last.end() :]
    if last["boxed"]:
        return rest.partition("}")[0].strip() or None
    return _SENTENCE_END.split(rest.partition("\n")[0].lstrip(), maxsplit=1)[0].strip() or None


def _normal_number(match: re.Match[str]) -> str:
    sign = "-" if (match["sign"] == "-") != (match["sign2"] == "-") else ""
    number = format(Decimal(sign + match["digits"].replace(",", "")), "f")
    if "." in number:
        number = number.rstrip("0").rstrip(".")
    return "0" if number in ("-0", "") else number


def _number(text: str) -> str | None:
    text = text.replace("−", "-")
    marked = _marked(text)
    # "The answer is 3 + 4 = 7" means 7.
    found = _NUMBER.search(marked.rpartition("=")[2]) if marked else None
    if found is None:
        for found in _NUMBER.finditer(text):  # noqa: B007 - the last one is wanted
            pass
    return _normal_number(found) if found else None


def _choice(text: str) -> str | None:
    for part in (_marked(text), text):
        match = _BARE_CHOICE.match(part) if part else None
        # Without brackets only capitals: "answer is a dog" chooses nothing.
        if match and (match[1] or match[2].isupper()):
            return str(match[1] or match[2]).upper()
    letters = _BRACKETED_CHOICE.findall(text)
    return str(letters[-1]).upper() if letters else None


def _boolean(text: str) -> str | None:
    for part in (_marked(text), text):
        match = _LEADING_BOOLEAN.match(part) if part else None
        if match:
            return _yes_or_no(match[1])
    words = _BOOLEAN.findall(text)
    return _yes_or_no(words[-1]) if words else None


def _yes_or_no(word: str) -> str:
    return "yes" if word.lower() in ("yes", "true") else "no"


def _text(text: str) -> str | None:
    return " ".join((_marked(text) or text).casefold().split()) or None


def _auto(text: str) -> str | None:
    """The kind that the statement of the answer has; without one, that of the text."""
    stated = _marked(text) or text
    choice = _BARE_CHOICE.match(stated)
    if choice and (choice[1] or (choice[2].isupper() and stated[choice.end() :].strip(" .):*") == "")):
        return str(choice[1] or choice[2]).upper()
    if _LEADING_BOOLEAN.match(stated):
        return _boolean(stated)
    return _number(text) or _choice(text) or _text(text)


_PARSERS: dict[str, Callable[[str], str | None]] = {
    "auto": _auto,
    "number": _number,
    "choice": _choice,
    "boolean": _boolean,
    "text": _text,
}
ANSWER_KINDS = tuple(_PARSERS)

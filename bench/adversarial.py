"""Word problems that look like another one and ask for something else, made by rules and word lists.

That the answer really changes is checked, not hoped for:
- number, unit, entities: the worked solution is computed again with what was changed (`Problem.recomputed`). Names that
  change sides of a comparison ("40 more than") are taken without that: the relation is turned around;
- negation: the sentence denied is one that states a number from which the answer follows;
- other problem: its answer is another one;
- other question: an amount is asked for that is given as another number than the answer, or of which nothing is said.
A problem to which no rule of a kind applies, or whose calculations cannot be read, gives no phrasing of that kind.
"""

import random
import re
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from itertools import pairwise

from bench.word_problems import Problem, numerals, sentences, single_numerals, to_number

Made = tuple[str, str]
"""A question, and what was done to make it."""

PAST = {
    "add": "added", "bake": "baked", "bring": "brought", "buy": "bought", "catch": "caught", "charge": "charged",
    "collect": "collected", "complete": "completed", "cook": "cooked", "cut": "cut", "deposit": "deposited",
    "donate": "donated", "download": "downloaded", "drink": "drank", "drive": "drove", "earn": "earned", "eat": "ate",
    "find": "found", "finish": "finished", "gain": "gained", "get": "got", "give": "gave", "go": "went",
    "grow": "grew", "have": "had", "hit": "hit", "hold": "held", "keep": "kept", "leave": "left", "lose": "lost",
    "make": "made", "need": "needed", "order": "ordered", "pay": "paid", "pick": "picked", "plant": "planted",
    "purchase": "purchased", "put": "put", "read": "read", "receive": "received", "run": "ran", "save": "saved",
    "score": "scored", "see": "saw", "sell": "sold", "send": "sent", "share": "shared", "spend": "spent",
    "take": "took", "teach": "taught", "travel": "traveled", "use": "used", "walk": "walked", "win": "won",
    "work": "worked", "write": "wrote",
}  # fmt: skip
"""Verbs of word problems and their past."""
_BASE = {past: base for base, past in PAST.items()}
_PRESENT = {f"{base}s": base for base in (*PAST, "contain", "cost", "live", "play", "practice", "produce", "weigh")}

UNITS = {
    "seconds": ("minutes", "60"), "minutes": ("hours", "60"), "hours": ("minutes", "1/60"), "days": ("weeks", "7"),
    "weeks": ("days", "1/7"), "months": ("years", "12"), "years": ("months", "1/12"), "feet": ("inches", "1/12"),
    "inches": ("feet", "12"), "meters": ("kilometers", "1000"), "kilometers": ("meters", "1/1000"),
    "kilometres": ("metres", "1/1000"), "miles": ("yards", "1/1760"), "yards": ("feet", "1/3"),
    "pounds": ("ounces", "1/16"), "ounces": ("pounds", "16"), "kg": ("grams", "1/1000"), "grams": ("kilograms", "1000"),
    "kilograms": ("grams", "1/1000"), "liters": ("milliliters", "1/1000"), "litres": ("millilitres", "1/1000"),
    "gallons": ("quarts", "1/4"), "dollars": ("cents", "1/100"), "cents": ("dollars", "100"),
}  # fmt: skip
"""Unit -> another one, and how many of the first make one of it."""

# A question about one is a question about the other's opposite.
_OPPOSITES = {
    "earn": "spend", "spend": "save", "save": "spend", "sell": "buy", "buy": "sell", "lose": "gain", "gain": "lose",
    "win": "lose", "eat": "throw away", "make": "lose", "pay": "get back", "use": "waste", "need": "give away",
    "have left": "use up", "get": "give away",
}  # fmt: skip
_OTHER_ENDS = {"in total": "on average", "altogether": "on average", "are left": "are gone", "is left": "is gone"}
_NO_NAME = (
    "He|She|It|They|The|There|If|In|On|At|After|When|Each|Mr|Mrs|Ms|His|Her|Then|And|But|A|An|All|For|So|One|Of|Out"
)


def adversarial(problem: Problem, kind: str, rng: random.Random) -> Made | None:
    """A question that looks alike and has another answer.

    Args:
        problem: problem to change.
        kind: key of RULES.
        rng: random numbers that choose among what the rules give.

    Returns:
        None where no rule applies.
    """
    options = list(RULES[kind](problem))
    return rng.choice(options) if options else None


def other_problem(problems: Sequence[Problem], index: int, rng: random.Random) -> Made | None:
    """Another problem of the same set with another answer; None where there is none."""
    others = [problem for problem in problems if problem.answer != problems[index].answer]
    return (rng.choice(others).question, "another problem") if others else None


def _other_numbers(problem: Problem) -> Iterator[Made]:
    text = problem.question
    taken = {to_number(m[0]) for m in numerals(text)}
    for m in single_numerals(text):
        old = to_number(m[0])
        for new in (old + 1, old + 3, old - 1, old * 2, old + 10):
            after = problem.recomputed({old: new})
            is_sane = new.denominator == 1 and new >= 2 and new not in taken and not old <= 100 < new
            has_article = text[: m.start()].endswith((" a ", " an "))  # "an 8-mile trail" is no "an 9-mile trail"
            if is_sane and not has_article and after is not None and 0 < after != problem.answer:
                shown = f"{int(new):,}" if "," in m[0] else str(int(new))
                yield text[: m.start()] + shown + text[m.end() :], f"{m[0]} -> {shown}"


def _denied(problem: Problem) -> Iterator[Made]:
    parts = sentences(problem.question)
    needed = [
        m[0] for m in single_numerals(problem.question) if problem.changes({to_number(m[0]): to_number(m[0]) + 1})
    ]
    for at, part in enumerate(parts):
        if part.endswith("?"):
            denied = re.sub(r"\b(are|were|did|do) not (?=[a-z]+)", r"\1 ", part, count=1)
        else:
            denied = _denial(part) if any(number in part for number in needed) else part
        if denied != part:
            yield _put(parts, at, denied), f"{part} -> {denied}"


def _denial(sentence: str) -> str:
    """A sentence of one clause with its verb denied; itself where that cannot be done safely."""
    thing = r"(?:The|His|Her|Their|A|An|Each|Every)(?: [a-z]+){1,2}?"
    found = re.match(rf"(?:He|She|It|They|There|{thing}|[A-Z][a-z]+(?: and [A-Z][a-z]+)?) ([a-z]+) (?=(\S+))", sentence)
    if found is None or re.search(r"\b(?:not|never|no|if|who|which|that|and then)\b|n['’]t|[,;]", sentence):
        return sentence
    verb, following = found[1], found[2]
    is_possession = verb in ("has", "have") and re.match(r"[$\d]|an?\b|the\b|some\b|two\b|three\b|four\b", following)
    if verb in ("is", "are", "was", "were", "will", "would", "could"):
        denied = f"{verb} not"
    elif verb == "can":
        denied = "cannot"
    elif is_possession:
        denied = "does not have" if verb == "has" else "do not have"
    elif verb in _BASE and verb != "had":
        denied = f"did not {_BASE[verb]}"
    elif verb in _PRESENT:
        denied = f"does not {_PRESENT[verb]}"
    else:
        return sentence
    return sentence[: found.start(1)] + denied + sentence[found.end(1) :]


def _swapped(problem: Problem) -> Iterator[Made]:
    parts = sentences(problem.question)
    for at, part in enumerate(parts):
        if not part.endswith("?"):
            for said, rule in (*_swapped_things(problem, part), *_swapped_names(problem, part)):
                yield _put(parts, at, said), rule


def _swapped_things(problem: Problem, part: str) -> Iterator[Made]:
    """20 red hats and 24 blue hats -> 20 blue hats and 24 red hats."""
    single = {m[0] for m in single_numerals(problem.question)}
    for first, second in pairwise([m for m in _counted(part) if m[1] in single]):
        one, two = first[2], second[2]
        is_named_once = part.count(one) == part.count(two) == 1
        if is_named_once and _exchange_matters(problem, first[1], second[1]):
            between = part[first.end() : second.start()]
            said = f"{part[: first.start()]}{first[1]} {two}{between}{second[1]} {one}{part[second.end() :]}"
            yield said, f"{one} <-> {two}"


def _counted(text: str) -> Iterator[re.Match[str]]:
    """Numbers and the things that they count: (number, thing); no amounts of a unit, and nothing relative."""
    for m in re.finditer(r"(?<![\d.$])(\d+) ((?:[a-z]+ )?[a-z]+s)\b(?! (?:of|as|more|less|fewer)\b)", text):
        *_, noun = m[2].split()
        is_relative = re.search(r"\b(?:more|less|fewer|times|as|percent|and|this|is|has|was|with|by|of)\b", m[2])
        if noun not in UNITS and noun != "degrees" and not is_relative:
            yield m


def _swapped_names(problem: Problem, part: str) -> Iterator[Made]:
    """Ann has 4 more than Bill -> Bill has 4 more than Ann."""
    names = re.findall(rf"\b(?!(?:{_NO_NAME})\b)[A-Z][a-z]+\b", part)
    if len(names) != 2 or names[0] == names[1]:
        return
    first, second = names
    exchanged = {first: second, second: first}
    said = re.sub(rf"\b(?:{first}|{second})\b", lambda m: exchanged[m[0]], part)
    begin, end = part.index(first), part.index(second)
    compares = re.search(r"\b(?:than|as (?:many|much|old|long|tall|fast))\b", part[begin:end])
    amount = re.search(r"\d|\b(?:twice|half|times|third|quarter|two|three|four|five|six)\b", part)
    numbers = [m[0] for m in numerals(part)]
    if compares and amount and any(problem.question.count(name) > 1 for name in names):
        yield said, f"{first} <-> {second} in a comparison"
    elif len(numbers) == 2 and begin < part.index(numbers[0]) < end < part.rindex(numbers[1]):
        yield from [(said, f"{first} <-> {second}")] if _exchange_matters(problem, *numbers) else []


def _exchange_matters(problem: Problem, one: str, two: str) -> bool:
    first, second = to_number(one), to_number(two)
    return first != second and problem.changes({first: second, second: first})


def _other_units(problem: Problem) -> Iterator[Made]:
    """One number in another unit: in the unit that the solution counts in, it is another number."""
    text = problem.question
    for m in single_numerals(text):
        value = to_number(m[0])
        if found := re.match(r"[ -]([a-z]+)\b", text[m.end() :]):
            is_singular = found[1] not in UNITS
            unit = found[1] + "s" if is_singular else found[1]
            other, factor = UNITS.get(unit, ("", "1"))
            if problem.changes({value: value * Fraction(factor)}) and not (is_singular and other in ("feet", "inches")):
                other = other.removesuffix("s") if is_singular else other
                yield text[: m.end() + 1] + other + text[m.end() + found.end(1) :], f"{m[0]} {unit} -> {other}"
        if text[: m.start()].endswith("$") and value.denominator == 1 and problem.changes({value: value / 100}):
            yield f"{text[: m.start() - 1]}{m[0]} cents{text[m.end() :]}", f"${m[0]} -> {m[0]} cents"


def _other_questions(problem: Problem) -> Iterator[Made]:
    *statements, question = sentences(problem.question)
    if problem.answer is None or not question.endswith("?"):
        return
    told = " ".join(statements)
    changed = list(_other_amounts(problem.answer, told, question))
    for said, rule in changed:
        yield " ".join([*statements, said]), rule
    if not changed and problem.answer:
        for asks in ("Give twice that number as the answer.", "Give half of that number as the answer."):
            yield f"{problem.question} {asks}", asks


def _other_amounts(answer: Fraction, told: str, question: str) -> Iterator[Made]:
    asked = re.match(r"How many ((?:[a-z]+ ){0,2}?[a-z]+s) (?=did|does|do|will|would|can|are|were|has|have)", question)
    for m in _counted(told) if asked else ():
        assert asked
        is_other = not asked[1].endswith(m[2]) and not m[2].endswith(asked[1])
        if is_other and to_number(m[1]) != answer:
            yield question.replace(asked[1], m[2], 1), f"{asked[1]} -> {m[2]}"
    for verb, opposite in _OPPOSITES.items():
        words = {opposite, PAST.get(opposite, opposite), f"{opposite}s"}
        is_silent = not any(re.search(rf"\b{word}\b", told + question) for word in words)
        if is_silent and re.search(rf"\b(?:did|does|do|will|would|can|could|to) [^,?]*\b{verb}\b", question):
            yield re.sub(rf"\b{verb}\b", opposite, question, count=1), f"{verb} -> {opposite}"
    if len(numerals(told)) > 1 and answer * 2 not in {to_number(m[0]) for m in numerals(told)}:
        for old, new in _OTHER_ENDS.items():
            if old in question:
                yield question.replace(old, new, 1), f"{old} -> {new}"


def _put(parts: Sequence[str], at: int, part: str) -> str:
    return " ".join([*parts[:at], part, *parts[at + 1 :]])


RULES: dict[str, Callable[[Problem], Iterator[Made]]] = {
    "number": _other_numbers,
    "negation": _denied,
    "entities": _swapped,
    "unit": _other_units,
    "other question": _other_questions,
}
"""Kind -> what its rules make of a problem."""

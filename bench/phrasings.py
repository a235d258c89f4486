"""W4, diverse phrasings: a word problem in other words, and problems that only look the same.

Rules and word lists, no model: the same file and seed give the same texts. Paraphrases come in four levels:
1 minor: other function words, contractions, numerals, punctuation, courtesies;
2 template: another instruction around the same problem;
3 structure: sentences built differently, the template is the same;
4 reordered: the question told first or sentences exchanged, with 1 to 3 on top.
Adversarial phrasings, six kinds, are those of `bench.adversarial` in the first phrasing's template.
"""

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from bench.adversarial import PAST, RULES, Made, adversarial, other_problem
from bench.word_problems import Problem, sentences

LEVELS = ("minor", "template", "structure", "reordered")
KINDS = ("number", "negation", "entities", "unit", "other problem", "other question")

ROOT_TEMPLATE = "Solve the following problem step by step.\n\nProblem: {}\n\nSolution:"
TEMPLATES = (
    "Here is a word problem. Work out the answer and show your steps.\n\n{}\n\nAnswer:",
    "Question: {}\n\nThink carefully, then give the answer.\nAnswer:",
    "Read this and find the answer, explaining how you get there.\n\n{}\n\nExplanation:",
    "You are a patient teacher. Show your students how to solve this exercise:\n\n{}\n\nSolution:",
)
COURTESIES = (
    "Please help with this. {}",
    "{} Thank you.",
    "{} Please show how. Thanks!",
    "Here it is: {}",
)


@dataclass(frozen=True)
class Phrasing:
    """A text that is held against the first phrasing of a problem.

    Attributes:
        problem: index of the problem.
        kind: name out of LEVELS or KINDS.
        rule: name of what was done.
        root: prompt of the first phrasing, whole.
        text: prompt of this one, whole.
    """

    problem: int
    kind: str
    rule: str
    root: str
    text: str


def phrasings(problems: Sequence[Problem], seed: int = 0) -> list[Phrasing]:
    """At most one phrasing of each level and kind a problem, in the order of the problems.

    Args:
        problems: problems to word.
        seed: seed of the choice of rules.
    """
    return [one for index in range(len(problems)) for one in _phrasings(problems, index, seed)]


def _phrasings(problems: Sequence[Problem], index: int, seed: int) -> Iterator[Phrasing]:
    problem = problems[index]
    rng = random.Random(f"{seed} {index}")
    root = ROOT_TEMPLATE.format(problem.question)
    for level in LEVELS:
        if made := paraphrase(problem.question, level, rng):
            yield Phrasing(index, level, made[1], root, made[0])
    for kind in KINDS:
        changed = adversarial(problem, kind, rng) if kind in RULES else other_problem(problems, index, rng)
        if changed:
            yield Phrasing(index, kind, changed[1], root, ROOT_TEMPLATE.format(changed[0]))


def paraphrase(question: str, level: str, rng: random.Random) -> Made | None:
    """A whole prompt that asks for the same.

    Args:
        question: question to say differently.
        level: name out of LEVELS.
        rng: random numbers that choose among the rules that apply.

    Returns:
        The prompt and what was done; None where no rule of the level applies.
    """
    if level == "minor":
        text, rules = _minor(question, rng, 3)
        if not rules or rng.random() < 0.4:
            form = rng.choice(COURTESIES)
            text, rules = form.format(text), [*rules, form]
        return ROOT_TEMPLATE.format(text), "; ".join(rules)
    if level == "template":
        template = rng.choice(TEMPLATES)
        return template.format(question), template.split("\n")[0]
    if level == "structure":
        made = _structure(question, rng)
        return (ROOT_TEMPLATE.format(made[0]), made[1]) if made else None
    moved = _reordered(question, rng)
    if moved is None:
        return None
    built = _structure(moved[0], rng) or (moved[0], "")
    text, rules = _minor(built[0], rng, 2)
    return rng.choice(TEMPLATES).format(text), "; ".join(rule for rule in (moved[1], built[1], *rules) if rule)


# ---- 1: minor --------------------------------------------------------------------------------------------------------

_NUMERALS = {"two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9"}
_NUMERALS |= {"ten": "10", "eleven": "11", "twelve": "12"}
_IN_WORDS = {digits: word for word, digits in _NUMERALS.items()}
_TIME = "day|week|month|year|hour|minute|night|morning|evening"
_VERBS = "did|does|is|are|was|were|could|would|do|has"
_AFTER_MANY = "did|does|do|will|would|can|are|has|have|were"

# What it is called, where it applies, what stands there then.
MINOR: tuple[tuple[str, str, str | Callable[[re.Match[str]], str]], ...] = (
    ("How many -> What number of", rf"\bHow many (?=[a-z]+s (?:{_AFTER_MANY})\b)", "What number of "),
    ("How much money -> What amount of money", r"\bHow much money\b", "What amount of money"),
    ("altogether -> in total", r"\b(?:altogether|in all)(?=[?.,])", "in total"),
    ("in total -> altogether", r"\bin total(?=[?.])", "altogether"),
    ("contraction", rf"\b({_VERBS}) not\b", r"\1n't"),
    ("no contraction", rf"\b({_VERBS})n['’]t\b", r"\1 not"),
    ("it is -> it's", r"\b(It|it|There|there|That|that) is (?!not\b)(?=[a-z])", r"\1's "),
    ("it's -> it is", r"\b(It|There|That)['’]s (?=an?\b|the\b)", r"\1 is "),
    (
        "per day -> a day",
        rf"\bper ({_TIME})\b(?! (?:per|an?)\b)",
        lambda m: f"{'an' if m[1] == 'hour' else 'a'} {m[1]}",
    ),
    ("each day -> every day", rf"\beach ({_TIME})\b", r"every \1"),
    ("every day -> each day", rf"\bevery ({_TIME})\b", r"each \1"),
    ("because -> since", r"\bbecause (?!of)", "since "),
    ("until -> till", r"\buntil\b", "till"),
    ("however -> but", r"\bHowever, ", "But "),
    ("wants to -> would like to", r"(?<=[a-z] )wants to\b", "would like to"),
    ("has to -> must", r"(?<=[a-z] )(?<!will )(?<!would )(?:has|have) to (?!be\b)(?=[a-z])", "must "),
    ("is able to -> can", r"(?<!not )\b(?:is|are) able to\b", "can"),
    ("so that -> so", r"\bso that\b", "so"),
    ("while -> whereas", r"(?<=, )while (?=[A-Z])", "whereas "),
    (
        "number in words",
        r"(?<![\d$£€.,/:%#-])\b(?:[2-9]|1[0-2])(?= [a-z]{3,}\b)(?! percent)",
        lambda m: _IN_WORDS[m[0]],
    ),
    ("number in digits", rf"(?<!-)\b(?:{'|'.join(_NUMERALS)})(?= [a-z]+s\b)", lambda m: _NUMERALS[m[0]]),
    ("no comma before and", r"(?<=[a-z]), and (?=(?:he|she|they|it)\b)", " and "),
    ("and then -> then", r"\band then\b", "then"),
    ("also left out", r" also (?=[a-z]+ed\b|bought|gave|has|had|sold)", " "),
    ("mom -> mother", r"\bmom\b", "mother"),
    ("dad -> father", r"\bdad\b", "father"),
)


def _minor(text: str, rng: random.Random, count: int) -> tuple[str, list[str]]:
    """The text with up to `count` rules of MINOR applied, at places that do not overlap; and which."""
    edits: list[tuple[int, int, str, str]] = []
    for name, pattern, replacement in rng.sample(MINOR, len(MINOR)):
        places = list(re.finditer(pattern, text))
        if not places or len(edits) == count:
            continue
        place = rng.choice(places)
        if all(place.end() <= begin or end <= place.start() for begin, end, *_ in edits):
            said = place.expand(replacement) if isinstance(replacement, str) else replacement(place)
            edits.append((place.start(), place.end(), said, name))
    for begin, end, said, _ in sorted(edits, reverse=True):
        text = text[:begin] + said + text[end:]
    return text, [name for *_, name in edits]


# ---- 3: structure ----------------------------------------------------------------------------------------------------

_MONTHS = "January|February|March|April|May|June|July|August|September|October|November|December"
_DAYS = "Monday|Tuesday|Wednesday|Thursday|Friday|Saturday|Sunday"
_WHEN = (
    r"(?:(?:in|on|at|during|after|by) (?:the |his |her |their |this |that |last |each |every )?(?:[a-z]+ )?"
    rf"(?:{_TIME}|weekend|summer|winter|spring|autumn|afternoon|noon|end|beginning|{_MONTHS}|{_DAYS})"
    r"|yesterday|today|this (?:week|month|year)|last (?:week|month|year|night))"
)
_WHO = "(?:[A-Z][a-z]+|he|she|they|it)(?: and [A-Z][a-z]+)?"
# What belongs to the time, so that it cannot be left behind: "two more than on Monday".
_ENDS = r"(?<! of)(?<! than)(?<! from)(?<! between)(?<! every)(?<! each)(?<! per)(?<! and)"
_COMMON = "He|She|They|It|The|There|A|An"
_NOW = "have|need|make|pay|spend|get|eat|earn|cost|weigh"


def _structure(text: str, rng: random.Random) -> Made | None:
    """Up to three sentences built differently."""
    changed: list[str] = []
    rules: list[str] = []
    for sentence in sentences(text):
        options = list(_restructured(sentence)) if len(rules) < 3 else []
        made, rule = rng.choice(options) if options else (sentence, "")
        changed.append(made)
        rules += [rule] if rule else []
    return (" ".join(changed), "; ".join(rules)) if rules else None


def _restructured(sentence: str) -> Iterator[Made]:
    if m := re.fullmatch(r"If ([^,?]+), (how|what|calculate|find) ([^?.]+)([?.])", sentence):
        if " if " not in m[3]:
            yield f"{m[2].capitalize()} {m[3]} if {m[1]}{m[4]}", "condition last"
        if not re.match(r"[a-z]+ing\b", m[1]):
            yield f"Suppose {m[1]}. {m[2].capitalize()} {m[3]}{m[4]}", "condition as a sentence"
    if m := re.fullmatch(r"((?:How|What|Calculate|Find) [^,?]+?) if ([^,?]+)([?.])", sentence):
        yield f"If {m[2]}, {_small(m[1])}{m[3]}", "condition first"
    if m := re.fullmatch(rf"((?:{_COMMON}|[A-Z][a-z]+) [^,;]*?[a-z]){_ENDS} ({_WHEN})\.", sentence):
        subject = _small(m[1]) if re.match(rf"(?:{_COMMON})\b", m[1]) else m[1]
        yield f"{_large(m[2])}, {subject}.", "time in front"
    if m := re.fullmatch(rf"({_WHEN}), ((?:he|she|they|it|the|[A-Z][a-z]+) [^,;]+)\.", _small(sentence)):
        yield f"{_large(m[2])} {m[1]}.", "time at the end"
    if m := re.fullmatch(r"((?!If |When |After |While )[^,?]{20,}), (and|but) (he|she|they|it) ([^?]+)\.", sentence):
        begin = f"But {m[3]}" if m[2] == "but" else m[3].capitalize()
        yield f"{m[1]}. {begin} {m[4]}.", "cut in two"
    if m := re.fullmatch(
        r"There (are|were) ([^,.]+?) ((?:in|on|at) (?:the|an?|his|her) [a-z]+(?: [a-z]+)?)\.", sentence
    ):
        yield f"{_large(m[3])} there {m[1]} {m[2]}.", "place in front"
    for request in _requests(sentence):
        yield f"Find out {request}.", "question as a request"


def _requests(sentence: str) -> Iterator[str]:
    """A direct question as an indirect one: How many cats does Ann have? -> how many cats Ann has."""
    what = r"How ((?:many|much)(?: [a-z ]+?)?)"
    if m := re.fullmatch(rf"{what} (does|do) ({_WHO}) ({_NOW})\b([^?]*)\?", sentence):
        verb = m[4] if m[2] == "do" else {"have": "has"}.get(m[4], f"{m[4]}s")
        yield f"how {m[1]} {m[3]} {verb}{m[5]}"
    if m := re.fullmatch(rf"{what} (will|can|would|should|must) ({_WHO}|the [a-z]+) ([^?]*)\?", sentence):
        yield f"how {m[1]} {m[3]} {m[2]} {m[4]}"
    if m := re.fullmatch(r"How (many [a-z ]+?) (are|were) (left|there)\b([^?]*)\?", sentence):
        yield f"how {m[1]} {f'there {m[2]}' if m[3] == 'there' else f'{m[2]} left'}{m[4]}"
    if (m := re.fullmatch(rf"{what} did ({_WHO}) ([a-z]+)\b([^?]*)\?", sentence)) and m[3] in PAST:
        yield f"how {m[1]} {m[2]} {PAST[m[3]]}{m[4]}"


def _small(text: str) -> str:
    return text[0].lower() + text[1:]


def _large(text: str) -> str:
    return text[0].upper() + text[1:]


# ---- 4: reordered ----------------------------------------------------------------------------------------------------

# A sentence with one of these may lean on the one before it.
_LEANS = re.compile(
    r"\b(?:he|she|it|they|them|him|his|hers?|their|its|this|these|those|that|then|also|rest|remaining|remainder|another"
    r"|others?|same|next|later|after|before|now|finally|again|than|as|first|second|third|last|half|twice|each|both|left"
    r"|however|so|still|further)\b|^(?:And|But|If|Of)\b",
    re.IGNORECASE,
)


def _reordered(text: str, rng: random.Random) -> Made | None:
    """The question first, or two sentences exchanged that lean on nothing."""
    *told, question = sentences(text)
    options: list[Made] = []
    if told and question.endswith("?") and not any("?" in part for part in told):
        options.append((f"{question} Here is what is known. {' '.join(told)}", "question first"))
    for at in range(1, len(told) - 1):
        if not any(map(_LEANS.search, [*told, question][at : at + 3])):
            exchanged = [*told[:at], told[at + 1], told[at], *told[at + 2 :], question]
            options.append((" ".join(exchanged), "sentences exchanged"))
    return rng.choice(options) if options else None

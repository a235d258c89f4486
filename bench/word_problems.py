"""Word problems with worked solutions, and what the answer would be if a number in them were another one."""

import ast
import operator
import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from bench.prompts import read_examples
from minirksc.rksc.answers import parse_answer

_STEP = re.compile(r"<<([^<>=]+)=([^<>=]+)>>")
_PLAIN_STEP = re.compile(r"(\$?[\d.,]+%?(?: *[-+*/] *\(?\$?[\d.,]+%?\)?)+) *= *\$?([\d.,]*\d)")
_NUMBER = re.compile(r"\d+(?:\.\d+)?|\.\d+")
_NUMERAL = re.compile(r"(?<![\d.,/:#])(?<!\d-)\d+(?:,\d{3})*(?:\.\d+)?(?![\d/:]|[.,]\d|st\b|nd\b|rd\b|th\b)")
_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


@dataclass(frozen=True)
class Problem:
    """A word problem.

    Attributes:
        question: text of the problem.
        solution: worked solution, with its calculations ("<<48/2=24>>" or "48 / 2 = 24") and the answer.
    """

    question: str
    solution: str

    @property
    def answer(self) -> Fraction | None:
        """The number that the solution gives."""
        found = parse_answer(self.solution, "number")
        return None if found is None else Fraction(found)

    def recomputed(self, changed: dict[Fraction, Fraction]) -> Fraction | None:
        """The answer if numbers of the problem were others: the chain of calculations, followed again.

        Args:
            changed: number -> what it would be.

        Returns:
            The new answer; None where the chain cannot be followed, does not lead to the answer, never uses a changed
            number, or has the same number in two meanings.
        """
        known = dict(changed)
        chain = self._chain()
        is_used = False
        for expression, result in chain:
            numbers = [Fraction(number) for number in _NUMBER.findall(expression)]
            is_used |= any(number in changed for number in numbers)
            try:
                before = _evaluate(expression, {})
                after = _evaluate(expression, known)
            except (ValueError, ZeroDivisionError, SyntaxError):
                return None
            if before != result or (result in changed and after != changed[result]):
                return None
            known[result] = after
        if not is_used or chain[-1][1] != self.answer:
            return None
        return known[chain[-1][1]]

    def changes(self, changed: dict[Fraction, Fraction]) -> bool:
        """Whether the answer is known to become another one."""
        new = self.recomputed(changed)
        return new is not None and new != self.answer

    def _chain(self) -> list[tuple[str, Fraction]]:
        """(expression, its result), in order; empty where one of them cannot be read."""
        pattern = _STEP if "<<" in self.solution else _PLAIN_STEP
        found = []
        for expression, result in pattern.findall(self.solution):
            try:
                found.append((re.sub("[$,]", "", expression), to_number(result.strip().rstrip("%"))))
            except ValueError:
                return []
        return found


def read_problems(file: Path) -> list[Problem]:
    """Of a JSONL file with `question` and `answer`, which is the worked solution."""
    return [Problem(" ".join(question.split()), answer) for question, answer in read_examples(file)]


def to_number(text: str) -> Fraction:
    """1,250.50 -> 2501/2.

    Raises:
        ValueError: it is no number.
    """
    return Fraction(re.sub("[$,]", "", text))


def numerals(text: str) -> list[re.Match[str]]:
    """Where numbers stand in digits; fractions, times and ordinals are left out."""
    return list(_NUMERAL.finditer(text))


def single_numerals(text: str) -> list[re.Match[str]]:
    """Those of `numerals` whose value occurs once, and is at least 2: one that can be changed by itself."""
    found = numerals(text)
    values = [to_number(m[0]) for m in found]
    return [m for m, value in zip(found, values, strict=True) if values.count(value) == 1 and value >= 2]


def sentences(text: str) -> list[str]:
    """Of a text; titles and initials end none."""
    ends = r"(?<=[.?!])(?<!\bMr\.)(?<!\bMrs\.)(?<!\bMs\.)(?<!\bDr\.)(?<!\b[A-Z]\.)\s+(?=[A-Z0-9$\"“])"
    return re.split(ends, text)


def _evaluate(expression: str, known: dict[Fraction, Fraction]) -> Fraction:
    """Of + - * / and brackets, exactly; numbers in `known` have the value there, and % is a hundredth."""

    def put(match: re.Match[str]) -> str:
        value = known.get(Fraction(match[0]), Fraction(match[0]))
        return f"({value.numerator}/{value.denominator})"

    def walk(node: ast.expr) -> Fraction:
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            return Fraction(_OPERATORS[type(node.op)](walk(node.left), walk(node.right)))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -walk(node.operand)
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            return Fraction(node.value)
        raise ValueError(expression)

    text = _NUMBER.sub(put, expression).replace("%", "/100")
    return walk(ast.parse(text.strip(), mode="eval").body)

"""Problems with reference answers, out of a JSONL file: how they are scored, and long natural prompts made of them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.prompts import few_shot_ids, read_examples
from minirksc.errors import ConfigError
from minirksc.rksc.answers import parse_answer
from minirksc.text.tokenizer import Tokenizer

STOP = "\nQuestion:"
"""Where a model that continues worked examples would begin the next one."""

_CHOICE = re.compile(r"\([A-J]\)")
_BOOLEANS = ("yes", "no", "true", "false")


@dataclass(frozen=True)
class ProblemSet:
    """Problems of one file.

    Attributes:
        name: name of the file.
        kind: kind of their answers, see `minirksc.rksc.answers.parse_answer`.
        questions: texts of the problems.
        references: right answers in normal form.
        shots: question and answer of other rows of the file, for worked examples; none of them is asked.
    """

    name: str
    kind: str
    questions: list[str]
    references: list[str]
    shots: list[tuple[str, str]]

    def prompt_ids(self, tokenizer: Tokenizer, index: int, num_tokens: int) -> list[int]:
        """Exactly `num_tokens` token ids: worked examples, then question `index` left open."""
        # Repeated more often than can fit, so that the asked question is never among them.
        return few_shot_ids(tokenizer, [(self.questions[index], ""), *self.shots * num_tokens], num_tokens)


def read_problem_set(file: Path, limit: int | None, num_shots: int = 0) -> ProblemSet:
    """The first rows of a file are the problems, its last ones the worked examples.

    Args:
        file: JSONL with `question` and `answer`.
        limit: most problems; None: all other rows.
        num_shots: rows kept for worked examples.

    Raises:
        ConfigError: it cannot be read, or has too few rows.
    """
    try:
        rows = read_examples(file)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file} is no JSONL with question and answer on each line: {error!r}") from error
    if len(rows) <= num_shots:
        raise ConfigError(f"{file} has {len(rows)} rows; {num_shots} worked examples and a problem need more")
    kind = kind_of([answer for _, answer in rows])
    asked = rows[: len(rows) - num_shots][:limit]
    references = []
    for question, answer in asked:
        reference = parse_answer(answer, kind)
        if reference is None:
            raise ConfigError(f"{file}: the answer of {question[:40]!r} has no {kind}: {answer[-40:]!r}")
        references.append(reference)
    return ProblemSet(
        name=file.stem,
        kind=kind,
        questions=[question for question, _ in asked],
        references=references,
        shots=[(question, _clean(answer)) for question, answer in rows[len(rows) - num_shots :]],
    )


def kind_of(answers: Sequence[str]) -> str:
    """What reference answers are: "number" after ####, "choice" in brackets, "boolean", else "text"."""
    if all("####" in answer for answer in answers):
        return "number"
    if all(_CHOICE.fullmatch(answer.strip()) for answer in answers):
        return "choice"
    if all(answer.strip().lower() in _BOOLEANS for answer in answers):
        return "boolean"
    return "text"


def _clean(answer: str) -> str:
    """Without the calculator's marks of GSM8K."""
    return re.sub(r"<<[^<>]*>>", "", answer)

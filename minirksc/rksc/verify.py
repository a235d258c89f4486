"""Verification: the model itself is asked whether an answer is correct; p(YES) is what it says.

Two styles:

- `append`: the question follows the branch's own tokens, so only the question is computed. In a
  conversation it is the user's next turn.
- `standalone` (the paper): a new prompt "Problem ... Proposed answer ... Is this answer correct?";
  its problem part is computed once for all branches, the answers again.

Everything goes by token ids: chat templates are rendered around placeholders and only the text
between these is tokenised, never a branch. An end-of-sequence token that closed a plain text answer
stays where it is.

Source: Sekar 2026, arXiv 2606.09937 (question and standalone style).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from minirksc.errors import ChatTemplateError, NumericalError
from minirksc.rksc.problem import Problem
from minirksc.rksc.solver_config import SolverConfig

if TYPE_CHECKING:
    from minirksc.engine.branch import Branch
    from minirksc.engine.session import Session
    from minirksc.rksc.exits import EntropyExit, EntropyRule, LayerExit, MarginRule
    from minirksc.text.tokenizer import Tokenizer

QUESTION = "Is this answer correct? YES or NO."
_PLAIN_CHOICES = (" YES", " NO")
_CHAT_CHOICES = ("YES", "NO")
_PLAIN_AFTER = f"\n\n{QUESTION}\nAnswer:"
_PLAIN_PARTS = {"append": ("", "", _PLAIN_AFTER), "standalone": ("Problem:\n", "\n\nProposed answer:\n", _PLAIN_AFTER)}
"""Text before the problem, between problem and answer, and after the answer, by style."""
# Letters and digits only: a template that strips or escapes leaves them alone.
_PROBLEM, _ANSWER = "PROBLEM7f3a9c", "ANSWER7f3a9c"


@dataclass(frozen=True)
class Verdict:
    """What the model says about one answer.

    Attributes:
        probability: p(YES) of the two choices; None where the pass failed.
        exit_layer: layers that the question went through, where it left the pass early.
        margin: YES - NO in logits, as it was there.
        saw_nan: a gate saw a hidden state that was not finite, and let the row go on.
        error: reason why the pass failed.
    """

    probability: float | None
    exit_layer: int | None = None
    margin: float | None = None
    saw_nan: bool = False
    error: str | None = None


class Verifier:
    """Asks about the answers of one problem.

    Args:
        session: session with a tokenizer.
        config: options of the solve; "none" for sharing: neither do the questions share anything.
        problem: problem that was solved. Where its prompt is a conversation and the checkpoint's chat format can be
            used, the questions are one too.

    Raises:
        TokenizerError: the checkpoint has no tokenizer.
    """

    def __init__(self, session: "Session", config: SolverConfig, problem: Problem) -> None:
        tokenizer, style = session.need_tokenizer("a verification"), config.verify_style
        self._session = session
        self._tokenizer = tokenizer
        self._share = config.sharing != "none"
        self._salt = problem.salt
        parts = _chat_parts(tokenizer, style) if problem.is_chat and tokenizer.has_chat_template else None
        self._choices = self._choice_ids(_PLAIN_CHOICES if parts is None else _CHAT_CHOICES)
        before, between, after = parts or _PLAIN_PARTS[style]
        # Only a prompt starts with BOS; the other parts continue one. None: the question follows the branch.
        self._prompt: list[int] | None = None
        if style == "standalone":
            self._prompt = [*tokenizer.encode(before), *self._problem_ids(problem.prompt), *self._encode(between)]
        # An answer that stopped by itself has closed its turn; the others' turns are closed here.
        self._closing, self._question = _split_after_eos(self._encode(after), tokenizer)

    def ask(
        self,
        branches: Sequence["Branch"],
        answers: Sequence[Sequence[int]],
        rule: "MarginRule | EntropyRule | None" = None,
    ) -> list[Verdict]:
        """Asks about answers in one pass; the branches stay as they were.

        Args:
            branches: distinct branches, each of which ends with an answer. One whose pass fails has an error for a
                verdict, and harms no other.
            answers: tokens of each answer alone, hint included, perhaps with an end-of-sequence token last.
            rule: lets rows leave the pass early; only where each choice is one token: a layer has a margin of these.

        Raises:
            PromptError, CacheFullError: as `LLM.score`.
        """
        gate = None
        if rule is not None and all(len(choice) == 1 for choice in self._choices):
            choices = (self._choices[0][0], self._choices[1][0])
            gate = rule.gate(self._session.lens, choices, self._session.spec.num_layers)
        if self._prompt is not None:
            return self._standalone(self._prompt, answers, gate)
        closings = [[] if self._is_closed(branch.token_ids) else self._closing for branch in branches]
        return self._score(branches, [[*closing, *self._question] for closing in closings], gate)

    def num_tokens(self, num_prompt: int) -> int:
        """Tokens that stand around an answer when it is asked about, where its branch's prompt has `num_prompt`."""
        num_before = num_prompt if self._prompt is None else len(self._prompt)
        return num_before + len(self._closing) + len(self._question)

    def _standalone(
        self, prompt: list[int], answers: Sequence[Sequence[int]], gate: "LayerExit | EntropyExit | None"
    ) -> list[Verdict]:
        options: dict[str, Any] = {"share": self._share, "seed": 0, "salt": self._salt}  # any seed: nothing is sampled
        prompts = [prompt] if self._share else [prompt] * len(answers)
        with self._session.engine.call() as call:
            call.sequences.extend(map(attrgetter("sequence"), asked := self._session.branches(prompts, **options)))
            if self._share:
                call.sequences.extend(map(attrgetter("sequence"), asked := asked[0].fork(len(answers))))
            for branch, answer_ids in zip(asked, answers, strict=True):
                branch.append(answer_ids[:-1] if self._is_closed(answer_ids) else answer_ids)
            return self._score(asked, [[*self._closing, *self._question]] * len(asked), gate)

    def _score(
        self, branches: Sequence["Branch"], questions: Sequence[list[int]], gate: "LayerExit | EntropyExit | None"
    ) -> list[Verdict]:
        try:
            scores = self._session.score(branches, questions, self._choices, gate)  # [branches, 2]
        except NumericalError as error:
            if len(branches) == 1:
                return [Verdict(None, error=str(error))]
            # It does not say whose: each by itself, and through all layers.
            pairs = zip(branches, questions, strict=True)
            return [verdict for branch, question in pairs for verdict in self._score([branch], [question], None)]
        verdicts = [Verdict(float(row[0])) for row in scores]
        if gate is not None:
            for index, margin in gate.margins.items():
                verdicts[index] = Verdict((1 + math.tanh(margin / 2)) / 2, gate.exit_layers[index], margin)
            for index in gate.problems:
                verdicts[index] = replace(verdicts[index], saw_nan=True)
        return verdicts

    def _choice_ids(self, choices: Sequence[str]) -> list[list[int]]:
        """First tokens where they tell the choices apart ("Y" of "YES"): one pass scores them all."""
        token_ids = [self._encode(choice) for choice in choices]
        firsts = [ids[:1] for ids in token_ids]
        return token_ids if firsts[0] == firsts[1] else firsts

    def _is_closed(self, token_ids: Sequence[int]) -> bool:
        return bool(token_ids) and token_ids[-1] in self._tokenizer.eos_token_ids

    def _problem_ids(self, problem: str | Sequence[int]) -> list[int]:
        if isinstance(problem, str):
            return self._encode(problem)
        starts_with_bos = bool(problem) and problem[0] == self._tokenizer.bos_token_id
        return list(problem[1:] if starts_with_bos else problem)

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)


def _chat_parts(tokenizer: "Tokenizer", style: str) -> tuple[str, str, str] | None:
    """`_PLAIN_PARTS` in the checkpoint's chat format; None when its template cannot be taken apart."""
    if style == "append":
        turns = [("user", _PROBLEM), ("assistant", _ANSWER), ("user", QUESTION)]
    else:
        turns = [("user", f"Problem:\n{_PROBLEM}\n\nProposed answer:\n{_ANSWER}\n\n{QUESTION}")]
    try:
        text = tokenizer.render_chat([{"role": role, "content": content} for role, content in turns])
    except ChatTemplateError:
        return None
    before, found_problem, rest = text.partition(_PROBLEM)
    between, found_answer, after = rest.partition(_ANSWER)
    if not found_problem or not found_answer or _PROBLEM in rest or _ANSWER in after:
        return None
    return before, between, after


def _split_after_eos(token_ids: list[int], tokenizer: "Tokenizer") -> tuple[list[int], list[int]]:
    """Splits behind the first end-of-sequence token; where there is none, nothing needs closing."""
    end = next((i + 1 for i, token_id in enumerate(token_ids) if token_id in tokenizer.eos_token_ids), 0)
    return token_ids[:end], token_ids[end:]

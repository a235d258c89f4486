"""What the gates would have done with one problem: its evidence replayed, without the model.

The rules are those of `minirksc.rksc.cgee`, `minirksc.rksc.exits` and `minirksc.rksc.judge` themselves, fed with what
was noted; nothing is decided here.

One assumption: branches are decoded in step, a token each, as they are when one batch holds all of them. Where a
branch is stopped early, what it had said until then is known token by token; such a branch is never asked about,
since the gates that stop one (decode_exit, consensus) also say who wins.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from minirksc.calibrate.evidence import BranchEvidence, Evidence
from minirksc.engine.signals import SIGNALS, TokenSignals
from minirksc.errors import ConfigError
from minirksc.rksc.answers import AnswerParser, parse_answer
from minirksc.rksc.cgee import NO_GATES, DecodeRule, Gates, Lead, leader_of
from minirksc.rksc.exits import EntropyRule, MarginExit, MarginRule
from minirksc.rksc.judge import Judge, Ruling


@dataclass(frozen=True)
class Outcome:
    """What the solver does with some gates.

    Attributes:
        best: index of the branch that wins.
        answer: parsed answer of that branch.
        num_asked: number of branches that the model was asked about.
        exit_layers: layers that each branch's question went through where it left early; None: all, or not asked.
        num_question_rows: rows (tokens times layers) of the question that were computed.
        num_question_rows_full: rows that asking about all branches takes.
        num_decoded_tokens: tokens of all branches.
        num_decoded_tokens_full: tokens of all branches without gates.
        num_layers: number of the model's layers.
        reason: gate that settled it: "decode_exit", "consensus", "agreement", "skip", "bound"; "asked": none did.
    """

    best: int
    answer: str | None
    num_asked: int
    exit_layers: list[int | None]
    num_question_rows: float
    num_question_rows_full: float
    num_decoded_tokens: int
    num_decoded_tokens_full: int
    num_layers: int
    reason: str

    @property
    def num_rows(self) -> float:
        """Rows of decoding and of the question."""
        return self.num_decoded_tokens * self.num_layers + self.num_question_rows

    @property
    def num_rows_full(self) -> float:
        """The same without gates."""
        return self.num_decoded_tokens_full * self.num_layers + self.num_question_rows_full

    def differs(self, other: "Outcome") -> bool:
        """Whether the decision is another one: another answer, or without any answer another branch."""
        if self.answer is None and other.answer is None:
            return self.best != other.best
        return self.answer != other.answer


def replay(evidence: Evidence, gates: Gates, decode_mode: str = "keep_leader", **rules: Any) -> Outcome:
    """What the solver would have done; `rules` are the other arguments of `Replay`."""
    return Replay(evidence, decode_mode=decode_mode, **rules).outcome(gates)


@dataclass
class _Progress:
    """A branch after some tokens, as `cgee.Progress`."""

    branch: BranchEvidence
    num_tokens: int

    @property
    def finished(self) -> bool:
        return self.num_tokens == len(self.branch.token_ids)

    @property
    def text(self) -> str:
        return self.branch.text_after(self.num_tokens)

    @property
    def signals(self) -> TokenSignals:
        return self.branch.signals.first(self.num_tokens)


@dataclass(frozen=True)
class _Decoded:
    """How decoding ended: the rule, and what each branch had by then."""

    rule: DecodeRule
    num_tokens: tuple[int, ...]
    answers: list[str | None]


class Replay:
    """One problem under any gates; remembers what several of them have in common.

    Args:
        evidence: evidence of the problem.
        select: rule by which the answer is chosen, see `answers.choose`.
        answer_parser: reader of the answers out of the texts.
        decode_mode: "off", "keep_leader" or "stop_all", see `cgee.DecodeRule`.

    Attributes:
        evidence: evidence of the problem.
        reference: outcome without gates.
    """

    def __init__(
        self,
        evidence: Evidence,
        *,
        select: str = "score",
        answer_parser: AnswerParser = "auto",
        decode_mode: str = "keep_leader",
    ) -> None:
        self.evidence = evidence
        self._select = select
        self._parser = answer_parser
        self._mode = decode_mode
        self._whole = tuple(len(branch.token_ids) for branch in evidence.branches)
        self._answer = cache(self._answer_after)
        self._decode = cache(self._decode_by)
        self._values = cache(self._signal_values)
        self._layer_exits = cache(self._layer_exits_by)
        self._outcomes: dict[tuple[object, ...], Outcome] = {}
        self.reference = self.outcome(NO_GATES)

    def is_correct(self, outcome: Outcome) -> bool | None:
        """Whether an outcome's answer is the right one; None where that is unknown."""
        if self.evidence.reference is None:
            return None
        return outcome.answer is not None and outcome.answer == parse_answer(self.evidence.reference, self._parser)

    def outcome(self, gates: Gates) -> Outcome:
        """What the solver would have done.

        Raises:
            ConfigError: The gates have a layer exit that margins do not decide, as the paper's.
        """
        exits = self._layer_exits(gates.layer_exit)
        decoded = self._decode(gates.exact, gates.signal, gates.decode_exit, gates.decode_min_tokens)
        skipped_to = None  # the branch that is chosen unasked if any must be asked about
        if gates.skip:
            answers = decoded.answers if gates.compares_answers else None
            skipped_to = leader_of(self._values(gates.signal, decoded.num_tokens), answers, gates.skip)
        # All that an outcome depends on: most thresholds differ in nothing that a problem shows.
        rule = decoded.rule
        seen = (gates.exact, rule.leader, rule.consensus, decoded.num_tokens, skipped_to, tuple(exits.items()))
        if seen not in self._outcomes:
            self._outcomes[seen] = self._judge(gates, decoded, exits)
        return self._outcomes[seen]

    def _judge(self, gates: Gates, decoded: _Decoded, exits: Mapping[int, tuple[float, int]]) -> Outcome:
        evidence, confidences = self.evidence, self._values("mean_top1", decoded.num_tokens)
        judge = Judge(
            gates,
            self._select,
            answers=decoded.answers,
            confidences=confidences,
            values=self._values(gates.signal, decoded.num_tokens),
            leader=decoded.rule.leader,
        )
        scores: list[float | None] = [None] * len(confidences)
        while (ruling := judge.ruling(scores)).ask:
            for i in ruling.ask:
                scores[i] = self._probability(i, decoded, exits) * math.sqrt(confidences[i])
        asked = [i for i, score in enumerate(scores) if score is not None]
        layers = [exits[i][1] if i in asked and i in exits else None for i in range(len(scores))]
        num_layers = evidence.num_layers
        return Outcome(
            best=ruling.best,
            answer=decoded.answers[ruling.best],
            num_asked=len(asked),
            exit_layers=layers,
            num_question_rows=evidence.num_question_tokens * sum(layers[i] or num_layers for i in asked),
            num_question_rows_full=evidence.num_question_tokens * num_layers * len(scores),
            num_decoded_tokens=sum(decoded.num_tokens),
            num_decoded_tokens_full=sum(self._whole),
            num_layers=num_layers,
            reason=_reason(decoded.rule, ruling, len(asked), len(scores)),
        )

    def _probability(self, index: int, decoded: _Decoded, exits: Mapping[int, tuple[float, int]]) -> float:
        """p(YES) of a branch that is asked about."""
        if decoded.num_tokens[index] < self._whole[index]:
            raise AssertionError(f"branch {index} was cut off, and is asked about")
        if index in exits:
            return (1 + math.tanh(exits[index][0] / 2)) / 2
        return self.evidence.branches[index].probability

    def _decode_by(self, exact: bool, signal: str, leads: tuple[Lead, ...], min_tokens: int) -> _Decoded:
        """Decodes under all that a decode rule looks at in gates."""
        gates = replace(NO_GATES, exact=exact, signal=signal, decode_exit=leads, decode_min_tokens=min_tokens)
        rule = DecodeRule(gates, self._mode, self._select, lambda text: parse_answer(text, self._parser))
        num_tokens = list(self._whole)
        may_stop = (self._mode != "off" and leads) or (self._select == "vote" and exact)
        branches = self.evidence.branches
        for step in range(max(num_tokens) if may_stop else 0):
            progress = [_Progress(branch, min(step + 1, len(branch.token_ids))) for branch in branches]
            for index in rule(progress):
                num_tokens[index] = progress[index].num_tokens
            if rule.leader is not None or rule.consensus is not None:
                break
        answers = [self._answer(index, count) for index, count in enumerate(num_tokens)]
        if rule.consensus is not None:  # as in the solver: a branch that was cut off gives none
            answers = [answers[i] if num_tokens[i] == whole else None for i, whole in enumerate(self._whole)]
        return _Decoded(rule, tuple(num_tokens), answers)

    def _signal_values(self, signal: str, num_tokens: tuple[int, ...]) -> list[float]:
        """Value of a signal, a key of `SIGNALS`, for each branch over its first tokens."""
        ends = zip(self.evidence.branches, num_tokens, strict=True)
        return [SIGNALS[signal](branch.signals.first(count)) for branch, count in ends]

    def _answer_after(self, index: int, num_tokens: int) -> str | None:
        return parse_answer(self.evidence.branches[index].text_after(num_tokens), self._parser)

    def _layer_exits_by(self, rule: MarginRule | EntropyRule | None) -> Mapping[int, tuple[float, int]]:
        """Margin, and layers that it went through, of each branch whose question would leave early."""
        branches = self.evidence.branches
        if isinstance(rule, EntropyRule):
            raise ConfigError(f"layer_exit={rule!r} does not follow from margins; use a MarginRule")
        if rule is None or not all(branch.margins for branch in branches):
            return {}
        exits = MarginExit(rule, self.evidence.num_layers)
        for layer in exits.layers:
            rows = [row for row in range(len(branches)) if row not in exits.margins]
            if not rows:
                break
            exits.leaving(layer, {row: branches[row].margins[layer] for row in rows})
        return {row: (margin, exits.exit_layers[row]) for row, margin in exits.margins.items()}


def _reason(rule: DecodeRule, ruling: Ruling, num_asked: int, num_branches: int) -> str:
    if rule.leader is not None:
        return "decode_exit"
    if rule.consensus is not None:
        return "consensus"
    if num_asked == 0:
        return "skip" if any(note.gate == "skip" for note in ruling.notes) else "agreement"
    return "bound" if num_asked < num_branches else "asked"

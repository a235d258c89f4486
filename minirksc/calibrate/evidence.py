"""What the gates look at, written down for one problem, and what they would have done: `replay`.

Evidence comes from a solve without gates: every branch decoded to its end, everybody asked, the margin of YES over NO
noted after every layer. From it any thresholds can be tried without the model. The rules are those of
`minirksc.rksc.cgee` and `minirksc.rksc.judge` themselves, driven with what was noted; nothing is decided here.

One assumption: branches are decoded in step, a token each, as they are when one batch holds all of them. Where a
branch is stopped early, what it had said until then is known token by token; nobody is ever asked about such a branch,
since the gates that stop one (decode_exit, consensus) also say who wins.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from minirksc.engine.gates import GateRows
from minirksc.engine.signals import SIGNALS, TokenSignals, mean_top1
from minirksc.errors import ConfigError
from minirksc.rksc.answers import AnswerParser, parse_answer
from minirksc.rksc.cgee import NO_GATES, DecodeRule, Gates, MarginRule, leader_of
from minirksc.rksc.judge import Judge


@dataclass(frozen=True)
class BranchEvidence:
    """One branch of a solve without gates.

    Attributes:
        token_ids: generated.
        text: of all of them.
        ends: after each token, how many characters of `text` are final.
        num_hidden: characters at the end of `text` that are a stop string.
        finish_reason: "stop" or "length".
        signals: how sure the model was of each token.
        probability: p(YES) after all layers.
        margins: YES - NO in logits after each layer but the last; [] where the choices have several tokens each.
    """

    token_ids: list[int]
    text: str
    ends: list[int]
    num_hidden: int
    finish_reason: str
    signals: TokenSignals
    probability: float
    margins: list[float]

    def text_after(self, num_tokens: int) -> str:
        """What it had said after so many tokens; the answer where these are all."""
        if num_tokens >= len(self.token_ids):
            return self.text[: len(self.text) - self.num_hidden]
        return self.text[: self.ends[num_tokens - 1]] if num_tokens else ""


@dataclass(frozen=True)
class Evidence:
    """One problem.

    Attributes:
        branches: that did not fail, in order.
        num_layers: of the model.
        num_question_tokens: that were computed to ask about one branch, on average.
        reference: the right answer as text; None: unknown.
    """

    branches: list[BranchEvidence]
    num_layers: int
    num_question_tokens: float
    reference: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain data that JSON can hold: a margin that is not finite becomes None."""
        values = asdict(self)
        for branch in values["branches"]:
            branch["margins"] = [margin if math.isfinite(margin) else None for margin in branch["margins"]]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Evidence":
        """The opposite of `to_dict`.

        Raises:
            KeyError, TypeError, ValueError: the values are no evidence.
        """
        branches = []
        for branch in values["branches"]:
            signals = TokenSignals(**branch["signals"])
            margins = [math.nan if margin is None else margin for margin in branch["margins"]]
            branches.append(BranchEvidence(**{**branch, "signals": signals, "margins": margins}))
        evidence = cls(**{**values, "branches": branches})
        evidence.check()
        return evidence

    def check(self) -> None:
        """Holds the parts against each other.

        Raises:
            TypeError, ValueError: one is of another kind, or does not fit.
        """
        if not self.branches or self.num_layers < 1 or not 0 <= self.num_question_tokens < math.inf:
            raise ValueError(f"{len(self.branches)} branches, num_layers {self.num_layers}")
        if not isinstance(self.reference, str | None):
            raise TypeError("the reference is no text")
        for branch in self.branches:
            tokens, text = branch.token_ids, branch.text
            if not isinstance(text, str) or not isinstance(branch.finish_reason, str):
                raise TypeError("text or finish_reason is no text")
            numbers: list[Sequence[float]] = [branch.signals.top1, branch.signals.self_certainty, branch.ends]
            if not all(len(part) == len(tokens) for part in numbers):
                raise ValueError("not one signal and end a token")
            if [*branch.ends, len(text)] != sorted([0, *branch.ends, len(text)])[1:]:
                raise ValueError("ends that are not in the text")
            whole = [*tokens, *branch.ends, branch.num_hidden, self.num_layers]
            if not all(type(number) is int for number in whole) or not 0 <= branch.num_hidden <= len(text):
                raise ValueError("a token, an end or num_hidden is no whole number, or outside the text")
            finite = [*branch.signals.top1, *branch.signals.self_certainty, 1 - branch.probability, branch.probability]
            if not all(map(math.isfinite, finite)) or not 0 <= branch.probability <= 1:
                raise ValueError("a signal or probability is not finite")
            if not all(isinstance(margin, float | int) for margin in branch.margins):
                raise TypeError("a margin is no number")
            if len(branch.margins) not in (0, self.num_layers - 1):
                raise ValueError(f"{len(branch.margins)} margins of {self.num_layers} layers")


@dataclass(frozen=True)
class Failed:
    """A problem that could not be solved.

    Attributes:
        error: why.
    """

    error: str


@dataclass(frozen=True)
class Outcome:
    """What the solver does with some gates.

    Attributes:
        best: index of the branch that wins.
        answer: its parsed answer.
        num_asked: branches that the model was asked about.
        exit_layers: of each branch, layers that its question went through where it left early; None: all, or not asked.
        num_question_rows: rows (tokens times layers) of the question that were computed, ...
        num_question_rows_full: ... and that asking everybody takes.
        num_decoded_tokens: of all branches, ...
        num_decoded_tokens_full: ... and without gates.
        num_layers: of the model.
        reason: which gate settled it: "decode_exit", "consensus", "agreement", "skip", "bound"; "asked": none did.
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


def replay(
    evidence: Evidence,
    gates: Gates,
    decode_mode: str = "keep_leader",
    *,
    select: str = "score",
    answer_parser: AnswerParser = "auto",
) -> Outcome:
    """What the solver would have done; see `Replay`."""
    return Replay(evidence, select=select, answer_parser=answer_parser, decode_mode=decode_mode).outcome(gates)


@dataclass
class _Progress:
    """A branch after some tokens, as `cgee.Progress`."""

    branch: BranchEvidence
    num_tokens: int = 0

    @property
    def finished(self) -> bool:
        return self.num_tokens == len(self.branch.token_ids)

    @property
    def text(self) -> str:
        return self.branch.text_after(self.num_tokens)

    @property
    def signals(self) -> TokenSignals:
        if self.finished:
            return self.branch.signals
        top1, self_certainty = self.branch.signals.top1, self.branch.signals.self_certainty
        return TokenSignals(top1[: self.num_tokens], self_certainty[: self.num_tokens])

    def advance(self) -> None:
        if not self.finished:
            self.num_tokens += 1


@dataclass
class _Judged:
    """What `Judge` sees of a branch."""

    index: int
    signals: TokenSignals
    confidence: float
    score: float | None = None
    error: None = None


@dataclass
class _Notes:
    """What `Judge` writes into a tree."""

    decisions: list[tuple[str, str]] = field(default_factory=list)

    def note(self, gate: str, decision: str, reason: str, **values: Any) -> None:
        self.decisions.append((gate, decision))


@dataclass(frozen=True)
class _Decoded:
    """How decoding ended: the rule, and what each branch had by then."""

    rule: DecodeRule
    num_tokens: list[int]
    signals: list[TokenSignals]
    answers: list[str | None]


class Replay:
    """One problem under any gates; remembers what several of them have in common.

    Args:
        evidence: of the problem.
        select: how the answer is chosen, see `answers.choose`.
        answer_parser: reads the answers out of the texts.
        decode_mode: "off", "keep_leader" or "stop_all", see `cgee.DecodeRule`.
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
        self._whole = [len(branch.token_ids) for branch in evidence.branches]
        self._answers: dict[tuple[int, int], str | None] = {}
        self._ends: dict[tuple[object, ...], _Decoded] = {}
        self._exits: dict[MarginRule, dict[int, tuple[float, int]]] = {}
        self._values: dict[tuple[object, ...], list[float]] = {}
        self._outcomes: dict[tuple[object, ...], Outcome] = {}
        self.reference = self.outcome(NO_GATES)
        """Without gates."""

    def is_correct(self, outcome: Outcome) -> bool | None:
        """Whether an outcome's answer is the right one; None where that is unknown."""
        if self.evidence.reference is None:
            return None
        return outcome.answer is not None and outcome.answer == parse_answer(self.evidence.reference, self._parser)

    def outcome(self, gates: Gates) -> Outcome:
        """What the solver would have done.

        Raises:
            ConfigError: the gates have a layer exit that margins do not decide, as the paper's.
        """
        exits = self._layer_exits(gates)
        decoded = self._decode(gates)
        # All that an outcome depends on: most thresholds differ in nothing that a problem shows.
        rule, ends, skipped_to = decoded.rule, tuple(decoded.num_tokens), self._skipped_to(gates, decoded)
        seen = (gates.exact, rule.leader, rule.consensus, ends, skipped_to, tuple(exits.items()))
        if seen not in self._outcomes:
            self._outcomes[seen] = self._judge(gates, decoded, exits)
        return self._outcomes[seen]

    def _skipped_to(self, gates: Gates, decoded: "_Decoded") -> int | None:
        """Who is chosen unasked if anybody must be asked; None: they are asked."""
        if not gates.skip:
            return None
        key = (gates.signal, *decoded.num_tokens)
        if key not in self._values:
            self._values[key] = [SIGNALS[gates.signal](signals) for signals in decoded.signals]
        return leader_of(self._values[key], decoded.answers if gates.compares_answers else None, gates.skip)

    def _judge(self, gates: Gates, decoded: "_Decoded", exits: Mapping[int, tuple[float, int]]) -> Outcome:
        evidence = self.evidence
        nodes = [_Judged(i, signals, mean_top1(signals)) for i, signals in enumerate(decoded.signals)]
        asked: set[int] = set()

        def ask(some: Sequence[_Judged]) -> None:
            for node in some:
                if decoded.num_tokens[node.index] < self._whole[node.index]:
                    raise AssertionError(f"branch {node.index} was cut off, and is asked about")
                asked.add(node.index)
                probability = evidence.branches[node.index].probability
                if node.index in exits:
                    probability = (1 + math.tanh(exits[node.index][0] / 2)) / 2
                node.score = probability * math.sqrt(node.confidence)

        notes: Any = _Notes()
        judged: Any = nodes  # the judge needs of a node no more than `_Judged` has
        put: Any = ask
        best = Judge(notes, gates, self._select, put).choose(judged, decoded.answers, decoded.rule.leader)
        layers = [exits[i][1] if i in asked and i in exits else None for i in range(len(nodes))]
        num_layers = evidence.num_layers
        return Outcome(
            best=best,
            answer=decoded.answers[best],
            num_asked=len(asked),
            exit_layers=layers,
            num_question_rows=evidence.num_question_tokens * sum(layers[i] or num_layers for i in asked),
            num_question_rows_full=evidence.num_question_tokens * num_layers * len(nodes),
            num_decoded_tokens=sum(decoded.num_tokens),
            num_decoded_tokens_full=sum(self._whole),
            num_layers=num_layers,
            reason=_reason(decoded.rule, notes, len(asked), len(nodes)),
        )

    def _decode(self, gates: Gates) -> _Decoded:
        key = (gates.signal, gates.decode_exit, gates.decode_min_tokens, gates.exact)
        if key not in self._ends:
            self._ends[key] = self._decode_anew(gates)
        return self._ends[key]

    def _decode_anew(self, gates: Gates) -> _Decoded:
        branches = self.evidence.branches
        rule = DecodeRule(gates, self._mode, self._select, lambda text: parse_answer(text, self._parser))
        num_tokens = list(self._whole)
        may_stop = (self._mode != "off" and gates.decode_exit) or (self._select == "vote" and gates.exact)
        progress = [_Progress(branch) for branch in branches]
        for _ in range(max(num_tokens) if may_stop else 0):
            for one in progress:
                one.advance()
            for index in rule(progress):
                num_tokens[index] = progress[index].num_tokens
            if rule.leader is not None or rule.consensus is not None:
                break
        ends = [_Progress(branch, count) for branch, count in zip(branches, num_tokens, strict=True)]
        answers = [self._answer(index, count) for index, count in enumerate(num_tokens)]
        if rule.consensus is not None:  # as in the solver: who was cut off gives none
            answers = [answers[i] if num_tokens[i] == whole else None for i, whole in enumerate(self._whole)]
        return _Decoded(rule, num_tokens, [end.signals for end in ends], answers)

    def _answer(self, index: int, num_tokens: int) -> str | None:
        key = (index, num_tokens)
        if key not in self._answers:
            text = self.evidence.branches[index].text_after(num_tokens)
            self._answers[key] = parse_answer(text, self._parser)
        return self._answers[key]

    def _layer_exits(self, gates: Gates) -> Mapping[int, tuple[float, int]]:
        """Of each branch whose question would leave early: margin, layers that it went through."""
        rule = gates.layer_exit
        if rule is None:
            return {}
        if not isinstance(rule, MarginRule):
            raise ConfigError(f"layer_exit={rule!r} does not follow from margins; use a MarginRule")
        if not all(branch.margins for branch in self.evidence.branches):
            return {}
        if rule not in self._exits:
            self._exits[rule] = self._layer_exits_anew(rule)
        return self._exits[rule]

    def _layer_exits_anew(self, rule: MarginRule) -> dict[int, tuple[float, int]]:
        """Drives the gate itself with a lens that shows what was noted."""
        gate = rule.gate(lambda _: lambda shown: shown, (0, 1), self.evidence.num_layers)
        for layer in gate.layers:
            rows = [row for row in range(len(self.evidence.branches)) if row not in gate.margins]
            if not rows:
                break
            gate.after_layer(layer, _shown_rows(rows, [self.evidence.branches[row].margins[layer] for row in rows]))
        return {row: (margin, gate.exit_layers[row]) for row, margin in gate.margins.items()}


class _Logits(list[list[float]]):
    """Of YES and NO, one entry a row, as far as a gate needs a tensor."""

    def tolist(self) -> list[list[float]]:
        """The rows."""
        return list(self)


def _shown_rows(rows: list[int], margins: list[float]) -> GateRows:
    """What a gate is shown: in place of hidden states, logits that the lens passes on."""
    logits: Any = _Logits([margin, 0.0] for margin in margins)
    return GateRows(rows, [True] * len(rows), [range(1)] * len(rows), lambda: logits, lambda _: logits)


def _reason(rule: DecodeRule, notes: _Notes, num_asked: int, num_branches: int) -> str:
    if rule.leader is not None:
        return "decode_exit"
    if rule.consensus is not None:
        return "consensus"
    if num_asked == 0:
        return "skip" if notes.decisions and notes.decisions[-1][0] == "skip" else "agreement"
    return "bound" if num_asked < num_branches else "asked"

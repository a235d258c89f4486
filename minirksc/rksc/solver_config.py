"""How a problem is to be solved: the options of `Solver`, checked."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from minirksc.errors import ConfigError, PromptError, brief
from minirksc.option_fields import MESSAGES, Options, finished, option
from minirksc.options import SamplingParams
from minirksc.rksc.answers import ANSWER_KINDS, SELECT_RULES, AnswerParser, check_parser
from minirksc.rksc.cgee import Gates
from minirksc.token_ids import is_list, read_token_ids

Tokens = str | Sequence[int]
"""Text or token ids."""

MAX_BRANCHES = 1024
DEFAULT_SAMPLING = SamplingParams(temperature=0.8, top_p=0.95)
"""Branches must differ, so not greedy."""

_WHOLE = "{name}={value} must be a whole number {allowed}"
_MESSAGES = {
    **MESSAGES,
    "none": "{name}={value} is not a value; leave it out for the default",
    "bool": "{name}={value} must be True or False",
    "choice": "{name}={value}; use one of {allowed}",
    **dict.fromkeys(("int", "int range"), _WHOLE),
    **dict.fromkeys(("float", "float range"), "{name}={value} must be a number; a similarity is at most 1"),
    "between": "in {low}..{high}",
}


def _read_sampling(name: str, value: Any) -> SamplingParams:
    """Sampling parameters of all branches."""
    sampling = SamplingParams.of(value)
    if sampling.n != 1:
        raise ConfigError(f"{name} has n={sampling.n}; leave it at 1 and set branches")
    for other in ("logprobs", "prompt_logprobs"):
        if getattr(sampling, other) is not None:
            raise ConfigError(f"{name} has {other}={getattr(sampling, other)}, which no result shows")
    return sampling


def _read_gates(name: str, value: Any) -> Gates | str | Path:
    """Thresholds, or the name of a file that has them."""
    if not isinstance(value, Gates | str | Path):
        raise ConfigError(f"{name}={brief(value)} must be a file of minirksc.calibrate, or Gates")
    return value


@finished
@dataclass(frozen=True, kw_only=True)
class SolverConfig(Options):
    """How a problem is solved.

    Sharing, verification and early exits are explained in `minirksc.rksc.asks`, `minirksc.rksc.verify` and
    `minirksc.rksc.cgee`, the rules of choice in `answers.choose`, kinds of answers in `answers.parse_answer`. gates may
    also be `Gates`, and answer_parser a function of a text. Without a seed a solve takes the LLM's next, so that two
    solves are independent; one seed is all branches'.

    Raises:
        ConfigError: a value is out of range, or the values contradict each other.

    Attributes:
        branches: candidates decoded together from one shared prompt.
        depth: rounds of decoding; before each further one the best branches are forked again.
        beam: branches that go on into the next round.
        tokens_per_step: most tokens of a branch in a round.
        hints: beginnings of the answers, as text or token ids, one a branch; later rounds have none (default: Approach
            #1: and so on).
        sampling: sampling parameters of all branches; tokens_per_step takes the place of max_tokens, and stop strings
            are looked for within a round (default: temperature 0.8, top_p 0.95).
        sharing: what branches share; exact: what begins alike is computed once; semantic: besides, phrasings that mean
            the same (an approximation); none: nothing, for comparison.
        sharing_mode: with semantic sharing: the first phrasing in place of another, or (aligned) its own tokens on the
            KV of those that both have.
        tau: with semantic sharing: similarity from which on a phrasing is accepted; above 1 none is (default: as tested
            for the model).
        uncalibrated: allow semantic sharing on a model for which no threshold was tested.
        verify: whether the model is asked about the answers; auto: as far as the gates leave a doubt, and what was not
            asked about has no score; always: about each in full; never: the score is the confidence alone.
        verify_style: form of the question: behind the branch, or (standalone) a prompt of its own.
        gates: thresholds of the gates, a file made by minirksc.calibrate (default: gates that change no parsed answer,
            and others that were not tested on the model).
        policy: rules of the gates: ours, or every published rule and constant.
        decode_exit: what stops while decoding once a branch leads decisively: nothing (off), the others (keep_leader)
            or all, cut off (stop_all); nobody is asked then (default: auto: keep_leader, with policy paper stop_all;
            off unless verify is auto).
        select: rule for which branch is the answer.
        chat: put a problem given as text through the chat template, where there is one.
        answer_parser: kind of the answers.
    """

    messages = _MESSAGES

    branches: int = option(8, low=1, high=MAX_BRANCHES)
    depth: int = option(1, low=1)
    beam: int = option(2, low=1)
    tokens_per_step: int = option(32, low=1)
    hints: Sequence[Tokens] | None = None
    sampling: SamplingParams | None = option(None, read=_read_sampling)
    sharing: str = option("exact", choices=("none", "exact", "semantic"))
    sharing_mode: str = option("substitute", choices=("substitute", "aligned"))
    tau: float | None = None
    uncalibrated: bool = False
    verify: str = option("auto", choices=("auto", "always", "never"))
    verify_style: str = option("append", choices=("append", "standalone"))
    gates: Gates | str | Path | None = option(None, read=_read_gates, metavar="FILE.json")
    policy: str = option("rksc", choices=("rksc", "paper"))
    decode_exit: str = option("auto", choices=("auto", "off", "keep_leader", "stop_all"))
    select: str = option("score", choices=SELECT_RULES)
    chat: bool = True
    answer_parser: AnswerParser = option("auto", choices=ANSWER_KINDS, read=lambda _, kind: check_parser(kind))

    def __post_init__(self) -> None:
        if self.branches == 1 and self.beam == SolverConfig.beam:
            object.__setattr__(self, "beam", 1)  # the default must not make branches=1 an error
        super().__post_init__()
        if self.hints is not None:
            object.__setattr__(self, "hints", tuple(self._read_hints()))

    def _check_contradictions(self) -> None:
        if self.beam > self.branches:
            raise ConfigError(_WHOLE.format(name="beam", value=brief(self.beam), allowed=f"in 1..{self.branches}"))
        self._check_needed(("gates", "decode_exit", "policy"), "verify", "auto")
        self._check_needed(("sharing_mode", "tau", "uncalibrated"), "sharing", "semantic")
        if self.policy == "paper" and self.gates is not None:
            raise ConfigError("policy='paper' has thresholds of its own; leave gates out")

    def _check_needed(self, names: Sequence[str], other: str, needed: str) -> None:
        """Refuses options that have no effect where another has not the value that they need."""
        if getattr(self, other) != needed:
            for name in names:
                if (value := getattr(self, name)) != getattr(SolverConfig, name):
                    raise ConfigError(f"{name}={value!r} needs {other}={needed!r}, not {getattr(self, other)!r}")

    def _read_hints(self) -> list[str | tuple[int, ...]]:
        given: Any = self.hints
        hints = list(given) if is_list(given) else []
        if len(hints) != self.branches:
            raise ConfigError(f"hints={brief(self.hints)} must have one entry a branch, {self.branches}")
        try:
            return [hint if isinstance(hint, str) else tuple(read_token_ids(hint)) for hint in hints]
        except PromptError as error:
            raise ConfigError(f"hints={brief(self.hints)} must be text or token ids: {error}") from error

    @property
    def decode_exit_mode(self) -> str:
        """The mode of `cgee.DecodeRule`."""
        if self.decode_exit != "auto":
            return self.decode_exit
        if self.verify != "auto":
            return "off"
        return "stop_all" if self.policy == "paper" else "keep_leader"

    @property
    def step_sampling(self) -> SamplingParams:
        """Sampling parameters of one round."""
        sampling = self.sampling or DEFAULT_SAMPLING
        min_tokens = min(sampling.min_tokens, self.tokens_per_step)
        return replace(sampling, max_tokens=self.tokens_per_step, min_tokens=min_tokens)

    def to_dict(self) -> dict[str, Any]:
        """As plain data that JSON can hold."""
        values = asdict(self)
        values["sampling"] = plain(asdict(self.step_sampling))
        if callable(self.answer_parser):
            values["answer_parser"] = getattr(self.answer_parser, "__name__", "function")
        return dict(plain(values))


def plain(value: Any) -> Any:
    """The same data with lists for every other sequence, and strings as keys and for paths."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value

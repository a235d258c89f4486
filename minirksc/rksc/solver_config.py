"""How a problem is to be solved: the options of `Solver`, checked."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from minirksc.errors import ConfigError, PromptError, brief
from minirksc.options import MAX_FLOAT, SamplingParams
from minirksc.rksc.answers import SELECT_RULES, AnswerParser, check_parser
from minirksc.rksc.cgee import Gates
from minirksc.token_ids import is_list, read_token_ids

Tokens = str | Sequence[int]
"""Text or token ids."""

MAX_BRANCHES = 1024
DEFAULT_SAMPLING = SamplingParams(temperature=0.8, top_p=0.95)
"""Branches must differ, so not greedy."""
_RULES = {
    "sharing": ("none", "exact", "semantic"),
    "sharing_mode": ("substitute", "aligned"),
    "verify": ("auto", "always", "never"),
    "verify_style": ("append", "standalone"),
    "policy": ("rksc", "paper"),
    "decode_exit": ("auto", "off", "keep_leader", "stop_all"),
    "select": SELECT_RULES,
}


@dataclass(frozen=True, kw_only=True)
class SolverConfig:
    """How a problem is solved.

    Attributes:
        branches: candidates in the air at a time, 1..1024.
        depth: rounds of decoding; before each further one the best branches are forked again.
        beam: how many branches go on into the next round, at most `branches`.
        tokens_per_step: most tokens that a branch decodes in a round.
        hints: how the answer of each branch begins, as text or token ids, one a branch; None:
            "Approach #1:" and so on. Deeper branches get none.
        sampling: of all branches, its max_tokens replaced by tokens_per_step; None:
            `DEFAULT_SAMPLING`. One seed is all branches'; without one a solve takes the LLM's next, so that two
            solves are independent. Stop strings are looked for within a round.
        sharing: "exact": one prefill for all that begins alike; "none": every branch computes all its
            tokens, for comparison; "semantic": besides, a wording that means the same as the first may
            take its KV (see `minirksc.rksc.asks`): an approximation.
        sharing_mode: what a wording that is accepted gets: "substitute", the first wording in its place,
            or "aligned", its own tokens with the KV of those that both have.
        tau: similarity from which on a wording is accepted; None: the one that was found for this
            model. Above 1 none is.
        uncalibrated: allow semantic sharing on a model for which no threshold was found.
        verify: "always"; "auto": as far as the gates of `minirksc.rksc.cgee` leave something to ask, and whoever was
            not asked has no score; or "never": the score is the confidence alone.
        gates: thresholds for "auto": a file of `minirksc.calibrate`, or `Gates`; None: the gates that
            change no parsed answer, and the others with thresholds that nobody tested on this model.
        policy: "rksc", or "paper": every published rule and constant, for comparison.
        decode_exit: what stops while decoding once a branch leads decisively: "off", "keep_leader" (the
            others) or "stop_all" (all: answers are cut off); nobody is asked then. "auto": as the policy has it
            where verify is "auto", else "off".
        verify_style: "append" or "standalone", see `minirksc.rksc.verify`.
        select: "score", "vote" or "weighted_vote", see `minirksc.rksc.answers.choose`.
        chat: put a problem given as text through the checkpoint's chat template, where it has one.
        answer_parser: "auto", "number", "choice", "boolean", "text", or a function; see
            `minirksc.rksc.answers.parse_answer`.

    Raises:
        ConfigError: a value is out of range, or the values contradict each other.
    """

    branches: int = 8
    depth: int = 1
    beam: int = 2
    tokens_per_step: int = 32
    hints: Sequence[Tokens] | None = None
    sampling: SamplingParams | None = None
    sharing: str = "exact"
    sharing_mode: str = "substitute"
    tau: float | None = None
    uncalibrated: bool = False
    verify: str = "auto"
    verify_style: str = "append"
    gates: Gates | str | Path | None = None
    policy: str = "rksc"
    decode_exit: str = "auto"
    select: str = "score"
    chat: bool = True
    answer_parser: AnswerParser = "auto"

    def __post_init__(self) -> None:
        for name in ("chat", "uncalibrated"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}={brief(getattr(self, name))} must be True or False")
        if self.branches == 1 and self.beam == SolverConfig.beam:
            object.__setattr__(self, "beam", 1)  # the default must not make branches=1 an error
        _check_int("branches", self.branches, MAX_BRANCHES)
        _check_int("depth", self.depth, None)
        _check_int("beam", self.beam, self.branches)
        _check_int("tokens_per_step", self.tokens_per_step, None)
        for name, allowed in _RULES.items():
            value = getattr(self, name)
            if not isinstance(value, str) or value not in allowed:
                raise ConfigError(f"{name}={brief(value)}; use one of {', '.join(allowed)}")
        if self.sampling is not None:
            object.__setattr__(self, "sampling", SamplingParams.of(self.sampling))
            if self.sampling.n != 1:
                raise ConfigError(f"sampling has n={self.sampling.n}; leave it at 1 and set branches")
            for name in ("logprobs", "prompt_logprobs"):
                if getattr(self.sampling, name) is not None:
                    raise ConfigError(f"sampling has {name}={getattr(self.sampling, name)}, which no result shows")
        check_parser(self.answer_parser)
        self._check_gates()
        if self.hints is not None:
            object.__setattr__(self, "hints", tuple(self._read_hints()))

    def _read_hints(self) -> list[str | tuple[int, ...]]:
        given: Any = self.hints
        hints = list(given) if is_list(given) else []
        if len(hints) != self.branches:
            raise ConfigError(f"hints={brief(self.hints)} must have one entry a branch, {self.branches}")
        try:
            return [hint if isinstance(hint, str) else tuple(read_token_ids(hint)) for hint in hints]
        except PromptError as error:
            raise ConfigError(f"hints={brief(self.hints)} must be text or token ids: {error}") from error

    def _check_gates(self) -> None:
        if self.verify != "auto":
            for name in ("gates", "decode_exit", "policy"):
                if getattr(self, name) != getattr(SolverConfig, name):
                    raise ConfigError(f"{name}={getattr(self, name)!r} needs verify='auto', not {self.verify!r}")
        if self.gates is not None and not isinstance(self.gates, Gates | str | Path):
            raise ConfigError(f"gates={brief(self.gates)} must be a file of minirksc.calibrate, or Gates")
        if self.policy == "paper" and self.gates is not None:
            raise ConfigError("policy='paper' has thresholds of its own; leave gates out")
        if self.sharing != "semantic":
            for name in ("sharing_mode", "tau", "uncalibrated"):
                if getattr(self, name) != getattr(SolverConfig, name):
                    raise ConfigError(f"{name}={getattr(self, name)!r} needs sharing='semantic', not {self.sharing!r}")
        if self.tau is not None:
            is_number = isinstance(self.tau, int | float) and not isinstance(self.tau, bool)
            if not is_number or not -MAX_FLOAT <= self.tau <= MAX_FLOAT:
                raise ConfigError(f"tau={brief(self.tau)} must be a number; a similarity is at most 1")

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
        values["gates"] = str(self.gates) if isinstance(self.gates, Path) else values["gates"]
        if callable(self.answer_parser):
            values["answer_parser"] = getattr(self.answer_parser, "__name__", "function")
        return dict(plain(values))


def _check_int(name: str, value: object, most: int | None) -> None:
    limit = "at least 1" if most is None else f"in 1..{most}"
    if not isinstance(value, int) or isinstance(value, bool) or value < 1 or value > (most or value):
        raise ConfigError(f"{name}={brief(value)} must be a whole number {limit}")


def plain(value: Any) -> Any:
    """The same data with lists for every other sequence, and strings as keys."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(item) for item in value]
    return value

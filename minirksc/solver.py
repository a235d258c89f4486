"""`Solver`: one problem, many branches decoded together, verified, and one of them chosen.

The prompt is computed once; branch k is a fork of it that begins its answer with hint k. All
branches are decoded together; for depth > 1 the best `beam` of them are forked again, the others
pruned. Then the model is asked about each answer, and one is selected. Nothing is approximated
here, unless the engine's cache is int8: sharing="none" and "exact" give the same tokens up to
rounding, since the random numbers depend on seed, path and position alone.

Whatever happens, nothing but the prefix cache is left in the engine afterwards.

Source: Sekar 2026, arXiv 2606.09937 (branches, verification, score = p(YES) * sqrt(confidence)).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from minirksc.answers import SELECT_RULES, AnswerParser, check_parser, choose, parse_answer
from minirksc.config import SamplingParams
from minirksc.errors import ConfigError
from minirksc.tree import Node, Tree
from minirksc.verify import Candidate, Verifier

if TYPE_CHECKING:
    from minirksc.llm import LLM

Tokens = str | Sequence[int]
"""Text or token ids."""

MAX_BRANCHES = 1024
DEFAULT_SAMPLING = SamplingParams(temperature=0.8, top_p=0.95, seed=0)
"""Branches must differ, so not greedy; a fixed seed, so that a solve can be repeated."""
_RULES = {
    "sharing": ("none", "exact"),
    "verify": ("always", "never"),
    "verify_style": ("append", "standalone"),
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
            `DEFAULT_SAMPLING`. Without a seed it is 0. Stop strings are looked for within a round.
        sharing: "exact": one prefill for all; "none": every branch computes all its tokens, for
            comparison.
        verify: "always", or "never": the score is the confidence alone.
        verify_style: "append" or "standalone", see `minirksc.verify`.
        select: "score", "vote" or "weighted_vote", see `minirksc.answers.choose`.
        chat: put a problem given as text through the checkpoint's chat template, where it has one.
        answer_parser: "auto", "number", "choice", "boolean", "text", or a function; see
            `minirksc.answers.parse_answer`.

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
    verify: str = "always"
    verify_style: str = "append"
    select: str = "score"
    chat: bool = True
    answer_parser: AnswerParser = "auto"

    def __post_init__(self) -> None:
        if self.branches == 1 and self.beam == SolverConfig.beam:
            object.__setattr__(self, "beam", 1)  # the default must not make branches=1 an error
        _check_int("branches", self.branches, MAX_BRANCHES)
        _check_int("depth", self.depth, None)
        _check_int("beam", self.beam, self.branches)
        _check_int("tokens_per_step", self.tokens_per_step, None)
        for name, allowed in _RULES.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name}={getattr(self, name)!r}; use one of {', '.join(allowed)}")
        if self.sampling is not None and self.sampling.n != 1:
            raise ConfigError(f"sampling has n={self.sampling.n}; leave it at 1 and set branches")
        check_parser(self.answer_parser)
        if self.hints is not None:
            if isinstance(self.hints, str) or len(self.hints) != self.branches:
                raise ConfigError(f"hints={self.hints!r} must have one entry a branch, {self.branches}")
            hints = tuple(hint if isinstance(hint, str) else tuple(hint) for hint in self.hints)
            object.__setattr__(self, "hints", hints)

    @property
    def step_sampling(self) -> SamplingParams:
        """Sampling parameters of one round."""
        sampling = self.sampling or DEFAULT_SAMPLING
        # One seed for all: branches differ by their paths.
        seed = 0 if sampling.seed is None else sampling.seed
        min_tokens = min(sampling.min_tokens, self.tokens_per_step)
        return replace(sampling, max_tokens=self.tokens_per_step, min_tokens=min_tokens, seed=seed)

    def to_dict(self) -> dict[str, Any]:
        """As plain data that JSON can hold."""
        plain = asdict(self)
        plain["sampling"] = _plain(asdict(self.step_sampling))
        if callable(self.answer_parser):
            plain["answer_parser"] = getattr(self.answer_parser, "__name__", "function")
        return dict(_plain(plain))


@dataclass(frozen=True)
class BranchResult:
    """One candidate at the end.

    Attributes:
        text: generated text, prompt and hint excluded.
        token_ids: the same as generated tokens.
        score: what it was ranked by.
        confidence: mean probability of the likeliest token at each generated position.
        verification: p(YES); None where nobody asked.
        sharing: what it got: "exact" when num_shared_tokens > 0, else "none".
        similarity, exit_layer: of gates that did not run here: None.
        finish_reason: "stop" or "length".
        parsed: its answer in normal form; None when it gives none.
        depth: round in which it was decoded last, from 1.
        path: index of each fork from the prompt to here.
        hint: how its answer was made to begin (text; token ids are decoded where possible).
        num_shared_tokens: tokens whose KV it took from another branch or the prefix cache when it
            started.
        num_own_tokens: all its other tokens, prompt included.
    """

    text: str
    token_ids: list[int]
    score: float
    confidence: float
    verification: float | None
    sharing: str
    similarity: float | None
    exit_layer: int | None
    finish_reason: str | None
    parsed: str | None
    depth: int
    path: tuple[int, ...]
    hint: str
    num_shared_tokens: int
    num_own_tokens: int


@dataclass(frozen=True)
class SolveResult:
    """What a problem gave.

    Attributes:
        answer: text of the chosen branch.
        parsed: its answer in normal form; None when it gives none.
        best: index of the chosen branch.
        branches: those that were left at the end.
        stats: seconds by phase (prefill_s: prompts; decode_s: hints and decoding; verify_s;
            total_s), what the engine counted meanwhile (num_prefilled_tokens and so on),
            blocks_used_peak (blocks in use, the most that was seen between phases).
        trace: config, problem, nodes of the tree and events in order, as plain data that JSON can
            hold.
    """

    answer: str
    parsed: str | None
    best: int
    branches: list[BranchResult]
    stats: dict[str, float]
    trace: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data that JSON can hold."""
        return dict(_plain(asdict(self)))


class Solver:
    """Solves problems on one LLM.

    Args:
        llm: used only while `solve` runs; nothing but cached blocks is left in it.
        config: None: the defaults.

    Raises:
        ConfigError: the config needs text and the checkpoint has no tokenizer.
    """

    def __init__(self, llm: "LLM", config: SolverConfig | None = None) -> None:
        self.llm = llm
        self.config = config or SolverConfig()
        if llm.tokenizer is None:
            self._check_needs_no_text()

    def solve(
        self,
        problem: Tokens,
        phrasings: Sequence[Tokens] | None = None,
        on_event: Callable[[dict[str, Any]], None] | None = None,
    ) -> SolveResult:
        """Solves one problem.

        Args:
            problem: text, or the token ids of a whole prompt (never put through the chat template).
            phrasings: one wording a branch, used instead of `problem` as its prompt; the standalone
                verification still asks about `problem`. What differing wordings share is their
                common beginning.
            on_event: called with each event of the trace as it happens.

        Raises:
            ConfigError: not one wording a branch, or text without a tokenizer.
            PromptError, CacheFullError, NumericalError: from the engine.
        """
        config = self.config
        wordings = [problem] * config.branches if phrasings is None else list(phrasings)
        if len(wordings) != config.branches or isinstance(phrasings, str):
            raise ConfigError(f"{len(wordings)} phrasings for {config.branches} branches; give one a branch")
        prompts = [self._prompt_ids(wording) for wording in wordings]
        chats = [self._is_chat(wording) for wording in wordings]
        hints = config.hints or [_default_hint(k, chat) for k, chat in enumerate(chats)]
        tree = Tree(self.llm, share=config.sharing == "exact", on_event=on_event)
        try:
            nodes = self._search(tree, problem, prompts, hints, chats[0])
            best, parsed = self._select(tree, nodes)
            tree.finish()
        finally:
            tree.close()
        return self._result(tree, nodes, best, parsed, problem, phrasings)

    def _search(
        self,
        tree: Tree,
        problem: Tokens,
        prompts: list[list[int]],
        hints: Sequence[Tokens],
        chat: bool,
    ) -> list[Node]:
        """Grows the tree; returns the candidates, all scored."""
        config = self.config
        verifier = None
        if config.verify == "always":
            share = config.sharing == "exact"
            verifier = Verifier(self.llm, config.verify_style, chat=chat, share=share)
        nodes = tree.plant(prompts, hints)
        for level in range(1, config.depth + 1):
            tree.extend([node for node in nodes if not node.finished], config.step_sampling)
            self._score(tree, [node for node in nodes if node.score is None], verifier, problem)
            survivors = sorted(nodes, key=lambda node: -(node.score or 0.0))[: config.beam]
            if level == config.depth or all(node.finished for node in survivors):
                break
            nodes = tree.expand(nodes, survivors, config.branches)
        return nodes

    def _score(self, tree: Tree, nodes: list[Node], verifier: Verifier | None, problem: Tokens) -> None:
        if verifier is not None:
            with tree.phase("verify", nodes) as event:
                candidates = [Candidate(node.branch, self._answer_ids(node)) for node in nodes]
                event["probabilities"] = verifier.probabilities(problem, candidates)
            for node, probability in zip(nodes, event["probabilities"], strict=True):
                node.verification = probability
        for node in nodes:
            if node.verification is None:
                node.score = node.confidence
            else:
                node.score = node.verification * math.sqrt(node.confidence)

    def _select(self, tree: Tree, nodes: list[Node]) -> tuple[int, list[str | None]]:
        """Index of the chosen node, and what each node's answer is."""
        with tree.phase("select", nodes) as event:
            parser = self.config.answer_parser
            parsed = [parse_answer(node.text, parser) for node in nodes]
            best = choose(parsed, [node.score or 0.0 for node in nodes], self.config.select)
            event.update(rule=self.config.select, parsed=list(parsed), best=nodes[best].node_id)
        return best, parsed

    def _result(
        self,
        tree: Tree,
        nodes: list[Node],
        best: int,
        parsed: list[str | None],
        problem: Tokens,
        phrasings: Sequence[Tokens] | None,
    ) -> SolveResult:
        branches = [_branch_result(node, answer) for node, answer in zip(nodes, parsed, strict=True)]
        trace = {
            "config": self.config.to_dict(),
            "problem": _plain(problem),
            "phrasings": _plain(phrasings),
            "nodes": [_plain(node.to_dict()) for node in tree.nodes],
            "best": nodes[best].node_id,
            "events": tree.events,
        }
        return SolveResult(nodes[best].text, parsed[best], best, branches, tree.stats, trace)

    def _answer_ids(self, node: Node) -> list[int]:
        """Hint and generated tokens, without the end-of-sequence token."""
        ids = node.branch.token_ids[node.num_prompt_tokens :]
        tokenizer = self.llm.tokenizer
        closed = tokenizer is not None and bool(ids) and ids[-1] in tokenizer.eos_token_ids
        return ids[:-1] if closed else ids

    def _is_chat(self, wording: Tokens) -> bool:
        tokenizer = self.llm.tokenizer
        has_template = tokenizer is not None and tokenizer.has_chat_template
        return isinstance(wording, str) and self.config.chat and has_template

    def _prompt_ids(self, wording: Tokens) -> list[int]:
        if not isinstance(wording, str):
            return list(wording)
        tokenizer = self.llm.tokenizer
        if tokenizer is None:
            raise ConfigError(f"{self.llm.model_path} has no tokenizer; give the problem as token ids, not text")
        if self._is_chat(wording):
            return tokenizer.encode_chat([{"role": "user", "content": wording}])
        return tokenizer.encode(wording)

    def _check_needs_no_text(self) -> None:
        config = self.config
        remedies = []
        if config.hints is None or any(isinstance(hint, str) for hint in config.hints):
            remedies.append("hints as token ids, such as [()] * branches")
        if config.verify != "never":
            remedies.append("verify='never'")
        if config.select != "score":
            remedies.append("select='score'")
        if remedies:
            raise ConfigError(f"{self.llm.model_path} has no tokenizer; use {', '.join(remedies)}")


def _check_int(name: str, value: object, most: int | None) -> None:
    limit = "at least 1" if most is None else f"in 1..{most}"
    if not isinstance(value, int) or isinstance(value, bool) or value < 1 or value > (most or value):
        raise ConfigError(f"{name}={value!r} must be a whole number {limit}")


def _default_hint(index: int, chat: bool) -> str:
    # In a conversation it begins the assistant's turn; in plain text, a paragraph.
    return f"Approach #{index + 1}:" if chat else f"\n\nApproach #{index + 1}:"


def _branch_result(node: Node, parsed: str | None) -> BranchResult:
    assert node.score is not None
    return BranchResult(
        text=node.text,
        token_ids=node.output_ids,
        score=node.score,
        confidence=node.confidence,
        verification=node.verification,
        sharing=node.sharing,
        similarity=None,
        exit_layer=None,
        finish_reason=node.branch.finish_reason,
        parsed=parsed,
        depth=node.depth,
        path=tuple(node.branch.path),
        hint=node.hint,
        num_shared_tokens=node.num_shared_tokens,
        num_own_tokens=node.num_tokens - node.num_shared_tokens,
    )


def _plain(value: Any) -> Any:
    """The same data with lists for every other sequence, and strings as keys."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value

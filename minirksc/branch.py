"""Branches: token sequences that fork without copying and are decoded together.

A branch is a handle on a kept sequence of one engine. Everything goes by token ids: text that was generated
is never tokenised again. Blocks are shared until one branch writes into a block that another one holds.
"""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from minirksc.errors import BranchError
from minirksc.request import Request, Sequence
from minirksc.signals import TokenSignals, mean_top1

if TYPE_CHECKING:
    from minirksc.llm import LLM


class Branch:
    """One path through a reasoning tree; made by `LLM.branch` and `Branch.fork`, not by hand.

    Attributes:
        parent: the branch that it was forked from; None for a root.
        exit_layer: of a root, layers that its prompt went through before a depth gate ended it; None: all.
        num_saved_layer_rows: of a root, its tokens times the layers that a depth gate spared them.
        num_cached_tokens: of a root, tokens of its prompt that were found in the prefix cache.
    """

    pruned = True  # until it is made

    def __init__(self, llm: "LLM", sequence: Sequence, parent: "Branch | None" = None) -> None:
        self._dropped = llm.engine.dropped
        self._llm = llm
        self._sequence = sequence
        self._num_forks = 0
        self._before = Output() if parent is None else parent._output()  # of its ancestors
        self._requests: list[Request] = []  # that have run on it, the last one perhaps still
        self.parent = parent
        self.pruned = False
        self.exit_layer: int | None = None
        self.num_saved_layer_rows = 0
        self.num_cached_tokens = 0

    def fork(self, n: int) -> list["Branch"]:
        """Makes n children that continue from here; no token is computed and no block copied.

        Raises:
            BranchError: it was pruned.
            ValueError: n < 1.
        """
        self._check_usable()
        if n < 1:
            raise ValueError(f"fork({n}): n must be at least 1")
        engine = self._llm.engine
        with engine.call() as call:
            made = []
            for index in range(self._num_forks, self._num_forks + n):
                made.append(Branch(self._llm, engine.fork_sequence(self._sequence, index, call), self))
            self._num_forks += n
            call.sequences.clear()  # they are the branches'
        return made

    def append(self, tokens: str | SequenceOf[int]) -> None:
        """Adds text or token ids to the end; computed with the next `LLM.extend` or `LLM.score`.

        Raises:
            BranchError: it was pruned.
            PromptError: longer than the model's length, or a token id outside the vocabulary.
        """
        self._check_usable()
        if self._is_under_way:
            raise BranchError(f"branch {self.path} is being extended; append to it once that has ended")
        token_ids = self._llm.encode_fragment(tokens)
        self._llm.engine.check_token_ids(token_ids, num_before=self.num_tokens)
        self._sequence.token_ids += token_ids

    def take_over(self, other: "Branch") -> None:
        """Goes on from what another branch has generated, as a fork of it does: for its tokens, computed anew.

        Args:
            other: whose tokens this one has, and which generated the last of them.
        """
        self._before = other._output()

    def prune(self) -> None:
        """Gives back every block that nobody else uses. The branch cannot be used after; twice is fine."""
        if not self.pruned and not self._llm.closed:
            self._llm.engine.release(self._sequence)
        self.pruned = True

    def __del__(self) -> None:
        # At any moment and in any thread: whoever enters the engine next gives back its blocks.
        if not self.pruned:
            self._dropped.append(self._sequence)

    def pin(self) -> None:
        """Keeps its blocks from eviction, also once nobody uses them, until `unpin` or `LLM.reset_prefix_cache`.

        Raises:
            BranchError: it was pruned.
        """
        self._check_usable()
        self._llm.engine.blocks.pin(self.seq_id)

    def unpin(self) -> None:
        """Takes `pin` back; also after the branch was pruned."""
        self._llm.engine.blocks.unpin(self.seq_id)

    @property
    def token_ids(self) -> list[int]:
        """All tokens, the prompt included."""
        return list(self._sequence.token_ids)

    @property
    def num_tokens(self) -> int:
        """How many tokens, the prompt included."""
        return len(self._sequence.token_ids)

    @property
    def output_token_ids(self) -> list[int]:
        """Generated tokens, hints and prompt excluded, those of its ancestors included."""
        return self._output().token_ids

    @property
    def logprobs(self) -> list[float]:
        """Of its generated tokens, those of its ancestors included."""
        return self._output().logprobs

    @property
    def signals(self) -> TokenSignals:
        """How sure the model was of each of them; see `minirksc.signals`."""
        return self._output().signals

    @property
    def finish_reason(self) -> str | None:
        """How the last `LLM.extend` ended on it; None before the first, and while one is under way."""
        return self._requests[-1].finish_reason if self._requests else None

    @property
    def text(self) -> str:
        """Generated text, prompt and hints excluded, without a stop string that ended it."""
        text = self._llm.decode(self.output_token_ids)
        checker = self._requests[-1].checker if self._requests else None
        if checker is None or not isinstance(checker.stop_reason, str):
            return text
        shown = self._llm.decode(self._requests[-1].output_token_ids)
        return text[: len(text) - (len(shown) - len(checker.text))]

    @property
    def confidence(self) -> float:
        """Mean probability of the likeliest token at each generated position; nan when there is none."""
        return mean_top1(self.signals)

    @property
    def num_shared_tokens(self) -> int:
        """Tokens whose KV block another sequence holds too, right now."""
        blocks = self._llm.engine.blocks
        seq_id = self._sequence.seq_id
        return blocks.num_shared_tokens(seq_id) if seq_id in blocks else 0

    @property
    def seq_id(self) -> int:
        """Its sequence in the engine's block manager."""
        return self._sequence.seq_id

    def has_kv(self, positions: SequenceOf[int]) -> bool:
        """Whether the KV of these tokens is there right now, in all layers."""
        return not self.pruned and self._llm.engine.blocks.holds(self.seq_id, positions)

    @property
    def depth(self) -> int:
        """Forks between the root and here."""
        return self._sequence.depth

    @property
    def path(self) -> tuple[int, ...]:
        """Index of each fork from the root to here; keys the branch's random numbers."""
        return self._sequence.path

    def __repr__(self) -> str:
        state = "pruned" if self.pruned else f"{self.num_tokens} tokens"
        return f"Branch(path={self.path}, {state}, finish_reason={self.finish_reason!r})"

    def _check_usable(self) -> None:
        if self.pruned:
            raise BranchError(f"branch {self.path} was pruned; fork it before prune() to go on from it")

    def _check_owner(self, llm: "LLM") -> None:
        self._check_usable()
        if self._llm is not llm:
            raise BranchError(f"branch {self.path} belongs to another LLM; use the one that made it")

    @property
    def _is_under_way(self) -> bool:
        return bool(self._requests) and not self._requests[-1].finished

    def _follow(self, request: Request) -> None:
        """What a request generates is this branch's from now on."""
        self._requests.append(request)

    def _output(self) -> "Output":
        """A copy of what it has generated so far."""
        output = Output(list(self._before.token_ids), list(self._before.logprobs), self._before.signals)
        for request in self._requests:
            output.token_ids += request.output_token_ids
            output.logprobs += request.logprobs
            output.signals += request.signals
        return output


@dataclass(slots=True)
class Output:
    """What a branch has generated, one entry a token."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    signals: TokenSignals = field(default_factory=TokenSignals)


class BranchProgress:
    """A branch while `LLM.extend` decodes it; ancestors' tokens count with its own."""

    def __init__(self, branch: Branch, request: Request) -> None:
        self._request = request
        self._before, self._text_before = branch._output(), branch.text
        branch._follow(request)

    @property
    def num_tokens(self) -> int:
        """Generated so far."""
        return len(self._before.token_ids) + len(self._request.output_token_ids)

    @property
    def signals(self) -> TokenSignals:
        """How sure the model was of each generated token."""
        return self._before.signals + self._request.signals

    @property
    def text(self) -> str:
        """Generated so far; never half a character or the beginning of a stop string."""
        return self._text_before + self._request.text

    @property
    def finished(self) -> bool:
        """True when it has ended."""
        return self._request.finished

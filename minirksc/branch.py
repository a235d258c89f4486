"""Branches: token sequences that fork without copying and are decoded together.

A branch is a handle on a kept sequence of one engine. Everything goes by token ids: text that was generated
is never tokenised again. Blocks are shared until one branch writes into a block that another one holds.
"""

from collections.abc import Sequence as SequenceOf
from typing import TYPE_CHECKING, Any

from minirksc.errors import BranchError, ConfigError, brief
from minirksc.prompts import Prompt
from minirksc.request import Request, Sequence
from minirksc.signals import TokenSignals, mean_top1
from minirksc.token_ids import is_list

if TYPE_CHECKING:
    from minirksc.config import SamplingParams
    from minirksc.llm import LLM
    from minirksc.stopping import TextSource


class Branch:
    """One path through a reasoning tree; made by `LLM.branch` and `Branch.fork`, not by hand.

    Attributes:
        parent: the branch that it was forked from; None for a root.
        finish_reason: how the last `LLM.extend` ended on it; None before the first.
        logprobs: of its generated tokens, those of its ancestors included.
        exit_layer: of a root, layers that its prompt went through before a depth gate ended it; None: all.
        num_saved_layer_rows: of a root, its tokens times the layers that a depth gate spared them.
        num_cached_tokens: of a root, tokens of its prompt that were found in the prefix cache, in whole blocks.
        signals: how sure the model was of each of them; see `minirksc.signals`.
        output_token_ids: generated tokens, hints and prompt excluded, those of its ancestors included.
    """

    def __init__(self, llm: "LLM", sequence: Sequence, parent: "Branch | None" = None) -> None:
        self._llm = llm
        self._sequence = sequence
        self._num_forks = 0
        self._text: str = "" if parent is None else parent._text
        # Characters at its end that stand for half a character, and what may complete it with the next token.
        self._num_provisional: int = 0 if parent is None else parent._num_provisional
        self._detokenizer: TextSource | None = None if parent is None else parent._detokenizer
        self.parent = parent
        self.pruned = False
        self.finish_reason: str | None = None
        self.exit_layer: int | None = None
        self.num_saved_layer_rows = 0
        self.num_cached_tokens = 0
        self.output_token_ids: list[int] = list(parent.output_token_ids) if parent else []
        self.logprobs: list[float] = list(parent.logprobs) if parent else []
        self.signals: TokenSignals = parent.signals + TokenSignals() if parent else TokenSignals()

    def fork(self, n: int) -> list["Branch"]:
        """Makes n children that continue from here; no token is computed and no block copied.

        Raises:
            BranchError: it was pruned.
            ConfigError: n is no whole number, or below 1.
        """
        self._check_usable()
        if not isinstance(n, int) or isinstance(n, bool) or n < 1:
            raise ConfigError(f"fork({brief(n)}): n must be a whole number, at least 1")
        engine = self._llm.engine
        first = self._num_forks
        made: list[Branch] = []
        try:
            for index in range(first, first + n):
                made.append(Branch(self._llm, engine.fork_sequence(self._sequence, index), self))
        except BaseException:
            for child in made:  # nobody has a handle on them
                child.prune()
            raise
        self._num_forks += n
        return made

    def append(self, tokens: Prompt) -> None:
        """Adds text or token ids to the end; computed with the next `LLM.extend` or `LLM.score`.

        Args:
            tokens: in any form of a prompt, but without a salt: it has that of its branch. Text gets no BOS.

        Raises:
            BranchError: it was pruned, or is being extended.
            ConfigError, PromptError: it is neither text nor token ids.
            PromptError: longer than the model's length, or a token id outside the vocabulary.
            TokenizerError: text, and there is no tokenizer.
        """
        self._check_usable()
        engine = self._llm.engine
        engine.check_idle(self._sequence)
        token_ids = engine.check_token_ids(self._llm.encode_fragment(tokens), num_before=self.num_tokens)
        if token_ids:
            self._sequence.token_ids += token_ids
            self._close_text()

    def prune(self) -> None:
        """Gives back every block that nobody else uses. The branch cannot be used after; twice is fine."""
        if not self.pruned:
            self.pruned = True
            self._llm.engine.release(self._sequence)

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
    def text(self) -> str:
        """What was generated here and on its ancestors, prompt and hints excluded, as `LLM.generate` shows it.

        Once shown it stays. Half a character alone, cut off by max_tokens, is shown as U+FFFD until it is completed.
        """
        return self._text

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
    def _settled_text(self) -> str:
        """The text that no further token can change."""
        return self._text[: len(self._text) - self._num_provisional]

    def _close_text(self) -> None:
        """Something else comes next: half a character at the end remains one."""
        self._num_provisional = 0
        if self._detokenizer is not None:
            self._detokenizer = self._detokenizer.cut()

    def _request(self, params: "SamplingParams") -> Request:
        """Queues a generation that goes on from here."""
        return self._llm.engine.add_request(
            self._sequence,
            params,
            seed=self._sequence.branch_seed,
            earlier_output_ids=self.output_token_ids,
            detokenizer=self._detokenizer,
        )

    def _absorb(self, request: Request, keep_stop: bool) -> None:
        """Takes over what a finished request generated."""
        checker = request.checker
        assert checker is not None
        if request.error is not None:
            checker.flush()
        self.finish_reason = request.finish_reason
        self.output_token_ids += request.output_token_ids
        self.logprobs += request.logprobs
        self.signals += request.signals
        before = self._detokenizer
        if checker.detokenizer is None:
            self._close_text()
        else:
            self._text = self._settled_text + request.text
            self._num_provisional, self._detokenizer = checker.num_provisional, checker.detokenizer
        if checker.finish_reason == "stop":
            self._close_text()
            if not keep_stop:
                self._take_out_stop(request, before)

    def _take_out_stop(self, request: Request, before: "TextSource | None") -> None:
        """Takes what ended a request out of the tokens: those from the first one on that holds any of it.

        A stop string may begin within a token: what that spelt before it is appended again, as a piece of its own.
        """
        tokens, text = request.output_token_ids, request.text
        num_kept, rest = len(tokens) - 1, ""
        assert request.checker is not None
        if isinstance(request.checker.stop_reason, str):
            source = self._llm.engine.text_source(request.params, before)
            assert source is not None  # there was text to find it in
            num_kept, num_chars = _num_within(tokens, text, source)
            rest = text[num_chars:]
        num_dropped = len(tokens) - num_kept
        self._llm.engine.cut(self._sequence, self.num_tokens - num_dropped)
        del self.output_token_ids[-num_dropped:], self.logprobs[-num_dropped:]
        self.signals = self.signals.without_last(num_dropped)
        self._sequence.token_ids += self._llm.encode_fragment(rest) if rest else []


def _num_within(token_ids: SequenceOf[int], text: str, source: "TextSource") -> tuple[int, int]:
    """(the most tokens that spell a beginning of the text, its length); a token may spell some of it and more."""
    num_tokens = num_chars = num_final = 0
    for count, token_id in enumerate(token_ids, start=1):
        num_final += len(source.push([token_id]))
        rest = source.flush()
        if text.startswith(rest, num_final):
            num_tokens, num_chars = count, num_final + len(rest)
    return num_tokens, num_chars


def branch_list(branches: Any, llm: "LLM") -> list[Branch]:
    """Branches that a call of this LLM can use.

    Raises:
        BranchError: they are no list of branches, or one is pruned or another LLM's.
    """
    items = list(branches) if is_list(branches) else [branches]
    for item in items:
        if not isinstance(item, Branch) or not is_list(branches):
            raise BranchError(f"branches must be a list of what branch() or fork() made, not {brief(branches)}")
        item._check_owner(llm)
    return items


class BranchProgress:
    """A branch while `LLM.extend` decodes it; ancestors' tokens count with its own.

    Attributes:
        branch: which; it gets what was generated at the end of the call.
    """

    def __init__(self, branch: Branch, request: Request) -> None:
        self.branch = branch
        self._request = request
        self._num_tokens_before = len(branch.output_token_ids)
        self._signals_before = branch.signals
        self._text_before = branch._settled_text if request.params.detokenize else branch.text

    @property
    def num_tokens(self) -> int:
        """Generated so far."""
        return self._num_tokens_before + len(self._request.output_token_ids)

    @property
    def signals(self) -> TokenSignals:
        """How sure the model was of each generated token."""
        return self._signals_before + self._request.signals

    @property
    def text(self) -> str:
        """Generated so far; never half a character or the beginning of a stop string."""
        return self._text_before + self._request.text

    @property
    def finished(self) -> bool:
        """True when it has ended."""
        return self._request.finished

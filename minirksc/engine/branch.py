"""Branches: token sequences that fork without copying and are decoded together.

A branch is a handle on a kept sequence of one engine. Everything goes by token ids: text that was generated
is never tokenised again. Blocks are shared until one branch writes into a block that another one holds.
"""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace
from typing import Any

from minirksc.engine.calls import Call
from minirksc.engine.open_engine import OpenEngine
from minirksc.engine.prompts import Prompt
from minirksc.engine.request import Request, Sequence
from minirksc.engine.signals import TokenSignals, mean_top1
from minirksc.engine.stopping import TextSource
from minirksc.errors import BranchError, ConfigError, brief
from minirksc.options import SamplingParams
from minirksc.token_ids import is_list


class Branch:
    """One path through a reasoning tree; made by `LLM.branch` and `Branch.fork`, not by hand.

    Args:
        home: the session that makes it.
        sequence: kept, and released with it.
        parent: see the attributes.

    Attributes:
        sequence: its own in the engine.
        parent: the branch that it was forked from; None for a root.
        exit_layer: of a root, layers that its prompt went through before a layer gate ended it; None: all.
        num_saved_layer_rows: of a root, its tokens times the layers that a layer gate spared them.
        num_cached_tokens: of a root, tokens of its prompt that were found in the prefix cache, in whole blocks.
    """

    def __init__(self, home: OpenEngine, sequence: Sequence, parent: "Branch | None" = None) -> None:
        self._home = home
        self.sequence = sequence
        self._num_forks = 0
        self._before = Output() if parent is None else parent.output()  # of its ancestors
        self._requests: list[Request] = []  # that have run on it, the last one perhaps still
        self._num_closed = 0  # of these; something was appended then
        self.parent = parent
        self.pruned = False
        self.exit_layer: int | None = None
        self.num_saved_layer_rows = 0
        self.num_cached_tokens = 0
        home.engine.release_with(self, sequence)

    def fork(self, n: int) -> list["Branch"]:
        """Makes n children that continue from here; no token is computed and no block copied.

        Raises:
            BranchError: it was pruned.
            ConfigError: n is no whole number, or below 1.
        """
        self.check_usable()
        if not isinstance(n, int) or isinstance(n, bool) or n < 1:
            raise ConfigError(f"fork({brief(n)}): n must be a whole number, at least 1")
        engine = self._home.engine
        with engine.call() as call:
            made = []
            for index in range(self._num_forks, self._num_forks + n):
                made.append(Branch(self._home, engine.fork_sequence(self.sequence, index, call), self))
            self._num_forks += n
            call.sequences.clear()  # they are the branches'
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
        self.check_usable()
        if self._is_under_way:
            raise BranchError(f"branch {self.path} is being extended; append to it once that has ended")
        fragment = self._home.encode_fragment(tokens)
        token_ids = self._home.engine.check_token_ids(fragment, num_before=self.num_tokens)
        if token_ids:
            self._num_closed = len(self._requests)
            if not self._requests:
                self._before.close()
            self.sequence.token_ids += token_ids

    def take_over(self, other: "Branch") -> None:
        """Goes on from what another branch has generated, as a fork of it does: for its tokens, computed anew.

        Args:
            other: whose tokens this one has, and which generated the last of them.
        """
        self._before = other.output()

    def prune(self) -> None:
        """Gives back every block that nobody else uses. The branch cannot be used after; twice is fine."""
        if not self.pruned and not self._home.closed:
            self._home.engine.release(self.sequence)
        self.pruned = True

    def pin(self) -> None:
        """Keeps its blocks from eviction, also once nobody uses them, until `unpin` or `LLM.reset_prefix_cache`.

        Raises:
            BranchError: it was pruned.
        """
        self.check_usable()
        self._home.engine.pin(self.sequence)

    def unpin(self) -> None:
        """Takes `pin` back; also after the branch was pruned."""
        self._home.engine.unpin(self.sequence)

    @property
    def token_ids(self) -> list[int]:
        """All tokens, the prompt included."""
        return list(self.sequence.token_ids)

    @property
    def num_tokens(self) -> int:
        """How many tokens, the prompt included."""
        return len(self.sequence.token_ids)

    @property
    def output_token_ids(self) -> list[int]:
        """Generated tokens, hints and prompt excluded, those of its ancestors included."""
        return self.output().token_ids

    @property
    def logprobs(self) -> list[float]:
        """Of its generated tokens, those of its ancestors included."""
        return self.output().logprobs

    @property
    def signals(self) -> TokenSignals:
        """How sure the model was of each of them; see `minirksc.engine.signals`."""
        return self.output().signals

    @property
    def finish_reason(self) -> str | None:
        """How the last `LLM.extend` ended on it; None before the first, and while one is under way."""
        return self._requests[-1].finish_reason if self._requests else None

    @property
    def text(self) -> str:
        """What was generated here and on its ancestors, prompt and hints excluded, as `LLM.generate` shows it.

        Once shown it stays. Half a character alone, cut off by max_tokens, is shown as U+FFFD until it is completed.
        While the branch is being extended this is its text as if it ended here.
        """
        return self.output().text

    @property
    def confidence(self) -> float:
        """Mean probability of the likeliest token at each generated position; nan when there is none."""
        return mean_top1(self.signals)

    @property
    def num_shared_tokens(self) -> int:
        """Tokens whose KV block another sequence holds too, right now."""
        blocks = self._home.engine.blocks
        seq_id = self.sequence.seq_id
        return blocks.num_shared_tokens(seq_id) if seq_id in blocks else 0

    @property
    def seq_id(self) -> int:
        """Its sequence in the engine's block manager."""
        return self.sequence.seq_id

    def has_kv(self, positions: SequenceOf[int]) -> bool:
        """Whether the KV of these tokens is there right now, in all layers."""
        return not self.pruned and self._home.engine.blocks.holds(self.seq_id, positions)

    @property
    def depth(self) -> int:
        """Forks between the root and here."""
        return self.sequence.depth

    @property
    def path(self) -> tuple[int, ...]:
        """Index of each fork from the root to here; keys the branch's random numbers."""
        return self.sequence.path

    def __repr__(self) -> str:
        state = "pruned" if self.pruned else f"{self.num_tokens} tokens"
        return f"Branch(path={self.path}, {state}, finish_reason={self.finish_reason!r})"

    def check_usable(self, home: OpenEngine | None = None) -> None:
        """Refuses a branch that nothing can be done with.

        Args:
            home: that is about to use it; None: its own.

        Raises:
            BranchError: it was pruned, or is another LLM's.
        """
        if self.pruned:
            raise BranchError(f"branch {self.path} was pruned; fork it before prune() to go on from it")
        if home is not None and self._home is not home:
            raise BranchError(f"branch {self.path} belongs to another LLM; use the one that made it")

    @property
    def _is_under_way(self) -> bool:
        return bool(self._requests) and not self._requests[-1].finished

    def add_request(self, params: SamplingParams, call: Call) -> None:
        """Queues a generation that goes on from here; see `follow`."""
        output = self.output()
        self._home.engine.add_request(
            self.sequence,
            params,
            seed=self.sequence.branch_seed,
            earlier_output_ids=output.token_ids,
            detokenizer=output.detokenizer,
            call=call,
        )

    def follow(self, request: Request) -> None:
        """What a request generates is this branch's from now on."""
        self._requests.append(request)

    def output(self) -> "Output":
        """A copy of what it has generated so far."""
        output = self._before.copy()
        for place, request in enumerate(self._requests):
            output.add(request)
            if place < self._num_closed:
                output.close()
        return output

    def take_out_stop(self) -> None:
        """Takes what ended the last request out of the tokens: those from the first one on that holds any of it.

        A stop string may begin within a token: what that spelt before it is appended again, as a piece of its own.
        """
        request = self._requests[-1]
        checker, tokens = request.checker, request.output_token_ids
        if self.pruned or checker is None or checker.finish_reason != "stop" or request.num_taken_out:
            return
        num_kept, rest = len(tokens) - 1, ""
        if isinstance(checker.stop_reason, str):
            source = self._home.engine.text_source(request.params, request.detokenizer)
            assert source is not None  # there was text to find it in
            num_kept, num_chars = _num_within(tokens, request.text, source)
            rest = request.text[num_chars:]
        token_ids = self._home.encode_fragment(rest) if rest else []
        begin = request.num_prompt_tokens + num_kept
        self._home.engine.cut_kv(self.sequence, begin)
        # In one statement: an interruption comes before or after.
        self.sequence.token_ids[begin:], request.num_taken_out = token_ids, len(tokens) - num_kept


@dataclass(slots=True)
class Output:
    """What a branch has generated, one entry a token, and how it reads.

    Attributes:
        token_ids, logprobs, signals: of each token that was not taken out again.
        text: what `LLM.generate` shows of it.
        num_provisional: characters at its end that stand for half a character, which the next token may complete.
        detokenizer: as the last token left it.
    """

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    signals: TokenSignals = field(default_factory=TokenSignals)
    text: str = ""
    num_provisional: int = 0
    detokenizer: TextSource | None = None

    @property
    def settled_text(self) -> str:
        """The text that no further token can change."""
        return self.text[: len(self.text) - self.num_provisional]

    def copy(self) -> "Output":
        """Another one, to add to."""
        return replace(self, token_ids=list(self.token_ids), logprobs=list(self.logprobs))

    def add(self, request: Request) -> None:
        """What a request has generated, perhaps so far."""
        end = len(request.output_token_ids) - request.num_taken_out
        self.token_ids += request.output_token_ids[:end]
        self.logprobs += request.logprobs[:end]
        self.signals += request.signals.first(end)
        checker = request.checker
        if checker is None or checker.detokenizer is None:
            self.close()
            return
        self.text = self.settled_text + request.text
        self.num_provisional, self.detokenizer = checker.num_provisional, checker.detokenizer
        if not request.finished:  # as if it ended here: a fork goes on from here alone
            held, self.num_provisional = checker.held()
            self.text += held
            self.detokenizer = checker.detokenizer.copy(request.params.skip_special_tokens)
        if checker.finish_reason == "stop":
            self.close()

    def close(self) -> None:
        """Something else comes next: half a character at the end remains one."""
        self.num_provisional = 0
        if self.detokenizer is not None:
            self.detokenizer = self.detokenizer.cut()


def _num_within(token_ids: SequenceOf[int], text: str, source: "TextSource") -> tuple[int, int]:
    """(the most tokens that spell a beginning of the text, its length); a token may spell some of it and more."""
    num_tokens = num_chars = num_final = 0
    for count, token_id in enumerate(token_ids, start=1):
        num_final += len(source.push([token_id]))
        rest = source.flush()
        if text.startswith(rest, num_final):
            num_tokens, num_chars = count, num_final + len(rest)
    return num_tokens, num_chars


def branch_list(branches: Any, home: OpenEngine) -> list[Branch]:
    """Branches that whoever made them can use.

    Raises:
        BranchError: they are no list of branches, or one is pruned or another LLM's.
    """
    items = list(branches) if is_list(branches) else [branches]
    for item in items:
        if not isinstance(item, Branch) or not is_list(branches):
            raise BranchError(f"branches must be a list of what branch() or fork() made, not {brief(branches)}")
        item.check_usable(home)
    return items


class BranchProgress:
    """A branch while `LLM.extend` decodes it; ancestors' tokens count with its own.

    Attributes:
        branch: the branch.
    """

    def __init__(self, branch: Branch, request: Request) -> None:
        self.branch = branch
        self._request = request
        self._before = branch.output()
        branch.follow(request)

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
        if not self._request.params.detokenize:
            return self._before.text
        return self._before.settled_text + self._request.text

    @property
    def finished(self) -> bool:
        """True when it has ended."""
        return self._request.finished

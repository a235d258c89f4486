"""Branches: token sequences that fork without copying and are decoded together.

A branch is a handle on a kept sequence of one engine. Everything goes by token ids: text that was generated
is never tokenised again. Blocks are shared until one branch writes into a block that another one holds.
"""

from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from typing import Any

from minirksc.engine.branch_output import BranchOutput, num_within
from minirksc.engine.calls import Call
from minirksc.engine.open_engine import OpenEngine
from minirksc.engine.prompts import Prompt
from minirksc.engine.request import Request, Sequence
from minirksc.engine.signals import TokenSignals, mean_top1
from minirksc.errors import BranchError, ConfigError, brief
from minirksc.options import SamplingParams
from minirksc.token_ids import is_list


class Branch:
    """One path through a reasoning tree; made by `LLM.branch` and `Branch.fork`, not by hand.

    Args:
        home: the session that makes it.
        sequence: its tokens in the engine, kept, and released with it.
        parent: the branch that it was forked from; None for a root.

    Attributes:
        sequence, parent: the arguments.
        exit_layer: layers that a root's prompt went through before a layer gate ended it; None: all.
        num_saved_layer_rows: tokens of a root's prompt times the layers that a layer gate spared them.
        num_cached_tokens: tokens of a root's prompt that were found in the prefix cache, in whole blocks.
    """

    def __init__(self, home: OpenEngine, sequence: Sequence, parent: "Branch | None" = None) -> None:
        self._home = home
        self.sequence = sequence
        self._num_forks = 0
        self._before = BranchOutput() if parent is None else parent.output()  # what its ancestors have generated
        self._requests: list[Request] = []  # that have run on it, the last one perhaps still
        self._num_closed = 0  # how many had run when something was appended last
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
            indices = range(self._num_forks, self._num_forks + n)
            made = [Branch(self._home, engine.fork_sequence(self.sequence, index, call), self) for index in indices]
            self._num_forks += n
            call.sequences.clear()  # they are the branches'
        return made

    def append(self, tokens: Prompt) -> None:
        """Adds text or token ids to the end; computed with the next `LLM.extend` or `LLM.score`.

        Args:
            tokens: text or ids in any form of a prompt, but without a salt: that of the branch counts. No BOS is added.

        Raises:
            BranchError: it was pruned, or is being extended.
            ConfigError, PromptError: it is neither text nor token ids.
            PromptError: longer than the model's length, or a token id outside the vocabulary.
            TokenizerError: text, and there is no tokenizer.
        """
        self.check_usable()
        if self._requests and not self._requests[-1].finished:
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
            other: branch whose tokens this one has, and which generated the last of them.
        """
        self._before = other.output()

    def prune(self) -> None:
        """Gives back every block that nothing else uses. The branch cannot be used after; twice is fine."""
        if not self.pruned and not self._home.closed:
            self._home.engine.release(self.sequence)
        self.pruned = True

    def pin(self) -> None:
        """Keeps its blocks from eviction, also once nothing uses them, until `unpin` or `LLM.reset_prefix_cache`.

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
        """Number of tokens, the prompt included."""
        return len(self.sequence.token_ids)

    @property
    def output_token_ids(self) -> list[int]:
        """Generated tokens, hints and prompt excluded, those of its ancestors included."""
        return self.output().token_ids

    @property
    def logprobs(self) -> list[float]:
        """Log-probabilities of its generated tokens, those of its ancestors included."""
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
        """Key of its block table in the engine's block manager."""
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

    def check_usable(self) -> None:
        """Refuses a branch that nothing can be done with.

        Raises:
            BranchError: it was pruned.
        """
        if self.pruned:
            raise BranchError(f"branch {self.path} was pruned; fork it before prune() to go on from it")

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

    def output(self) -> BranchOutput:
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
        num_remaining, rest = len(tokens) - 1, ""
        if isinstance(checker.stop_reason, str):
            source = self._home.engine.text_source(request.params, request.detokenizer)
            assert source is not None  # there was text to find it in
            num_remaining, num_chars = num_within(tokens, request.text, source)
            rest = request.text[num_chars:]
        token_ids = self._home.encode_fragment(rest) if rest else []
        begin = request.num_prompt_tokens + num_remaining
        self._home.engine.cut_kv(self.sequence, begin)
        # In one statement: an interruption comes before or after.
        self.sequence.token_ids[begin:], request.num_taken_out = token_ids, len(tokens) - num_remaining


def branch_list(branches: Any, home: OpenEngine) -> list[Branch]:
    """Branches as a list.

    Args:
        branches: what a caller gave for them.
        home: what they must have been made on.

    Raises:
        BranchError: they are no list of branches, or one is pruned or another LLM's.
    """
    items = list(branches) if is_list(branches) else [branches]
    for item in items:
        if not isinstance(item, Branch) or not is_list(branches):
            raise BranchError(f"branches must be a list of what branch() or fork() made, not {brief(branches)}")
        item.check_usable()
        if item._home is not home:
            raise BranchError(f"branch {item.path} belongs to another LLM; use the one that made it")
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


def early_ends(answer: Any, num_branches: int) -> list[tuple[int, str]]:
    """(index, finish_reason) of the branches that `on_step` of `LLM.extend` stops.

    Raises:
        ConfigError: it gave something else.
    """
    ends = {} if answer is None else answer
    if isinstance(ends, Mapping) and all(i in range(num_branches) and isinstance(ends[i], str) for i in ends):
        return list(ends.items())
    raise ConfigError(f"on_step gave {brief(answer)} for {num_branches} branches; it gives index -> finish_reason")

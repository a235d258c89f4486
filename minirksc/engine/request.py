"""What the engine works on: token sequences, and requests that generate on them.

A `Sequence` is tokens with (perhaps) KV blocks; it outlives a request when it belongs to a branch. A
`Request` is one generation on a sequence. Knows neither torch nor how anything is computed.

Python's abstract `Sequence`, of which a list is one, is imported as `SequenceOf` where this one is spoken of as well.
"""

import hashlib
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from minirksc.engine.gates import Seat
from minirksc.engine.signals import TokenSignals
from minirksc.engine.stopping import StopChecker
from minirksc.errors import ConfigError, MinirkscError, brief
from minirksc.options import SamplingParams
from minirksc.text.tokenizer import Detokenizer

if TYPE_CHECKING:
    from torch import Tensor

LogitsCallback = Callable[[int, "Tensor"], None]
"""Called with (position of the first row, logits `[rows, vocab]` float32), chunk by chunk; what is to be kept of the
logits is copied, since the next step overwrites them. What it raises ends the step, which is then computed again."""


Salt = str | bytes
"""Whose a prompt is: prompts share cached blocks with those of the same salt alone, or with those that have none."""


def salt_key(salt: Salt | None) -> bytes:
    """What keeps the blocks of a salt apart from all others; b"" for none. Text counts as its UTF-8.

    Raises:
        ConfigError: it is empty, or neither text nor bytes.
    """
    if salt is None:
        return b""
    spelt = salt.encode("utf-8", "surrogatepass") if isinstance(salt, str) else salt
    if not isinstance(spelt, bytes) or not spelt:
        raise ConfigError(f"salt {brief(salt)} must be text or bytes, and not empty; leave it out to share with all")
    return hashlib.sha256(spelt).digest()  # of one length: none is the beginning of another


@dataclass(slots=True, eq=False)
class Sequence:
    """Tokens that one block table holds, or will hold.

    Attributes:
        seq_id: key of the block table in the `BlockManager`.
        token_ids: prompt, hints and generated tokens, in order. KV exists for a prefix of them.
        salt: sequences with different salts never share a block.
        path: place in the reasoning tree, () for a root; keys the random numbers.
        depth: round of the reasoning tree in which it was made.
        kept: True while a branch owns it: its blocks then stay when a request on it ends.
        branch_seed: seed that its branch's samples use where the sampling parameters give none.
        owner: sign of the engine that made it; None once that has released it.
    """

    seq_id: int
    token_ids: list[int]
    salt: bytes = b""
    path: tuple[int, ...] = ()
    depth: int = 0
    kept: bool = False
    branch_seed: int = 0
    owner: object = None


@dataclass(slots=True, eq=False)
class Request:
    """One generation: extend a sequence by up to params.max_tokens tokens.

    Attributes:
        request_id: number, unique in its engine.
        sequence: tokens that are extended.
        params: resolved sampling parameters.
        seed: seed of its random numbers.
        num_prompt_tokens: length of the sequence when the request was made.
        checker: judge of when it ends and what text is final; None: it only computes the prompt's KV.
        logits_start: position from which on logits go to on_logits; None: no logits wanted.
        on_logits: callback for these; after a preemption in the midst of them positions may come twice.
        seat: place at a layer gate; None: it goes through all layers.
        earlier_output_ids: tokens that were generated on the sequence before, for presence and frequency penalties.
        detokenizer: state of the text after the generation before on the sequence; None: the text begins here.
        num_taken_out: tokens at the end of its output that were taken out of the sequence again.
        num_cached_tokens: prompt tokens whose KV was found and not computed, at first admission; whole blocks, since
            by more one could learn another's prompt token by token.
        output_token_ids, logprobs, signals: one entry a generated token.
        finish_reason: "stop", "length", "abort" or "error" at the end; "gate" when a gate ended it, or what
            `Engine.abort` was given; None: it has not finished.
        exit_layer: layers that it went through before a gate ended it; None: all.
        num_saved_layer_rows: its tokens times the layers that a gate spared them.
    """

    request_id: int
    sequence: Sequence
    params: SamplingParams
    seed: int
    num_prompt_tokens: int
    checker: StopChecker | None
    logits_start: int | None = None
    on_logits: LogitsCallback | None = None
    seat: Seat | None = None
    earlier_output_ids: SequenceOf[int] = ()
    detokenizer: Detokenizer | None = None
    num_taken_out: int = 0
    num_cached_tokens: int | None = None
    output_token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[dict[int, float]] = field(default_factory=list)
    signals: TokenSignals = field(default_factory=TokenSignals)
    finish_reason: str | None = None
    exit_layer: int | None = None
    num_saved_layer_rows: int = 0
    error: Exception | None = None

    @property
    def finished(self) -> bool:
        """True when nothing more will be computed for it."""
        return self.finish_reason is not None

    @property
    def pieces(self) -> SequenceOf[str]:
        """`text`, in the pieces that it came in."""
        return () if self.checker is None else self.checker.pieces

    @property
    def text(self) -> str:
        """Generated text that is final so far: never half a character or the beginning of a stop string."""
        return "" if self.checker is None else self.checker.text

    def flush(self) -> None:
        """Gives out the text that is held back, before the end; a tokenizer that fails on it is its own error."""
        if self.checker is not None:
            try:
                self.checker.flush()
            except MinirkscError as error:
                self.error = error

    def put_in_order(self, make_checker: Callable[["Request"], StopChecker]) -> None:
        """After an interruption at any line: what is whole of its output stays, and the rest follows from it."""
        if self.checker is not None and self.finish_reason is None:
            columns: list[list[Any]] = [self.output_token_ids, self.logprobs]
            columns += [self.signals.top1, self.signals.self_certainty]
            if self.params.logprobs is not None:
                columns.append(self.top_logprobs)
            num_whole = min(map(len, columns))
            for column in columns:
                del column[num_whole:]
            self.sequence.token_ids[self.num_prompt_tokens :] = self.output_token_ids
            self.checker = make_checker(self)
            try:
                for token_id in self.output_token_ids:
                    self.checker.push(token_id)
                self.finish_reason = self.checker.finish_reason
            except MinirkscError as error:  # its tokenizer's
                self.error, self.finish_reason = error, "error"

    @property
    def uses_cache(self) -> bool:
        """Cached tokens have no logits and no hidden states: where those of its prompt are wanted it computes all."""
        sees_all = self.seat is not None and self.seat.sees_all
        return not sees_all and self.first_wanted == len(self.sequence.token_ids) - 1

    @property
    def first_wanted(self) -> int:
        """Position of the first token whose logits are wanted: the last token of the sequence, or one before it."""
        last = len(self.sequence.token_ids) - 1
        return last if self.logits_start is None else min(last, self.logits_start)

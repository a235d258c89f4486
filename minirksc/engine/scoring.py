"""How probable given continuations are after a sequence: what `LLM.score` computes.

Each sequence is forked, the question appended, and only the KV of what is new computed; the fork is dropped
with its request. Choices of one token each are read off one row of logits; longer ones get a fork each.
"""

import math
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor

from minirksc.engine.calls import Call
from minirksc.engine.engine import Engine
from minirksc.engine.gates import LayerGate, Seat
from minirksc.engine.request import LogitsCallback, Sequence
from minirksc.options import SamplingParams


def score_requests(
    engine: Engine,
    call: Call,
    sequences: SequenceOf[Sequence],
    questions: SequenceOf[list[int]],
    choices: list[list[int]],
    gate: LayerGate | None,
) -> Tensor:
    """Queues requests, and gives the scores that they will fill in.

    Args:
        engine: the engine that owns the sequences.
        call: the call to which the requests and the forks that they run on belong.
        sequences: sequences that are scored; they stay as they are.
        questions: tokens that follow each sequence.
        choices: tokens of each choice.
        gate: gate at which all sit, by their place; only for choices of one token each.

    Returns:
        `[sequences, choices]` float32: NaN, later logits or log-probabilities, whose softmax over a row is the
        distribution over the choices.

    Raises:
        PromptError, CacheFullError: a sequence and its question do not fit.
    """
    scores = torch.full((len(sequences), len(choices)), math.nan)
    are_single = all(len(choice) == 1 for choice in choices)

    def ask(sequence: Sequence, tokens: list[int], start: int, store: LogitsCallback, seat: Seat | None) -> None:
        new = engine.check_token_ids(tokens, num_before=len(sequence.token_ids))
        child = engine.fork_sequence(sequence, index=0, call=call, kept=False)
        child.token_ids += new
        params = SamplingParams()
        engine.add_request(child, params, prefill_only=True, logits_start=start, on_logits=store, seat=seat, call=call)

    for place, (row, sequence, question) in enumerate(zip(scores, sequences, questions, strict=True)):
        # The logits at a position are those of the token after it: the first ones wanted are the question's last.
        start = len(sequence.token_ids) + len(question) - 1
        if are_single:
            seat = None if gate is None else Seat(gate, place)
            ask(sequence, question, start, _store_columns(row, [choice[0] for choice in choices]), seat)
            continue
        for index, choice in enumerate(choices):
            ask(sequence, [*question, *choice], start, _store_sum(row, index, choice, start), None)
    return scores


def _store_columns(out: Tensor, columns: list[int]) -> Callable[[int, Tensor], None]:
    """Stores the logits of the choices' tokens."""

    def store(first: int, logits: Tensor) -> None:
        out[:] = logits[0, columns]

    return store


def _store_sum(out: Tensor, index: int, choice: list[int], start: int) -> Callable[[int, Tensor], None]:
    """Sums the log-probabilities of a choice's tokens, whatever chunks its rows come in; `start` is the first row's."""
    parts: dict[int, float] = {}

    def store(first: int, logits: Tensor) -> None:
        for place, logprobs in enumerate(logits.log_softmax(-1), start=first - start):
            if place < len(choice):
                parts[place] = float(logprobs[choice[place]])
        out[index] = sum(parts.values())

    return store

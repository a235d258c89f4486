"""How probable given continuations are after a sequence: what `LLM.score` computes.

Each sequence is forked, the question appended, and only the KV of what is new computed; the fork is dropped
with its request. Choices of one token each are read off one row of logits; longer ones get a fork each.
"""

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf

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
    params: SamplingParams,
    out: Tensor,
    gate: LayerGate | None = None,
) -> None:
    """Queues requests that fill `out`.

    Args:
        engine: that owns the sequences.
        call: that the requests and the forks that they run on belong to.
        sequences: stay as they are.
        questions: tokens that follow each sequence.
        choices: tokens of each choice.
        params: resolved; nothing is sampled.
        out: `[sequences, choices]` float32; gets logits or log-probabilities, whose softmax over a row is the
            distribution over the choices.
        gate: at which all sit, by their place; with choices of one token each.

    Raises:
        PromptError, CacheFullError: a sequence and its question do not fit.
    """
    single = all(len(choice) == 1 for choice in choices)
    columns = [choice[0] for choice in choices]
    for place, (row, sequence, question) in enumerate(zip(out, sequences, questions, strict=True)):
        if single:
            seat = None if gate is None else Seat(gate, place)
            _request(engine, call, sequence, question, [], params, _store_columns(row, columns), seat)
        else:
            for index, choice in enumerate(choices):
                _request(engine, call, sequence, question, choice, params, _store_sum(row, index, choice))


def _request(
    engine: Engine,
    call: Call,
    sequence: Sequence,
    question: list[int],
    tail: list[int],
    params: SamplingParams,
    on_logits: LogitsCallback,
    seat: Seat | None = None,
) -> None:
    engine.check_token_ids([*question, *tail], num_before=len(sequence.token_ids))
    child = engine.fork_sequence(sequence, index=0, call=call, kept=False)
    child.token_ids += [*question, *tail]
    # The logits at a position are those of the token after it: the first ones wanted are the question's last.
    start = len(child.token_ids) - 1 - len(tail)
    engine.add_request(child, params, prefill_only=True, logits_start=start, on_logits=on_logits, seat=seat, call=call)


def _store_columns(out: Tensor, columns: list[int]) -> Callable[[int, Tensor], None]:
    """Stores the logits of the choices' tokens."""

    def store(first: int, logits: Tensor) -> None:
        out[:] = logits[0, columns]

    return store


def _store_sum(out: Tensor, index: int, tail: list[int]) -> Callable[[int, Tensor], None]:
    """Sums the log-probabilities of a choice's tokens, whatever chunks its rows come in."""
    start: list[int] = []
    parts: dict[int, float] = {}

    def store(first: int, logits: Tensor) -> None:
        start[:] = start or [first]
        for place, logprobs in enumerate(logits.log_softmax(-1), start=first - start[0]):
            if place < len(tail):
                parts[place] = float(logprobs[tail[place]])
        out[index] = sum(parts.values())

    return store

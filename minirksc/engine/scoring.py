"""How probable given continuations are after a sequence: what `LLM.score` computes.

Each sequence is forked, the question appended, and only the KV of what is new computed; the fork is dropped
with its request. Choices of one token each are read off one row of logits; longer ones get a fork each.
"""

import math
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from typing import Any

import torch
from torch import Tensor

from minirksc.engine.calls import Call
from minirksc.engine.engine import Engine
from minirksc.engine.gates import LayerGate, Seat
from minirksc.engine.open_engine import OpenEngine
from minirksc.engine.prompts import one_or_many
from minirksc.engine.request import LogitsCallback, Sequence
from minirksc.errors import ConfigError, brief
from minirksc.options import SamplingParams
from minirksc.token_ids import is_list, plain, read_token_ids


def read_choices(home: OpenEngine, choices: Any) -> list[list[int]]:
    """Token ids of each choice.

    Args:
        home: what makes token ids of text.
        choices: choices, in any form of a list that `LLM.score` takes.

    Raises:
        ConfigError: they are no list, fewer than two, or one is empty.
        PromptError, TokenizerError: one is neither text nor token ids, or there is no tokenizer.
    """
    items = plain(choices)
    if not is_list(items):
        raise ConfigError(f"choices must be a list of text or token ids, not {brief(items)}")
    choice_ids = [read_token_ids(home.encode_fragment(choice), vocab_size=home.spec.vocab_size) for choice in items]
    if len(choice_ids) < 2 or not all(choice_ids):
        raise ConfigError(f"score() needs at least two choices of at least one token, got {brief(choices)}")
    return choice_ids


def read_questions(home: OpenEngine, question: Any, num_branches: int) -> list[list[int]]:
    """Token ids of the question of each branch.

    Args:
        home: what makes token ids of text.
        question: one for all branches, or a list of one for each.
        num_branches: number of branches.

    Raises:
        ConfigError: a list of another length.
        PromptError, TokenizerError: one is neither text nor token ids, or there is no tokenizer.
    """
    items, is_one = one_or_many(question)
    if is_one or not items:
        return [home.encode_fragment(items[0] if items else ())] * num_branches
    if len(items) != num_branches:
        raise ConfigError(f"{len(items)} questions for {num_branches} branches; give one, or one a branch")
    return [home.encode_fragment(item) for item in items]


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

"""From logits to the next token of each row.

Order: logit_bias, penalties, forbidden tokens, temperature, top_k, top_p, min_p, one draw. The draw is keyed:
its only random number is a hash of (seed, branch path, position), which depends neither on the batch, nor on which
siblings live, nor on how its prompt was computed. The logits may, in their last bits, since what is computed together
may be summed in another order (kernels/README.md says where): in 16 bits that can turn a near tie.

Log-probabilities and confidence are those of the model's own distribution, before all of the above.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from minirksc.engine.request import Request
from minirksc.kernels.confidence import Confidence
from minirksc.kernels.draw import Draw
from minirksc.options import SamplingParams

NEG_INF = float("-inf")
MIN_TEMPERATURE = 1e-6
NOTHING = frozenset[int]()


class SamplingRow(NamedTuple):
    """What one row of logits is drawn with.

    Attributes:
        params: resolved: no None in the sampling values.
        token_ids: the whole sequence so far, for repetition_penalty.
        output_token_ids: what this request generated, for presence and frequency penalties.
        earlier_output_ids: what was generated on its sequence before, for the same.
        seed, path, position: key of the random number; position is the new token's place in its sequence.
        forbidden_ids: never drawn, such as end tokens before min_tokens.
    """

    params: SamplingParams
    token_ids: Sequence[int]
    output_token_ids: Sequence[int]
    seed: int
    path: tuple[int, ...]
    position: int
    forbidden_ids: frozenset[int] = NOTHING
    earlier_output_ids: Sequence[int] = ()

    @classmethod
    def of(cls, request: Request, eos_token_ids: frozenset[int]) -> "SamplingRow":
        """What the next token of a request is drawn with."""
        params, sequence = request.params, request.sequence
        below_minimum = len(request.output_token_ids) < params.min_tokens
        return cls(
            params=params,
            token_ids=sequence.token_ids,
            output_token_ids=request.output_token_ids,
            seed=request.seed,
            path=sequence.path,
            position=len(sequence.token_ids),
            forbidden_ids=eos_token_ids.union(params.stop_token_ids) if below_minimum else NOTHING,
            earlier_output_ids=request.earlier_output_ids,
        )


class Sampled(NamedTuple):
    """One drawn token.

    Attributes:
        token_id: -1 when it failed.
        logprob: under the model's distribution.
        top_logprobs: the chosen token and the top k, likeliest first; None unless asked for.
        top1_probability: probability of the likeliest token.
        self_certainty: divergence of the uniform distribution from the model's, nats; see `minirksc.engine.signals`.
        failure: what is wrong with the row's logits; None when nothing is.
    """

    token_id: int
    logprob: float
    top_logprobs: dict[int, float] | None
    top1_probability: float
    self_certainty: float
    failure: str | None = None


class Delivery(NamedTuple):
    """What a step gives a request.

    It need be neither one token nor what this step computed: a step that accepts drafts has
    several, and on a device that runs ahead they come a step later.

    Attributes:
        request: request that gains the tokens; it may have ended since they were drawn, and then they are dropped.
        tokens: one or more, in the order of their positions; after one that ends the request the rest are dropped.
    """

    request: Request
    tokens: Sequence[Sampled]


def uniform(seed: int, path: tuple[int, ...], position: int) -> float:
    """The random number of that key, uniform in [0, 1) with 53 bits."""
    return (_hash(":".join(map(str, (seed, position, *path)))) >> 11) / (1 << 53)


def derived_seed(seed: int, number: int) -> int:
    """The seed of one of many that were not given any: far from all others, since samples of a prompt count up."""
    return _hash(f"seed {seed} {number}")


def _hash(key: str) -> int:
    """64 bits of a key."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


def sample(
    logits: Tensor,
    rows: Sequence[SamplingRow],
    confidence: Callable[[Tensor], Confidence],
    draw: Callable[[Tensor, Sequence[Draw]], Tensor],
) -> list[Sampled]:
    """Draws one token a row.

    Args:
        logits: `[rows, vocab]` float32; not changed.
        rows: one a row.
        confidence: a form of `kernels.confidence`.
        draw: a form of `kernels.draw`.
    """
    sure = confidence(logits)
    token_ids = _choose(logits, rows, sure.argmax, draw)  # [rows]
    chosen = logits.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1) - sure.logsumexp  # [rows]
    given = list(zip(token_ids.tolist(), chosen.tolist(), strict=True))
    tops = _tops(logits, sure.logsumexp, given, [row.params.logprobs for row in rows])
    top1 = sure.top1_probability.tolist()
    certainty = sure.self_certainty(logits.shape[-1]).tolist()
    is_sound = [abs(lse) < float("inf") for lse in sure.logsumexp.tolist()]  # neither NaN nor an infinity
    return [
        Sampled(*given[i], tops[i], top1[i], certainty[i])
        if is_sound[i]
        else Sampled(-1, 0.0, None, top1[i], certainty[i], _describe(logits[i]))
        for i in range(len(rows))
    ]


def top_logprobs_of(logits: Tensor, token_ids: Sequence[int], k: int) -> list[dict[int, float]]:
    """Per row, the log-probabilities of a given token and of the top k.

    Args:
        logits: `[rows, vocab]` float32.
        token_ids: one a row.
        k: 0 for the given token alone.

    Returns:
        One {token id: logprob} a row, likeliest first.
    """
    logsumexp = logits.logsumexp(-1)  # [rows]
    chosen = logits.gather(-1, torch.tensor(list(token_ids), device=logits.device).view(-1, 1)).squeeze(-1) - logsumexp
    given = list(zip(token_ids, chosen.tolist(), strict=True))
    return [top for top in _tops(logits, logsumexp, given, [k] * len(given)) if top is not None]


def _tops(
    logits: Tensor, logsumexp: Tensor, given: Sequence[tuple[int, float]], counts: Sequence[int | None]
) -> list[dict[int, float] | None]:
    """Per row {token id: logprob} of so many of the likeliest, and then of the given token; None where the count is."""
    if all(count is None for count in counts):
        return [None] * len(counts)
    most = max(count or 0 for count in counts)
    values, ids = logits.topk(min(most, logits.shape[-1]))  # [rows, most]
    likeliest = zip(ids.tolist(), (values - logsumexp.unsqueeze(-1)).tolist(), strict=True)
    tops: list[dict[int, float] | None] = []
    for count, (token_id, logprob), (top_ids, top_logprobs) in zip(counts, given, likeliest, strict=True):
        top = dict(zip(top_ids[:count], top_logprobs[:count], strict=True))
        tops.append(None if count is None else top | {token_id: logprob})
    return tops


def _changes_logits(row: SamplingRow) -> bool:
    params = row.params
    return bool(
        params.logit_bias
        or row.forbidden_ids
        or params.repetition_penalty != 1
        or params.presence_penalty
        or params.frequency_penalty
    )


def _choose(
    logits: Tensor, rows: Sequence[SamplingRow], argmax: Tensor, draw: Callable[[Tensor, Sequence[Draw]], Tensor]
) -> Tensor:
    """Token ids `[rows]`, drawn where the temperature is not 0; `argmax` are those of the logits as they are."""
    changed = [i for i, row in enumerate(rows) if _changes_logits(row)]
    if changed:
        logits = logits.clone()
        for i in changed:
            _penalise(logits[i], rows[i])
    sampled = [i for i, row in enumerate(rows) if row.params.temperature != 0]
    draws = [_draw_of(rows[i]) for i in sampled]
    if len(sampled) == len(rows):
        return draw(logits, draws)
    token_ids = logits.argmax(-1) if changed else argmax
    if sampled:
        token_ids = token_ids.clone()
        token_ids[sampled] = draw(logits[sampled], draws)
    return token_ids


def _draw_of(row: SamplingRow) -> Draw:
    params = row.params
    assert params.temperature is not None and params.top_p is not None
    return Draw(
        max(params.temperature, MIN_TEMPERATURE),
        params.top_k or 0,
        params.top_p,
        params.min_p or 0.0,
        uniform(row.seed, row.path, row.position),
    )


def _penalise(scores: Tensor, row: SamplingRow) -> None:
    """Bias, penalties and forbidden tokens of one row `[vocab]`, in place."""
    params = row.params
    if params.logit_bias:
        scores[list(params.logit_bias)] += torch.tensor(list(params.logit_bias.values()), device=scores.device)
    if params.repetition_penalty != 1:
        seen = list(set(row.token_ids))
        values = scores[seen]
        penalty = params.repetition_penalty
        assert penalty is not None
        # A tiny penalty would make a logit infinite, and the row's probabilities NaN.
        changed = torch.where(values > 0, values / penalty, values * penalty)
        scores[seen] = changed.clamp(max=torch.finfo(scores.dtype).max)
    if (params.presence_penalty or params.frequency_penalty) and (row.output_token_ids or row.earlier_output_ids):
        output = torch.tensor([*row.earlier_output_ids, *row.output_token_ids], device=scores.device)
        ids, counts = torch.unique(output, return_counts=True)
        scores[ids] -= params.presence_penalty + params.frequency_penalty * counts
    if row.forbidden_ids:
        scores[[i for i in row.forbidden_ids if i < len(scores)]] = NEG_INF


def _describe(scores: Tensor) -> str:
    """What is wrong with a row `[vocab]` that has no finite log-sum-exp."""
    num_nan = int(scores.isnan().sum())
    num_inf = int(scores.isposinf().sum())
    if num_nan or num_inf:
        return f"the logits hold {num_nan} NaN and {num_inf} infinite values of {len(scores)}"
    return "the logits are -inf for every token"

"""How sure the model is of its next token: likeliest token, its probability, entropy and log-sum-exp.

For logits x: lse = log sum exp(x), p = exp(x - lse), top-1 probability = exp(max x - lse),
entropy = lse - sum p x (nats). Computed in float32. -inf logits have probability zero and add nothing. A row
with NaN or +inf gives NaN; its argmax means nothing. Ties go to the smallest index.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Confidence(NamedTuple):
    """One entry a row of logits.

    Attributes:
        argmax: `[rows]` int64.
        top1_probability: `[rows]` float32.
        entropy: `[rows]` float32, nats.
        logsumexp: `[rows]` float32.
    """

    argmax: Tensor
    top1_probability: Tensor
    entropy: Tensor
    logsumexp: Tensor


def confidence_reference(logits: Tensor) -> Confidence:
    """The specification.

    Args:
        logits: `[rows, vocab]`, any float dtype.
    """
    x = logits.float()
    lse = x.logsumexp(-1)
    logprobs = x - lse.unsqueeze(-1)  # [rows, vocab]
    p = logprobs.exp()
    entropy = -torch.where(p > 0, p * logprobs, torch.where(p.isnan(), p, 0.0)).sum(-1)
    argmax = (x == x.amax(-1, keepdim=True)).int().argmax(-1)
    top1 = p.gather(-1, argmax.unsqueeze(-1)).squeeze(-1)
    return Confidence(argmax, top1, entropy, lse)


def confidence(logits: Tensor) -> Confidence:
    """The same in four passes over the logits and one temporary."""
    x = logits.float()
    top, argmax = x.max(-1)
    weights = (x - top.unsqueeze(-1)).exp_()  # [rows, vocab], relative to the largest: no overflow
    total = weights.sum(-1)
    mean = torch.linalg.vecdot(weights, x) / total
    if bool(mean.isnan().any()):
        # A weight of zero on a logit of -inf gives NaN, and must add nothing.
        mean = torch.linalg.vecdot(weights, x.clamp(min=torch.finfo(torch.float32).min)) / total
    lse = top + total.log()
    return Confidence(argmax, 1 / total, lse - mean, lse)

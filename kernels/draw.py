"""Draws one token a row: temperature, then top_k, then top_p, then min_p, then the row's one random number.

With weights w = exp(x / temperature): top_k keeps the k likeliest; top_p, of these likeliest first, each before which
less than top_p of their sum has come, so at least one; min_p those whose weight is at least min_p of the largest. Of
what is kept, in order, the first is drawn at which the sum of weights exceeds `uniform` of the whole. The order is that
of token ids where neither top_k nor top_p leaves anything out, and else from the likeliest on, equal ones by token id.
So a row's token depends on its own logits and numbers alone.

A row with NaN or +inf, or with nothing but -inf, gives some token: a caller must look at its log-sum-exp.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from minirksc.kernels.native.check import is_rows, refused
from minirksc.kernels.native.ops import native

NEG_INF = float("-inf")
FIRST_WIDTH = 512


class Draw(NamedTuple):
    """How one row is drawn.

    Attributes:
        temperature: divisor of the logits, above 0.
        top_k: number of likeliest tokens that remain; 0: all.
        top_p: share of the probability that the likeliest tokens which remain reach together; 1: all of it.
        min_p: smallest weight that remains, in shares of the largest; 0: any.
        uniform: random number, in [0, 1).
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    uniform: float

    def is_truncated(self, vocab: int) -> bool:
        """Whether top_k or top_p may leave something out."""
        return 0 < self.top_k < vocab or self.top_p != 1


def draw_torch(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """The specification, in float64.

    Args:
        logits: `[rows, vocab]` float32; not changed.
        draws: numbers of each row.

    Returns:
        Token ids, `[rows]` int64.
    """
    token_ids = torch.empty(len(draws), dtype=torch.int64, device=logits.device)
    # Truncation puts candidates in another order, and the order decides what a random number means: apart, so
    # that no row's token depends on what its batch mates ask for.
    for truncated in (False, True):
        if group := [i for i, draw in enumerate(draws) if draw.is_truncated(logits.shape[-1]) is truncated]:
            token_ids[group] = _draw(logits[group], [draws[i] for i in group], truncated)
    return token_ids


def draw_native(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """The same with float32 weights and float64 sums, in one pass over the logits and a sort of few.

    Raises:
        ConfigError: it would misread the logits.
    """
    vocab = logits.shape[-1] if isinstance(logits, Tensor) and logits.dim() else 0
    rows = len(draws)
    if not is_rows(logits, torch.float32, rows, vocab) or vocab == 0:
        raise refused("logits", logits, f"[{rows}, vocab] float32 of the CPU, a row for each draw")
    if vocab > 1 and logits.stride(1) != 1:
        logits = logits.contiguous()
    numbers = torch.tensor([[d.temperature, d.top_p, d.min_p, d.uniform] for d in draws], dtype=torch.float64)
    top_k = torch.tensor([d.top_k for d in draws], dtype=torch.int64)
    token_ids = torch.empty(rows, dtype=torch.int64)
    native.draw(logits, numbers, top_k, token_ids, rows, vocab, logits.stride(0))
    return token_ids


def _draw(logits: Tensor, draws: Sequence[Draw], truncated: bool) -> Tensor:
    def column(numbers: Sequence[float]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.float64, device=logits.device).unsqueeze(-1)

    scores = logits.double() / column([draw.temperature for draw in draws])  # [rows, vocab]
    ids = None
    if truncated:
        scores, ids = _truncate(scores, draws, column([draw.top_p for draw in draws]))  # [rows, candidates]
    probs = scores.softmax(-1)
    if any(draw.min_p for draw in draws):
        probs[probs < column([draw.min_p for draw in draws]) * probs.amax(-1, keepdim=True)] = 0
    cumulative = probs.cumsum(-1)
    # The first token whose cumulative probability exceeds u * total; one of probability zero never does.
    target = column([draw.uniform for draw in draws]) * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, target, right=True)  # [rows, 1]
    last = (probs > 0).cumsum(-1).argmax(-1, keepdim=True)  # where rounding takes u ~ 1 past the end
    drawn = torch.minimum(drawn, last)
    return (drawn if ids is None else ids.gather(-1, drawn)).squeeze(-1)


def _truncate(scores: Tensor, draws: Sequence[Draw], top_p: Tensor) -> tuple[Tensor, Tensor]:
    """Top_k, then top_p.

    Args:
        scores: `[rows, vocab]` float64.
        draws: numbers of each row, of which top_k is read.
        top_p: `[rows, 1]` float64.

    Returns:
        (scores, token ids), each `[rows, candidates]`, likeliest first; -inf for what drops out.
    """
    vocab_size = scores.shape[-1]
    top_k = [draw.top_k if 0 < draw.top_k < vocab_size else vocab_size for draw in draws]
    limit = torch.tensor(top_k, device=scores.device).unsqueeze(-1)  # [rows, 1]
    # Sorting a whole vocabulary is slow and its tail is almost never needed: try few, then more.
    explicit = [2 * k for k in top_k if k < vocab_size]
    width = min(vocab_size, max([FIRST_WIDTH, *explicit]))
    while True:
        columns = torch.arange(width, device=scores.device)
        ids = scores.topk(width).indices.sort(-1).values
        # Equal scores are taken in order of token id, which topk does not promise.
        ordered, order = scores.gather(-1, ids).sort(dim=-1, descending=True, stable=True)
        ids = ids.gather(-1, order)
        # Of the tokens as likely as the last candidate, topk took any: only those before them are sure.
        border = ordered[:, -1:].clone()
        num_sure = (ordered > border).sum(-1, keepdim=True)  # [rows, 1]
        ordered[columns >= limit] = NEG_INF
        all_of_them = (scores if width < vocab_size else ordered).logsumexp(-1, keepdim=True)
        total = torch.where(limit <= width, ordered.logsumexp(-1, keepdim=True), all_of_them)
        cumulative = (ordered - total).exp().cumsum(-1)
        reached = ((cumulative > top_p) & (columns < num_sure)).any(-1, keepdim=True)
        if width == vocab_size or bool(((limit <= num_sure) | reached | border.isneginf()).all()):
            break
        width = min(width * 16, vocab_size)
    # A token stays while those before it do not reach top_p: at least one always does.
    before = cumulative - (ordered - total).exp()
    ordered[(before >= top_p) & (top_p < 1)] = NEG_INF
    return ordered, ids

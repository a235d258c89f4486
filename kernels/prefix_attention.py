"""Shared prefixes: which sequences share which leading blocks, and how partial attentions are merged.

Sequences whose block tables begin with the same block ids attend to the same keys there. `shared_segments`
finds those runs, nested ones included (a reasoning tree), so that the attention reads each shared run once
for all its queries. Partial results over disjoint key sets merge exactly by their log-sum-exp.

Source: Juravsky et al. 2024, arXiv 2402.05099 (Hydragen); Ye et al. 2024 (cascade inference),
https://flashinfer.ai/2024/02/02/cascade-inference.html.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

MIN_SHARED_BLOCKS = 4
"""Shorter shared runs cost more in the extra pass and merge than reading them again."""


class Segment(NamedTuple):
    """Rows [row_begin, row_end) share block-table columns [block_begin, block_end)."""

    row_begin: int
    row_end: int
    block_begin: int
    block_end: int


def common_prefix_len(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common prefix, by bisection over slice comparisons."""
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low


def shared_segments(
    block_tables: Sequence[Sequence[int]], num_full_blocks: Sequence[int]
) -> tuple[list[int], list[Segment]]:
    """Orders rows so that sharers are neighbours, and lists what they share.

    Args:
        block_tables: one a row.
        num_full_blocks: per row, how many leading blocks may be shared (those that only hold keys which
            every query of the row may see).

    Returns:
        (order, segments): order[i] is the row at place i; segments speak of places, outer ones come before those
        nested in them.
    """
    tables = [list(table[:n]) for table, n in zip(block_tables, num_full_blocks, strict=True)]
    order = sorted(range(len(tables)), key=lambda row: tables[row])
    segments: list[Segment] = []

    def descend(begin: int, end: int, column: int) -> None:
        """Places [begin, end) are known to agree before `column`."""
        start = begin
        while start < end:
            table = tables[order[start]]
            stop = start + 1
            if column < len(table):
                # Sorted rows: those that agree on this column are neighbours.
                while stop < end and tables[order[stop]][column : column + 1] == [table[column]]:
                    stop += 1
            if stop - start > 1:
                # In sorted order the first and the last row have the shortest common prefix of all.
                depth = common_prefix_len(table, tables[order[stop - 1]])
                shared_from = column
                if depth - column >= MIN_SHARED_BLOCKS:
                    segments.append(Segment(start, stop, column, depth))
                    shared_from = depth
                if shared_from == depth:
                    descend(start, stop, depth)
            start = stop

    descend(0, len(order), 0)
    return order, segments


def merge_partials_reference(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The specification: attention over the union of disjoint key sets.

    Args:
        outs: each `[rows, heads, head_dim]`, softmax-normalised over its own keys.
        lses: each `[rows, heads]`, natural log-sum-exp of its own scores; -inf where it saw no key.

    Returns:
        (out `[rows, heads, head_dim]`, lse `[rows, heads]`), float32.
    """
    lse = torch.logsumexp(torch.stack([x.float() for x in lses]), dim=0)
    weights = [torch.exp(x.float() - lse).nan_to_num_(0.0) for x in lses]
    parts = [
        torch.where(w.unsqueeze(-1) > 0, w.unsqueeze(-1) * out.float(), 0.0)
        for w, out in zip(weights, outs, strict=True)
    ]
    return torch.stack(parts).sum(0), lse


def merge_into(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> None:
    """Merges a second partial into the first, in place; both must have seen at least one key.

    exp(b) / (exp(a) + exp(b)) = sigmoid(b - a), so two partials merge with one interpolation.

    Args:
        out: `[rows, heads, head_dim]`, overwritten.
        lse: `[rows, heads]` float32, overwritten.
        other: like out.
        other_lse: like lse.
    """
    weight = torch.sigmoid(other_lse - lse).unsqueeze(-1)  # [rows, heads, 1]
    out.lerp_(other, weight.to(out.dtype))
    torch.logaddexp(lse, other_lse, out=lse)

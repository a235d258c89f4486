"""Shared prefixes: which sequences share which leading blocks, and how partial attentions are merged.

Sequences whose block tables begin with the same block ids attend to the same keys there. `shared_segments`
finds those runs, nested ones included (a reasoning tree), so that the attention reads each shared run once
for all its queries. Partial results over disjoint key sets merge exactly by their log-sum-exp.

Source: Juravsky et al. 2024, arXiv 2402.05099 (Hydragen); Ye et al. 2024 (cascade inference),
https://flashinfer.ai/2024/02/02/cascade-inference.html.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from minirksc.kernels.attention.batch import AttentionBatch
from minirksc.kernels.jit import launch_options, tl, triton

MIN_SHARED_BLOCKS = 4
"""Shorter shared runs cost more in the extra pass and merge than reading them again."""

MIN_GAIN = 2.0
"""A shared pass must save so many times what it costs: its readers' own pass was perhaps served by the L2 cache."""


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
        block_tables: block ids of each row.
        num_full_blocks: number of leading blocks of each row that may be shared: those that only hold keys which every
            query of the row may see.

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
            block, stop = table[column : column + 1], start + 1
            # Sorted rows: those that agree on this column are neighbours.
            while block and stop < end and tables[order[stop]][column : column + 1] == block:
                stop += 1
            if stop - start > 1:
                # In sorted order the first and the last row have the shortest common prefix of all.
                common = common_prefix_len(table, tables[order[stop - 1]])
                if common - column >= MIN_SHARED_BLOCKS:
                    segments.append(Segment(start, stop, column, common))
                    descend(start, stop, common)
            start = stop

    descend(0, len(order), 0)
    return order, segments


def in_view(segments: list[Segment], first_keys: Sequence[int], block_size: int) -> list[Segment]:
    """Segments without the blocks that are not wholly visible to each of their places, if enough of them remains."""
    clipped = []
    for segment in segments:
        first_key = max(first_keys[segment.row_begin : segment.row_end])
        block_begin = max(segment.block_begin, -(-first_key // block_size))
        if block_begin == segment.block_begin or segment.block_end - block_begin >= MIN_SHARED_BLOCKS:
            clipped.append(segment._replace(block_begin=block_begin))
    return clipped


def own_ranges(
    place: int, first_key: int, context_len: int, segments: Sequence[Segment], block_size: int
) -> list[tuple[int, int]]:
    """Positions [begin, end) that a place reads alone: what it sees and none of its segments covers."""
    ranges = []
    begin = first_key
    for segment in segments:
        if segment.row_begin <= place < segment.row_end:  # outer segments come before those nested in them
            if begin < segment.block_begin * block_size:
                ranges.append((begin, segment.block_begin * block_size))
            begin = segment.block_end * block_size
    return [*ranges, (begin, context_len)]


def find_shared(
    batch: AttentionBatch,
    sequences: Sequence[int],
    is_worth: Callable[[Segment, Sequence[int]], bool] = lambda segment, order: True,
) -> tuple[list[int], list[Segment], list[list[tuple[int, int]]]]:
    """Finds what sequences with few new tokens share, so that it is read once.

    The block that holds the first of its new tokens stays a sequence's own, so that each has keys of its own.

    Args:
        batch: places of queries and keys.
        sequences: indices of the sequences.
        is_worth: whether a segment, of places in this order, is to be read once.

    Returns:
        (order, segments, own): indices of the sequences in the batch, those that share side by side, a place being an
        index into this; runs of blocks that neighbouring places read together; positions [begin, end) that each place
        reads alone, never nothing.
    """
    size = batch.block_size
    firsts = {i: batch.context_lens[i] - batch.num_queries(i) for i in sequences}  # positions of the first queries
    places, segments = shared_segments(
        [batch.block_tables[i] for i in sequences], [firsts[i] // size for i in sequences]
    )
    order = [sequences[place] for place in places]
    # A segment is read unmasked: by those that see all of it, the last of their queries included.
    last_first_keys = [batch.first_visible(batch.context_lens[i] - 1) for i in order]
    segments = [segment for segment in in_view(segments, last_first_keys, size) if is_worth(segment, order)]
    own = [
        own_ranges(place, batch.first_visible(firsts[i]), batch.context_lens[i], segments, size)
        for place, i in enumerate(order)
    ]
    return order, segments, own


def is_worth_sharing(group: int, *, num_sequences: int, num_queries: int, num_keys: int, kv_itemsize: int) -> bool:
    """True where one pass over a shared run moves fewer bytes than its readers would, by `MIN_GAIN`.

    Reading it once saves the other readers' reads, and costs one more partial a query: written and read again, in
    float32. Both are per KV head and element of a head, so that these cancel. There is no further launch to pay: the
    shared runs are items among the others.

    Args:
        group: number of query heads a KV head.
        num_sequences: number of readers.
        num_queries: number of queries of all readers.
        num_keys: number of tokens of the run.
        kv_itemsize: bytes of a cached number.
    """
    saved = (num_sequences - 1) * num_keys * 2 * kv_itemsize
    cost = num_queries * group * 2 * 4
    return saved > MIN_GAIN * cost


def merge_partials_reference(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The specification: attention over the union of disjoint key sets.

    Args:
        outs: results `[rows, heads, head_dim]`, each softmax-normalised over its own keys.
        lses: log-sum-exp (natural) `[rows, heads]` of the scores of each; -inf where it saw no key.

    Returns:
        (out `[rows, heads, head_dim]`, lse `[rows, heads]`), float32.
    """
    lse = torch.logsumexp(torch.stack([x.float() for x in lses]), dim=0)
    parts = []
    for out, own in zip(outs, lses, strict=True):
        weight = torch.where(own.isneginf(), 0.0, torch.exp(own.float() - lse)).unsqueeze(-1)
        parts.append(torch.where(weight == 0, 0.0, weight * out.float()))
    return torch.stack(parts).sum(0), lse


def merge_into(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> None:
    """Merges a second partial into the first, in place; both must have seen at least one key.

    exp(b) / (exp(a) + exp(b)) = sigmoid(b - a), so two partials merge with one interpolation.

    Args:
        out: `[rows, heads, head_dim]`, overwritten.
        lse: `[rows, heads]` float32, overwritten.
        other: `[rows, heads, head_dim]`.
        other_lse: `[rows, heads]` float32.
    """
    weight = torch.sigmoid(other_lse - lse).unsqueeze(-1)  # [rows, heads, 1]
    out.lerp_(other, weight.to(out.dtype))
    torch.logaddexp(lse, other_lse, out=lse)


@triton.jit
def _merge_partials_kernel(
    part_out_ptr,
    part_lse_ptr,
    parts_ptr,
    out_ptr,
    lse_ptr,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Program (token, head): all partials of one query, PARTS at a time."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    begin = tl.load(parts_ptr + 2 * token)
    num_parts = tl.load(parts_ptr + 2 * token + 1)
    if num_parts == 1:  # written already
        return
    offs_d = tl.arange(0, HEAD_PAD)
    offs_p = tl.arange(0, PARTS)
    m = float("-inf")
    total = 0.0
    acc = tl.zeros([HEAD_PAD], tl.float32)
    for first in range(0, num_parts, PARTS):
        is_part = first + offs_p < num_parts
        rows = (begin + first + offs_p).to(tl.int64) * NUM_HEADS + head  # [PARTS]
        lse = tl.load(part_lse_ptr + rows, mask=is_part, other=float("-inf"))
        mask = (lse != float("-inf"))[:, None] & (offs_d < HEAD_DIM)[None, :]  # NaN is read
        part = tl.load(part_out_ptr + rows[:, None] * HEAD_DIM + offs_d[None, :], mask=mask, other=0.0)
        new_m = tl.maximum(m, tl.max(lse, 0))
        shift = tl.where(new_m == float("-inf"), 0.0, new_m)
        weights = tl.exp2(lse - shift)  # [PARTS]
        decay = tl.exp2(m - shift)
        acc = acc * decay + tl.sum(weights[:, None] * part, 0)
        total = total * decay + tl.sum(weights, 0)
        m = new_m
    acc = acc / tl.where(num_parts == 0, 1.0, total)
    row = token * NUM_HEADS + head
    tl.store(out_ptr + row * HEAD_DIM + offs_d, acc.to(out_ptr.dtype.element_ty), mask=offs_d < HEAD_DIM)
    if lse_ptr is not None:
        tl.store(lse_ptr + row, m + tl.log2(total))


def merge_partials_triton(part_out: Tensor, part_lse: Tensor, parts: Tensor, out: Tensor, lse: Tensor | None) -> None:
    """Merges each token's partials; a token with one has its result already, a token without any gets zeros.

    Args:
        part_out: `[partials, num_heads, head_dim]` float32.
        part_lse: `[partials, num_heads]` float32, base 2.
        parts: `[tokens, 2]` int32, first partial of each token, and how many it has.
        out: `[tokens, num_heads, head_dim]`, written.
        lse: `[tokens, num_heads]` float32, base 2, written; None: not wanted.
    """
    num_heads, head_dim = out.shape[1:]
    head_pad = triton.next_power_of_2(head_dim)
    _merge_partials_kernel[(len(parts), num_heads)](
        part_out,
        part_lse,
        parts,
        out,
        lse,
        NUM_HEADS=num_heads,
        HEAD_DIM=head_dim,
        HEAD_PAD=head_pad,
        PARTS=max(2, min(16, 4096 // head_pad)),
        **launch_options(4, num_stages=None),
    )

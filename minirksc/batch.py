"""From a schedule to the tensors of one forward pass."""

from dataclasses import dataclass

import torch
from torch import Tensor

from minirksc.kernels.paged_attention import AttentionBatch
from minirksc.rsbcm import BlockManager
from minirksc.scheduler import Schedule, ScheduledRequest


@dataclass(frozen=True, slots=True)
class LogitsRows:
    """Rows of the logits that belong to one scheduled request: `[begin, end)`, from position `first` on."""

    item: ScheduledRequest
    begin: int
    end: int
    first: int


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """One step's input; tokens of all requests are flattened into one dimension.

    Attributes:
        token_ids: `[tokens]` int64.
        positions: `[tokens]` int64, place of each token in its sequence.
        slots: `[tokens]` int64, block_id * block_size + offset.
        attention: where queries and keys are.
        logits_rows: `[rows]` int64, tokens whose logits are computed; None: all of them.
        wanted: whose logits these are, in order.
        copies: (source, destination) blocks to copy before anything is written.
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    attention: AttentionBatch
    logits_rows: Tensor | None
    wanted: list[LogitsRows]
    copies: list[tuple[int, int]]


def build_batch(step: Schedule, blocks: BlockManager, device: torch.device) -> ForwardBatch:
    """Flattens what the scheduler chose."""
    size = blocks.block_size
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    cu_seqlens_q = [0]
    logits_rows: list[int] = []
    wanted: list[LogitsRows] = []
    for item in step.scheduled:
        sequence = item.request.sequence
        end = item.first + item.num_tokens
        table = blocks.block_table(sequence.seq_id)
        row = len(token_ids)
        token_ids += sequence.token_ids[item.first : end]
        positions += range(item.first, end)
        slots += [table[p // size] * size + p % size for p in range(item.first, end)]
        cu_seqlens_q.append(len(token_ids))
        first = _first_logits_position(item)
        if first < end:
            begin = len(logits_rows)
            logits_rows += range(row + first - item.first, row + item.num_tokens)
            wanted.append(LogitsRows(item, begin, len(logits_rows), first))
    return ForwardBatch(
        token_ids=torch.tensor(token_ids, device=device),
        positions=torch.tensor(positions, device=device),
        slots=torch.tensor(slots, device=device),
        attention=AttentionBatch(
            cu_seqlens_q=cu_seqlens_q,
            context_lens=[item.first + item.num_tokens for item in step.scheduled],
            block_tables=[blocks.block_table(i.request.sequence.seq_id) for i in step.scheduled],
            block_size=size,
            device=device,
        ),
        logits_rows=None
        if len(logits_rows) == len(token_ids)
        else torch.tensor(logits_rows, dtype=torch.int64, device=device),
        wanted=wanted,
        copies=[copy for item in step.scheduled for copy in item.copies],
    )


def _first_logits_position(item: ScheduledRequest) -> int:
    """First position of the item whose logits are wanted; its end when none is."""
    end = item.first + item.num_tokens
    start = end
    if item.request.logits_start is not None:
        start = max(item.first, item.request.logits_start)
    if item.completes and item.request.checker is not None:
        start = min(start, end - 1)
    return min(start, end)

"""From a schedule to the tensors of one forward pass."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minirksc.cache.rsbcm import BlockCopy, BlockManager
from minirksc.engine.scheduler import ScheduledRequest
from minirksc.kernels.attention.batch import AttentionBatch


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
        sequence_lens: `[tokens]` int64, known length of each token's sequence, tokens of later steps included.
        attention: places of queries and keys, by the window of the layers.
        logits_rows: `[rows]` int64, tokens whose logits are computed; None: all of them.
        wanted: requests whose logits these are, in order, and which of the rows.
        copies: blocks to copy before anything is written.
    """

    token_ids: Tensor
    positions: Tensor
    sequence_lens: Tensor
    attention: dict[int | None, AttentionBatch]
    logits_rows: Tensor | None
    wanted: list[LogitsRows]
    copies: list[BlockCopy]

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """(token_ids, positions, sequence_lens): what a pass begins with."""
        return self.token_ids, self.positions, self.sequence_lens


def build_batch(
    items: Sequence[ScheduledRequest],
    blocks: BlockManager,
    windows: Collection[int | None],
    device: torch.device,
    key_chunk: int | None,
) -> ForwardBatch:
    """Flattens what the scheduler chose.

    Args:
        items: what the scheduler chose.
        blocks: block manager that has the tables of their sequences.
        windows: windows of the model's layers.
        device: device of the tensors.
        key_chunk: keys that one program reads at most, see `AttentionBatch`.
    """
    token_ids: list[int] = []
    positions: list[int] = []
    sequence_lens: list[int] = []
    cu_seqlens_q = [0]
    logits_rows: list[int] = []
    wanted: list[LogitsRows] = []
    for item in items:
        tokens = item.request.sequence.token_ids
        end = item.first + item.num_tokens
        row = len(token_ids)
        token_ids += tokens[item.first : end]
        positions += range(item.first, end)
        sequence_lens += [len(tokens)] * item.num_tokens
        cu_seqlens_q.append(len(token_ids))
        first = _first_logits_position(item)
        if first < end:
            begin = len(logits_rows)
            logits_rows += range(row + first - item.first, row + item.num_tokens)
            wanted.append(LogitsRows(item, begin, len(logits_rows), first))
    size = blocks.block_size
    seq_ids = [item.request.sequence.seq_id for item in items]
    context_lens = [item.first + item.num_tokens for item in items]
    block_tables = [blocks.block_table(seq_id) for seq_id in seq_ids]
    window_tables = [blocks.window_table(seq_id) for seq_id in seq_ids] if any(windows) else []

    def attention(window: int | None) -> AttentionBatch:
        kv_tables = block_tables if window is None else window_tables
        slots: list[int] = []
        for item, table in zip(items, kv_tables, strict=True):
            slots += slots_at(table, range(item.first, item.first + item.num_tokens), size)
        return AttentionBatch(
            cu_seqlens_q,
            context_lens,
            block_tables,
            kv_tables,
            torch.tensor(slots, device=device),
            block_size=size,
            device=device,
            window=window,
            key_chunk=key_chunk,
        )

    return ForwardBatch(
        token_ids=torch.tensor(token_ids, device=device),
        positions=torch.tensor(positions, device=device),
        sequence_lens=torch.tensor(sequence_lens, device=device),
        attention={window: attention(window) for window in windows},
        logits_rows=None
        if len(logits_rows) == len(token_ids)
        else torch.tensor(logits_rows, dtype=torch.int64, device=device),
        wanted=wanted,
        copies=[copy for item in items for copy in item.copies],
    )


def slots_at(table: Sequence[int], positions: Iterable[int], block_size: int) -> list[int]:
    """Where the KV of tokens lies in a cache: one slot for each of these positions.

    Args:
        table: places of the sequence's blocks in that cache, in order of position.
        positions: positions of the tokens.
        block_size: number of tokens a block.
    """
    return [table[p // block_size] * block_size + p % block_size for p in positions]


def _first_logits_position(item: ScheduledRequest) -> int:
    """First position of the item whose logits are wanted; its end when none is."""
    request, end = item.request, item.first + item.num_tokens
    # The next token is drawn from the last one's logits.
    first = end - 1 if item.completes and request.checker is not None else end
    return first if request.logits_start is None else min(first, max(item.first, request.logits_start))

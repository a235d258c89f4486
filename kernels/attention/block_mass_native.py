"""Attention with the mass of each block (`block_mass`) on a cache of tiles, for decode steps.

The compiled attention leaves, where it is asked to, the sum of the weights of each tile in a piece of the keys
(`paged_attention_native`). Relative to the whole row's, these are mass; a block is some tiles.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minirksc.kernels.attention.batch import AttentionBatch
from minirksc.kernels.attention.block_mass import check_decode
from minirksc.kernels.attention.block_mass_torch import paged_attention_mass_torch
from minirksc.kernels.attention.paged_attention_native import (
    PIECE_TILES,
    WHOLE,
    TableWithSums,
    attend_rows,
    check_layout,
)
from minirksc.kernels.kv.layer_cache import TILE, LayerCache


def paged_attention_mass_native(
    q: Tensor, kv: Tensor, layer_cache: LayerCache, batch: AttentionBatch, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Arguments, result and errors as in `paged_attention_mass_reference`, and those of `paged_attention_native`.

    Its `out` is that of `paged_attention_native`.
    """
    if not layer_cache.is_tiled:
        return paged_attention_mass_torch(q, kv, layer_cache, batch, scale, softcap)
    check_decode(batch)
    plan = batch.plan(*WHOLE)
    plan.check(len(q), check_layout(q, layer_cache, batch.block_size, softcap))
    out = q.new_empty(q.shape)
    table = plan.table_with_sums(*q.shape[1:])
    attend_rows(q, layer_cache, out, table.table, batch.window, scale, softcap)
    return out, block_mass(batch, table)


@dataclass(frozen=True, slots=True)
class _Cells:
    """Where the sums of tiles go; made once a step.

    Attributes:
        rows: `[rows]` int64, batch row of each row of the partial results.
        cells: `[rows, PIECE_TILES]` int64, place of each tile's block in the flattened mass; one past the end where a
            piece has fewer tiles.
        width: number of blocks of the longest sequence.
    """

    rows: Tensor
    cells: Tensor
    width: int


def _find_cells(batch: AttentionBatch) -> _Cells:
    plan = batch.plan(*WHOLE)
    width = max(map(len, batch.kv_tables))
    nowhere = len(batch.kv_tables) * width
    columns = [{block_id: column for column, block_id in enumerate(table)} for table in batch.kv_tables]
    place_rows, runs = plan.rows.tolist(), plan.runs.tolist()
    rows: list[int] = []
    cells: list[list[int]] = []
    for begin, end, run_begin, run_end, *_ in plan.pieces.tolist():
        block_ids = _block_ids(runs[run_begin:run_end], batch.block_size)
        for row in place_rows[begin:end]:
            own = [row * width + columns[row][block_id] for block_id in block_ids]
            rows.append(row)
            cells.append(own + [nowhere] * (PIECE_TILES - len(own)))
    return _Cells(torch.tensor(rows), torch.tensor(cells), width)


def _block_ids(runs: Sequence[Sequence[int]], block_size: int) -> list[int]:
    """The block of each tile in which the runs (first slot, keys) have keys."""
    return [
        tile * TILE // block_size
        for first, length in runs
        for tile in range(first // TILE, (first + length - 1) // TILE + 1)
    ]


def block_mass(batch: AttentionBatch, table: TableWithSums) -> Tensor:
    """`[sequences, blocks]` float32 as of `block_mass_reference`, of the sums that a call has found.

    In numpy, since torch would wake its threads for so little, and they wait for more in the way of ours.

    Args:
        batch: batch of decode rows.
        table: table of its plan, as the call has filled it in.
    """
    found = batch.plan("native mass", _find_cells)
    rows, num_rows = found.rows.numpy(), len(batch.kv_tables)
    largest, totals = np.moveaxis(table.sums.numpy(), -1, 0)  # [rows, num_heads]
    tile_totals, relative_to = np.moveaxis(table.tile_sums.numpy(), -1, 0)  # [rows, num_heads, PIECE_TILES]
    of_row = np.full((num_rows, largest.shape[1]), -np.inf, largest.dtype)
    np.maximum.at(of_row, rows, largest)
    whole = np.zeros_like(of_row)
    with np.errstate(invalid="ignore"):  # of a row that is not finite
        np.add.at(whole, rows, totals * np.exp(largest - of_row[rows]))
        # No score is above its row's largest; where a piece has no tile, 0 must stay 0.
        fade = np.exp(np.minimum(relative_to - of_row[rows][..., None], 0))
        shares = (tile_totals * fade / whole[rows][..., None]).mean(1)  # [rows, PIECE_TILES]
    mass = np.bincount(found.cells.numpy().ravel(), shares.ravel(), minlength=num_rows * found.width + 1)
    return torch.from_numpy(mass[:-1].reshape(num_rows, found.width)).float()

"""KV that tokens of one sequence use of another one: what becomes of a `Borrow`, layer by layer.

The borrowed KV is copied to where that of the tokens themselves would be, its keys turned to their positions. So a
later step, and the attention of this one, see nothing of it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from minirksc.cache.rsbcm import BlockManager
from minirksc.engine.batch import ForwardBatch, slots_at
from minirksc.engine.gates import Borrow
from minirksc.engine.runner import Runner


@dataclass(frozen=True, slots=True)
class _Loan:
    """Slots `[tokens]` int64 by window, and by how many positions the tokens were moved."""

    sources: dict[int | None, Tensor]
    destinations: dict[int | None, Tensor]
    shifts: Tensor  # [tokens] int64


class Loans:
    """What is borrowed in one step.

    Args:
        batch: the whole step.
        blocks: block manager that has the tables of all sequences.
        runner: model and cache.
    """

    def __init__(self, batch: ForwardBatch, blocks: BlockManager, runner: Runner) -> None:
        self._batch, self._blocks, self._runner = batch, blocks, runner
        self._loans: list[_Loan] = []

    def add(self, borrow: Borrow, first_row: int, first_position: int) -> None:
        """Notes what a request borrows.

        Args:
            borrow: decision of a gate.
            first_row: row of the request's first token in the whole batch.
            first_position: position of that token.
        """
        device = self._batch.token_ids.device
        rows = torch.tensor([first_row + offset for offset in borrow.offsets], device=device)
        sources: dict[int | None, Tensor] = {}
        destinations: dict[int | None, Tensor] = {}
        for window, attention in self._batch.attention.items():
            table_of = self._blocks.block_table if window is None else self._blocks.window_table
            slots = slots_at(table_of(borrow.seq_id), borrow.positions, attention.block_size)
            sources[window] = torch.tensor(slots, device=device)
            destinations[window] = attention.slots[rows]
        shifts = [first_position + o - p for o, p in zip(borrow.offsets, borrow.positions, strict=True)]
        self._loans.append(_Loan(sources, destinations, torch.tensor(shifts, device=device)))

    def copy(self, layer: int) -> None:
        """Copies what is borrowed within the cache of a layer, before that is computed."""
        model, cache = self._runner.model, self._runner.cache.layers[layer]
        window = model.spec.layers[layer].window
        for loan in self._loans:
            model.copy_kv(layer, cache, loan.sources[window], loan.destinations[window], loan.shifts)

"""What gates do to one step: they are asked between layers, and the batch becomes smaller.

A row is a token of the flattened batch. A request that lost rows in its midst is several runs of rows; to the attention
each run is a sequence of its own with the same blocks, whose keys end where the run does.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minirksc.cache.rsbcm import BlockManager
from minirksc.engine.batch import ForwardBatch, LogitsRows
from minirksc.engine.gates import Borrow, GateRows, LayerGate, Leave
from minirksc.engine.loans import Loans
from minirksc.engine.request import Request
from minirksc.engine.runner import Runner
from minirksc.engine.scheduler import ScheduledRequest
from minirksc.errors import ConfigError, brief
from minirksc.kernels.attention.batch import AttentionBatch
from minirksc.models.hooks import LayerControl, Narrowed
from minirksc.models.layers import ResidualStream


@dataclass(slots=True, eq=False)
class _Part:
    """One request: its rows of the whole batch begin at `begin`; `rows` are those that are still computed."""

    item: ScheduledRequest
    begin: int
    rows: list[int]


class GatedPass:
    """One step's way through the layers: every row goes through all of them, unless a gate decides otherwise.

    Args:
        items: what was scheduled, in the order of the batch.
        batch: the whole step.
        blocks: the block manager, for the tables of any sequence.
        runner: model and cache.

    Attributes:
        wanted: rows of the logits that the pass gives, of the requests that went through all layers.
        departed: requests that departed as a whole -> layers that they went through.
        borrowed: requests that use borrowed KV -> position of the first such token.
        num_departed_rows: rows that departed.
        num_saved_layer_rows: these rows times the layers that they were spared.
    """

    def __init__(
        self, items: Sequence[ScheduledRequest], batch: ForwardBatch, blocks: BlockManager, runner: Runner
    ) -> None:
        self.wanted = batch.wanted
        self.departed: dict[Request, int] = {}
        self.borrowed: dict[Request, int] = {}
        self.num_departed_rows = 0
        self.num_saved_layer_rows = 0
        self._batch = batch
        self._num_layers = runner.model.spec.num_layers
        self._loans = Loans(batch, blocks, runner)
        seats = [item.request.seat for item in items]
        asks = any(seat is not None and seat.gate.layers for seat in seats)
        self._parts = _parts(items) if asks else {}
        undecided: dict[int, tuple[LayerGate, dict[int, _Part]]] = {}
        for part, seat in zip(self._parts.values(), seats, strict=False):
            if seat is not None:
                _, of_gate = undecided.setdefault(id(seat.gate), (seat.gate, {}))
                of_gate[seat.row] = part
        # Each gate with the requests that it has not yet decided about, by the rows' names.
        self._undecided = list(undecided.values())

    @property
    def control(self) -> LayerControl | None:
        """What is to be asked between layers; None: nothing, since no request sits at a gate that is asked."""
        return self if self._undecided else None

    def after_layer(self, layer: int, stream: ResidualStream) -> Narrowed | None:
        """Asks the gates of this layer; see `models.hooks.LayerControl`."""
        asked = [(gate, parts) for gate, parts in self._undecided if parts and layer in gate.layers]
        places = {row: place for place, row in enumerate(self._rows())} if asked else {}
        has_changed = False
        for gate, parts in asked:
            for row, decision in gate.after_layer(layer, self._gate_rows(parts, stream, places)).items():
                if row not in parts or not isinstance(decision, (Leave, Borrow)):
                    raise ConfigError(
                        f"a gate decided {brief(decision)} for row {brief(row)} after layer {layer}; it gives "
                        "LEAVE or Borrow(...), for rows that it was shown; leave out those that go on"
                    )
                self._apply(layer, parts.pop(row), decision)
                has_changed = True
        if layer + 1 < self._num_layers:
            self._loans.copy(layer + 1)
        return self._narrow(places) if has_changed else None

    def _rows(self) -> list[int]:
        """Rows that are still computed, in the order of the stream."""
        return [row for part in self._parts.values() for row in part.rows]

    def _gate_rows(self, of_gate: dict[int, _Part], stream: ResidualStream, places: dict[int, int]) -> GateRows:
        parts = list(of_gate.values())

        def read(rows: list[int]) -> Tensor:
            return stream.at(torch.tensor([places[row] for row in rows], device=self._batch.token_ids.device))

        return GateRows(
            rows=list(of_gate),
            ends=[part.item.completes for part in parts],
            positions=[range(part.item.first, part.item.first + part.item.num_tokens) for part in parts],
            last=lambda: read([part.rows[-1] for part in parts]),
            hidden=lambda index: read(parts[index].rows),
        )

    def _apply(self, layer: int, part: _Part, decision: Leave | Borrow) -> None:
        request = part.item.request
        if isinstance(decision, Borrow):
            gone = {part.begin + offset for offset in decision.offsets}
            assert part.rows[-1] not in gone, "the last token must stay"
            request.seat = None  # decided: what it generates goes through all layers
            self.borrowed[request] = part.item.first + min(decision.offsets)
            self._loans.add(decision, part.begin, part.item.first)
        else:
            gone = set(part.rows)
            self.departed[request] = layer + 1
        part.rows = [row for row in part.rows if row not in gone]
        num_saved = len(gone) * (self._num_layers - layer - 1)
        request.num_saved_layer_rows += num_saved
        self.num_saved_layer_rows += num_saved
        self.num_departed_rows += len(gone)

    def _narrow(self, before: dict[int, int]) -> Narrowed:
        """The batch without what has departed; `before` is where each row was in the stream."""
        device = self._batch.token_ids.device
        remaining = self._rows()
        places = {row: place for place, row in enumerate(remaining)}
        logits_rows: list[int] = []
        wanted: list[LogitsRows] = []
        for rows in self._batch.wanted:
            part = self._parts[rows.item.request]
            if part.rows:
                begin, first_row = len(logits_rows), part.begin + rows.first - rows.item.first
                logits_rows += [places[first_row + i] for i in range(rows.end - rows.begin)]
                wanted.append(LogitsRows(rows.item, begin, len(logits_rows), rows.first))
        self.wanted = wanted
        return Narrowed(
            rows=torch.tensor([before[row] for row in remaining], dtype=torch.int64, device=device),
            attention={window: self._attention(whole, remaining) for window, whole in self._batch.attention.items()},
            logits_rows=torch.tensor(logits_rows, dtype=torch.int64, device=device),
        )

    def _attention(self, whole: AttentionBatch, remaining: list[int]) -> AttentionBatch:
        cu_seqlens_q = [0]
        context_lens: list[int] = []
        sequences: list[int] = []
        for index, part in enumerate(self._parts.values()):
            for begin, end in _runs(part.rows):
                cu_seqlens_q.append(cu_seqlens_q[-1] + end - begin)
                context_lens.append(part.item.first + end - part.begin)
                sequences.append(index)
        rows = torch.tensor(remaining, dtype=torch.int64, device=whole.device)
        return AttentionBatch(
            cu_seqlens_q,
            context_lens,
            [whole.block_tables[index] for index in sequences],
            [whole.kv_tables[index] for index in sequences],
            whole.slots[rows],
            block_size=whole.block_size,
            device=whole.device,
            window=whole.window,
            key_chunk=whole.key_chunk,
        )


def _parts(items: Sequence[ScheduledRequest]) -> dict[Request, _Part]:
    """The requests of a step, all of their rows still computed."""
    parts: dict[Request, _Part] = {}
    begin = 0
    for item in items:
        parts[item.request] = _Part(item, begin, list(range(begin, begin + item.num_tokens)))
        begin += item.num_tokens
    return parts


def _runs(rows: Sequence[int]) -> Iterator[tuple[int, int]]:
    """[begin, end) of consecutive rows."""
    begin = 0
    for i in range(1, len(rows) + 1):
        if i == len(rows) or rows[i] != rows[i - 1] + 1:
            yield rows[begin], rows[i - 1] + 1
            begin = i

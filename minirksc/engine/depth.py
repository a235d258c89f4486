"""What gates do to one step: they are asked between layers, and the batch becomes smaller.

A row is a token of the flattened batch. A request that lost rows in its midst is several runs of rows; to the attention
each run is a sequence of its own with the same blocks, whose keys end where the run does.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from minirksc.engine.batch import ForwardBatch, LogitsRows
from minirksc.engine.gates import Borrow, DepthGate, GateRows
from minirksc.engine.request import Request
from minirksc.engine.scheduler import ScheduledRequest
from minirksc.kernels.attention.batch import AttentionBatch
from minirksc.models.decoder import Narrowed
from minirksc.models.layers import ResidualStream

KvTable = Callable[[int, int | None], Sequence[int]]
"""Called with (seq_id, window): where each of the sequence's blocks is in the cache of layers with that window."""

CopyKv = Callable[[int, Tensor, Tensor, Tensor], None]
"""Called with (layer, source slots, destination slots, shifts): `models.decoder.Decoder.copy_kv` on the cache."""


@dataclass(slots=True, eq=False)
class _Part:
    """One request: its rows of the whole batch begin at `begin`; `rows` are those that are still computed."""

    item: ScheduledRequest
    begin: int
    rows: list[int]


@dataclass(slots=True)
class _Fill:
    """Tokens that use another sequence's KV: slots `[tokens]` int64 by window, and by how much they were moved."""

    sources: dict[int | None, Tensor]
    destinations: dict[int | None, Tensor]
    shifts: Tensor  # [tokens] int64


@dataclass(slots=True)
class _Watch:
    """A gate and the requests at it that it has not yet decided about, by their names."""

    gate: DepthGate
    parts: dict[int, _Part] = field(default_factory=dict)


class Depth:
    """The gates of one step.

    Args:
        items: of the schedule, in the order of the batch.
        batch: the whole step.
        windows: of each layer.
        kv_table: of any sequence.
        copy_kv: within the cache of one layer.

    Attributes:
        wanted: whose the rows of the logits are.
        left: requests that left as a whole -> layers that they went through.
        borrowed: requests that use borrowed KV -> position of the first such token.
        num_layer_rows: rows computed, summed over layers.
        num_dropped_rows: rows that left.
    """

    def __init__(
        self,
        items: Sequence[ScheduledRequest],
        batch: ForwardBatch,
        windows: Sequence[int | None],
        kv_table: KvTable,
        copy_kv: CopyKv,
    ) -> None:
        self.wanted = batch.wanted
        self.left: dict[Request, int] = {}
        self.borrowed: dict[Request, int] = {}
        self.num_layer_rows = 0
        self.num_dropped_rows = 0
        self._batch = batch
        self._windows = windows
        self._kv_table = kv_table
        self._copy_kv = copy_kv
        self._fills: list[_Fill] = []
        self._parts: dict[Request, _Part] = {}
        watches: dict[int, _Watch] = {}
        begin = 0
        for item in items:
            end = begin + item.num_tokens
            part = self._parts[item.request] = _Part(item, begin, list(range(begin, end)))
            if (seat := item.request.seat) is not None:
                watches.setdefault(id(seat.gate), _Watch(seat.gate)).parts[seat.row] = part
            begin = end
        self._watches = list(watches.values())
        self._rows = list(range(begin))  # still computed, in the order of the stream

    def after_layer(self, layer: int, stream: ResidualStream) -> Narrowed | None:
        """Asks the gates of this layer; see `models.decoder.DepthControl`."""
        self.num_layer_rows += len(self._rows)
        asked = [watch for watch in self._watches if watch.parts and layer in watch.gate.layers]
        has_changed = False
        if asked:
            places = {row: place for place, row in enumerate(self._rows)}
            for watch in asked:
                verdicts = watch.gate.after_layer(layer, self._gate_rows(watch, stream, places))
                for name, verdict in verdicts.items():
                    self._apply(layer, watch.parts.pop(name), verdict)
                    has_changed = True
        narrowed = self._narrow() if has_changed else None
        if layer + 1 < len(self._windows):
            window = self._windows[layer + 1]
            for fill in self._fills:
                self._copy_kv(layer + 1, fill.sources[window], fill.destinations[window], fill.shifts)
        return narrowed

    def _gate_rows(self, watch: _Watch, stream: ResidualStream, places: dict[int, int]) -> GateRows:
        parts = list(watch.parts.values())

        def read(rows: list[int]) -> Tensor:
            return stream.at(torch.tensor([places[row] for row in rows], device=self._batch.token_ids.device))

        return GateRows(
            rows=list(watch.parts),
            ends=[part.item.completes for part in parts],
            positions=[range(part.item.first, part.item.first + part.item.num_tokens) for part in parts],
            last=lambda: read([part.rows[-1] for part in parts]),
            hidden=lambda index: read(parts[index].rows),
        )

    def _apply(self, layer: int, part: _Part, verdict: Borrow | None) -> None:
        request = part.item.request
        num_layers_above = len(self._windows) - layer - 1
        if verdict is None:
            request.num_saved_layer_rows += len(part.rows) * num_layers_above
            self.left[request] = layer + 1
            part.rows = []
            return
        request.num_saved_layer_rows += len(verdict.offsets) * num_layers_above
        request.seat = None  # decided: what it generates goes through all layers
        gone = {part.begin + offset for offset in verdict.offsets}
        part.rows = [row for row in part.rows if row not in gone]
        assert part.rows and part.rows[-1] == part.begin + part.item.num_tokens - 1, "the last token must stay"
        self.borrowed[request] = part.item.first + min(verdict.offsets)
        self._fills.append(self._fill(part, verdict))

    def _fill(self, part: _Part, borrow: Borrow) -> _Fill:
        device = self._batch.token_ids.device
        rows = torch.tensor([part.begin + offset for offset in borrow.offsets], device=device)
        sources: dict[int | None, Tensor] = {}
        destinations: dict[int | None, Tensor] = {}
        for window, attention in self._batch.attention.items():
            size, table = attention.block_size, self._kv_table(borrow.seq_id, window)
            slots = [table[p // size] * size + p % size for p in borrow.positions]
            sources[window] = torch.tensor(slots, device=device)
            destinations[window] = attention.slots[rows]
        shifts = [part.item.first + o - p for o, p in zip(borrow.offsets, borrow.positions, strict=True)]
        return _Fill(sources, destinations, torch.tensor(shifts, device=device))

    def _narrow(self) -> Narrowed:
        """The batch without what has left."""
        device = self._batch.token_ids.device
        before = {row: place for place, row in enumerate(self._rows)}
        self._rows = [row for part in self._parts.values() for row in part.rows]
        self.num_dropped_rows += len(before) - len(self._rows)
        places = {row: place for place, row in enumerate(self._rows)}
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
            rows=torch.tensor([before[row] for row in self._rows], dtype=torch.int64, device=device),
            attention={window: self._attention(whole) for window, whole in self._batch.attention.items()},
            logits_rows=torch.tensor(logits_rows, dtype=torch.int64, device=device),
        )

    def _attention(self, whole: AttentionBatch) -> AttentionBatch:
        cu_seqlens_q = [0]
        context_lens: list[int] = []
        sequences: list[int] = []
        for index, part in enumerate(self._parts.values()):
            for begin, end in _runs(part.rows):
                cu_seqlens_q.append(cu_seqlens_q[-1] + end - begin)
                context_lens.append(part.item.first + end - part.begin)
                sequences.append(index)
        rows = torch.tensor(self._rows, dtype=torch.int64, device=whole.device)
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


def _runs(rows: Sequence[int]) -> Iterator[tuple[int, int]]:
    """[begin, end) of consecutive rows."""
    begin = 0
    for i in range(1, len(rows) + 1):
        if i == len(rows) or rows[i] != rows[i - 1] + 1:
            yield rows[begin], rows[i - 1] + 1
            begin = i

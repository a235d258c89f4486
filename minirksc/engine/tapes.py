"""Decode steps on a CPU in one call: the layers' compiled operations are recorded once for each number of rows.

What a step begins with (embedded tokens, cosines and sines, slots, the plan of its attention) is made anew each time
and copied to where the recording reads it; see `kernels/native/tape.py`. Of a small model a fifth of a step is saved.
"""

import copy
from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor

from minirksc.engine.batch import ForwardBatch
from minirksc.engine.recorded import Recordings, attention_of_buffers
from minirksc.kernels.attention.batch import AttentionBatch
from minirksc.kernels.attention.block_mass_native import block_mass
from minirksc.kernels.attention.paged_attention_native import DECODE, WHOLE, NativePlan, TableWithSums, plan_all
from minirksc.kernels.kv.layer_cache import LayerCache
from minirksc.kernels.native.tape import NativeRecorder
from minirksc.models.decoder import Decoder, LayerFeed
from minirksc.models.hooks import MassSample

MAX_ROWS = 32
"""Beyond, a step computes for much longer than Python takes, and its temporaries would be large."""


class _LayerPlan:
    """The plan of one layer while it is recorded: a table that stays where it is; stands in for `NativePlan`.

    Args:
        table: numbers of the layer's own table, int64; see `NativePlan.table`.
        sizes: gains (tokens, slots) that all later plans must fit.
    """

    prefills: Sequence[Any] = ()
    has_rows = True

    def __init__(self, table: Tensor, sizes: set[tuple[int, int]]) -> None:
        self._table = table
        self._sizes = sizes

    def check(self, num_tokens: int, num_slots: int) -> None:
        """See `NativePlan.check`."""
        self._sizes.add((num_tokens, num_slots))

    def table(self, num_heads: int, head_dim: int) -> Tensor:
        """See `NativePlan.table`."""
        return self._table


class _Tables:
    """The tables of all layers of one window and head_dim: one tensor, filled at once.

    Args:
        layers: indices of the layers.
        size: (heads, head_dim).
        plan: plan of the step that is recorded.

    Attributes:
        plan_of: layer -> the plan that it is recorded with.
    """

    def __init__(self, layers: Sequence[int], size: tuple[int, int], plan: NativePlan) -> None:
        self._size = size
        self._tables = plan.table(*size).repeat(len(layers), 1)  # [layers, numbers]
        self._of_layer = dict(zip(layers, self._tables, strict=True))
        self._sizes: set[tuple[int, int]] = set()
        self.plan_of = {layer: _LayerPlan(table, self._sizes) for layer, table in self._of_layer.items()}
        self._pointed_at: list[Any] = [plan]  # what the tables point at

    def follow(self, plan: NativePlan, measured: Collection[int]) -> dict[int, TableWithSums]:
        """Does what this plan says from now on; `measured` layers leave what they find in these tables."""
        for sizes in self._sizes:
            plan.check(*sizes)
        self._tables.copy_(plan.table(*self._size))
        found = {layer: plan.table_with_sums(*self._size) for layer in measured if layer in self._of_layer}
        for layer, table in found.items():
            self._of_layer[layer].copy_(table.table)
        self._pointed_at = [plan, found]
        return found


class _Tape:
    """The step of one number of rows."""

    def __init__(
        self, model: Decoder, cache: Sequence[LayerCache], recorder: NativeRecorder, batch: ForwardBatch
    ) -> None:
        spec = model.spec
        self._feed = copy.deepcopy(model.feed(*batch.inputs))
        self._slots = {window: one.slots.clone() for window, one in batch.attention.items()}
        alike: dict[tuple[int | None, int], list[int]] = {}  # layers by window and head_dim
        for index, layer in enumerate(spec.layers):
            alike.setdefault((layer.window, layer.head_dim), []).append(index)
        self._tables = {
            (window, head_dim): _Tables(layers, (spec.num_heads, head_dim), _plan(batch.attention[window]))
            for (window, head_dim), layers in alike.items()
        }
        attention = []  # of each layer
        for index, layer in enumerate(spec.layers):
            plan = self._tables[layer.window, layer.head_dim].plan_of[index]
            plans = {key: plan for key, _ in (DECODE, WHOLE)}
            block_size = batch.attention[layer.window].block_size
            attention.append(attention_of_buffers(self._slots[layer.window], block_size, layer.window, plans))
        self._replay, self.logits = recorder.record(
            lambda: model.through_layers(self._feed, attention, cache, logits_rows=None)
        )

    def run(self, feed: LayerFeed, batch: ForwardBatch, mass: MassSample | None) -> None:
        """Fills `logits`, `[rows, vocab]` float32, and what is asked for of the attention."""
        for buffer, tensor in zip(_tensors(self._feed), _tensors(feed), strict=True):
            buffer.copy_(tensor)
        for window, slots in self._slots.items():
            slots.copy_(batch.attention[window].slots)
        measured = () if mass is None else mass.layers
        found: dict[int, tuple[AttentionBatch, TableWithSums]] = {}
        for (window, _), tables in self._tables.items():
            one = batch.attention[window]
            found |= {layer: (one, table) for layer, table in tables.follow(_plan(one), measured).items()}
        self._replay()
        if mass is not None:
            mass.masses.extend(block_mass(*found[layer]) for layer in measured)


class DecodeTapes(Recordings[_Tape]):
    """Tapes of one model on one cache; a key is the number of rows.

    Args:
        model: a model on the native backend.
        cache: cache of each layer.
    """

    def __init__(self, model: Decoder, cache: Sequence[LayerCache]) -> None:
        super().__init__(model, cache, MAX_ROWS)
        self._recorder = NativeRecorder()

    def _can_measure(self, mass: MassSample) -> bool:
        return all(self._cache[layer].is_tiled for layer in mass.layers)

    def _serve(self, batch: ForwardBatch, mass: MassSample | None) -> Tensor:
        model = self._model
        num_rows = batch.token_ids.shape[0]
        tape = self._recording(num_rows, lambda: _Tape(model, self._cache, self._recorder, batch))
        tape.run(model.feed(*batch.inputs), batch, mass)
        return model.capped(tape.logits)  # the next step overwrites them


def _tensors(feed: LayerFeed) -> list[Tensor]:
    """All that it is made of, in the same order for every pass of a model."""
    tables = [tensor for pair in feed.tables.values() for tensor in pair]
    return [feed.hidden, *tables, *(one for one in (feed.growth, feed.inputs) if one is not None)]


def _plan(batch: AttentionBatch) -> NativePlan:
    key, _ = WHOLE
    return batch.plan(key, plan_all)

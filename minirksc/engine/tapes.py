"""Decode steps on a CPU in one call: the layers' compiled operations are recorded once for each number of rows.

What a step begins with (embedded tokens, cosines and sines, slots, the plan of its attention) is made anew each time
and copied to where the recording reads it; see `kernels/native/tape.py`. Of a small model a fifth of a step is saved.

Steps that no recording serves run as they are, and `eager_steps` says how many did and why.
"""

from collections import Counter
from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from minirksc.engine.batch import ForwardBatch
from minirksc.kernels.attention.batch import AttentionBatch
from minirksc.kernels.attention.block_mass_native import block_mass
from minirksc.kernels.attention.paged_attention_native import DECODE, WHOLE, NativePlan, TableWithSums, plan_all
from minirksc.kernels.kv.layer_cache import LayerCache
from minirksc.kernels.native.tape import NativeRecorder, NotRecordableError
from minirksc.models.decoder import Decoder, LayerFeed, MassSample

MAX_ROWS = 32
"""Beyond, a step computes for much longer than Python takes, and its temporaries would be large."""


class _FixedPlan:
    """A plan whose tables stay where they are, one a layer; stands in for `NativePlan`.

    Args:
        num_heads: of the model.
        head_dims: layer -> its own, of those that it is the plan of, in order.
        plan: what to do first.
    """

    prefills: Sequence[Any] = ()
    has_rows = True

    def __init__(self, num_heads: int, head_dims: dict[int, int], plan: NativePlan) -> None:
        self._num_heads, self._head_dims = num_heads, head_dims
        sizes = Counter(head_dims.values())
        self._tables = {size: plan.table(num_heads, size).repeat(count, 1) for size, count in sizes.items()}
        rows = {size: iter(tables) for size, tables in self._tables.items()}
        self._of_layer = {layer: next(rows[size]) for layer, size in head_dims.items()}
        self._recorded = iter(self._of_layer.values())
        self._kept: list[Any] = [plan]  # what the tables point at
        self._sizes = (0, 0)

    def follow(self, plan: NativePlan, measured: Collection[int] = ()) -> dict[int, TableWithSums]:
        """Does what this plan says from now on; `measured` layers leave what they find in these tables."""
        plan.check(*self._sizes)
        for size, tables in self._tables.items():
            tables.copy_(plan.table(self._num_heads, size))
        found = {
            layer: plan.table_with_sums(self._num_heads, size)
            for layer, size in self._head_dims.items()
            if layer in measured
        }
        for layer, table in found.items():
            self._of_layer[layer].copy_(table.table)
        self._kept = [plan, found]
        return found

    def check(self, num_tokens: int, num_slots: int) -> None:
        """Notes, while it is recorded, what all plans must fit."""
        self._sizes = num_tokens, num_slots

    def table(self, num_heads: int, head_dim: int) -> Tensor:
        """Of the next layer; they are recorded in order."""
        table: Tensor = next(self._recorded)
        return table


class _Tape:
    """The step of one number of rows."""

    def __init__(
        self, model: Decoder, cache: Sequence[LayerCache], recorder: NativeRecorder, batch: ForwardBatch
    ) -> None:
        spec = model.spec
        self._feed = model.feed(batch.token_ids, batch.positions, batch.sequence_lens).clone()
        self._slots = {window: one.slots.clone() for window, one in batch.attention.items()}
        head_dims: dict[int | None, dict[int, int]] = {window: {} for window in batch.attention}
        for index, layer in enumerate(spec.layers):
            head_dims[layer.window][index] = layer.head_dim
        self._plans = {
            window: _FixedPlan(spec.num_heads, head_dims[window], _plan(one)) for window, one in batch.attention.items()
        }
        attention = {}
        for window, one in batch.attention.items():
            fixed = AttentionBatch(
                [], [], [], [], self._slots[window], block_size=one.block_size, device=one.device, window=window
            )
            for key, _ in (DECODE, WHOLE):
                fixed.plan(key, partial(_given, self._plans[window]))
            attention[window] = fixed
        self._replay, self.logits = recorder.record(
            lambda: model.through_layers(self._feed, attention, cache, logits_rows=None)
        )

    def run(self, feed: LayerFeed, batch: ForwardBatch, mass: MassSample | None) -> None:
        """Fills `logits`, `[rows, vocab]` float32, and what is asked for of the attention."""
        self._feed.copy_(feed)
        measured = () if mass is None else mass.layers
        found: dict[int, tuple[AttentionBatch, TableWithSums]] = {}
        for window, one in batch.attention.items():
            self._slots[window].copy_(one.slots)
            tables = self._plans[window].follow(_plan(one), measured)
            found |= {layer: (one, table) for layer, table in tables.items()}
        self._replay()
        if mass is not None:
            mass.masses.extend(block_mass(*found[layer]) for layer in measured)


class DecodeTapes:
    """Recordings of one model on one cache.

    Args:
        model: on the native backend.
        cache: of each layer.

    Attributes:
        num_steps: steps that a recording served.
        eager_steps: reason -> steps that none did.
    """

    def __init__(self, model: Decoder, cache: Sequence[LayerCache]) -> None:
        self.num_steps = 0
        self.eager_steps: Counter[str] = Counter()
        self._model, self._cache, self._recorder = model, cache, NativeRecorder()
        self._tapes: dict[int, _Tape] = {}
        self._failure: str | None = None

    def forward(self, batch: ForwardBatch, mass: MassSample | None = None) -> Tensor | None:
        """Logits `[rows, vocab]` float32 as of `Decoder.forward`, or None where no recording serves the batch.

        The next step overwrites them.

        Args:
            batch: the step.
            mass: gains the attention mass of KV blocks, see `Decoder.forward`.
        """
        reason = self._failure or _why_not(batch)
        if mass is not None and not all(self._cache[layer].is_tiled for layer in mass.layers):
            reason = "attention is measured"
        num_rows = batch.token_ids.shape[0]
        if reason is None and num_rows not in self._tapes:
            try:
                self._tapes[num_rows] = _Tape(self._model, self._cache, self._recorder, batch)
            except NotRecordableError as error:
                reason = self._failure = str(error)
        if reason is not None:
            self.eager_steps[reason] += 1
            return None
        tape = self._tapes[num_rows]
        tape.run(self._model.feed(batch.token_ids, batch.positions, batch.sequence_lens), batch, mass)
        self.num_steps += 1
        return self._model.capped(tape.logits)


def _why_not(batch: ForwardBatch) -> str | None:
    num_rows = batch.token_ids.shape[0]
    if num_rows == 0 or any(len(one.context_lens) != num_rows for one in batch.attention.values()):
        return "prompts in the batch"
    if batch.logits_rows is not None:
        return "logits of some rows only"
    return f"more than {MAX_ROWS} rows" if num_rows > MAX_ROWS else None


def _plan(batch: AttentionBatch) -> NativePlan:
    key, _ = WHOLE
    return batch.plan(key, plan_all)


def _given(plan: Any, batch: AttentionBatch) -> Any:
    return plan

"""Decode steps on a CPU in one call: the layers' compiled operations are recorded once for each number of rows.

What a step begins with (embedded tokens, cosines and sines, slots, the plan of its attention) is made anew each time
and copied to where the recording reads it; see `kernels/native_tape.py`. Of a small model a fifth of a step is saved.

Steps that no recording serves run as they are, and `eager_steps` says how many did and why.
"""

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from minirksc.batch import ForwardBatch
from minirksc.kernels.attention_batch import AttentionBatch
from minirksc.kernels.layer_cache import LayerCache
from minirksc.kernels.native_tape import NativeRecorder, NotRecordableError
from minirksc.kernels.paged_attention_native import DECODE, WHOLE, NativePlan, plan_all
from minirksc.models.decoder import Decoder, LayerFeed

MAX_ROWS = 32
"""Beyond, a step computes for much longer than Python takes, and its temporaries would be large."""


class _FixedPlan:
    """A plan whose tables stay where they are; stands in for `NativePlan`."""

    prefills: Sequence[Any] = ()
    has_rows = True

    def __init__(self, sizes: set[tuple[int, int]], plan: NativePlan) -> None:
        self._tables = {size: plan.table(*size).clone() for size in sizes}
        self._plan = plan  # what the tables point at

    def follow(self, plan: NativePlan) -> None:
        """Does what this plan says from now on."""
        for size, table in self._tables.items():
            table.copy_(plan.table(*size))
        self._plan = plan

    def table(self, num_heads: int, head_dim: int) -> Tensor:
        return self._tables[num_heads, head_dim]


class _Tape:
    """The step of one number of rows."""

    def __init__(
        self, model: Decoder, cache: Sequence[LayerCache], recorder: NativeRecorder, batch: ForwardBatch
    ) -> None:
        spec = model.spec
        self._feed = model.feed(batch.token_ids, batch.positions, batch.sequence_lens).clone()
        self._slots = {window: one.slots.clone() for window, one in batch.attention.items()}
        sizes = {(spec.num_heads, layer.head_dim) for layer in spec.layers}
        self._plans = {window: _FixedPlan(sizes, _plan(one)) for window, one in batch.attention.items()}
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

    def run(self, feed: LayerFeed, batch: ForwardBatch) -> None:
        """Fills `logits`, `[rows, vocab]` float32."""
        self._feed.copy_(feed)
        for window, one in batch.attention.items():
            self._slots[window].copy_(one.slots)
            self._plans[window].follow(_plan(one))
        self._replay()


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

    def forward(self, batch: ForwardBatch) -> Tensor | None:
        """Logits `[rows, vocab]` float32 as of `Decoder.forward`, or None where no recording serves the batch.

        The next step overwrites them.
        """
        reason = self._failure or _why_not(batch)
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
        tape.run(self._model.feed(batch.token_ids, batch.positions, batch.sequence_lens), batch)
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

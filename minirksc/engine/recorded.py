"""Decode steps that are recorded once and replayed: what graphs of a GPU and tapes of a CPU have in common.

A recording does the same work on the same memory again. So each has *buffers*, which stay where they are, and a step
begins by copying its inputs there. What fits into one recording has one *key*, such as the number of rows; a recording
is made when its key first occurs, and stays until the engine is closed.

Only decode steps are recorded: one new token a sequence, the logits of all rows wanted. Steps that no recording serves
run as they are, and `eager_steps` says how many did and why.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor

from minirksc.engine.batch import ForwardBatch
from minirksc.kernels.attention.batch import AttentionBatch
from minirksc.kernels.kv.layer_cache import LayerCache
from minirksc.kernels.native.tape import NotRecordableError
from minirksc.models.decoder import Decoder
from minirksc.models.hooks import MassSample

MAX_RECORDINGS = 128
"""Each keeps its launches and its temporaries; sizes beyond so many are too rare to be worth it."""

Recording = TypeVar("Recording")


class Recorder(Protocol):
    """Records work on a device, to be done again."""

    def record(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Records `run`.

        Returns:
            (what does it again, the result, overwritten each time).
        """


class NotServedError(Exception):
    """No recording serves a step; the message is the reason, for a person."""


class Recordings(ABC, Generic[Recording]):
    """Recordings of one model on one cache.

    Args:
        model: the model whose forward pass is recorded.
        cache: cache of each layer.
        max_rows: most rows of a step that is recorded.

    Attributes:
        num_steps: steps that a recording served.
        eager_steps: reason -> steps that none did.
    """

    def __init__(self, model: Decoder, cache: Sequence[LayerCache], max_rows: int) -> None:
        self.num_steps = 0
        self.eager_steps: Counter[str] = Counter()
        self._model, self._cache, self._max_rows = model, cache, max_rows
        self._recordings: dict[Hashable, Recording] = {}
        self._failure: str | None = None  # once something could not be recorded, nothing is

    @property
    def num_recordings(self) -> int:
        """How many there are so far."""
        return len(self._recordings)

    def forward(self, batch: ForwardBatch, mass: MassSample | None = None) -> Tensor | None:
        """Logits `[rows, vocab]` float32 as of `Decoder.forward`, or None where no recording serves the batch.

        Args:
            batch: the step.
            mass: what gains the attention mass of KV blocks, see `Decoder.forward`.
        """
        try:
            self._check(batch, mass)
            logits = self._serve(batch, mass)
        except NotServedError as error:
            self.eager_steps[str(error)] += 1
            return None
        self.num_steps += 1
        return logits

    def _check(self, batch: ForwardBatch, mass: MassSample | None) -> None:
        """Refuses what no recording serves, whatever its key."""
        num_rows = batch.token_ids.shape[0]
        if mass is not None and not self._can_measure(mass):
            raise NotServedError("attention is measured")
        if self._failure is not None:
            raise NotServedError(self._failure)
        if num_rows == 0 or any(len(one.context_lens) != num_rows for one in batch.attention.values()):
            raise NotServedError("prompts in the batch")
        if batch.logits_rows is not None:
            raise NotServedError("logits of some rows only")
        if num_rows > self._max_rows:
            raise NotServedError(f"more than {self._max_rows} rows")

    def _recording(self, key: Hashable, make: Callable[[], Recording]) -> Recording:
        """The recording of a key, made where there is none yet."""
        if key not in self._recordings:
            if len(self._recordings) == MAX_RECORDINGS:
                raise NotServedError(f"more than {MAX_RECORDINGS} sizes")
            try:
                self._recordings[key] = make()
            except NotRecordableError as error:
                self._failure = str(error)
                raise NotServedError(self._failure) from error
        return self._recordings[key]

    @abstractmethod
    def _can_measure(self, mass: MassSample) -> bool:
        """Whether a recorded step can measure this."""

    @abstractmethod
    def _serve(self, batch: ForwardBatch, mass: MassSample | None) -> Tensor:
        """Logits of a step that has passed `_check`.

        Raises:
            NotServedError: no recording serves it.
        """


def attention_of_buffers(
    slots: Tensor, block_size: int, window: int | None, plans: Mapping[Any, Any]
) -> AttentionBatch:
    """What is recorded in place of a step's own attention: its plans are given, and nothing reads its lists.

    Args:
        slots: `[tokens]` int64, a buffer.
        block_size: tokens a block.
        window: window of the layers.
        plans: plans by their keys, see `AttentionBatch.plan`; what they point at are buffers too.
    """
    batch = AttentionBatch([], [], [], [], slots, block_size=block_size, device=slots.device, window=window)
    for key, plan in plans.items():
        batch.plan(key, partial(_given, plan))
    return batch


def _given(plan: Any, batch: AttentionBatch) -> Any:
    return plan

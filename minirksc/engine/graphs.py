"""Decode steps as CUDA graphs: one launch for a whole step, instead of ten for each layer.

A graph replays what was recorded: the same kernels on the same addresses. So a step's inputs are copied into buffers
that stay where they are, and the batch is padded to a size for which there is a graph: padding rows have no slot and
no keys, so that they neither read nor write the cache. A graph is recorded when its size first occurs, after one run
that compiles the kernels and lets the libraries allocate; it stays until the engine is closed.

Steps that no graph serves run as they are, and `eager_steps` says how many did and why. What is recorded must not
read from the device: `Backend.recording`.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from minirksc.engine.batch import ForwardBatch
from minirksc.kernels.attention.batch import KEY_CHUNK, AttentionBatch
from minirksc.kernels.attention.work_list import Shape, StaticWorkList, WorkList, make_work_list, work_shape
from minirksc.kernels.kv.layer_cache import LayerCache
from minirksc.models.decoder import Decoder, MassSample

MAX_GRAPHS = 128
"""Each keeps its launches and its temporaries; sizes beyond so many are too rare to be worth it."""

MAX_GRAPH_BATCH = 128
"""Rows of the largest graph: beyond, a step computes for longer than its launches take."""

GraphKey = tuple[int, tuple[object, ...]]


class Recorder(Protocol):
    """Records work on a device, to be done again."""

    def record(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Records `run`.

        Returns:
            (what does it again, the result, overwritten each time).
        """


class CudaRecorder:
    """Records CUDA graphs that share one pool of memory, since they never run at once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Runs once on a stream apart, so that everything is compiled and allocated, then records."""
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream(self._device).wait_stream(stream)
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=stream):
            out = run()
        return graph.replay, out


def padded_size(num_rows: int) -> int:
    """The batch size whose graph serves so many rows: powers of two to 8, then multiples of 8."""
    return 1 << (num_rows - 1).bit_length() if num_rows <= 8 else -(-num_rows // 8) * 8


class DecodeGraphs:
    """Graphs of one model on one cache.

    Args:
        model: whose forward pass is recorded.
        cache: of each layer.
        block_size: tokens a block.
        max_batch: rows of the largest graph.
        max_model_len: longest sequence, in tokens.
        recorder: of the device.

    Attributes:
        num_steps: steps that a graph served.
        eager_steps: reason -> steps that none did.
        num_graphs: recorded so far.
    """

    def __init__(
        self,
        model: Decoder,
        cache: Sequence[LayerCache],
        block_size: int,
        max_batch: int,
        max_model_len: int,
        recorder: Recorder,
    ) -> None:
        self.num_steps = 0
        self.eager_steps: Counter[str] = Counter()
        self._model, self._cache, self._recorder = model, cache, recorder
        self._block_size = block_size
        self._size = padded_size(max_batch)
        self._failure: str | None = None
        self._graphs: dict[GraphKey, tuple[Callable[[], None], Tensor]] = {}

        def ints(fill: int = 0) -> Tensor:
            return torch.full((self._size,), fill, dtype=torch.int64, device=model.device)

        self._token_ids, self._positions, self._sequence_lens = ints(), ints(), ints(1)
        spec = model.spec
        self._slots = {window: ints(-1) for window in {layer.window for layer in spec.layers}}
        max_blocks = -(-max_model_len // block_size)
        max_items = self._size * (-(-max_model_len // KEY_CHUNK) + 1)
        self._work: dict[tuple[int | None, Shape], StaticWorkList] = {}
        for layer, layer_cache in zip(spec.layers, cache, strict=True):
            shape = work_shape(spec.num_heads, layer_cache, model.dtype)
            if (layer.window, shape) not in self._work:
                self._work[layer.window, shape] = StaticWorkList(self._size, max_items, max_blocks, model.device)

    @property
    def num_graphs(self) -> int:
        """Recorded so far."""
        return len(self._graphs)

    def forward(self, batch: ForwardBatch, mass: MassSample | None = None) -> Tensor | None:
        """Logits `[rows, vocab]` float32 as of `Decoder.forward`, or None where no graph serves the batch."""
        reason = self._failure or self._why_not(batch)
        if mass is not None:
            reason = "attention is measured"
        works = None if reason else self._plan(batch)
        if works is None:
            self.eager_steps[reason or "more ranges of keys than there is room for"] += 1
            return None
        size = padded_size(len(batch.token_ids))
        key = size, tuple(work.size_key() for work in works.values())
        if key not in self._graphs and len(self._graphs) == MAX_GRAPHS:
            self.eager_steps[f"more than {MAX_GRAPHS} sizes"] += 1
            return None
        self._fill(batch, works)
        if key not in self._graphs:
            try:
                self._graphs[key] = self._recorder.record(lambda: self._run(size, works))
            except RuntimeError as error:
                self._failure = f"recording failed: {error}"
                self.eager_steps[self._failure] += 1
                return None
        replay, logits = self._graphs[key]
        replay()
        self.num_steps += 1
        return logits[: len(batch.token_ids)].clone()  # the next replay overwrites them

    def _why_not(self, batch: ForwardBatch) -> str | None:
        num_rows = len(batch.token_ids)
        if num_rows == 0 or any(len(a.context_lens) != num_rows for a in batch.attention.values()):
            return "prompts in the batch"
        if batch.logits_rows is not None:
            return "logits of some rows only"
        if num_rows > self._size:
            return f"more than {self._size} rows"
        return None

    def _plan(self, batch: ForwardBatch) -> dict[tuple[int | None, Shape], WorkList] | None:
        """Work lists on the host; None where one does not fit its buffers."""
        works = {
            (window, shape): make_work_list(batch.attention[window], shape, torch.device("cpu"))
            for window, shape in self._work
        }
        return works if all(self._work[key].has_room(work) for key, work in works.items()) else None

    def _fill(self, batch: ForwardBatch, works: dict[tuple[int | None, Shape], WorkList]) -> None:
        """Copies a step's inputs into the buffers, and empties the rows beyond it."""
        n = len(batch.token_ids)
        for buffer, values, empty in (
            (self._token_ids, batch.token_ids, 0),
            (self._positions, batch.positions, 0),
            (self._sequence_lens, batch.sequence_lens, 1),
            *((slots, batch.attention[window].slots, -1) for window, slots in self._slots.items()),
        ):
            buffer[:n].copy_(values)
            buffer[n:].fill_(empty)
        for key, work in works.items():
            self._work[key].fill(work)

    def _attention(
        self, size: int, works: dict[tuple[int | None, Shape], WorkList]
    ) -> dict[int | None, AttentionBatch]:
        """Batches whose tensors are the buffers; nothing on the device reads their lists."""
        attention = {
            window: AttentionBatch(
                [], [], [], [], slots[:size], block_size=self._block_size, device=slots.device, window=window
            )
            for window, slots in self._slots.items()
        }
        for (window, shape), work in works.items():
            static = self._work[window, shape].view(size, work)
            attention[window].plan(shape, partial(_given, static))
        return attention

    def _run(self, size: int, works: dict[tuple[int | None, Shape], WorkList]) -> Tensor:
        # New batches for each run, so that partials made while recording are the recorder's memory, and stay.
        attention = self._attention(size, works)
        return self._model.forward(
            self._token_ids[:size],
            self._positions[:size],
            self._sequence_lens[:size],
            attention,
            self._cache,
            None,
        )


def _given(work: WorkList, batch: AttentionBatch) -> WorkList:
    return work

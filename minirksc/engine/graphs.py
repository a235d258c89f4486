"""Decode steps as CUDA graphs: one launch for a whole step, instead of ten for each layer.

A graph replays what was recorded: the same kernels on the same addresses. So a step's inputs are copied into buffers
that stay where they are, and the batch is padded to a size for which there is a graph: padding rows have no slot and
no keys, so that they neither read nor write the cache. A graph is recorded after one run that compiles the kernels and
lets the libraries allocate. What is recorded must not read from the device: `Backend.recording`.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from minirksc.engine.batch import ForwardBatch
from minirksc.engine.recorded import NotServedError, Recorder, Recordings, attention_of_buffers
from minirksc.kernels.attention.batch import KEY_CHUNK
from minirksc.kernels.attention.work_list import Shape, StaticWorkList, WorkList, make_work_list, work_shape
from minirksc.kernels.kv.layer_cache import LayerCache
from minirksc.kernels.native.tape import NotRecordableError
from minirksc.models.decoder import Decoder
from minirksc.models.hooks import MassSample

MAX_GRAPH_BATCH = 128
"""Rows of the largest graph: beyond, a step computes for longer than its launches take."""

Works = dict[tuple[int | None, Shape], WorkList]
"""Work lists of a step on the host, by window and shape of the layers that they are for."""


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


class DecodeGraphs(Recordings[tuple[Callable[[], None], Tensor]]):
    """Graphs of one model on one cache; a key is a padded size and the sizes of the work lists.

    Args:
        model: the model whose forward pass is recorded.
        cache: cache of each layer.
        block_size: tokens a block.
        max_batch: rows of the largest graph.
        max_model_len: longest sequence, in tokens.
        recorder: what records on the device.
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
        super().__init__(model, cache, padded_size(max_batch))
        self._recorder = recorder
        self._block_size = block_size
        size = self._max_rows

        def ints(fill: int = 0) -> Tensor:
            return torch.full((size,), fill, dtype=torch.int64, device=model.device)

        self._token_ids, self._positions, self._sequence_lens = ints(), ints(), ints(1)
        spec = model.spec
        self._slots = {window: ints(-1) for window in {layer.window for layer in spec.layers}}
        max_blocks = -(-max_model_len // block_size)
        max_items = size * (-(-max_model_len // KEY_CHUNK) + 1)
        self._work: dict[tuple[int | None, Shape], StaticWorkList] = {}
        for layer, layer_cache in zip(spec.layers, cache, strict=True):
            shape = work_shape(spec.num_heads, layer_cache, model.dtype)
            if (layer.window, shape) not in self._work:
                self._work[layer.window, shape] = StaticWorkList(size, max_items, max_blocks, model.device)

    def _can_measure(self, mass: MassSample) -> bool:
        return False

    def _serve(self, batch: ForwardBatch, mass: MassSample | None) -> Tensor:
        works = {
            (window, shape): make_work_list(batch.attention[window], shape, torch.device("cpu"))
            for window, shape in self._work
        }
        if not all(self._work[key].has_room(work) for key, work in works.items()):
            raise NotServedError("more ranges of keys than there is room for")
        num_rows = len(batch.token_ids)
        size = padded_size(num_rows)
        key = size, tuple(work.size_key() for work in works.values())
        self._fill(batch, works)
        replay, logits = self._recording(key, lambda: self._record(size, works))
        replay()
        return logits[:num_rows].clone()  # the next replay overwrites them

    def _record(self, size: int, works: Works) -> tuple[Callable[[], None], Tensor]:
        try:
            return self._recorder.record(lambda: self._run(size, works))
        except RuntimeError as error:
            raise NotRecordableError(f"recording failed: {error}") from error

    def _fill(self, batch: ForwardBatch, works: Works) -> None:
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

    def _run(self, size: int, works: Works) -> Tensor:
        # New batches for each run, so that partials made while recording are the recorder's memory, and stay.
        views = {key: self._work[key].view(size, work) for key, work in works.items()}
        attention = {
            window: attention_of_buffers(
                slots[:size],
                self._block_size,
                window,
                {shape: view for (of, shape), view in views.items() if of == window},
            )
            for window, slots in self._slots.items()
        }
        inputs = self._token_ids[:size], self._positions[:size], self._sequence_lens[:size]
        return self._model.forward(*inputs, attention, self._cache, None)

"""Compiled operations recorded once and done again in one call: what a step costs in Python is then paid once.

A recording is addresses and numbers (`kernels/native/module.cpp`): what is done again reads and writes the same memory.
So whatever the recorded run allocates is kept, in memory that all recordings share, since they never run at once. A run
that does more than calls of compiled operations, allocations and views cannot be recorded, and says what else it did.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from minirksc.kernels.huge_pages import empty
from minirksc.kernels.native.ops import native

ALLOCATIONS = ("new_empty", "empty", "empty_like")
VIEWS = ("view", "flatten", "__getitem__", "contiguous", "to", "float", "long")
QUERIES = ("__get__", "__len__", "data_ptr", "dim", "is_contiguous", "numel", "size", "stride")

CHUNK_BYTES = 2**22
ALIGNMENT = 64


class NotRecordableError(Exception):
    """A run did something that the compiled operations do not do; the message is a reason for a person."""


class NativeRecorder:
    """Records runs that share memory."""

    def __init__(self) -> None:
        self._chunks: list[Tensor] = []

    def record(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Runs once, and records it.

        Returns:
            (what does it again, the result, overwritten each time by this and by any other recording).

        Raises:
            NotRecordableError: it cannot be.
        """
        drop_recording()
        native.begin_recording()
        try:
            with _Watch(self._chunks):
                out = run()
        finally:
            tape = native.end_recording()
        return partial(_replay, tape, tuple(self._chunks)), out


def drop_recording() -> None:
    """Ends what this thread records, if an exception came in the midst of it."""
    if native is not None:
        with suppress(RuntimeError):  # it records nothing
            native.end_recording()


def _replay(tape: bytes, memory: Sequence[Tensor]) -> None:
    """`memory` is what the tape's addresses are in."""
    native.replay(tape)


class _Watch(TorchFunctionMode):
    """Gives out memory that stays, and refuses what is not recorded."""

    def __init__(self, chunks: list[Tensor]) -> None:
        super().__init__()
        self._chunks = chunks  # int8 each
        self._index = self._offset = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.__name__
        if name in ALLOCATIONS:
            with torch._C.DisableTorchFunction():
                like = func(*args, **{"device": "meta"} | (kwargs or {}))
            return self._allocate(like.shape, like.dtype)
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            given = args[0]
            if name not in VIEWS or out.untyped_storage().data_ptr() != given.untyped_storage().data_ptr():
                raise NotRecordableError(f"torch's {name} is no compiled operation")
        elif name not in QUERIES:
            raise NotRecordableError(f"torch's {name} may read what is computed")
        return out

    def _allocate(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        size = shape.numel() * dtype.itemsize
        while self._index < len(self._chunks) and self._offset + size > len(self._chunks[self._index]):
            self._index, self._offset = self._index + 1, 0
        if self._index == len(self._chunks):
            self._chunks.append(empty(max(size, CHUNK_BYTES), dtype=torch.int8))
            self._offset = 0
        begin = self._offset
        self._offset += -(-size // ALIGNMENT) * ALIGNMENT
        return self._chunks[self._index][begin : begin + size].view(dtype).view(shape)

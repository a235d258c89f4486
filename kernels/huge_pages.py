"""Memory in pages of 2 MB, for what every step reads from end to end: packed weights, and the KV cache.

A processor that reads through many pages has to look each of them up, in a virtual machine twice over, and starts anew
to guess what comes next. In pages of 4 KB that took a third of the speed of a memory that two cores read 61 GB/s from.
Linux gives the large pages to a process that asks (`madvise(MADV_HUGEPAGE)`;
/sys/kernel/mm/transparent_hugepage/enabled says whether it does); where it does not, or there is no such call, this is
ordinary memory.

What has not been written takes no room: a page is there from its first write on.
"""

import math
import mmap
from contextlib import suppress

import torch
from torch import Tensor

PAGE = 2**21
CHUNK_BYTES = 2**28
"""Of address space, from which several tensors come: their ends share a page."""

MIN_BYTES = 2**17
"""A smaller tensor has nothing to gain, and may come and go: no chunk is given back before its last tensor is."""

ALIGNMENT = 64


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    """A tensor of the CPU that begins with a page; its numbers are 0."""
    size = math.prod(shape) * dtype.itemsize
    return _map(max(size, 1))[:size].view(dtype).view(shape)


class Arena:
    """Tensors that stay together for as long as a model does."""

    def __init__(self) -> None:
        self._chunk = torch.empty(0, dtype=torch.uint8)
        self._end = 0  # of what has been given out

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """As `torch.empty` of the CPU."""
        size = math.prod(shape) * dtype.itemsize
        if size < MIN_BYTES:
            return torch.empty(shape, dtype=dtype)
        if self._end + size > len(self._chunk):
            self._chunk, self._end = _map(max(size, CHUNK_BYTES)), 0
        begin = self._end
        self._end += -(-size // ALIGNMENT) * ALIGNMENT
        return self._chunk[begin : begin + size].view(dtype).view(shape)


def _map(size: int) -> Tensor:
    """`[>= size]` uint8, whole pages."""
    size = -(-size // PAGE) * PAGE
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(size, dtype=torch.uint8)
    memory = mmap.mmap(-1, size + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    begin = -whole.data_ptr() % PAGE
    return whole[begin : begin + size]

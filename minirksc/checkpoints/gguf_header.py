"""Looks through the header of a GGUF file before any of it is believed: every count and length fits the file.

The `gguf` package reads as many items as a file claims, also beyond its end, and keeps an object of each.

Source: the layout as https://github.com/ggml-org/ggml/blob/master/docs/gguf.md describes it.
"""

import math
import mmap
from pathlib import Path

from minirksc.checkpoints.folder import check_file
from minirksc.errors import CheckpointError

MAX_FIELDS = 10_000
MAX_TENSORS = 100_000
MAX_ITEMS = 4_000_000
"""Items of all arrays together; the largest published vocabularies have 1.5 million, scores and merges included."""

MAX_NAME_BYTES = 65_535
MAX_DIMS = 4
ELEMENTS_PER_BYTE = 8
"""No kind of quantisation has more."""

STRING, ARRAY = 8, 9
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of each type of number."""


def check_header(source: Path) -> None:
    """Refuses a file whose header claims what cannot be.

    Raises:
        CheckpointError: it is no regular file, no GGUF file, damaged, or beyond the limits.
    """
    check_file(source)
    try:
        with source.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _Header(data).check()
    except OSError as error:
        raise CheckpointError(f"{source} cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # of mmap, that the file is empty
        raise CheckpointError(f"{source} is not a readable GGUF file: {error}") from error


class _Header:
    """A walk over the header: `_place` is the byte that is read next."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._size = len(data)
        self._place = 4  # behind "GGUF"
        self._items_left = MAX_ITEMS

    def check(self) -> None:
        if self._data[:4] != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        version = self._number(4)
        if version not in (2, 3):
            raise ValueError(f"its version is {version}; 2 and 3 are read, in little-endian order")
        num_tensors, num_fields = self._number(8), self._number(8)
        if num_fields > MAX_FIELDS or num_tensors > MAX_TENSORS:
            raise ValueError(
                f"it claims {num_fields} fields and {num_tensors} tensors; {MAX_FIELDS} and {MAX_TENSORS} are allowed"
            )
        for _ in range(num_fields):
            self._skip_string(MAX_NAME_BYTES)
            self._skip_value(self._number(4))
        for _ in range(num_tensors):
            self._skip_string(MAX_NAME_BYTES)
            num_dims = self._number(4)
            if num_dims > MAX_DIMS:
                raise ValueError(f"a tensor has {num_dims} dimensions; {MAX_DIMS} are allowed")
            shape = [self._number(8) for _ in range(num_dims)]
            self._skip(12)  # type and offset: the package checks both
            if math.prod(shape) > self._size * ELEMENTS_PER_BYTE:
                raise ValueError(f"a tensor of the shape {shape} cannot be in {self._size} bytes")

    def _number(self, num_bytes: int) -> int:
        place = self._skip(num_bytes)
        return int.from_bytes(self._data[place : self._place], "little")

    def _skip(self, num_bytes: int) -> int:
        """Goes on; returns the place before."""
        place = self._place
        self._place += num_bytes
        if self._place > self._size:
            raise ValueError(f"it ends after {self._size} bytes, in the middle of its header")
        return place

    def _skip_string(self, max_bytes: int) -> None:
        num_bytes = self._number(8)
        if num_bytes > max_bytes:
            raise ValueError(f"it claims a text of {num_bytes} bytes; {max_bytes} are allowed there")
        self._skip(num_bytes)

    def _skip_value(self, kind: int) -> None:
        is_array = kind == ARRAY
        item, count = (self._number(4), self._number(8)) if is_array else (kind, 1)
        if is_array:
            self._items_left -= count
        if self._items_left < 0:
            raise ValueError(f"its arrays claim more than {MAX_ITEMS} items")
        if item in SIZES:
            self._skip(count * SIZES[item])
        elif item == STRING:
            for _ in range(count):
                self._skip_string(self._size)
        elif is_array:
            raise ValueError(f"it holds an array of the type {item}, which no field has")
        else:
            raise ValueError(f"it holds a field of the type {kind}, which is not known")

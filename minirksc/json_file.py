"""Reads the small files of a checkpoint folder whole, JSON above all: the one way in which that is done.

A folder may come from anybody. What is no regular file is never opened for long (a FIFO would wait for ever), what is
too large is not read, and what is nested too deeply goes no further.
"""

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from minirksc.errors import CheckpointError, MinirkscError

MAX_JSON_BYTES = 16 << 20
"""Of a config or an index: the largest published ones have a few MB; as JSON's smallest objects it is 400 MB."""

MAX_TOKENIZER_BYTES = 64 << 20
"""Of a tokenizer: the largest published ones have 35 MB."""

MAX_DEPTH = 64
"""Of objects and lists within each other; published files have ten levels. Python's own recursion ends at 1000."""

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""How a file begins that Git LFS left in place of the real one."""

LFS_FAULT = (
    "a pointer of Git LFS, not the file itself: the repository was cloned without git-lfs; in its folder, "
    "type: git lfs install && git lfs pull"
)
"""What is said of such a file."""


@contextmanager
def open_regular(path: Path) -> Iterator[BinaryIO | None]:
    """Opens a file to read; None for what is no regular file, such as a FIFO, which would make its reader wait.

    Raises:
        OSError: there is none, or it cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            with open(descriptor, "rb", closefd=False) as stream:
                yield stream
        else:
            yield None
    finally:
        os.close(descriptor)


def read_bytes(path: Path, error: type[MinirkscError] = CheckpointError, max_bytes: int = MAX_JSON_BYTES) -> bytes:
    """The content of a regular file.

    Args:
        path: file to read.
        error: class of what is raised.
        max_bytes: size above which it is not even read.

    Raises:
        error: it is absent, no regular file, too large, unreadable, or a pointer of Git LFS.
    """
    try:
        with open_regular(path) as stream:
            if stream is None:
                raise error(f"{path} is no regular file, and nothing else is read; put the file itself there")
            size = os.fstat(stream.fileno()).st_size
            content = b"" if size > max_bytes else stream.read(max_bytes + 1)
    except FileNotFoundError as cause:
        if path.is_symlink():
            raise error(f"{path} is a link to a file that is not there: the download is not complete") from cause
        raise error(f"{path} does not exist") from cause
    except OSError as cause:
        raise error(f"{path} cannot be read: {cause.strerror or cause}") from cause
    if max(size, len(content)) > max_bytes:
        raise error(f"{path} has {size} bytes, more than {max_bytes}, and no such file needs as many; it is damaged")
    if content.startswith(LFS_POINTER):
        raise error(f"{path} is {LFS_FAULT}")
    return content


def read_text(path: Path, error: type[MinirkscError] = CheckpointError, max_bytes: int = MAX_JSON_BYTES) -> str:
    """The content of a regular file as UTF-8, without a byte order mark.

    Raises:
        error: as of `read_bytes`, or it is no UTF-8.
    """
    try:
        return read_bytes(path, error, max_bytes).decode("utf-8-sig")
    except UnicodeDecodeError as cause:
        raise error(f"{path} is not UTF-8: {cause.reason} at byte {cause.start}") from cause


def read_json(path: Path, error: type[MinirkscError] = CheckpointError, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """What a JSON file holds.

    Raises:
        error: as of `read_text`, or it is no JSON, or nested too deeply.
    """
    text = read_text(path, error, max_bytes)
    try:
        content = json.loads(text)
        if is_nested_deeper(content, MAX_DEPTH):
            raise RecursionError(f"of more than {MAX_DEPTH} levels")
    except ValueError as cause:
        raise error(f"{path} is not readable JSON: {cause}") from cause
    except RecursionError as cause:
        raise error(f"{path} is not readable JSON: it is nested more than {MAX_DEPTH} deep; it is damaged") from cause
    return content


def read_json_object(
    path: Path, error: type[MinirkscError] = CheckpointError, max_bytes: int = MAX_JSON_BYTES
) -> dict[str, Any]:
    """The object in a JSON file; {} when there is no such file.

    Raises:
        error: as of `read_json`, or it is not an object.
    """
    if not os.path.lexists(path):
        return {}
    content = read_json(path, error, max_bytes)
    if not isinstance(content, dict):
        raise error(f"{path} must hold a JSON object, not {type(content).__name__}")
    return content


def is_nested_deeper(content: Any, num_levels: int) -> bool:
    """Whether objects and lists lie within each other on more levels than so many; without recursion."""
    level = [content] if isinstance(content, dict | list) else []
    for _ in range(num_levels):
        items = (item for value in level for item in (value.values() if isinstance(value, dict) else value))
        level = [item for item in items if isinstance(item, dict | list)]
    return bool(level)

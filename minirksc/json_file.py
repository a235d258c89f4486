"""Reads the small files of a checkpoint folder whole, JSON above all: the one way in which that is done.

A folder may come from anybody. What is no regular file is never opened for long (a FIFO would wait for ever), what is
too large is not read, and what is nested too deeply goes no further.
"""

import json
import os
import stat
from pathlib import Path
from typing import Any

from minirksc.errors import CheckpointError, MinirkscError

MAX_JSON_BYTES = 16 << 20
"""Of a config or an index: the largest published ones have a few MB; as JSON's smallest objects it is 400 MB."""

MAX_TOKENIZER_BYTES = 64 << 20
"""Of a tokenizer: the largest published ones have 35 MB."""

MAX_DEPTH = 64
"""Of objects and lists within each other; published files have ten levels. Python's own recursion ends at 1000."""

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""How a file begins that Git LFS left in place of the real one."""


def read_bytes(path: Path, error: type[MinirkscError] = CheckpointError, max_bytes: int = MAX_JSON_BYTES) -> bytes:
    """The content of a regular file.

    Args:
        path: of the file.
        error: what to raise.
        max_bytes: size above which it is not even read.

    Raises:
        error: it is absent, no regular file, too large, unreadable, or a pointer of Git LFS.
    """
    try:
        # A FIFO opens at once this way, and is refused before anybody waits for what it may give.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with open(descriptor, "rb") as stream:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise error(f"{path} is no regular file, and nothing else is read; put the file itself there")
            content = b"" if status.st_size > max_bytes else stream.read(max_bytes + 1)
    except FileNotFoundError as cause:
        if path.is_symlink():
            raise error(f"{path} is a link to a file that is not there: the download is not complete") from cause
        raise error(f"{path} does not exist") from cause
    except OSError as cause:
        raise error(f"{path} cannot be read: {cause.strerror or cause}") from cause
    if max(status.st_size, len(content)) > max_bytes:
        raise error(f"{path} has {status.st_size} bytes, and no such file needs more than {max_bytes}; it is damaged")
    if content.startswith(LFS_POINTER):
        raise error(
            f"{path} is a pointer of Git LFS, not the file itself: the repository was cloned without git-lfs; "
            "in its folder, type: git lfs install && git lfs pull"
        )
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
    except ValueError as cause:
        raise error(f"{path} is not readable JSON: {cause}") from cause
    except RecursionError as cause:
        raise _too_deep(path, error) from cause
    level = [content] if isinstance(content, dict | list) else []
    for _ in range(MAX_DEPTH):
        items = (item for value in level for item in (value.values() if isinstance(value, dict) else value))
        level = [item for item in items if isinstance(item, dict | list)]
    if level:
        raise _too_deep(path, error)
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


def _too_deep(path: Path, error: type[MinirkscError]) -> MinirkscError:
    return error(f"{path} is not readable JSON: it is nested more than {MAX_DEPTH} deep; it is damaged")

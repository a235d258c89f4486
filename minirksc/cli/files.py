"""Files that a person names: read whole within a limit, written whole or not at all.

Regular files only. A FIFO may have no writer and a device no end, so they are refused by name.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from minirksc.errors import ConfigError, MinirkscError
from minirksc.json_file import open_regular

MAX_TEXT_BYTES = 64 << 20
"""Size of a prompt from standard input, and of a file with hints or wordings."""


@contextmanager
def os_errors_as(kind: type[MinirkscError], failure: str, remedy: str = "") -> Iterator[None]:
    """What the system refuses becomes an error of ours: the failure in words, the system's reason, the remedy."""
    try:
        yield
    except OSError as error:
        raise kind(f"{failure}: {error.strerror}{remedy}") from error


def read_file(path: Path, max_bytes: int, what: str, error: type[MinirkscError] = ConfigError) -> bytes:
    """The bytes of a file.

    Args:
        path: path of the file.
        max_bytes: size above which it is not even read.
        what: name of what it is, for messages.
        error: class of what to raise.

    Raises:
        error: It is no regular file, too large, or cannot be read.
    """
    with os_errors_as(error, f"{what} {path} cannot be read"), open_regular(path) as stream:
        if stream is None:
            raise error(f"{what} {path} is no regular file; write what it gives into one and name that")
        size = os.fstat(stream.fileno()).st_size
        if size > max_bytes:
            raise error(f"{what} {path} has {size} bytes, more than {max_bytes}; give it in parts")
        return stream.read()


def check_utf8(raw: bytes, what: str) -> None:
    """Refuses text in UTF-16 or UTF-32, such as PowerShell writes; other bytes may be anything.

    Raises:
        ConfigError: It is such text.
    """
    encoding = json.detect_encoding(raw)
    # A line of garbage at the beginning makes no other encoding: the other lines would not be seen in it.
    if not encoding.startswith("utf-8") and ("\n" in raw.decode(encoding, "replace") or b"\n" not in raw):
        raise ConfigError(f"{what} is text in {encoding[:6].upper()}; save it as UTF-8")


def read_jsonl(path: Path, max_bytes: int, what: str) -> tuple[bytes, list[tuple[int, bytes]]]:
    """All bytes of a JSONL file, and its lines that are not empty, each with its number from 1.

    Args:
        path: path of the file.
        max_bytes: size above which it is not even read.
        what: name of what it is, for messages.

    Raises:
        ConfigError: It cannot be read, or is text in UTF-16 or UTF-32.
    """
    raw = read_file(path, max_bytes, what)
    check_utf8(raw, f"{what} {path}")
    lines = enumerate(raw.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1)
    return raw, [(number, line.strip()) for number, line in lines if line.strip()]


def read_lines(path: Path, what: str) -> list[str]:
    """The non-empty lines of a text file.

    Args:
        path: path of the file.
        what: name of what it is, for messages.

    Raises:
        ConfigError: It cannot be read.
    """
    raw = read_file(path, MAX_TEXT_BYTES, what)
    return [line for line in _text(raw, f"{what} {path}").split("\n") if line.strip()]


def read_stdin() -> str:
    """Standard input, as UTF-8 whatever the locale says, without its last line break.

    Raises:
        ConfigError: It is closed, cannot be read, is too long, or not UTF-8.
    """
    if sys.stdin is None:
        raise ConfigError("standard input is closed; give a PROMPT")
    try:
        raw = sys.stdin.buffer.read(MAX_TEXT_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"standard input cannot be read: {error}; give a PROMPT") from error
    if len(raw) > MAX_TEXT_BYTES:
        raise ConfigError(f"standard input has more than {MAX_TEXT_BYTES} bytes; give a prompt that a model can hold")
    return _text(raw, "standard input").removesuffix("\n").removesuffix("\r")


def _text(raw: bytes, what: str) -> str:
    check_utf8(raw, what)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{what} is not UTF-8 text: {error}") from error


def write_file(path: Path, text: str) -> None:
    """Writes a text file; if that fails halfway, there is none.

    Raises:
        MinirkscError: It cannot be written.
    """
    with os_errors_as(MinirkscError, f"{path} cannot be written"), path.open("w", encoding="utf-8") as stream:
        try:
            stream.write(text)
            stream.flush()
        except BaseException:
            path.unlink()
            raise

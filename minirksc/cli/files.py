"""Files that a person names: read whole within a limit, or grown line by line by one run at a time.

Regular files only. A FIFO may have no writer and a device no end, so they are refused by name.
"""

import contextlib
import json
import os
from pathlib import Path
from types import TracebackType

from minirksc.cli.terminal import note
from minirksc.errors import ConfigError, MinirkscError
from minirksc.json_file import open_regular

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_NO_WAITING = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


def read_file(path: Path, max_bytes: int, what: str, error: type[MinirkscError] = ConfigError) -> bytes:
    """The bytes of a file.

    Args:
        path: of the file.
        max_bytes: size above which it is not even read.
        what: it is, for messages.
        error: what to raise.

    Raises:
        error: it is no regular file, too large, or cannot be read.
    """
    try:
        with open_regular(path) as stream:
            if stream is None:
                raise error(f"{what} {path} is no regular file; write what it gives into one and name that")
            size = os.fstat(stream.fileno()).st_size
            if size > max_bytes:
                raise error(f"{what} {path} has {size} bytes, more than {max_bytes}; give it in parts")
            return stream.read()
    except OSError as cause:
        raise error(f"{what} {path} cannot be read: {cause.strerror}") from cause


def check_utf8(raw: bytes, what: str) -> None:
    """Refuses text in UTF-16 or UTF-32, such as PowerShell writes; other bytes may be anything.

    Raises:
        ConfigError: it is such text.
    """
    encoding = json.detect_encoding(raw)
    # A line of garbage at the beginning makes no other encoding: the other lines would not be seen in it.
    if not encoding.startswith("utf-8") and ("\n" in raw.decode(encoding, "replace") or b"\n" not in raw):
        raise ConfigError(f"{what} is text in {encoding[:6].upper()}; save it as UTF-8")


class GrowingFile:
    """A file of lines that this run alone appends to; a context manager.

    It holds whole lines whatever a write meets; only a killed process can leave one torn off.

    Args:
        path: new, or of an earlier run.
        what: it is, for messages.

    Attributes:
        path: of the file.

    Raises:
        ConfigError: it is no regular file, cannot be written, or is written by another run.
    """

    def __init__(self, path: Path, what: str) -> None:
        self.path = path
        self._name = f"{what} {path}"
        try:
            if path.exists() and not path.is_file():
                raise ConfigError(f"{self._name} is no regular file, so it cannot be written; choose another one")
            descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | _NO_WAITING, 0o666)
            self._stream = open(descriptor, "r+b", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise ConfigError(f"{self._name} cannot be written: {error.strerror}; choose another one") from error
        try:
            self._lock()
        except BaseException:
            self._stream.close()
            raise
        self._size = os.fstat(descriptor).st_size

    def truncate(self, num_bytes: int) -> None:
        """Drops what follows the first bytes, if anything does.

        Raises:
            MinirkscError: it cannot be done.
        """
        try:
            self._stream.truncate(num_bytes)
        except OSError as error:
            raise self._cannot_write(error) from error
        self._size = num_bytes

    def add(self, line: bytes) -> None:
        """Appends a line, or nothing.

        Raises:
            MinirkscError: it cannot be written.
        """
        rest = memoryview(line)
        try:
            while rest:
                rest = rest[self._stream.write(rest) :]
        except BaseException as error:
            with contextlib.suppress(OSError):
                self._stream.truncate(self._size)
            if isinstance(error, OSError):
                raise self._cannot_write(error) from error
            raise
        self._size += len(line)

    def sync(self) -> None:
        """What was added survives whatever comes.

        Raises:
            MinirkscError: it cannot be written.
        """
        try:
            os.fsync(self._stream.fileno())
        except OSError as error:
            raise self._cannot_write(error) from error

    def __enter__(self) -> "GrowingFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Lets others write; a second call does nothing."""
        self._stream.close()

    def _lock(self) -> None:
        """For as long as the file is open, which no process survives."""
        why = "this system has no such locks"
        if fcntl is not None:
            try:
                return fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ConfigError(
                    f"{self._name} is being written by another run; wait for its end, or choose another file"
                ) from error
            except OSError as error:
                why = str(error.strerror)
        note(f"warning: {self._name} cannot be locked ({why}): let no other run write it")

    def _cannot_write(self, error: OSError) -> MinirkscError:
        return MinirkscError(f"{self._name} cannot be written: {error.strerror}; the lines that are in it are whole")


def write_file(path: Path, text: str) -> None:
    """Writes a text file; if that fails halfway, there is none.

    Raises:
        MinirkscError: it cannot be written.
    """
    try:
        with path.open("w", encoding="utf-8") as stream:
            try:
                stream.write(text)
                stream.flush()
            except BaseException:
                path.unlink()
                raise
    except OSError as error:
        raise MinirkscError(f"{path} cannot be written: {error.strerror}") from error

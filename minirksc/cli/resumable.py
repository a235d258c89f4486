"""JSONL files that a long run appends to, one result a line, and with which a later run goes on after any end.

One run at a time writes such a file. It holds whole lines whatever a write meets; only a process that was killed can
leave a line torn off, and the next run drops it. What a line must look like, and of which input it is the result, is
the run's own affair: it is handed every line that is there already, and refuses a file of another run.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from minirksc.cli.files import os_errors_as
from minirksc.cli.terminal import is_terminal, note
from minirksc.errors import ConfigError, MinirkscError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

Input = TypeVar("Input")

_NO_WAITING = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


class GrowingFile(contextlib.AbstractContextManager["GrowingFile"]):
    """A file of lines that this run alone appends to; a context manager.

    Args:
        path: path of the file, new or of an earlier run.
        what: name of what it is, for messages.

    Attributes:
        path: path of the file.

    Raises:
        ConfigError: It is no regular file, cannot be written, or is written by another run.
    """

    def __init__(self, path: Path, what: str) -> None:
        self.path = path
        self._name = f"{what} {path}"
        with os_errors_as(ConfigError, f"{self._name} cannot be written", "; choose another one"):
            if path.exists() and not path.is_file():
                raise ConfigError(f"{self._name} is no regular file, so it cannot be written; choose another one")
            descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | _NO_WAITING, 0o666)
            self._stream = open(descriptor, "r+b", buffering=0)  # noqa: SIM115
        try:
            self._lock()
        except BaseException:
            self._stream.close()
            raise
        self._size = os.fstat(descriptor).st_size

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets others write; a second call does nothing."""
        self._stream.close()

    def read(self, take: Callable[[int, bytes], None], begin: bytes = b"") -> int:
        """Reads the lines of an earlier run, one at a time.

        Args:
            take: callback for each line, with its number from 1. Only the last can lack its line break: torn off.
            begin: beginning of every line that this program writes. Of a line that begins otherwise no more than as
                many bytes are read, since what somebody named by mistake may have no line breaks.

        Returns:
            Bytes of all whole lines, for `truncate`.

        Raises:
            ConfigError: The file cannot be read.
        """
        num_whole = number = 0
        reading = os_errors_as(ConfigError, f"{self._name} cannot be read")
        with reading, open(self._stream.fileno(), "rb", closefd=False) as stream:
            stream.seek(0)
            while line := stream.readline(len(begin) or -1):
                if begin and line == begin:
                    line += stream.readline()
                number += 1
                take(number, line)
                if line.endswith(b"\n"):
                    num_whole += len(line)
        return num_whole

    def truncate(self, num_bytes: int) -> None:
        """Drops what follows the first bytes, if anything does.

        Raises:
            MinirkscError: It cannot be done.
        """
        with self._writing():
            self._stream.truncate(num_bytes)
        self._size = num_bytes

    def add(self, line: bytes) -> None:
        """Appends a line, or nothing.

        Raises:
            MinirkscError: It cannot be written.
        """
        rest = memoryview(line)
        with self._writing():
            try:
                while rest:
                    rest = rest[self._stream.write(rest) :]
            except BaseException:
                with contextlib.suppress(OSError):
                    self._stream.truncate(self._size)
                raise
        self._size += len(line)

    def sync(self) -> None:
        """Makes sure that what was added survives whatever comes.

        Raises:
            MinirkscError: It cannot be written.
        """
        with self._writing():
            os.fsync(self._stream.fileno())

    def fill(
        self,
        todo: Sequence[Input],
        num_inputs: int,
        add_results: Callable[[Sequence[Input]], Iterable[object]],
        *,
        chunk: int,
        unit: str,
        state: str,
    ) -> None:
        """Works through the inputs that have no result yet, with a progress bar on a terminal.

        Args:
            todo: inputs without a result.
            num_inputs: number of all inputs.
            add_results: generator over some inputs that yields each time it has added one's result.
            chunk: number of inputs that are computed together; an interruption loses as many.
            unit: name of an input, for the bar.
            state: words that say of finished inputs that they are in the file, for whoever interrupts the run.
        """
        from tqdm import tqdm

        num_done = num_inputs - len(todo)
        try:
            with tqdm(total=num_inputs, initial=num_done, unit=unit, disable=not is_terminal(sys.stderr)) as bar:
                for begin in range(0, len(todo), chunk):
                    for _ in add_results(todo[begin : begin + chunk]):
                        num_done += 1
                        bar.update()
                    self.sync()
        except BaseException:
            note(f"{num_done} of {num_inputs} {state} {self.path}; the same command goes on from there")
            raise

    def _lock(self) -> None:
        """Locks for as long as the file is open, which no process survives."""
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

    def _writing(self) -> contextlib.AbstractContextManager[None]:
        return os_errors_as(MinirkscError, f"{self._name} cannot be written", "; the lines that are in it are whole")

"""The other end of bench.peers: a worker process that is asked one thing at a time, and may be missing, fail or die."""

import json
import os
import queue
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from bench.harness import ROOT

STRAY = ("PYTHONPATH", "PYTHONHOME", "PYTHONSAFEPATH", "PYTHONSTARTUP")
"""Variables that would lead a worker away from its own environment."""

CLOSE_S = 20.0
"""Seconds for a worker to end by itself."""


class PeerError(Exception):
    """A worker could not do what it was asked; one line says why."""


class PeerProcess:
    """A worker, from its start to `close`.

    Args:
        name: name of the peer, for messages.
        command: interpreter and arguments.
        threads: threads for OpenMP: some engines take their number from there alone.
        timeout_s: longest time for one reply, seconds.

    Raises:
        PeerError: there is no such interpreter.
    """

    def __init__(self, name: str, command: Sequence[str], threads: int, timeout_s: float) -> None:
        self._name = name
        self._timeout_s = timeout_s
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115
        variables = {key: value for key, value in os.environ.items() if key not in STRAY}
        variables |= {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                text=True,
                encoding="utf-8",
                env=variables,
                # In ours a rival would take the folder "kernels" for the package of that name.
                cwd=ROOT if "-m" in command else tempfile.gettempdir(),
            )
        except OSError as error:
            self._stderr.close()
            raise PeerError(f"{command[0]} cannot be started: {error.strerror or error}") from error
        threading.Thread(target=self._read, daemon=True).start()

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Sends a request and waits for its reply.

        Raises:
            PeerError: the worker says so, has died, says what is no reply, or takes too long and is ended.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._lines.get(timeout=self._timeout_s)
        except OSError:
            line = None
        except queue.Empty:
            self.close(now=True)
            raise PeerError(f"no reply to {do!r} within {self._timeout_s:g} s; ended") from None
        if line is None:
            raise PeerError(self._death(do))
        try:
            reply = json.loads(line)
            if "error" in reply:
                raise PeerError(reply["error"])
            result: dict[str, Any] = reply["result"]
        except (ValueError, KeyError, TypeError) as error:
            self.close(now=True)
            raise PeerError(f"this is no reply to {do!r}: {line.strip()[:200]!r}; ended") from error
        return result

    @property
    def is_alive(self) -> bool:
        """Whether it can be asked more."""
        return self._process.poll() is None

    def close(self, now: bool = False) -> None:
        """Ends the worker: by the end of its stdin, or by force where that does not do."""
        assert self._process.stdin is not None and self._process.stdout is not None
        if now:
            self._process.kill()
        with suppress(OSError):  # of one that has died before it read all
            self._process.stdin.close()
        try:
            self._process.wait(CLOSE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._stderr.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as stream:
            for line in stream:
                self._lines.put(line)
        self._lines.put(None)

    def _death(self, do: str) -> str:
        code = self._process.wait()
        how = f"killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        said = self._last_words()
        return f"{how} during {do!r}" + (f"; last on stderr: {said}" if said else "")

    def _last_words(self) -> str:
        if self._stderr.closed:
            return ""
        self._stderr.seek(0, os.SEEK_END)
        self._stderr.seek(max(0, self._stderr.tell() - 4000))
        lines = self._stderr.read().decode(errors="replace").split("\n")
        return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "")


def python_of(environment: str) -> str:
    """The interpreter that an environment's name on the command line means: itself, or the one in that folder."""
    folder = Path(environment).expanduser().absolute()
    if folder.is_dir():
        return str(folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))
    return str(folder) if folder.is_file() else environment

"""Ctrl-C in a command that is a process of its own: exit code 130 and one line, wherever it comes.

While the work is done it raises KeyboardInterrupt, once, so that files are closed and what is finished is named. Before
that, while extension modules are imported, and when it is pressed again, the process ends where it stands: an exception
would be printed or lost there. Once the exit code is known it stays.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

INTERRUPTED = 130


def leave_at_once() -> None:
    """From now on Ctrl-C ends the process where it stands; not where whoever started it had it ignored."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Around the import of extension modules; changes nothing unless `run_process` runs."""
    is_raising = signal.getsignal(signal.SIGINT) is _raise
    if is_raising:
        signal.signal(signal.SIGINT, _leave)
    try:
        yield
    finally:
        if is_raising:
            signal.signal(signal.SIGINT, _raise)


def run_process(main: Callable[[], int]) -> NoReturn:
    """Ends the process with the exit code of `main`, which turns KeyboardInterrupt into 130."""
    from minirksc.cli.terminal import discard

    code = INTERRUPTED
    sys.unraisablehook = _leave_if_interrupted
    with contextlib.suppress(KeyboardInterrupt):
        if signal.getsignal(signal.SIGINT) is _leave:
            signal.signal(signal.SIGINT, _raise)
        code = main()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # and where main was left by an interruption
    if code == INTERRUPTED:
        discard(sys.stdout)  # a reader that takes nothing must not hold up the end
    sys.exit(code)


def _raise(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGINT, _leave)
    raise KeyboardInterrupt


def _leave(*_: object) -> NoReturn:
    with contextlib.suppress(OSError):
        os.write(2, b"minirksc: interrupted\n")
    os._exit(INTERRUPTED)


def _leave_if_interrupted(unraisable: Any) -> None:
    """An interruption that came inside a destructor or a callback of C cannot reach `main`."""
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        _leave()
    sys.__unraisablehook__(unraisable)

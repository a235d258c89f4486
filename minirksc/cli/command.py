"""What all command lines share: how they are read, and what becomes of errors and of streams that do not work.

Exit codes: 0 when all work was done and delivered, 1 when something failed, 2 for a wrong command line, 130 when
interrupted.
"""

import argparse
import contextlib
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from minirksc.cli.interrupts import INTERRUPTED
from minirksc.cli.terminal import deliver, is_terminal, note, say, shortened
from minirksc.errors import ConfigError, MinirkscError
from minirksc.version import __version__


class UsageError(Exception):
    """The command line cannot be carried out as it stands."""


class CommandParser(argparse.ArgumentParser):
    """Reports errors by exception, and delivers --help and --version or says that it cannot.

    Args:
        options: arguments of argparse's own parser.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)
        self.add_argument("--version", action="version", version=f"minirksc {__version__}")

    def error(self, message: str) -> NoReturn:
        """Raises UsageError, where argparse would end the process."""
        raise UsageError(message)

    def _print_message(self, message: str, file: object = None) -> None:
        deliver(message)  # argparse would write to stderr instead of a closed stdout, and say nothing of a full one


def run_command(read: Callable[[], Callable[[], int]], encoding_errors: str = "replace") -> int:
    """Runs a command; every error becomes one line on stderr and an exit code.

    Args:
        read: function that checks the command line and returns what does the work. A ConfigError in it is wrong usage.
        encoding_errors: what becomes of characters that stdout's encoding lacks; text must not die of them.
    """
    _occupy_descriptors()
    with contextlib.suppress(AttributeError, OSError, ValueError):  # no such thing, full, or closed: said when needed
        sys.stdout.reconfigure(errors=encoding_errors)  # type: ignore[union-attr]
    try:
        try:
            work = read()
        except SystemExit as end:  # --help and --version
            return int(end.code or 0)
        except ConfigError as error:
            raise UsageError(str(error)) from error
        return work()
    except UsageError as error:
        note(f"error: {shortened(str(error))} (--help lists the options)")
        return 2
    except KeyboardInterrupt:
        note("interrupted", begin="\n" if is_terminal(sys.stderr) else "")
        return INTERRUPTED
    except BaseException as error:  # a panic in compiled Rust is no Exception
        if os.environ.get("MINIRKSC_DEBUG"):
            say(traceback.format_exc())
        if isinstance(error, MinirkscError | OSError):
            note(f"error: {error}")
        else:
            message = shortened(f"{type(error).__name__}: {error}")
            note(f"error: unexpected {message}; MINIRKSC_DEBUG=1 shows where")
        return 1


def check_text(what: str, text: str) -> None:
    """That an argument is UTF-8; names of files need not be.

    Raises:
        UsageError: it is not; says where.
    """
    try:
        os.fsencode(text).decode("utf-8")
    except UnicodeError as error:
        raise UsageError(f"{what} is not UTF-8 text: {error}") from error


def _occupy_descriptors() -> None:
    """Standard streams that are closed lead nowhere: else the next file that is opened would be one of them."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free one, which is this

"""What leaves for a person: text on stdout, notes on stderr. All commands write through here.

A stream may be closed, broken or full. What stdout does not take is an error, since it was asked for; what stderr does
not take is lost. On a terminal no text acts: characters that would move the cursor, change its colours or show what
follows in another order are shown as escapes. What is piped stays as it is.
"""

import contextlib
import os
import re
import sys
from typing import IO

from minirksc.errors import MinirkscError

MAX_MESSAGE_LEN = 2000
"""Characters of a message: a template's own error may have megabytes."""

_ACTING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Control characters but for tabs and line feeds, and what overrides or isolates the direction of writing."""


def visible(text: str) -> str:
    r"""Text in which nothing acts on a terminal: ESC is \u001b, as JSON writes it, so that JSON keeps its meaning."""
    return _ACTING.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def shortened(text: str) -> str:
    """At most `MAX_MESSAGE_LEN` characters, and how many more there were."""
    more = len(text) - MAX_MESSAGE_LEN
    return text if more <= 0 else f"{text[:MAX_MESSAGE_LEN]} ... ({more} more characters)"


def is_terminal(stream: IO[str] | None) -> bool:
    """Whether a person is at the other end; a stream that was closed at the start is None."""
    return stream is not None and not stream.closed and stream.isatty()


def check_stdout() -> None:
    """That there is a stdout: known before anything is computed for it.

    Raises:
        MinirkscError: it is closed.
    """
    if sys.stdout is None or sys.stdout.closed:
        raise MinirkscError("standard output is closed, so nothing can be delivered; give it a terminal, pipe or file")


def show(text: str, end: str = "\n") -> None:
    """Text on stdout, at once.

    Raises:
        MinirkscError: it cannot be delivered.
    """
    deliver((visible(text) if is_terminal(sys.stdout) else text) + end)


def deliver(text: str) -> None:
    """As `show`, with whatever control characters the text has: of a table that was made for this terminal.

    Raises:
        MinirkscError: it cannot be delivered.
    """
    check_stdout()
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        discard(sys.stdout)
        raise MinirkscError(f"standard output: {error}; not everything was delivered") from error


def note(message: str, begin: str = "") -> None:
    """One line on stderr, however many the message has."""
    lines = [line.strip() for line in message.splitlines()]
    say(f"{begin}minirksc: {shortened(visible(' '.join(filter(None, lines))))}")


def say(text: str) -> None:
    """Lines on stderr, if it takes them."""
    if sys.stderr is None:
        return
    try:
        # A name of a file may hold bytes that are no text.
        print(visible(text).encode("utf-8", "backslashreplace").decode(), file=sys.stderr, flush=True)
    except (OSError, ValueError):  # full, or closed
        discard(sys.stderr)


def discard(stream: IO[str] | None) -> None:
    """Empties a stream into nothing: what a failed write has put into its buffer must not fail again at the end."""
    if stream is None:
        return
    with contextlib.suppress(OSError, ValueError), open(os.devnull, "wb") as null:
        os.dup2(null.fileno(), stream.fileno())

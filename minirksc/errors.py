"""Every error that minirksc raises on purpose.

A message names the offending value, the limit it met and what to do about it. All of them derive from
`MinirkscError`, so that a service can catch one type; those that reject an argument are `ValueError`s too.
"""

import difflib
import reprlib
from collections.abc import Iterable, Sequence
from typing import Any

_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = _BRIEF.maxlong = 100

MAX_LISTED = 20
MAX_ITEM_CHARS = 200
"""Of one item of a listing, which may be a name from a file of anybody's."""


class MinirkscError(Exception):
    """Base of all errors raised on purpose by minirksc."""


def brief(value: Any) -> str:
    """A value for a message: its repr, cut where it is long."""
    try:
        return _BRIEF.repr(value)
    except ValueError:  # an int of more digits than Python prints
        return f"{type(value).__name__} of thousands of digits"


def listing(items: Sequence[str], separator: str) -> str:
    """Items in a row for a message, or as many of them as somebody reads."""
    shown = [item if len(item) <= MAX_ITEM_CHARS else f"{item[:MAX_ITEM_CHARS]}..." for item in items[:MAX_LISTED]]
    more = [f"and {len(items) - MAX_LISTED} more"] if len(items) > MAX_LISTED else []
    return separator.join([*shown, *more])


def did_you_mean(word: str, known: Iterable[str], most: int) -> str:
    """A question after names that look like a word; "" where none does.

    Args:
        word: word that was not understood.
        known: names that would have been.
        most: number of names to ask about.
    """
    close = difflib.get_close_matches(word, list(known), n=most)
    return f"did you mean {' or '.join(close)}?" if close else ""


def named(error: Exception, what: str) -> Exception:
    """The same error, saying which of several things it is about."""
    if not isinstance(error, MinirkscError):
        return error
    other = type(error)(f"{what}: {error}")
    other.__cause__ = error
    return other


class ConfigError(MinirkscError, ValueError):
    """An option or a sampling value is unknown, contradictory or out of range."""


class PromptError(MinirkscError, ValueError):
    """A prompt is empty, too long, or holds a token id outside the vocabulary."""


class CheckpointError(MinirkscError):
    """A checkpoint folder cannot be read: files missing, damaged, or tensors that do not fit the model."""


class UnsupportedModelError(CheckpointError):
    """config.json describes a model that minirksc does not implement."""


class TokenizerError(MinirkscError):
    """The checkpoint has no usable tokenizer, or text was given where only token ids can be used."""


class ChatTemplateError(TokenizerError):
    """The chat template is missing, raises, or runs for too long."""


class CacheFullError(MinirkscError):
    """The KV cache cannot hold what one request needs, however much is evicted."""


class NumericalError(MinirkscError):
    """The model produced NaN or infinite logits for one request."""


class BranchError(MinirkscError):
    """A branch was used after prune(), or on an engine that does not own it."""


class EngineClosedError(MinirkscError):
    """The engine was used after close()."""


class EngineBusyError(MinirkscError):
    """The engine was used by a second thread, or from inside one of its own steps."""


class EngineForkedError(MinirkscError):
    """The engine was used in a child of os.fork in which its threads or its device do not work."""

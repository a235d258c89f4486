"""Reads JSON that anybody may have written, so that nothing in it is lost or guessed.

Each key of an object is there once, numbers are finite, and nothing is nested so deeply that a reader or a writer of it
would give up.
"""

import argparse
import json
import math
from collections import Counter
from typing import Any, NoReturn

from minirksc.cli.command import UsageError, check_text
from minirksc.json_file import is_nested_deeper

MAX_NESTING = 100
"""Levels of lists and objects within each other; Python's own recursion ends at 1000."""


def strict_json(raw: bytes) -> Any:
    """What a text in UTF-8 is in JSON.

    Raises:
        ValueError: It is not JSON, or not strictly.
    """
    try:
        content = json.loads(
            raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite_float
        )
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if is_nested_deeper(content, MAX_NESTING):
        raise ValueError(f"it is nested more than {MAX_NESTING} levels deep")
    return content


def json_object(text: str) -> dict[str, Any]:
    """The object that a text is in JSON; the type of an option for argparse.

    Raises:
        argparse.ArgumentTypeError: It is none.
    """
    try:
        check_text("its text", text)
        content = strict_json(text.encode())
    except (ValueError, UsageError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise argparse.ArgumentTypeError(f'{text!r} is not a JSON object, such as {{"enable_thinking": false}}')
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        ((name, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the key {name!r} is there twice")
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _finite_float(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is larger than any number here")
    return value

"""Values of options that are more than a number, a switch or one of a few words.

A reader takes the name of an option and its value, and gives the value in the form that the option's field has; what it
cannot be read from is a ConfigError.
"""

import re
from collections.abc import Mapping, Sequence, Set
from typing import Any

from minirksc.errors import ConfigError, PromptError, brief
from minirksc.option_fields import Option, check_number
from minirksc.token_ids import BYTES, plain, read_token_ids

MAX_STOPS = 64
MAX_STOP_LEN = 256
"""Characters. Every new token is held against each beginning of each stop string."""


def read_model(name: str, value: Any) -> str:
    """The name of a model, which is looked up later."""
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{name} {value!r} must be a checkpoint folder or an alias, as text")
    return value


def read_device(name: str, value: Any) -> Any:
    """A device as torch names it."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", str(value)):
        raise ConfigError(f"{name} {value!r} is unknown; use auto, cpu, cuda or cuda:N")
    return value


def read_bytes(name: str, value: Any) -> int:
    """Bytes, from a number or a size as text."""
    number: int = parse_bytes(value) if isinstance(value, str) else value
    check_number(name, number, int, Option(low=1))
    return number


def read_names(name: str, value: Any) -> tuple[str, ...]:
    """Names, from a list of them."""
    if isinstance(value, str) or not all(isinstance(item, str) for item in _as_tuple(name, value)):
        raise ConfigError(f"{name} {value!r:.200} must be a list of names, such as ['my_field']")
    return tuple(value)


def read_stops(name: str, value: Any) -> tuple[str, ...]:
    """Stop strings, from one or a list of them."""
    stops = (value,) if isinstance(value, str) else _as_tuple(name, value)
    if len(stops) > MAX_STOPS:
        raise ConfigError(f"{name} holds {len(stops)} strings, more than {MAX_STOPS}; keep those that matter")
    for string in stops:
        if not isinstance(string, str) or not string:
            raise ConfigError(f"{name} holds {brief(string)}; it takes non-empty strings")
        if len(string) > MAX_STOP_LEN:
            raise ConfigError(
                f"{name} holds a string of {len(string)} characters; shorten it to {MAX_STOP_LEN} or less"
            )
    return stops


def read_ids(name: str, value: Any) -> tuple[int, ...]:
    """Token ids, from a list, an array or a set of them."""
    try:
        return tuple(read_token_ids(_as_tuple(name, value)))
    except PromptError as error:
        raise ConfigError(f"{name}: {error}") from error


def read_biases(name: str, value: Any) -> dict[int, float]:
    """Biases of token ids, from a mapping; a copy, for the caller may change theirs."""
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name} {brief(value)} must map token ids to numbers, as in {{50: -1.5}}")
    ids = read_ids(name, list(value))
    if len(set(ids)) < len(ids):
        raise ConfigError(f"{name} {brief(value)} names a token id twice")
    biases = dict(zip(ids, value.values(), strict=True))
    for token_id, bias in biases.items():
        check_number(f"{name}[{brief(token_id)}]", bias, float, Option())
    return biases


def parse_bytes(text: str) -> int:
    """Bytes from "512MiB", "2GB", "1.5 GiB" or a plain number.

    Raises:
        ConfigError: it is not a size.
    """
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,9})?)\s*(?:([KMGT])(i?)B?|B)?\s*", text, re.IGNORECASE)
    if not match:
        raise ConfigError(f"{text!r} is not a size; write bytes, or for example 512MiB or 2GB")
    number, unit, binary = match.groups()
    power = "KMGT".index(unit.upper()) + 1 if unit else 0
    return int(float(number) * (1024 if binary else 1000) ** power)


def _as_tuple(name: str, value: Any) -> tuple[Any, ...]:
    value = plain(value)
    if not isinstance(value, Sequence | Set) or isinstance(value, (str, *BYTES)):
        raise ConfigError(f"{name} {brief(value)} must be a list; leave it out for none")
    return tuple(value)

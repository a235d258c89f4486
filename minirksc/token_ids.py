"""What counts as token ids, wherever they are taken: whole numbers, in a list or an array of one dimension.

Integers, arrays and tensors of numpy and torch are taken and kept as int. Bools, floats, text and bytes can be read as
whole numbers too, and are not: none of them is meant as ids. Knows neither library: both have `tolist`.
"""

from collections.abc import Iterable, Mapping, Set
from numbers import Integral, Number
from typing import Any

from minirksc.errors import PromptError, brief

BYTES = (bytes, bytearray, memoryview)


def plain(value: Any) -> Any:
    """An array, tensor or scalar as Python's own lists and numbers; anything else as it is."""
    has_list = hasattr(value, "tolist") and not isinstance(value, (*BYTES, type))
    return value.tolist() if has_list else value


def is_number(value: Any) -> bool:
    """True for what is meant as a token id, be it a wrong one."""
    return type(value) is int or isinstance(plain(value), Number)


def is_list(value: Any) -> bool:
    """True for what has items in an order: neither text, bytes, a mapping nor a set."""
    return isinstance(value, Iterable) and not isinstance(value, (str, *BYTES, Mapping, Set, type))


def read_token_ids(values: Any, vocab_size: int | None = None) -> list[int]:
    """Token ids as a list of int.

    Args:
        values: a list, an array or anything else that can be iterated in order.
        vocab_size: number of ids that there are; None: any that is not negative will do.

    Raises:
        PromptError: it is no list, or one of them is no whole number or outside the vocabulary.
    """
    values = plain(values)
    if not is_list(values):
        raise PromptError(f"token ids must be a list of whole numbers, not {brief(values)}")
    token_ids = [value if type(value) is int else _whole(value) for value in values]
    if token_ids and (min(token_ids) < 0 or (vocab_size is not None and max(token_ids) >= vocab_size)):
        wrong = next(i for i in token_ids if i < 0 or (vocab_size is not None and i >= vocab_size))
        limit = "0 or more" if vocab_size is None else f"0..{vocab_size - 1}"
        raise PromptError(f"token id {brief(wrong)} is outside the vocabulary; ids are {limit}")
    return token_ids


def _whole(value: Any) -> int:
    number = plain(value)
    if not isinstance(number, Integral) or isinstance(number, bool):
        raise PromptError(f"token id {brief(number)} is no whole number; give ids as int, or text as one str")
    return int(number)

"""HTML and SVG from nested calls: whatever is not `Markup` already is escaped where it is put in.

So a text cannot become markup by being forgotten. Characters that a page cannot hold or that would act instead of
being seen are replaced by visible ones.
"""

from collections.abc import Iterable
from html import escape
from typing import TypeAlias

_VOID = {"meta", "link"}
# Controls as their pictures, except tab and line breaks. As U+FFFD: what UTF-8 or HTML has no place for, and what would
# show the characters after it in another order.
_VISIBLE = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\t\n\r"}
_VISIBLE[0x7F] = "\u2421"
for _first, _last in ((0x80, 0x9F), (0x202A, 0x202E), (0x2066, 0x2069), (0xD800, 0xDFFF), (0xFFFE, 0xFFFF)):
    _VISIBLE |= dict.fromkeys(range(_first, _last + 1), "\ufffd")


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


Part: TypeAlias = "str | int | float | Iterable[Part] | None"
"""What an element may hold; None is nothing."""


def join(*parts: Part) -> Markup:
    """Parts in order, each as markup."""
    return Markup("".join(_flat(parts)))


def tag(name: str, /, *parts: Part, **attributes: str | float | bool | None) -> Markup:
    """An element.

    Args:
        name: of the element.
        parts: what is in it.
        attributes: an underscore stands for a hyphen, one at the end for nothing (`class_`). True: an attribute
            without a value; None and False: none.
    """
    head = name
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.removesuffix("_").replace("_", "-")
        head += f" {key}" if value is True else f' {key}="{_escape(_plain(value))}"'
    return Markup(f"<{head}>") if name in _VOID else Markup(f"<{head}>{join(*parts)}</{name}>")


def _flat(parts: Iterable[Part]) -> Iterable[str]:
    for part in parts:
        if isinstance(part, Markup):
            yield part
        elif isinstance(part, str | int | float):
            yield _escape(_plain(part))
        elif part is not None:
            yield from _flat(part)


def _plain(value: str | float) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _escape(text: str) -> str:
    return escape(text.translate(_VISIBLE))

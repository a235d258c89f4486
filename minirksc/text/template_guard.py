"""The limits of one rendering of a chat template, and what each operation is checked for before it is run.

An operation takes time and memory in proportion to its operands, or it is looked at here first. Only data can be
shown: a function in a text, or a generator, would be shown as an address.
"""

import re
import sys
import time
from collections.abc import ItemsView, Iterable, KeysView, Mapping, ValuesView
from typing import Any

from jinja2 import Undefined
from jinja2.exceptions import SecurityError
from jinja2.utils import Namespace

from minirksc.errors import ChatTemplateError
from minirksc.text.chat_messages import TextParts, ToolArguments

MAX_RENDER_S = 2.0
MAX_CHARS = 10_000_000
MAX_ITEMS = 150_000
MAX_TOTAL_BYTES = 300_000_000
ITEM_CHARS = 64
MAX_INT_BITS = 10_000
MAX_WIDTH = 10_000
MAX_FORMAT_CHARS = 10_000
MAX_SEARCH = 200_000_000
"""Characters of a text times those that it is searched for from its end, which takes the product."""

SHOWING = frozenset(
    [
        *("capitalize", "center", "e", "escape", "format", "indent", "join", "lower", "replace", "safe", "string"),
        *("title", "tojson", "trim", "truncate", "upper"),
    ]
)
"""Filters that make text of whatever they get."""

COMPARING = frozenset(["dictsort", "groupby", "max", "min", "sort", "sum", "unique"])
SELECTING = frozenset(["list", "map", "reject", "rejectattr", "select", "selectattr"])
STEPWISE = (COMPARING | SELECTING | {"join", "title", "splitlines"}) - {"dictsort"}
"""Filters and methods that take a text character by character, or make an object of every part."""

PADDING = frozenset(["center", "ljust", "rjust", "zfill"])
FROM_THE_END = frozenset(["lstrip", "rfind", "rindex", "rpartition", "rsplit", "rstrip", "strip", "trim"])
CONTAINERS = (Mapping, list, tuple, set, frozenset, KeysView, ItemsView, ValuesView)
WIDE_PERCENT = re.compile(r"%(\([^)]*\))?[^%a-zA-Z]*(\d{4,}|\*)")
WIDE_BRACES = re.compile(r"\{[^{}]*:[^{}]*(\d{4,}|\{)")
BRACES_WITH_PATH = re.compile(r"\{[^{}:!]*[.\[]")


def new_deadline() -> float:
    """When a rendering that begins now has to be done."""
    return time.thread_time() + MAX_RENDER_S


class Guard:
    """The limits of one rendering.

    Args:
        deadline: by the clock of `thread_time`.
    """

    def __init__(self, deadline: float) -> None:
        self._deadline = deadline
        self._bytes_left = MAX_TOTAL_BYTES

    def tick(self) -> None:
        """Looks at the clock."""
        if time.thread_time() > self._deadline:
            raise ChatTemplateError(f"the chat template ran for more than {MAX_RENDER_S} seconds")

    def charge(self, value: Any, with_items: bool = False) -> Any:
        """Counts a value that the template has made, perhaps together with its items; returns it."""
        self.tick()
        if isinstance(value, str):
            if len(value) > MAX_CHARS:
                raise too_long()
        elif isinstance(value, list | tuple | dict):
            if len(value) > MAX_ITEMS:
                raise ChatTemplateError(f"the chat template makes a list of more than {MAX_ITEMS} items")
            if isinstance(value, tuple):
                self.weigh(value, is_shown=False)  # a tuple may be hashed, which goes through all of it
        elif isinstance(value, int):
            self.weigh(value)
        self._bytes_left -= sys.getsizeof(value)
        if with_items and isinstance(value, list):
            self._bytes_left -= sum(map(sys.getsizeof, value))
        if self._bytes_left < 0:
            raise ChatTemplateError(f"the chat template made more than {MAX_TOTAL_BYTES} bytes in passing")
        return value

    def weigh(self, value: Any, is_shown: bool = True) -> int:
        """Characters that a value would show; what is in it twice counts twice.

        Args:
            value: any.
            is_shown: that it holds something else than data is an error.
        """
        num_chars = 0
        stack = [value]
        while stack:
            item = stack.pop()
            if isinstance(item, str | bytes):
                num_chars += len(item)
            elif isinstance(item, int):
                if item.bit_length() > MAX_INT_BITS:
                    raise ChatTemplateError("the chat template computes a number that is too large")
                num_chars += 1 + item.bit_length() // 3
            elif isinstance(item, (*CONTAINERS, TemplateNamespace)):
                inner = children(item)
                if is_shown and isinstance(item, TextParts):
                    item.is_shown = True
                num_chars += ITEM_CHARS * (1 + len(inner))
                num_chars += len(str(item)) if isinstance(item, ToolArguments) else 0
                if num_chars <= MAX_CHARS:
                    stack += inner
            elif is_shown and not isinstance(item, float | range | Undefined | None):
                raise ChatTemplateError(f"the chat template shows a {type(item).__name__}, which is no text")
            else:
                num_chars += ITEM_CHARS
            if num_chars > MAX_CHARS:
                raise too_long()
        return num_chars

    def check_filter(self, name: str, subject: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Refuses a filter that would take long or make much, before it is run."""
        operands = [*args, *kwargs.values()]
        self._check_text(name, subject, operands)
        if name in SHOWING:
            self.weigh([subject, *operands])
        elif name in COMPARING:
            self.weigh([subject, *operands], is_shown=False)
        if name == "format":
            self.check_percent(str(subject), kwargs or args)
        if name == "round" and any(abs(n) > 100 for n in operands if isinstance(n, int | float)):
            raise ChatTemplateError("the chat template rounds to more than 100 digits")
        if name == "indent":
            width = max([4, *(len(a) if isinstance(a, str) else a for a in operands if isinstance(a, str | int))])
            if width * (1 + str(subject).count("\n")) > MAX_CHARS:
                raise ChatTemplateError(f"the chat template pads to more than {MAX_CHARS} characters (indent)")
        paths = args[:1] if name.endswith("attr") else operands
        if name in COMPARING | SELECTING and any(isinstance(path, str) and path.count(".") > 20 for path in paths):
            raise ChatTemplateError(f"the chat template follows too long a path of attributes ({name})")

    def check_method(self, name: str, text: str, args: tuple[Any, ...]) -> None:
        """Refuses a method of a text that would take long or make much, before it is run."""
        self._check_text(name, text, args)
        if name == "replace" and len(args) > 1 and all(isinstance(a, str) for a in args[:2]):
            if text.count(args[0]) * len(args[1]) > MAX_CHARS:
                raise ChatTemplateError(f"the chat template replaces to more than {MAX_CHARS} characters")
        elif name == "join" and args:
            self.weigh(args[0])
            if len(args[0]) * len(text) > MAX_CHARS:
                raise ChatTemplateError(f"the chat template joins to more than {MAX_CHARS} characters")

    def check_percent(self, form: str, values: Any) -> None:
        """Refuses text with % that would become huge."""
        self._check_format(form, WIDE_PERCENT, form.count("%"), values)

    def check_braces(self, form: str, values: Any) -> None:
        """Refuses a call of str.format that would give huge text, or look into values."""
        plain = form.replace("{{", "").replace("}}", "")
        self._check_format(plain, WIDE_BRACES, plain.count("{"), values)
        if BRACES_WITH_PATH.search(plain):
            raise ChatTemplateError("the chat template formats parts of a value; only whole values are taken")

    def _check_format(self, form: str, wide: re.Pattern[str], num_fields: int, values: Any) -> None:
        if len(form) > MAX_FORMAT_CHARS or wide.search(form):
            raise ChatTemplateError("the chat template formats with a width that is too large or not fixed")
        if num_fields * self.weigh(values) > MAX_CHARS:
            raise too_long()

    def _check_text(self, name: str, subject: Any, operands: Iterable[Any]) -> None:
        if name in STEPWISE and isinstance(subject, str) and len(subject) > MAX_ITEMS:
            raise ChatTemplateError(f"the chat template takes more than {MAX_ITEMS} characters one by one ({name})")
        if name in PADDING and any(isinstance(width, int) and width > MAX_WIDTH for width in operands):
            raise ChatTemplateError(f"the chat template pads to more than {MAX_WIDTH} characters ({name})")
        num_chars = len(subject) if name in FROM_THE_END and isinstance(subject, str) else 0
        if any(isinstance(part, str) and len(part) * num_chars > MAX_SEARCH for part in operands):
            raise ChatTemplateError(f"the chat template searches for too long a text ({name})")


class TemplateNamespace(Namespace):
    """`namespace()` of templates, without names that Python itself may look for."""

    def __init__(self, /, *args: Any, **kwargs: Any) -> None:
        attributes = dict(*args, **kwargs)
        for name in attributes:
            _check_name(name)
        super().__init__(attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<namespace>"


def too_long() -> ChatTemplateError:
    """The error of a value beyond MAX_CHARS."""
    return ChatTemplateError(f"the chat template makes a value of more than {MAX_CHARS} characters")


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}: names with a leading underscore are not allowed")


def children(item: Any) -> list[Any]:
    """What a container or a namespace holds."""
    if isinstance(item, TemplateNamespace):
        item = object.__getattribute__(item, "_Namespace__attrs")
    return [*item.keys(), *item.values()] if isinstance(item, Mapping) else list(item)

"""The limits of chat templates, and what each operation is checked for before it is run.

An operation takes time and memory in proportion to its operands, or it is looked at here first. Only data can be
shown: a function in a text, or a generator, would be shown as an address.
"""

import re
import sys
import time
from collections.abc import ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from typing import Any

from jinja2 import Undefined
from jinja2.exceptions import SecurityError
from jinja2.utils import Namespace

from minirksc.errors import ChatTemplateError
from minirksc.text.chat_messages import Text, TextParts, ToolArguments

# Of a source, so that compiling it ends. The longest published ones have 20 000 characters, 4 000 words and signs, and
# expressions and blocks nested 28 deep; Python's own parser ends at 200.
MAX_SOURCE_CHARS = 200_000
MAX_TOKENS = 20_000
MAX_NESTING = 100

# Of one rendering, by itself, so that any thread may render.
MAX_RENDER_S = 2.0
"""CPU time of the thread, looked at with every loop iteration and operation."""
MAX_CHARS = 10_000_000
"""Characters of any one text, or of what a value shows, where an item of a container counts as ITEM_CHARS."""
ITEM_CHARS = 64
MAX_ITEMS = 150_000
"""Items of a list. A `range` has jinja2's own limit of 100 000, and recursion Python's."""
MAX_TOTAL_BYTES = 300_000_000
"""Bytes of all values that are made in passing."""
MAX_INT_BITS = 10_000
MAX_DIGITS = 100
MAX_WIDTH = 10_000
MAX_FORMAT_CHARS = 10_000
MAX_SEARCH = 200_000_000
"""Characters of a text times those that it is searched for from its end, which takes the product."""
MAX_PATH = 20
"""Attributes of attributes that a filter may follow."""
MAX_DATE_CHARS = 100
MAX_JSON_BLANKS = 16
"""Characters of a separator or of a step of indented JSON."""
MAX_JSON_NESTING = 64

TOO_LONG = f"makes a value of more than {MAX_CHARS} characters"


def names(text: str) -> frozenset[str]:
    """The words of a text as a set."""
    return frozenset(text.split())


# Filters by what they take: text is made of whatever they get, all of it is compared, items are chosen. And others.
SHOWING = names("capitalize center e escape format indent join lower replace safe string title tojson trim truncate")
SHOWING |= {"upper"}
COMPARING = names("dictsort groupby max min sort sum unique")
SELECTING = names("list map reject rejectattr select selectattr")
FILTERS = SHOWING | COMPARING | SELECTING
FILTERS |= names("abs count d default first float int items last length reverse round")
COMPARING_TESTS = names("== eq equalto != ne > gt greaterthan >= ge < lt lessthan <= le in")

# Filters and methods of texts that take one character by character, or make an object of every part; that make it as
# long as they are told; that search from its end. And others.
STEPWISE = (COMPARING | SELECTING | names("join title splitlines")) - {"dictsort"}
PADDING = names("center ljust rjust zfill")
FROM_THE_END = names("lstrip rfind rindex rpartition rsplit rstrip strip trim")
TEXT_METHODS = PADDING | FROM_THE_END | names("capitalize casefold count endswith find format index join lower")
TEXT_METHODS |= names("isalnum isalpha isascii isdecimal isdigit islower isnumeric isspace istitle isupper")
TEXT_METHODS |= names("partition removeprefix removesuffix replace split splitlines startswith swapcase title upper")

CONTAINERS = (Mapping, list, tuple, set, frozenset, KeysView, ItemsView, ValuesView)
WIDE_PERCENT = re.compile(r"%(\([^)]*\))?[^%a-zA-Z]*(\d{4,}|\*)")
WIDE_BRACES = re.compile(r"\{[^{}]*:[^{}]*(\d{4,}|\{)")
BRACES_WITH_PATH = re.compile(r"\{[^{}:!]*[.\[]")


def new_deadline() -> float:
    """When a rendering that begins now has to be done."""
    return time.thread_time() + MAX_RENDER_S


def refuse(is_beyond: bool, what: str) -> None:
    """Ends a rendering that goes beyond a limit.

    Raises:
        ChatTemplateError: says what the template does.
    """
    if is_beyond:
        raise ChatTemplateError(f"the chat template {what}")


class Guard:
    """The limits of one rendering.

    Args:
        deadline: end of the rendering by the clock of `thread_time`.
    """

    def __init__(self, deadline: float) -> None:
        self._deadline = deadline
        self._bytes_left = MAX_TOTAL_BYTES

    def tick(self) -> None:
        """Looks at the clock."""
        if time.thread_time() > self._deadline:
            raise ChatTemplateError(f"the chat template ran for more than {MAX_RENDER_S} seconds")

    def each(self, items: Iterable[Any]) -> Iterator[Any]:
        """The items of a loop, one by one against the clock."""
        take_apart(items)
        for item in items:
            self.tick()
            yield item

    def charge(self, value: Any, with_items: bool = False) -> Any:
        """Counts a value that the template has made, perhaps together with its items; returns it."""
        self.tick()
        if isinstance(value, str):
            refuse(len(value) > MAX_CHARS, TOO_LONG)
        elif isinstance(value, list | tuple | dict) and len(value) > MAX_ITEMS:
            raise ChatTemplateError(f"the chat template makes a list of more than {MAX_ITEMS} items")
        elif isinstance(value, int | tuple):
            self.weigh(value, is_shown=False)  # a tuple may be hashed, which goes through all of it
        self._bytes_left -= sys.getsizeof(value)
        if with_items and isinstance(value, list):
            self._bytes_left -= sum(map(sys.getsizeof, value))
        if self._bytes_left < 0:
            raise ChatTemplateError(f"the chat template made more than {MAX_TOTAL_BYTES} bytes in passing")
        return value

    def shown(self, value: Any) -> Any:
        """A value that is written; only data can be."""
        if not isinstance(value, str):
            self.weigh(value)
        return self.charge(value)

    def compared(self, value: Any) -> Any:
        """An operand of a comparison, which may go through all of it."""
        self.tick()
        if isinstance(value, CONTAINERS):
            self.weigh(value, is_shown=False)
        return value

    def concatenated(self, values: list[Any]) -> Any:
        """What the operator ~ gives."""
        self.weigh(values)
        return self.charge("".join(map(str, values)))

    def weigh(self, value: Any, is_shown: bool = True) -> int:
        """Characters that a value would show; what is in it twice counts twice.

        Args:
            value: any value.
            is_shown: whether it is an error that it holds something else than data.
        """
        num_chars = 0
        stack = [value]
        while stack:
            item = stack.pop()
            if isinstance(item, str | bytes):
                num_chars += len(item)
            elif isinstance(item, int):
                refuse(item.bit_length() > MAX_INT_BITS, "computes a number that is too large")
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
            refuse(num_chars > MAX_CHARS, TOO_LONG)
        return num_chars

    def check_filter(self, name: str, subject: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Refuses a filter that would take long or make much, before it is run.

        Returns:
            The value that it gets: what it would go through more than once as a list.
        """
        if name in SHOWING | COMPARING and isinstance(subject, Iterator):
            subject = list(subject)
        if name in SELECTING or (name in ("first", "last") and isinstance(subject, TextParts)):
            take_apart(subject)
        operands = [*args, *kwargs.values()]
        self._check_text(name, subject, operands)
        if name in SHOWING | COMPARING:
            self.weigh([subject, *operands], is_shown=name in SHOWING)
        if name == "format":
            self._check_format(str(subject), WIDE_PERCENT, "%", kwargs or args)
        elif name == "round":
            is_long = any(abs(n) > MAX_DIGITS for n in operands if isinstance(n, int | float))
            refuse(is_long, f"rounds to more than {MAX_DIGITS} digits")
        elif name == "indent":
            width = max([4, *(len(a) if isinstance(a, str) else a for a in operands if isinstance(a, str | int))])
            num_added = width * (1 + str(subject).count("\n"))
            refuse(num_added > MAX_CHARS, f"pads to more than {MAX_CHARS} characters (indent)")
        elif name in COMPARING | SELECTING:
            paths = args[:1] if name.endswith("attr") else operands
            lengths = [path.count(".") for path in paths if isinstance(path, str)]
            refuse(max(lengths, default=0) > MAX_PATH, f"follows too long a path of attributes ({name})")
        return subject

    def check_test(self, name: str, subject: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Refuses a test that would take long, before it is run; returns the value that it gets."""
        if name in COMPARING_TESTS:
            self.weigh([subject, *args, *kwargs.values()], is_shown=False)
        return subject

    def check_method(self, name: str, text: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
        """Refuses a method of a text that would take long or make much, before it is run.

        Returns:
            The arguments that it gets: those of split with a limit, what join takes as a list.
        """
        operands = [*args, *kwargs.values()]
        if name == "format":
            plain = text.replace("{{", "").replace("}}", "")
            self._check_format(plain, WIDE_BRACES, "{", operands)
            refuse(bool(BRACES_WITH_PATH.search(plain)), "formats parts of a value; only whole values are taken")
            return args
        self._check_text(name, text, operands)
        if name == "replace" and len(operands) > 1 and all(isinstance(a, str) for a in operands[:2]):
            num_chars = text.count(operands[0]) * len(operands[1])
            refuse(num_chars > MAX_CHARS, f"replaces to more than {MAX_CHARS} characters")
        elif name == "join" and args:
            if not isinstance(args[0], str):
                args = (list(args[0]), *args[1:])
            self.check_join(text, args[0])
        elif name in ("split", "rsplit") and len(args) < 2 and not kwargs:
            args = (*(args or (None,)), MAX_ITEMS)
        return args

    def check_join(self, separator: str, items: Any) -> None:
        """Refuses to join items to huge text."""
        self.weigh(items)
        refuse(len(items) * len(separator) > MAX_CHARS, f"joins to more than {MAX_CHARS} characters")

    def check_json(self, value: Any, indent: int | str | None, separators: Iterable[str]) -> None:
        """Refuses JSON that would be huge for its blanks; the value has been weighed."""
        widths = [indent if isinstance(indent, int) else len(indent or ""), *map(len, separators)]
        refuse(max(widths) > MAX_JSON_BLANKS, f"writes JSON with more than {MAX_JSON_BLANKS} blanks a step")
        if indent is not None:
            level = [value]
            for _ in range(MAX_JSON_NESTING):
                level = [child for item in level if isinstance(item, CONTAINERS) for child in children(item)]
            refuse(bool(level), f"writes indented JSON that is nested more than {MAX_JSON_NESTING} deep")

    def check_operator(self, operator: str, left: Any, right: Any) -> None:
        """Refuses an operation that would take long or make much, before it is run."""
        if operator == "**":
            refuse(abs(left) > 1000 or abs(right) > 100, "computes a power that is too large")
        elif operator == "*":
            for items, times in ((left, right), (right, left)):
                limit = MAX_CHARS if isinstance(items, str | bytes) else MAX_ITEMS
                if isinstance(items, str | bytes | list | tuple) and isinstance(times, int):
                    refuse(len(items) * times > limit, f"repeats text to more than {limit} characters or items")
        elif operator == "%" and isinstance(left, str):
            self._check_format(left, WIDE_PERCENT, "%", right)

    def _check_format(self, form: str, wide: re.Pattern[str], sign: str, values: Any) -> None:
        """Refuses a form with wide fields, or one that shows much in all of them; each begins with a sign."""
        is_wide = len(form) > MAX_FORMAT_CHARS or bool(wide.search(form))
        refuse(is_wide, "formats with a width that is too large or not fixed")
        refuse(form.count(sign) * self.weigh(values) > MAX_CHARS, TOO_LONG)

    def _check_text(self, name: str, subject: Any, operands: Iterable[Any]) -> None:
        num_chars = len(subject) if isinstance(subject, str) else 0
        if name in STEPWISE:
            refuse(num_chars > MAX_ITEMS, f"takes more than {MAX_ITEMS} characters one by one ({name})")
        elif name in PADDING:
            widths = [width for width in operands if isinstance(width, int)]
            refuse(max(widths, default=0) > MAX_WIDTH, f"pads to more than {MAX_WIDTH} characters ({name})")
        elif name in FROM_THE_END:
            lengths = [len(part) for part in operands if isinstance(part, str)]
            refuse(max(lengths, default=0) * num_chars > MAX_SEARCH, f"searches for too long a text ({name})")


class TemplateNamespace(Namespace):
    """`namespace()` of templates, without names that Python itself may look for."""

    def __init__(self, /, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        for name, value in dict(*args, **kwargs).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a namespace cannot hold {name!r}: names with a leading underscore are not allowed")
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<namespace>"


def take_apart(value: Any) -> None:
    """Notes of a content that the template looks at single parts of it."""
    if isinstance(value, Text | TextParts):
        value.is_taken_apart = True


def children(item: Any) -> list[Any]:
    """What a container or a namespace holds."""
    if isinstance(item, TemplateNamespace):
        item = object.__getattribute__(item, "_Namespace__attrs")
    return [*item.keys(), *item.values()] if isinstance(item, Mapping) else list(item)

"""The jinja2 environment of chat templates: immutable, instrumented, and stopped beyond its limits.

The limits hold for each rendering by itself, so that any thread may render:

- MAX_RENDER_S seconds of the thread's CPU time, looked at with every loop iteration, call, filter and operator;
- MAX_CHARS characters of output, or of any one value (an item of a container counts as ITEM_CHARS);
- MAX_TOTAL_CHARS characters of all values that it makes in passing;
- jinja2's own limit of 100 000 items for a `range`, and Python's for recursion.

One single operation on values within these limits is never interrupted.
"""

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from functools import wraps
from typing import Any

from jinja2 import nodes, pass_context
from jinja2.exceptions import SecurityError, TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from minirksc.errors import ChatTemplateError

MAX_RENDER_S = 2.0
MAX_CHARS = 10_000_000
MAX_TOTAL_CHARS = 300_000_000
ITEM_CHARS = 16
MAX_INT_BITS = 10_000

GUARD = "_minirksc_guard"
"""Variable that carries a rendering's limits; templates may not mention it."""

WIDENING = frozenset(
    [
        "batch",
        "center",
        "expandtabs",
        "indent",
        "ljust",
        "pprint",
        "rjust",
        "slice",
        "to_bytes",
        "tojson",
        "wordwrap",
        "xmlattr",
        "zfill",
    ]
)
"""Filters and methods whose result grows with the product of text and arguments."""

STRINGIFYING = frozenset(["join", "list", "pprint", "string", "sum", "tojson"])
WIDE_PERCENT = re.compile(r"%(\([^)]*\))?[^%a-zA-Z]*(\d{5,}|\*)")
WIDE_BRACES = re.compile(r"\{[^{}]*:[^{}]*(\d{5,}|\{)")


class Guard:
    """The limits of one rendering."""

    def __init__(self) -> None:
        self._deadline = time.thread_time() + MAX_RENDER_S
        self._chars_left = MAX_TOTAL_CHARS

    def tick(self) -> None:
        """Looks at the clock."""
        if time.thread_time() > self._deadline:
            raise ChatTemplateError(f"the chat template ran for more than {MAX_RENDER_S} seconds")

    def charge(self, value: Any) -> Any:
        """Counts a value that the template has made; returns it."""
        num_chars = self.weigh(value)
        self._chars_left -= num_chars
        if self._chars_left < 0:
            raise ChatTemplateError(f"the chat template made more than {MAX_TOTAL_CHARS} characters in passing")
        return value

    def weigh(self, value: Any) -> int:
        """Characters that a value would show; what is in it twice counts twice."""
        num_chars = 0
        stack = [value]
        while stack:
            item = stack.pop()
            if isinstance(item, str | bytes):
                num_chars += len(item)
            elif isinstance(item, int):
                if item.bit_length() > MAX_INT_BITS:
                    raise ChatTemplateError("the chat template computes a number that is too large")
                num_chars += 1
            elif isinstance(item, Mapping | list | tuple | set | frozenset | _Namespace):
                children = _children(item)
                num_chars += ITEM_CHARS * (1 + len(children))
                if num_chars <= MAX_CHARS:
                    stack += children
            if num_chars > MAX_CHARS:
                raise ChatTemplateError(f"the chat template makes a value of more than {MAX_CHARS} characters")
        return num_chars

    def check_operands(self, name: str, subject: Any, arguments: Iterable[Any]) -> None:
        """Refuses a filter or method whose result would be huge, before it is made."""
        arguments = list(arguments)
        if name in WIDENING:
            sizes = [len(a) if isinstance(a, str) else abs(a) for a in arguments if isinstance(a, str | int)]
            if max(sizes, default=0) * (1 + self.weigh(subject)) > 10 * MAX_CHARS:
                raise ChatTemplateError(f"the chat template pads to more than {10 * MAX_CHARS} characters ({name})")
        elif name in STRINGIFYING:
            self.weigh([subject, *arguments])
            if name == "join" and isinstance(subject, str):  # the method: the items are the argument
                subject, arguments = arguments[0] if arguments else (), [subject]
            separator = next((a for a in arguments if isinstance(a, str)), "")
            if hasattr(subject, "__len__") and len(subject) * len(separator) > MAX_CHARS:
                raise ChatTemplateError(f"the chat template joins to more than {MAX_CHARS} characters")
        elif name in ("%", "format", "format_map") and isinstance(subject, str):
            plain = subject.replace("{{", "").replace("}}", "")
            if WIDE_PERCENT.search(subject) if name == "%" else WIDE_BRACES.search(plain):
                raise ChatTemplateError("the chat template formats with a width that is too large or not fixed")
        elif name == "replace" and isinstance(subject, str):
            texts = [a for a in arguments if isinstance(a, str)]
            if len(texts) > 1 and subject.count(texts[0]) * len(texts[1]) > MAX_CHARS:
                raise ChatTemplateError(f"the chat template replaces to more than {MAX_CHARS} characters")


class _Namespace(Namespace):
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


class Sandbox(ImmutableSandboxedEnvironment):
    """What chat templates expect, and a guard over everything that can repeat or grow."""

    intercepted_binops = frozenset(["*", "**", "+", "%"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationTag, loopcontrols],
            finalize=_charged,
            optimized=False,  # it would compute constants while compiling, unguarded
        )
        self.filters["tojson"] = _tojson
        self.filters = {name: _guarded_filter(name, function) for name, function in self.filters.items()}
        self.filters |= {"_each": _each, "_charged": _charged}
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self.globals["namespace"] = _Namespace
        del self.globals["lipsum"]

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for node in tree.find_all((nodes.Name, nodes.NSRef)):
            if getattr(node, "name", None) == GUARD:
                raise TemplateSyntaxError(f"the name {GUARD} is reserved", node.lineno)
        _Instrument().visit(tree)
        tree.set_environment(self)
        return tree

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Calls a function, method or macro for the template."""
        guard = _guard(context)
        guard.tick()
        if isinstance(obj, LoopContext) and args:  # a recursive loop
            args = (_each(context, args[0]), *args[1:])
        name = getattr(obj, "__name__", "")
        if name == "join" and args and not isinstance(args[0], str):
            args = (list(args[0]), *args[1:])
        method = getattr(obj, "__wrapped__", obj)  # jinja2 wraps str.format
        guard.check_operands(name, getattr(method, "__self__", None), [*args, *kwargs.values()])
        return guard.charge(super().call(context, obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Computes what one of `intercepted_binops` gives."""
        guard = _guard(context)
        guard.tick()
        if operator == "**":
            if abs(left) > 1000 or abs(right) > 100:
                raise ChatTemplateError("the chat template computes a power that is too large")
        elif operator == "*":
            for text, times in ((left, right), (right, left)):
                is_long = isinstance(text, str | bytes | list | tuple) and isinstance(times, int)
                if is_long and (guard.weigh(text) + ITEM_CHARS) * times > MAX_CHARS + ITEM_CHARS * times:
                    raise ChatTemplateError(f"the chat template repeats text to more than {MAX_CHARS} characters")
        elif operator == "%":
            guard.check_operands("%", left, ())
        return guard.charge(super().call_binop(context, operator, left, right))


class _Instrument(NodeTransformer):
    """Puts the guard into a template's tree, where the environment has no hook for it."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _filter("_each", node.iter)
        return node

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:
        return nodes.Const(node.data, lineno=node.lineno)  # so that it passes through finalize

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        return self._charge(node)

    def visit_List(self, node: nodes.List) -> nodes.Node:
        return self._charge(node)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        return self._charge(node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        return self._charge(node) if node.ctx == "load" else node

    def _charge(self, node: nodes.Expr) -> nodes.Node:
        self.generic_visit(node)
        return _filter("_charged", node)


class _GenerationTag(Extension):
    """`{% generation %}` marks the assistant's tokens for training; here it is plain text."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _filter(name: str, node: nodes.Node) -> nodes.Filter:
    assert isinstance(node, nodes.Expr)
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _guard(context: Context) -> Guard:
    guard = context[GUARD]
    assert isinstance(guard, Guard)
    return guard


@pass_context
def _each(context: Context, items: Iterable[Any]) -> Iterator[Any]:
    """The items of a loop, one by one against the clock."""
    guard = _guard(context)
    for item in items:
        guard.tick()
        yield item


@pass_context
def _charged(context: Context, value: Any) -> Any:
    return _guard(context).charge(value)


def _guarded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The filter within the guard; called as jinja2 calls filters that take the context."""
    wanted = getattr(getattr(function, "jinja_pass_arg", None), "name", None)

    @wraps(function)
    def guarded(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        guard = _guard(context)
        guard.tick()
        if name in STRINGIFYING and isinstance(value, Iterator):
            value = list(value)
        # The filter `format` is the operator %, not the method of that name.
        guard.check_operands("%" if name == "format" else name, value, [*args, *kwargs.values()])
        first = {"context": context, "eval_context": context.eval_ctx, "environment": context.environment}
        leading = (first[wanted],) if wanted else ()
        return guard.charge(function(*leading, value, *args, **kwargs))

    return pass_context(guarded)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the HTML escapes of jinja2's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise ChatTemplateError(f"the chat template refuses the conversation: {message}")


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}: names with a leading underscore are not allowed")


def _children(item: Any) -> list[Any]:
    if isinstance(item, _Namespace):
        item = object.__getattribute__(item, "_Namespace__attrs")
    return [*item.keys(), *item.values()] if isinstance(item, Mapping) else list(item)

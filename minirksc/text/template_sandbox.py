"""The jinja2 environment of chat templates: immutable, instrumented, and stopped beyond its limits.

Nothing but what is listed here can be reached: statements, filters, and attributes of values. Each takes time and
memory in proportion to its operands, or looks at them first. The limits:

- MAX_TOKENS and MAX_DEPTH of the source, so that compiling it ends;
- MAX_RENDER_S seconds of the thread's CPU time for a rendering, looked at with every loop iteration and operation;
- MAX_CHARS characters of any one text, or of what a value shows (an item of a container counts as ITEM_CHARS);
- MAX_ITEMS items of a list;
- MAX_TOTAL_BYTES of all values that a rendering makes in passing;
- jinja2's own limit of 100 000 items for a `range`, and Python's for recursion.

They hold for each rendering by itself, so that any thread may render. Only data can be shown: a function in a text,
or a generator, would be shown as an address.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from functools import wraps
from typing import Any

from jinja2 import Environment, nodes, pass_context, pass_environment
from jinja2.exceptions import TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import make_attrgetter
from jinja2.lexer import Token, TokenStream
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Cycler
from jinja2.visitor import NodeTransformer

from minirksc.errors import ChatTemplateError
from minirksc.text.chat_messages import Text, TextParts
from minirksc.text.template_guard import (
    COMPARING,
    CONTAINERS,
    FROM_THE_END,
    MAX_CHARS,
    MAX_ITEMS,
    PADDING,
    SELECTING,
    SHOWING,
    Guard,
    TemplateNamespace,
    children,
)

MAX_TOKENS = 20_000
"""Of a source; the longest published ones have 4 000."""

MAX_DEPTH = 100
"""Of expressions and blocks within each other; published ones have up to 28. Python's own parser ends at 200."""

GUARD = "_minirksc_guard"
"""Variable that carries a rendering's limits; templates may not mention it."""

STATEMENTS = (
    *(nodes.Output, nodes.For, nodes.If, nodes.Assign, nodes.AssignBlock, nodes.Macro, nodes.CallBlock),
    *(nodes.FilterBlock, nodes.With, nodes.Scope, nodes.Break, nodes.Continue),
)
FILTERS = (
    SHOWING
    | COMPARING
    | SELECTING
    | frozenset(
        ["abs", "count", "d", "default", "first", "float", "int", "items", "last", "length", "reverse", "round"]
    )
)
COMPARING_TESTS = frozenset(
    [
        *("==", "eq", "equalto", "!=", "ne", ">", "gt", "greaterthan", ">=", "ge", "<", "lt", "lessthan", "<=", "le"),
        *("in",),
    ]
)
ATTRIBUTES: Sequence[tuple[Any, frozenset[str]]] = (
    (
        str,
        frozenset(
            [
                *("capitalize", "casefold", "count", "endswith", "find", "format", "index", "isalnum", "isalpha"),
                *("isascii", "isdecimal", "isdigit", "islower", "isnumeric", "isspace", "istitle", "isupper", "join"),
                *("lower", "partition", "removeprefix", "removesuffix", "replace", "split", "splitlines"),
                *("startswith", "swapcase", "title", "upper", *PADDING, *FROM_THE_END),
            ]
        ),
    ),
    (dict, frozenset(["copy", "get", "items", "keys", "values"])),
    (list, frozenset(["copy", "count", "index"])),
    (tuple, frozenset(["count", "grouper", "index", "list"])),
    (
        LoopContext,
        frozenset(
            [
                *("changed", "cycle", "depth", "depth0", "first", "index", "index0", "last", "length", "nextitem"),
                *("previtem", "revindex", "revindex0"),
            ]
        ),
    ),
    (Cycler, frozenset(["current", "next", "reset"])),
)
"""What a template can reach of a value; beside it, the keys of objects and of namespaces."""


class Sandbox(ImmutableSandboxedEnvironment):
    """What chat templates expect, and a guard over everything that can repeat or grow."""

    intercepted_binops = frozenset(["*", "**", "+", "%"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Limits, _GenerationTag, loopcontrols],
            finalize=_shown,
            optimized=False,  # it would compute constants while compiling, unguarded
        )
        known = {**self.filters, "join": _join, "replace": _replace, "sum": _sum, "tojson": _tojson}
        self.filters = {name: _guarded_filter(name, known[name]) for name in FILTERS}
        self.filters |= {"_each": _each, "_charged": _charged, "_compared": _compared, "_concat": _concat}
        tests: dict[str, Any] = dict(self.tests)
        del tests["upper"], tests["lower"]  # all that would read a whole text
        self.tests = {name: _guarded_test(name, function) for name, function in tests.items()}
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now
        self.globals["namespace"] = TemplateNamespace
        del self.globals["lipsum"]

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        _check_tree(tree)
        _Instrument().visit(tree)
        tree.set_environment(self)
        return tree

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Whether a template can reach an attribute of a value."""
        names = next((names for kind, names in ATTRIBUTES if isinstance(obj, kind)), frozenset[str]())
        return super().is_safe_attribute(obj, attr, value) and (isinstance(obj, TemplateNamespace) or attr in names)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """An item of a list or object, or an attribute."""
        if isinstance(obj, TextParts):
            _take_apart(obj)
        return super().getitem(obj, argument)

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Calls a function, method or macro for the template."""
        guard = _guard(context)
        guard.tick()
        if isinstance(obj, LoopContext) and args:  # a recursive loop
            args = (_each(context, args[0]), *args[1:])
        name = getattr(obj, "__name__", "")
        subject = getattr(getattr(obj, "__wrapped__", obj), "__self__", None)  # jinja2 wraps str.format
        if isinstance(subject, str):
            if name == "join" and args and not isinstance(args[0], str):
                args = (list(args[0]), *args[1:])
            elif name in ("split", "rsplit") and len(args) < 2 and not kwargs:
                args = (*(args or (None,)), MAX_ITEMS)
            if name == "format":
                guard.check_braces(subject, [*args, *kwargs.values()])
            else:
                guard.check_method(name, subject, (*args, *kwargs.values()))
        elif isinstance(subject, list | tuple | LoopContext):
            guard.weigh([subject if isinstance(subject, list | tuple) else None, *args], is_shown=False)  # compares
        return guard.charge(super().call(context, obj, *args, **kwargs), with_items=True)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Computes what one of `intercepted_binops` gives."""
        guard = _guard(context)
        guard.tick()
        if operator == "**":
            if abs(left) > 1000 or abs(right) > 100:
                raise ChatTemplateError("the chat template computes a power that is too large")
        elif operator == "*":
            for items, times in ((left, right), (right, left)):
                is_long = isinstance(items, str | bytes | list | tuple) and isinstance(times, int)
                limit = MAX_CHARS if isinstance(items, str | bytes) else MAX_ITEMS
                if is_long and len(items) * times > limit:
                    raise ChatTemplateError(f"the chat template repeats text to more than {limit} characters or items")
        elif operator == "%" and isinstance(left, str):
            guard.check_percent(left, right)
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
        self.generic_visit(node)
        return _filter("_concat", nodes.List(node.nodes, lineno=node.lineno))

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = _compared_operand(node.expr)
        for operand in node.ops:
            operand.expr = _compared_operand(operand.expr)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _filter("_charged", node) if isinstance(node.arg, nodes.Slice) else node

    def visit_List(self, node: nodes.List) -> nodes.Node:
        self.generic_visit(node)
        return _filter("_charged", node)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        return _filter("_charged", node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return _filter("_charged", node) if node.ctx == "load" else node


class _Limits(Extension):
    """Ends the reading of a source that is too long to be compiled in time."""

    def filter_stream(self, stream: TokenStream) -> Iterator[Token]:
        for place, token in enumerate(stream):
            if place > MAX_TOKENS:
                raise TemplateSyntaxError(f"it has more than {MAX_TOKENS} words and signs", token.lineno)
            yield token


class _GenerationTag(Extension):
    """`{% generation %}` marks the assistant's tokens for training; here it is plain text."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _check_tree(tree: nodes.Template) -> None:
    """Refuses statements that chat templates have no use for, the reserved name, and what Python would not compile."""
    level: list[nodes.Node] = [tree]
    for _ in range(MAX_DEPTH):
        level = [child for node in level for child in node.iter_child_nodes()]
        for node in level:
            if getattr(node, "name", None) == GUARD:
                raise TemplateSyntaxError(f"the name {GUARD} is reserved", node.lineno)
            if isinstance(node, nodes.Stmt) and not isinstance(node, STATEMENTS):
                kind = type(node).__name__.lower()
                raise TemplateSyntaxError(f"a chat template has no use for {kind!r}", node.lineno)
    if level:
        raise TemplateSyntaxError(f"it is nested more than {MAX_DEPTH} deep", level[0].lineno)


def _filter(name: str, node: nodes.Node) -> nodes.Filter:
    assert isinstance(node, nodes.Expr)
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _compared_operand(node: nodes.Expr) -> nodes.Expr:
    return node if isinstance(node, nodes.Const) else _filter("_compared", node)


def _guard(context: Context) -> Guard:
    guard = context[GUARD]
    assert isinstance(guard, Guard)
    return guard


@pass_context
def _each(context: Context, items: Iterable[Any]) -> Iterator[Any]:
    """The items of a loop, one by one against the clock."""
    guard = _guard(context)
    _take_apart(items)
    for item in items:
        guard.tick()
        yield item


@pass_context
def _charged(context: Context, value: Any) -> Any:
    return _guard(context).charge(value)


@pass_context
def _shown(context: Context, value: Any) -> Any:
    guard = _guard(context)
    if not isinstance(value, str):
        guard.weigh(value)
    return guard.charge(value)


@pass_context
def _compared(context: Context, value: Any) -> Any:
    """An operand of a comparison, which may go through all of it."""
    guard = _guard(context)
    guard.tick()
    if isinstance(value, CONTAINERS):
        guard.weigh(value, is_shown=False)
    return value


@pass_context
def _concat(context: Context, values: list[Any]) -> str:
    """What the operator ~ gives."""
    guard = _guard(context)
    guard.weigh(values)
    text: str = guard.charge("".join(map(str, values)))
    return text


def _guarded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The filter within the guard; called as jinja2 calls filters that take the context."""
    wanted = getattr(getattr(function, "jinja_pass_arg", None), "name", None)

    @wraps(function)
    def guarded(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        guard = _guard(context)
        guard.tick()
        if name in SHOWING | COMPARING and isinstance(value, Iterator):
            value = list(value)
        if name in SELECTING or (name in ("first", "last") and isinstance(value, TextParts)):
            _take_apart(value)
        guard.check_filter(name, value, args, kwargs)
        first = {"context": context, "eval_context": context.eval_ctx, "environment": context.environment}
        leading = (first[wanted],) if wanted else ()
        return guard.charge(function(*leading, value, *args, **kwargs), with_items=True)

    return pass_context(guarded)


def _guarded_test(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The test within the guard; called as jinja2 calls tests that take the context."""
    wanted = getattr(getattr(function, "jinja_pass_arg", None), "name", None)

    @wraps(function)
    def guarded(context: Context, value: Any, *args: Any) -> Any:
        guard = _guard(context)
        guard.tick()
        if name in COMPARING_TESTS:
            guard.weigh([value, *args], is_shown=False)
        leading = (context.environment,) if wanted == "environment" else ()
        return function(*leading, value, *args)

    return pass_context(guarded)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the HTML escapes of jinja2's own filter."""
    if max([len(s) for s in separators or ()] + [indent if isinstance(indent, int) else len(indent or "")]) > 16:
        raise ChatTemplateError("the chat template writes JSON with more than 16 blanks a step")
    if indent is not None:
        level = [value]
        for _ in range(64):
            level = [child for item in level if isinstance(item, CONTAINERS) for child in children(item)]
        if level:
            raise ChatTemplateError("the chat template writes indented JSON that is nested more than 64 deep")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@pass_context
def _join(context: Context, value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
    """The items as one text, once they are known."""
    items = list(value)
    if attribute is not None:
        items = list(map(make_attrgetter(context.environment, attribute), items))
    _guard(context).weigh(items)
    if len(items) * len(str(d)) > MAX_CHARS:
        raise ChatTemplateError(f"the chat template joins to more than {MAX_CHARS} characters")
    return str(d).join(map(str, items))


@pass_context
def _replace(context: Context, s: str, old: str, new: str, count: int | None = None) -> str:
    s, old, new = str(s), str(old), str(new)
    _guard(context).check_method("replace", s, (old, new))
    return s.replace(old, new, -1 if count is None else count)


@pass_environment
def _sum(environment: Environment, iterable: Iterable[Any], attribute: str | None = None, start: Any = 0) -> Any:
    """Numbers are added, and lists to a list, which takes Python the square of their number."""
    items = list(iterable if attribute is None else map(make_attrgetter(environment, attribute), iterable))
    if not isinstance(start, list):
        if wrong := next((item for item in items if not isinstance(item, int | float)), None):
            raise ChatTemplateError(f"the chat template adds up a {type(wrong).__name__}, which is no number")
        return sum(items, start)
    total = list(start)
    for item in items:
        if not isinstance(item, list):
            raise ChatTemplateError(f"the chat template adds a {type(item).__name__} to a list")
        total += item
    return total


@pass_context
def _raise_exception(context: Context, message: Any) -> None:
    _guard(context).weigh(message)
    raise ChatTemplateError(f"the chat template refuses the conversation: {str(message)[:500]}")


def _strftime_now(form: str) -> str:
    if len(form) > 100:
        raise ChatTemplateError(f"the chat template writes the date in {len(form)} characters, 100 are allowed")
    return datetime.now().strftime(form)


def _take_apart(value: Any) -> None:
    if isinstance(value, Text | TextParts):
        value.is_taken_apart = True

"""The jinja2 environment of chat templates: immutable, instrumented, and stopped beyond the limits of `template_guard`.

Nothing but what is listed here can be reached: statements, filters, and attributes of values.
"""

import json
from collections.abc import Callable, Iterable, Iterator
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
from minirksc.text import template_guard as limits
from minirksc.text.chat_messages import TextParts
from minirksc.text.template_guard import FILTERS, TEXT_METHODS, Guard, TemplateNamespace, names, refuse, take_apart

GUARD = "_minirksc_guard"
"""Variable that carries a rendering's limits; templates may not mention it."""

STATEMENTS = (
    *(nodes.Output, nodes.For, nodes.If, nodes.Assign, nodes.AssignBlock, nodes.Macro, nodes.CallBlock),
    *(nodes.FilterBlock, nodes.With, nodes.Scope, nodes.Break, nodes.Continue),
)
ATTRIBUTES: dict[type[Any], frozenset[str]] = {
    str: TEXT_METHODS,
    dict: names("copy get items keys values"),
    list: names("copy count index"),
    tuple: names("count grouper index list"),
    LoopContext: names(
        "changed cycle depth depth0 first index index0 last length nextitem previtem revindex revindex0"
    ),
    Cycler: names("current next reset"),
}
"""What a template can reach of a value; beside it, the keys of objects and of namespaces."""


class Sandbox(ImmutableSandboxedEnvironment):
    """What chat templates expect, and a guard over everything that can repeat or grow."""

    intercepted_binops = frozenset(["*", "**", "+", "%"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Source, loopcontrols],
            finalize=_by_guard(Guard.shown),
            optimized=False,  # it would compute constants while compiling, unguarded
        )
        known = {**self.filters, "join": _join, "replace": _replace, "sum": _sum, "tojson": _tojson}
        self.filters = {name: _guarded(name, known[name], Guard.check_filter) for name in FILTERS}
        for method in (Guard.each, Guard.charge, Guard.compared, Guard.concatenated):
            self.filters[f"_{method.__name__}"] = _by_guard(method)
        tests: dict[str, Any] = dict(self.tests)
        del tests["upper"], tests["lower"]  # all that would read a whole text
        self.tests = {name: _guarded(name, function, Guard.check_test) for name, function in tests.items()}
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
        known = next((known for kind, known in ATTRIBUTES.items() if isinstance(obj, kind)), frozenset[str]())
        return super().is_safe_attribute(obj, attr, value) and (isinstance(obj, TemplateNamespace) or attr in known)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """An item of a list or object, or an attribute."""
        if isinstance(obj, TextParts):
            take_apart(obj)
        return super().getitem(obj, argument)

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Calls a function, method or macro for the template."""
        guard = _guard(context)
        guard.tick()
        subject = getattr(getattr(obj, "__wrapped__", obj), "__self__", None)  # jinja2 wraps str.format
        if isinstance(obj, LoopContext) and args:  # a recursive loop
            args = (guard.each(args[0]), *args[1:])
        elif isinstance(subject, str):
            args = guard.check_method(getattr(obj, "__name__", ""), subject, args, kwargs)
        elif isinstance(subject, list | tuple | LoopContext):
            guard.weigh([subject if isinstance(subject, list | tuple) else None, *args], is_shown=False)  # compares
        return guard.charge(super().call(context, obj, *args, **kwargs), with_items=True)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Computes what one of `intercepted_binops` gives."""
        guard = _guard(context)
        guard.tick()
        guard.check_operator(operator, left, right)
        return guard.charge(super().call_binop(context, operator, left, right))


class _Instrument(NodeTransformer):
    """Puts the guard into a template's tree, where the environment has no hook for it."""

    def visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> Any:
        """The node that takes the place of one, or the same; what is in it first."""
        self.generic_visit(node)
        match node:
            case nodes.For():
                node.iter = _filter("_each", node.iter)
            case nodes.TemplateData():
                return nodes.Const(node.data, lineno=node.lineno)  # so that it passes through finalize
            case nodes.Concat():
                return _filter("_concatenated", nodes.List(node.nodes, lineno=node.lineno))
            case nodes.Compare():
                operands: list[nodes.Compare | nodes.Operand] = [node, *node.ops]
                for operand in operands:
                    if not isinstance(operand.expr, nodes.Const):
                        operand.expr = _filter("_compared", operand.expr)
            case nodes.List() | nodes.Dict() | nodes.Tuple(ctx="load") | nodes.Getitem(arg=nodes.Slice()):
                return _filter("_charge", node)
        return node


class _Source(Extension):
    """What is done while a source is read.

    `{% generation %}` marks the assistant's tokens for training; here it is plain text.
    """

    tags = {"generation"}  # noqa: RUF012

    def filter_stream(self, stream: TokenStream) -> Iterator[Token]:
        """Ends the reading of a source that is too long to be compiled in time."""
        for place, token in enumerate(stream):
            if place > limits.MAX_TOKENS:
                raise TemplateSyntaxError(f"it has more than {limits.MAX_TOKENS} words and signs", token.lineno)
            yield token

    def parse(self, parser: Parser) -> nodes.Node:
        """The statement `{% generation %}`."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _check_tree(tree: nodes.Template) -> None:
    """Refuses statements that chat templates have no use for, the reserved name, and what Python would not compile."""
    level: list[nodes.Node] = [tree]
    for _ in range(limits.MAX_NESTING):
        level = [child for node in level for child in node.iter_child_nodes()]
        for node in level:
            if getattr(node, "name", None) == GUARD:
                raise TemplateSyntaxError(f"the name {GUARD} is reserved", node.lineno)
            if isinstance(node, nodes.Stmt) and not isinstance(node, STATEMENTS):
                kind = type(node).__name__.lower()
                raise TemplateSyntaxError(f"a chat template has no use for {kind!r}", node.lineno)
    if level:
        raise TemplateSyntaxError(f"it is nested more than {limits.MAX_NESTING} deep", level[0].lineno)


def _filter(name: str, node: nodes.Node) -> nodes.Filter:
    assert isinstance(node, nodes.Expr)
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _guard(context: Context) -> Guard:
    guard = context[GUARD]
    assert isinstance(guard, Guard)
    return guard


def _by_guard(method: Callable[[Guard, Any], Any]) -> Callable[[Context, Any], Any]:
    """A method of the guard as a filter."""
    return pass_context(lambda context, value: method(_guard(context), value))


def _guarded(name: str, function: Callable[..., Any], check: Callable[..., Any]) -> Callable[..., Any]:
    """A filter or test within the guard; called as jinja2 calls those that take the context.

    Args:
        name: name of the filter or test.
        function: what jinja2 has by that name.
        check: method of the guard that looks at its operands first, and returns the value that it gets.
    """
    wanted = getattr(getattr(function, "jinja_pass_arg", None), "name", None)

    @wraps(function)
    def guarded(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        guard = _guard(context)
        guard.tick()
        value = check(guard, name, value, args, kwargs)
        first = {"context": context, "eval_context": context.eval_ctx, "environment": context.environment}
        leading = (first[wanted],) if wanted else ()
        return guard.charge(function(*leading, value, *args, **kwargs), with_items=True)

    return pass_context(guarded)


@pass_context
def _tojson(
    context: Context,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the HTML escapes of jinja2's own filter."""
    _guard(context).check_json(value, indent, separators or ())
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@pass_context
def _join(context: Context, value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
    """The items as one text, once they are known."""
    items = list(value if attribute is None else map(make_attrgetter(context.environment, attribute), value))
    _guard(context).check_join(str(d), items)
    return str(d).join(map(str, items))


@pass_context
def _replace(context: Context, s: str, old: str, new: str, count: int | None = None) -> str:
    s, old, new = str(s), str(old), str(new)
    _guard(context).check_method("replace", s, (old, new), {})
    return s.replace(old, new, -1 if count is None else count)


@pass_environment
def _sum(environment: Environment, iterable: Iterable[Any], attribute: str | None = None, start: Any = 0) -> Any:
    """Numbers are added, and lists to a list, which takes Python the square of their number."""
    items = list(iterable if attribute is None else map(make_attrgetter(environment, attribute), iterable))
    if not isinstance(start, list):
        for item in items:
            refuse(not isinstance(item, int | float), f"adds up a {type(item).__name__}, which is no number")
        return sum(items, start)
    total = list(start)
    for item in items:
        refuse(not isinstance(item, list), f"adds a {type(item).__name__} to a list")
        total += item
    return total


@pass_context
def _raise_exception(context: Context, message: Any) -> None:
    _guard(context).weigh(message)
    raise ChatTemplateError(f"the chat template refuses the conversation: {str(message)[:500]}")


def _strftime_now(form: str) -> str:
    num_chars, most = len(form), limits.MAX_DATE_CHARS
    refuse(num_chars > most, f"writes the date in {num_chars} characters, {most} are allowed")
    return datetime.now().strftime(form)

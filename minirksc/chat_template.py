"""The checkpoint's own chat template, rendered in a sandbox.

Templates come with a checkpoint and are programs. They run in jinja2's immutable sandbox, see plain data only, and
are stopped beyond limits that hold for each rendering by itself, so that any thread may render:

- MAX_RENDER_S seconds of the thread's CPU time, looked at with every loop iteration, call, filter and operator;
- MAX_CHARS characters of output, or of any one value (an item of a container counts as ITEM_CHARS);
- MAX_TOTAL_CHARS characters of all values that it makes in passing;
- jinja2's own limit of 100 000 items for a `range`, and Python's for recursion.

One single operation on values within these limits is never interrupted. Sources larger than MAX_SOURCE_CHARS are
refused.
"""

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import wraps
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, nodes, pass_context
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
MAX_SOURCE_CHARS = 1_000_000
ITEM_CHARS = 16
MAX_INT_BITS = 10_000
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")

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


class ChatTemplate:
    """One compiled template.

    Args:
        source: jinja2 text.
        special_tokens: variables such as bos_token.

    Raises:
        ChatTemplateError: a syntax error, with its line.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self._special_tokens = dict(special_tokens)
        if len(source) > MAX_SOURCE_CHARS:
            raise ChatTemplateError(f"the chat template has {len(source)} characters, {MAX_SOURCE_CHARS} are allowed")
        environment = _Sandbox()
        try:
            tree = environment.parse(source)
            self._takes_parts = _loops_over_content(tree)
            self._template = environment.from_string(tree)
        except (TemplateError, RecursionError, SyntaxError, ValueError) as error:
            line = getattr(error, "lineno", None)
            where = f" at line {line}" if line else ""
            raise ChatTemplateError(
                f"the chat template has an error{where}: {error}; mend it, or use the plain prompt (--no-chat)"
            ) from error

    def render(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The conversation as text.

        Keys of a message whose value is None count as absent. A content given as text parts is joined by line ends
        for a template that knows content as text only.

        Raises:
            ChatTemplateError: the messages are malformed; the template raises, or exceeds its limits.
        """
        check_messages(messages)
        try:
            context: dict[str, Any] = {
                **self._special_tokens,
                "tools": None,
                "documents": None,
                **_plain(variables),
                "messages": [self._message(message) for message in messages],
                "add_generation_prompt": add_generation_prompt,
                GUARD: _Guard(),
            }
            return self._generate(context)
        except ChatTemplateError:
            raise
        except Exception as error:  # a template may fail in any way that Python can
            raise ChatTemplateError(
                f"the chat template raised {type(error).__name__}: {str(error)[:500]}; "
                "check the messages, or use the plain prompt (--no-chat)"
            ) from error

    def _message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        plain = {key: _plain(value) for key, value in message.items() if value is not None}
        if isinstance(plain.get("content"), list) and not self._takes_parts:
            plain["content"] = "\n".join(part["text"] for part in plain["content"])
        return plain

    def _generate(self, context: dict[str, Any]) -> str:
        parts: list[str] = []
        num_chars = 0
        for part in self._template.generate(context):
            parts.append(part)
            num_chars += len(part)
            if num_chars > MAX_CHARS:
                raise ChatTemplateError(f"the chat template wrote more than {MAX_CHARS} characters")
        return "".join(parts)


def load_chat_templates(folder: Path, settings: Mapping[str, Any]) -> dict[str, ChatTemplate]:
    """The templates of a checkpoint folder by name; one without a name is "default", none at all gives {}.

    Read from chat_template.jinja, else chat_template.json, else tokenizer_config.json.

    Args:
        folder: the checkpoint.
        settings: content of its tokenizer_config.json.

    Raises:
        ChatTemplateError: one cannot be read or has a syntax error.
    """
    source: Any = settings.get("chat_template")
    try:
        if (folder / "chat_template.jinja").is_file():
            source = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        elif (folder / "chat_template.json").is_file():
            source = json.loads((folder / "chat_template.json").read_text(encoding="utf-8"))["chat_template"]
        if isinstance(source, list):
            source = {template["name"]: template["template"] for template in source}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ChatTemplateError(f"the chat template in {folder} cannot be read: {error!r}") from error
    if source is None:
        return {}
    special = {}
    for name in SPECIAL_TOKENS:
        token = settings.get(name)
        token = token.get("content") if isinstance(token, Mapping) else token
        if isinstance(token, str):
            special[name] = token
    sources = source if isinstance(source, dict) else {"default": source}
    for name, text in sources.items():
        if not isinstance(text, str):
            raise ChatTemplateError(f"chat template {name!r} in {folder} is not text but {type(text).__name__}")
    return {name: ChatTemplate(text, special) for name, text in sources.items()}


def check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    """Refuses what is not a conversation.

    Raises:
        ChatTemplateError: names the message and what is wrong with it.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise ChatTemplateError(
            f'a conversation is a list of {{"role": ..., "content": ...}}, not {type(messages).__name__}'
        )
    if not messages:
        raise ChatTemplateError("the conversation is empty; give at least one message")
    for place, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ChatTemplateError(
                f"message {place} is {_short(message)}; it must be an object with a role (text) and a content"
            )
        content = message.get("content")
        if isinstance(content, list | tuple):
            for part in content:
                is_text = isinstance(part, Mapping) and part.get("type", "text") == "text"
                if not is_text or not isinstance(part.get("text"), str):
                    raise ChatTemplateError(
                        f'message {place} has the part {_short(part)}; only {{"type": "text", "text": ...}} is taken'
                    )
        elif content is None and len({key for key, value in message.items() if value is not None}) == 1:
            raise ChatTemplateError(f"message {place} ({message['role']}) has no content")
        elif content is not None and not isinstance(content, str):
            raise ChatTemplateError(
                f"content of message {place} is {_short(content)}; it must be text or a list of text parts"
            )


class _Guard:
    """The limits of one rendering."""

    def __init__(self) -> None:
        self._deadline = time.thread_time() + MAX_RENDER_S
        self._chars_left = MAX_TOTAL_CHARS

    def tick(self) -> None:
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


class _Sandbox(ImmutableSandboxedEnvironment):
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


def _guard(context: Context) -> _Guard:
    guard = context[GUARD]
    assert isinstance(guard, _Guard)
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


def _plain(value: Any) -> Any:
    """A copy out of plain JSON types: methods of anything else would be open to the template."""
    if value is None or isinstance(value, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    raise ChatTemplateError(f"a chat template takes plain data only, not {type(value).__name__}: {_short(value)}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _loops_over_content(tree: nodes.Template) -> bool:
    """Whether a template knows messages whose content is a list of parts."""
    for loop in tree.find_all(nodes.For):
        for node in loop.iter.find_all((nodes.Getattr, nodes.Getitem, nodes.Name)):
            key = getattr(node, "arg", None)  # of message["content"]
            if "content" in (getattr(node, "attr", None), getattr(node, "name", None), getattr(key, "value", None)):
                return True
    return False

"""The checkpoint's own chat template, rendered in a sandbox.

Templates come with a checkpoint and are programs: they run in jinja2's immutable sandbox, with the variables and
helpers that chat templates expect, and within limits of time, output, range and multiplication, all kept per
rendering, so that any thread may render.
"""

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, nodes, pass_context
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from minirksc.errors import ChatTemplateError

MAX_RENDER_S = 2.0
MAX_OUTPUT_CHARS = 10_000_000
MAX_PRODUCT = 1_000_000
DEADLINE = "_render_deadline"
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


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
        environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols])
        environment.filters["tojson"] = _tojson
        environment.filters["_bounded"] = _bounded
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except (TemplateError, RecursionError) as error:
            line = getattr(error, "lineno", None)
            where = f" at line {line}" if line else ""
            raise ChatTemplateError(f"the chat template has an error{where}: {error}") from error

    def render(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The conversation as text.

        Raises:
            ChatTemplateError: the messages are malformed; the template raises, or exceeds its limits.
        """
        _check_messages(messages)
        context: dict[str, Any] = {
            **self._special_tokens,
            "tools": None,
            "documents": None,
            **variables,
            "messages": [dict(message) for message in messages],
            "add_generation_prompt": add_generation_prompt,
            DEADLINE: time.monotonic() + MAX_RENDER_S,
        }
        parts: list[str] = []
        num_chars = 0
        try:
            for part in self._template.generate(context):
                parts.append(part)
                num_chars += len(part)
                if num_chars > MAX_OUTPUT_CHARS:
                    raise ChatTemplateError(f"the chat template wrote more than {MAX_OUTPUT_CHARS} characters")
        except ChatTemplateError:
            raise
        except Exception as error:  # a template may fail in any way that Python can
            raise ChatTemplateError(
                f"the chat template raised {type(error).__name__}: {str(error)[:500]}; "
                "check the messages, or use the plain prompt (--no-chat)"
            ) from error
        return "".join(parts)


def load_chat_template(folder: Path, settings: Mapping[str, Any]) -> ChatTemplate | None:
    """The template of a checkpoint folder: a .jinja file, a .json file, or inside tokenizer_config.json.

    Raises:
        ChatTemplateError: it cannot be read or has a syntax error.
    """
    source: Any = settings.get("chat_template")
    try:
        if (folder / "chat_template.jinja").is_file():
            source = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        elif (folder / "chat_template.json").is_file():
            source = json.loads((folder / "chat_template.json").read_text(encoding="utf-8"))["chat_template"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ChatTemplateError(f"the chat template in {folder} cannot be read: {error!r}") from error
    if isinstance(source, list):  # several named ones
        named = {t.get("name"): t.get("template") for t in source if isinstance(t, Mapping)}
        source = named.get("default")
    if source is None:
        return None
    if not isinstance(source, str):
        raise ChatTemplateError(f"the chat template in {folder} is not text but {type(source).__name__}")
    special = {}
    for name in SPECIAL_TOKENS:
        token = settings.get(name)
        token = token.get("content") if isinstance(token, Mapping) else token
        if isinstance(token, str):
            special[name] = token
    return ChatTemplate(source, special)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Guards loops and products, with which a small template could otherwise run for ever."""

    intercepted_binops = frozenset(["*", "**"])

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(nodes.For):
            loop.iter = nodes.Filter(loop.iter, "_bounded", [], [], None, None, lineno=loop.lineno)
        return tree

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            if abs(left) > 1000 or abs(right) > 100:
                raise ChatTemplateError("the chat template computes a power that is too large")
        else:
            for text, times in ((left, right), (right, left)):
                is_long = isinstance(text, str | list | tuple) and isinstance(times, int)
                if is_long and len(text) * times > MAX_PRODUCT:
                    raise ChatTemplateError(f"the chat template repeats text to more than {MAX_PRODUCT} characters")
        return super().call_binop(context, operator, left, right)


class _GenerationTag(Extension):
    """`{% generation %}` marks the assistant's tokens for training; here it is plain text."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


@pass_context
def _bounded(context: Context, items: Iterable[Any]) -> Iterable[Any]:
    """The items of a loop, one by one against the clock."""
    deadline = context[DEADLINE]

    def checked() -> Iterator[Any]:
        for item in items:
            if time.monotonic() > deadline:
                raise ChatTemplateError(f"the chat template ran for more than {MAX_RENDER_S} seconds")
            yield item

    return checked()


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


def _check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    if not messages:
        raise ChatTemplateError("the conversation is empty; give at least one message")
    for place, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ChatTemplateError(
                f"message {place} is {message!r:.80}; it must be an object with a role and a content"
            )
        content = message.get("content")
        if content is not None and not isinstance(content, str | list):
            raise ChatTemplateError(f"content of message {place} must be text or a list of parts")

"""Messages of a conversation as chat templates were written for them, whichever client they come from.

Clients of OpenAI's interface send `content: null` beside tool calls, the arguments of a call as JSON text, and text
in parts. Templates were written for text, for arguments as objects, and some for parts. So:

- a content that is absent is "", where something else is said in its place (a tool call, reasoning);
- a refusal is what the assistant said, and a `function_call` is a tool call;
- fields that are null, and an empty list of tool calls, count as absent;
- arguments are objects that show as the text that they came as (`ToolArguments`);
- parts are a list for a template that takes them apart, and else one text, joined by line ends (`suit_contents`);
- a developer is a system to a template that knows no developer.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from minirksc.errors import ChatTemplateError, brief

REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
"""What messages call the text before an answer; the first that is there goes by the first two names."""

MARK = "5170962438"
"""Stands for a text in order to see whether a template shows it; no filter changes digits."""

SILENT_FIELDS = frozenset(["role", "content", "name", "id", "tool_call_id", "annotations"])
"""Fields that say nothing by themselves."""


COPIES: Mapping[type, Callable[[Any], Any]] = {str: str.__str__, int: int.__int__, float: float.__float__}
"""What makes a plain value of one of a class that derives from its type; of an Enum, str() would be the name."""


class ToolArguments(dict[str, Any]):
    """Arguments of a tool call: an object, and JSON text wherever a template takes them as text.

    Args:
        values: the object.
        text: JSON text as which they came.
    """

    def __init__(self, values: Mapping[str, Any], text: str) -> None:
        super().__init__(values)
        self._text = text

    def __str__(self) -> str:
        return self._text

    def __add__(self, other: str) -> str:
        return self._text + other

    def __radd__(self, other: str) -> str:
        return other + self._text


class TextPart(dict[str, str]):
    """One part of a content; where a template shows the whole of it, its text."""

    def __str__(self) -> str:
        return self["text"]


class TextParts(list[TextPart]):
    """A content in parts.

    Attributes:
        is_taken_apart: whether a template has looked at single parts.
        is_shown: whether a template has shown the list as it is.
    """

    is_taken_apart = False
    is_shown = False

    def __str__(self) -> str:
        return "\n".join(map(str, self))


class Text(str):
    """A content that is text.

    Attributes:
        is_taken_apart: whether a template has looked at it as if it were parts.
    """

    is_taken_apart = False


def check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    """Refuses what is not a conversation of texts.

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
                f"message {place} is {brief(message)}; it must be an object with a role (text) and a content"
            )
        content = message.get("content")
        if isinstance(content, list | tuple):
            for part in content:
                if _text_of(part) is None:
                    raise ChatTemplateError(
                        f'message {place} has the part {brief(part)}; only {{"type": "text", "text": ...}} is taken'
                    )
        elif content is None and not any(
            value not in (None, "", [], {}) for key, value in message.items() if key not in SILENT_FIELDS
        ):
            raise ChatTemplateError(f"message {place} ({message['role']:.80}) has no content")
        elif content is not None and not isinstance(content, str):
            raise ChatTemplateError(
                f"content of message {place} is {brief(content)}; it must be text or a list of text parts"
            )
        if message.get("audio") is not None:
            raise ChatTemplateError(f"message {place} holds audio, and only text is taken; give its transcript")


def check_tools(tools: Sequence[Mapping[str, Any]] | None) -> None:
    """Refuses what is not a list of functions.

    Raises:
        ChatTemplateError: names it.
    """
    if tools is not None and not (isinstance(tools, list | tuple) and all(isinstance(t, Mapping) for t in tools)):
        raise ChatTemplateError(f"tools are a list of objects, each of which describes a function, not {brief(tools)}")


def template_message(message: Mapping[str, Any], knows_developer: bool) -> dict[str, Any]:
    """A checked message as plain data in the form that templates expect.

    Args:
        message: message that has passed `check_messages`.
        knows_developer: whether the template has the role of that name.
    """
    plain = {key: value for key, value in plain_data(message).items() if value is not None}
    refusal, call = plain.pop("refusal", None), plain.pop("function_call", None)
    if not plain.get("tool_calls"):
        plain.pop("tool_calls", None)
        if call is not None:
            plain["tool_calls"] = [{"type": "function", "function": call}]
    if isinstance(plain.get("tool_calls"), list):
        plain["tool_calls"] = [_tool_call(call) for call in plain["tool_calls"]]
    content = plain.get("content")
    if isinstance(content, list):
        plain["content"] = TextParts(TextPart(part, type="text", text=str(_text_of(part))) for part in content)
    else:
        plain["content"] = Text(content or refusal or "")
    reasoning = next((plain[key] for key in REASONING_FIELDS if key in plain), None)
    if reasoning is not None:
        plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
    if plain["role"] == "developer" and not knows_developer:
        plain["role"] = "system"
    return plain


def suit_contents(messages: Sequence[dict[str, Any]], render: Callable[[list[dict[str, Any]]], str]) -> bool:
    """Gives contents the form that a template was seen to want, text or parts; whether any has changed.

    Args:
        messages: messages of `template_message`, after they were rendered; changed in place.
        render: function that gives what the template makes of others.
    """
    contents = [message["content"] for message in messages]
    marks = {}
    for place, content in enumerate(contents):
        if isinstance(content, TextParts) and (content.is_shown or not content.is_taken_apart):
            messages[place]["content"] = str(content)
        elif isinstance(content, Text) and content.is_taken_apart:
            marks[place] = f"{MARK}{place:06}"
    if marks:  # texts that a loop went through: some templates do so beside showing them, some instead
        marked = [m if i not in marks else {**m, "content": marks[i]} for i, m in enumerate(messages)]
        with suppress(Exception):  # the template may refuse the conversation, whatever the form of these
            shown = render(marked)
            for place, mark in marks.items():
                if mark not in shown:
                    messages[place]["content"] = TextParts([TextPart(type="text", text=str(contents[place]))])
    return any(message["content"] is not content for message, content in zip(messages, contents, strict=True))


def plain_data(value: Any) -> Any:
    """A copy out of plain JSON types: methods of anything else would be open to the template.

    Raises:
        ChatTemplateError: there is something else in it.
    """
    if value is None or isinstance(value, bool):
        return value
    for kind, copy_of in COPIES.items():
        if isinstance(value, kind):
            return copy_of(value)
    if isinstance(value, Mapping):
        return {str(plain_data(key)): plain_data(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_data(item) for item in value]
    raise ChatTemplateError(f"a chat template takes plain data only, not {type(value).__name__}: {brief(value)}")


def _text_of(part: Any) -> str | None:
    """The text of a part; None when it is no part of text."""
    if not isinstance(part, Mapping):
        return None
    kind = part.get("type", "text")
    text = part.get(kind) if kind in ("text", "refusal") else None
    return str.__str__(text) if isinstance(text, str) else None


def _tool_call(call: Any) -> Any:
    """A call whose arguments are an object, as far as they are one; others stay as they are."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or "arguments" not in function:
        return call
    values = text = function["arguments"] or "{}"
    if isinstance(values, str):
        try:
            values = json.loads(values)
        except (ValueError, RecursionError):
            return call
    if not isinstance(values, dict):
        return call
    if not isinstance(text, str):
        text = json.dumps(values, ensure_ascii=False)
    function = {**function, "arguments": ToolArguments(values, text)}
    return {**call, "function": function} if "function" in call else function

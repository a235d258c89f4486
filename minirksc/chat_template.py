"""The checkpoint's own chat template, rendered in a sandbox.

Templates come with a checkpoint and are programs. They see plain data only, and run within the limits of
`template_sandbox`. Sources larger than MAX_SOURCE_CHARS are refused.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, nodes

from minirksc.errors import ChatTemplateError
from minirksc.template_sandbox import GUARD, MAX_CHARS, Guard, Sandbox

MAX_SOURCE_CHARS = 1_000_000
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
"""What messages call the text before an answer; the first that is there goes by the first two names."""

ARGUMENTS = ("messages", "add_generation_prompt", "tools")
"""Variables with an argument of their own in `ChatTemplate.render`."""


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
        environment = Sandbox()
        try:
            tree = environment.parse(source)
            self._takes_parts = _loops_over_content(tree)
            self._names = {node.name for node in tree.find_all(nodes.Name) if node.ctx == "load"} - {GUARD}
            self._template = environment.from_string(tree)
        except (TemplateError, RecursionError, SyntaxError, ValueError) as error:
            line = getattr(error, "lineno", None)
            where = f" at line {line}" if line else ""
            raise ChatTemplateError(
                f"the chat template has an error{where}: {error}; mend it, or use the plain prompt (--no-chat)"
            ) from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The conversation as text.

        Keys of a message whose value is None count as absent. A content given as text parts is joined by line ends
        for a template that knows content as text only.

        Args:
            messages: each {"role": ..., "content": ...}.
            add_generation_prompt: end with the beginning of the assistant's turn.
            tools: functions that the model may call, each described by a JSON schema.
            variables: others that the template knows, such as enable_thinking.

        Raises:
            ChatTemplateError: the messages are malformed, or the template does not know a variable or tools; it
                raises, or exceeds its limits.
        """
        variables = variables or {}
        self._check_variables(variables, bool(tools))
        check_messages(messages)
        try:
            context: dict[str, Any] = {
                **self._special_tokens,
                "documents": None,
                **_plain(variables),
                "tools": _plain(tools),
                "messages": [self._message(message) for message in messages],
                "add_generation_prompt": add_generation_prompt,
                GUARD: Guard(),
            }
            return self._generate(context)
        except ChatTemplateError:
            raise
        except Exception as error:  # a template may fail in any way that Python can
            raise ChatTemplateError(
                f"the chat template raised {type(error).__name__}: {str(error)[:500]}; "
                "check the messages, or use the plain prompt (--no-chat)"
            ) from error

    def _check_variables(self, variables: Mapping[str, Any], has_tools: bool) -> None:
        if not isinstance(variables, Mapping):
            raise ChatTemplateError(f"variables of a chat template are names with values, not {_short(variables)}")
        if taken := [name for name in ARGUMENTS if name in variables]:
            raise ChatTemplateError(f"{taken[0]} is an argument of its own, not one of the chat template's variables")
        for name in [*variables, *["tools"] * has_tools]:
            if name not in self._names:
                raise ChatTemplateError(f"the chat template makes no use of {name!r}; leave it out")

    def _message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        plain = {key: _plain(value) for key, value in message.items() if value is not None}
        reasoning = next((plain[key] for key in REASONING_FIELDS if key in plain), None)
        if reasoning is not None:
            plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
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

    Read from chat_template.jinja and additional_chat_templates/NAME.jinja, else chat_template.json, else
    tokenizer_config.json.

    Args:
        folder: the checkpoint.
        settings: content of its tokenizer_config.json.

    Raises:
        ChatTemplateError: one cannot be read or has a syntax error.
    """
    source: Any = settings.get("chat_template")
    try:
        files = {file.stem: file for file in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
        if (folder / "chat_template.jinja").is_file():
            files = {"default": folder / "chat_template.jinja", **files}
        if files:
            source = {name: file.read_text(encoding="utf-8") for name, file in files.items()}
        elif (folder / "chat_template.json").is_file():
            source = json.loads((folder / "chat_template.json").read_text(encoding="utf-8"))["chat_template"]
        if isinstance(source, list):
            source = {template["name"]: template["template"] for template in source}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ChatTemplateError(f"the chat template in {folder} cannot be read: {error!r}") from error
    if source is None:
        return {}
    special = {}
    for name, token in settings.items():
        token = token.get("content") if isinstance(token, Mapping) else token
        if name.endswith("_token") and isinstance(token, str):
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

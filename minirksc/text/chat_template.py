"""The checkpoint's own chat template, rendered in a sandbox.

Templates come with a checkpoint and are programs. They see plain data only, and run within the limits of
`template_sandbox`. Sources larger than MAX_SOURCE_CHARS are refused.
"""

import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, nodes

from minirksc.errors import ChatTemplateError, brief
from minirksc.json_file import read_json, read_text
from minirksc.text.chat_messages import check_messages, check_tools, plain_data, suit_contents, template_message
from minirksc.text.template_guard import MAX_CHARS, MAX_SOURCE_CHARS, Guard, new_deadline
from minirksc.text.template_sandbox import GUARD, Sandbox
from minirksc.text.tokenizer_checks import token_text

MAX_FILES = 100
"""Files of a folder of templates."""

MAX_ERROR_CHARS = 500
ADDRESS = re.compile(r" (object )?at 0x[0-9a-fA-F]+")

ARGUMENTS = ("messages", "add_generation_prompt", "tools")
"""Variables with an argument of their own in `ChatTemplate.render`."""


class ChatTemplate:
    """One compiled template.

    Args:
        source: text in jinja2's language.
        special_tokens: values of variables such as bos_token.

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
            self._names = {node.name for node in tree.find_all(nodes.Name) if node.ctx == "load"} - {GUARD}
            self._knows_developer = any(node.value == "developer" for node in tree.find_all(nodes.Const))
            self._template = environment.from_string(tree)
        except (TemplateError, RecursionError, SyntaxError, ValueError, MemoryError) as error:
            line = getattr(error, "lineno", None)
            where = f" at line {line}" if line else ""
            raise ChatTemplateError(
                f"the chat template has an error{where}: {_said(error)}; mend it, or use the plain prompt (--no-chat)"
            ) from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The conversation as text.

        Messages are taken as OpenAI's clients send them, see `chat_messages`. A content in parts is joined by line
        ends where the template does not take it apart.

        Args:
            messages: messages, each {"role": ..., "content": ...}.
            add_generation_prompt: whether to end with the beginning of the assistant's turn.
            tools: functions that the model may call, each described by a JSON schema.
            variables: other variables that the template knows, such as enable_thinking.

        Raises:
            ChatTemplateError: the messages are malformed, or the template does not know a variable or tools; it
                raises, or exceeds its limits.
        """
        variables = variables or {}
        self._check_variables(variables, bool(tools))
        check_messages(messages)
        check_tools(tools)
        try:
            context: dict[str, Any] = {
                **self._special_tokens,
                "documents": None,
                **plain_data(variables),
                "tools": plain_data(tools),
                "messages": [template_message(message, self._knows_developer) for message in messages],
                "add_generation_prompt": add_generation_prompt,
            }
            return self._render(context)
        except ChatTemplateError:
            raise
        except Exception as error:  # a template may fail in any way that Python can
            raise ChatTemplateError(
                f"the chat template raised {type(error).__name__}: {_said(error)}; "
                "check the messages, or use the plain prompt (--no-chat)"
            ) from error

    def _check_variables(self, variables: Mapping[str, Any], has_tools: bool) -> None:
        if not isinstance(variables, Mapping):
            raise ChatTemplateError(f"variables of a chat template are names with values, not {brief(variables)}")
        if taken := [name for name in ARGUMENTS if name in variables]:
            raise ChatTemplateError(f"{taken[0]} is an argument of its own, not one of the chat template's variables")
        for name in [*variables, *["tools"] * has_tools]:
            if name not in self._names:
                raise ChatTemplateError(f"the chat template makes no use of {brief(name)}; leave it out")

    def _render(self, context: dict[str, Any]) -> str:
        """The text, once contents have the form that the template wants: at first they have that which they came in."""
        deadline = new_deadline()  # of all attempts together

        def render(messages: list[dict[str, Any]]) -> str:
            return self._generate({**context, "messages": messages, GUARD: Guard(deadline)})

        messages = context["messages"]
        for _ in range(2):
            try:
                text = render(messages)
            except Exception:
                if not suit_contents(messages, render):
                    raise
            else:
                if not suit_contents(messages, render):
                    return text
        return render(messages)

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
        folder: folder of the checkpoint.
        settings: content of its tokenizer_config.json.

    Raises:
        ChatTemplateError: one cannot be read or has a syntax error.
    """
    sources = dict(_sources(folder, settings))
    named = {name: token_text(token) for name, token in settings.items() if name.endswith("_token")}
    special = {name: text for name, text in named.items() if text is not None}
    return {name: ChatTemplate(source, special) for name, source in sources.items()}


def _sources(folder: Path, settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Names and texts of the templates of a folder."""
    if files := _files(folder):
        yield from ((name, read_text(file, ChatTemplateError)) for name, file in files.items())
        return
    source, place = settings.get("chat_template"), folder / "tokenizer_config.json"
    if os.path.lexists(folder / "chat_template.json"):
        place = folder / "chat_template.json"
        content = read_json(place, ChatTemplateError)
        source = content.get("chat_template") if isinstance(content, dict) else content
    if isinstance(source, str):
        source = {"default": source}
    if isinstance(source, Mapping):
        source = [{"name": key, "template": value} for key, value in source.items()]
    for template in source if isinstance(source, list) else [] if source is None else [source]:
        named = template if isinstance(template, Mapping) else {}
        name, text = named.get("name"), named.get("template")
        if not isinstance(name, str) or not isinstance(text, str):
            raise ChatTemplateError(
                f"{place} has a chat template that is {brief(template)}; it must be text, or a list of objects with "
                "a name and a template"
            )
        yield name, text


def _files(folder: Path) -> dict[str, Path]:
    """Files with a template of their own, by the template's name."""
    others = folder / "additional_chat_templates"
    try:
        found = list(itertools.islice(others.iterdir(), MAX_FILES)) if others.is_dir() else []
    except OSError as error:
        raise ChatTemplateError(f"the chat templates in {others} cannot be read: {error.strerror}") from error
    default = folder / "chat_template.jinja"
    files = {"default": default} if os.path.lexists(default) else {}
    return files | {file.stem: file for file in sorted(found) if file.suffix == ".jinja"}


def _said(error: Exception) -> str:
    """What an error says, without addresses of objects, in few words."""
    return ADDRESS.sub("", str(error))[:MAX_ERROR_CHARS]

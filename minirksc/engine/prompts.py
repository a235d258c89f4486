"""The forms in which prompts and sampling parameters may be given."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from minirksc.engine.request import Salt
from minirksc.errors import ConfigError, PromptError, brief
from minirksc.options import SamplingParams
from minirksc.token_ids import is_list, is_number, plain, read_token_ids

Prompt = str | Iterable[int] | Mapping[str, Any]
"""Text, token ids, or {"prompt_token_ids": [...]} or {"prompt": "..."}, these two perhaps with a cache_salt."""

Params = SamplingParams | Mapping[str, Any] | None
"""Sampling parameters, the same as a dict of their fields, or None for the defaults."""


@dataclass(frozen=True)
class Conversation:
    """A prompt that the checkpoint's chat template is to write; see `LLM.chat`."""

    messages: Any
    add_generation_prompt: bool
    tools: Any
    chat_template_kwargs: Any

    def checked_messages(self) -> list[Mapping[str, Any]]:
        """The messages as a list.

        Raises:
            PromptError: they are something else.
        """
        messages = list(self.messages) if is_list(self.messages) else []
        if not messages or not all(isinstance(message, Mapping) for message in messages):
            raise PromptError(
                f'a conversation must be a list of {{"role": ..., "content": ...}}, not {brief(self.messages)}'
            )
        return messages


class Piece(NamedTuple):
    """A prompt, or a part of one, as it was given: text or token ids, and the salt beside them."""

    text: str | None
    token_ids: list[int]
    salt: Salt | None


def one_or_many(prompts: Any, is_part: Callable[[Any], bool] = is_number) -> tuple[list[Any], bool]:
    """(prompts, True if it was a single one); a list of parts of a prompt, such as token ids, is a single one.

    What is no prompt at all counts as one, and is refused where it is read; so do wrong token ids.
    """
    prompts = plain(prompts)
    if not is_list(prompts):
        return [prompts], True
    items = list(prompts)
    if items and all(map(is_part, items)):
        return [items], True
    return items, False


def conversation_list(conversations: Any) -> list[Any]:
    """One conversation or many; a message alone is a conversation too."""
    given = [conversations] if isinstance(conversations, Mapping) else conversations
    return one_or_many(given, lambda item: isinstance(item, Mapping))[0]


def either_params(params: Any, sampling_params: Any) -> Any:
    """Sampling parameters under our name for them or under vLLM's.

    Raises:
        ConfigError: under both.
    """
    if params is not None and sampling_params is not None:
        raise ConfigError("params and sampling_params are the same option; give one")
    return params if sampling_params is None else sampling_params


def params_list(params: Any, count: int) -> list[Any]:
    """Sampling parameters of each of `count` prompts; those given one each are not looked at yet.

    Raises:
        ConfigError: there are neither one nor `count` of them, or the one is wrong.
    """
    if not is_list(params):
        return [SamplingParams.of(params)] * count
    each = list(params)
    if len(each) != count:
        raise ConfigError(f"{len(each)} sampling parameters for {count} prompts; give one, or one each")
    return each


def read_prompt(prompt: Any) -> Piece:
    """Takes one prompt apart; nothing is tokenised.

    Raises:
        ConfigError: an object with other keys.
        PromptError: it is neither text nor token ids.
    """
    if isinstance(prompt, str):
        return Piece(prompt, [], None)
    if not isinstance(prompt, Mapping):
        if not is_list(plain(prompt)):
            raise PromptError(f"a prompt must be text, token ids or a dict with one of them, not {brief(prompt)}")
        return Piece(None, read_token_ids(prompt), None)
    salt = prompt.get("cache_salt")
    kind = prompt.keys() - {"cache_salt"}
    if kind == {"prompt_token_ids"}:
        return Piece(None, read_token_ids(prompt["prompt_token_ids"]), salt)
    if kind != {"prompt"} or not isinstance(prompt["prompt"], str):
        raise ConfigError(
            f"a prompt {brief(dict(prompt))}; it takes prompt_token_ids or prompt (text), and perhaps cache_salt"
        )
    return Piece(prompt["prompt"], [], salt)

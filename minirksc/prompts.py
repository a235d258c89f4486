"""The forms in which prompts and sampling parameters may be given."""

from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from typing import Any

from minirksc.config import SamplingParams
from minirksc.errors import ConfigError
from minirksc.tokenizer import Tokenizer

Prompt = str | SequenceOf[int] | Mapping[str, Any]
"""Text, token ids, or {"prompt_token_ids": [...]} or {"prompt": "..."}."""


def prompt_list(prompts: Prompt | SequenceOf[Prompt]) -> list[Prompt]:
    """One prompt or many; a list of ints is one prompt of token ids."""
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if prompts and all(isinstance(item, int) for item in prompts):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def params_list(params: SamplingParams | SequenceOf[SamplingParams] | None, count: int) -> list[SamplingParams]:
    """Sampling parameters of each of `count` prompts.

    Raises:
        ConfigError: there are neither one nor `count` of them.
    """
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if len(params) != count:
        raise ConfigError(f"{len(params)} sampling parameters for {count} prompts; give one, or one each")
    return list(params)


def text_and_ids(prompt: Prompt, tokenizer: Tokenizer | None) -> tuple[str | None, list[int]]:
    """(text or None, token ids) of one prompt; text needs a tokenizer.

    Raises:
        ConfigError: an object with other keys.
    """
    if isinstance(prompt, Mapping):
        if set(prompt) == {"prompt_token_ids"}:
            return None, list(prompt["prompt_token_ids"])
        if set(prompt) != {"prompt"} or not isinstance(prompt["prompt"], str):
            raise ConfigError(f"a prompt with the keys {sorted(prompt)}; it takes prompt_token_ids or prompt")
        prompt = prompt["prompt"]
    if isinstance(prompt, str):
        assert tokenizer is not None
        return prompt, tokenizer.encode(prompt)
    return None, list(prompt)

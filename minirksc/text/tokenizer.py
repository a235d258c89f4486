"""Text to token ids and back, for the checkpoint's own tokenizer files, whatever their kind (see `codecs`).

BOS comes exactly once: not before text that begins with it already, and not before what a chat template wrote.
"""

import copy
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from minirksc.errors import ChatTemplateError, PromptError, TokenizerError
from minirksc.json_file import read_json_object
from minirksc.text.chat_template import ChatTemplate, load_chat_templates
from minirksc.text.codecs import Codec, load_codec
from minirksc.text.tokenizer_checks import check_settings, eos_ids, library_errors

REPLACEMENT = "\ufffd"
"""What an incomplete UTF-8 sequence decodes to."""

Templates = Mapping[str, ChatTemplate] | ChatTemplateError
"""Chat templates by name, or the error that reading them gave."""


class Tokenizer:
    """A checkpoint's tokenizer and chat templates.

    Args:
        codec: the tokenizer file.
        eos_token_ids: ids that end a text, all that the checkpoint's files name.
        chat_templates: templates; where reading them failed, rendering a chat raises their error.
        folder: folder of the checkpoint, for messages.

    Attributes:
        vocab_size: number of the tokenizer's tokens, which may differ from the model's.
        bos_token_id: id that begins a prompt; None when prompts have no BOS.
        eos_token_ids: ids that end a text, all that the checkpoint's files name.
        special_ids: tokens that stand for no text.
    """

    def __init__(self, codec: Codec, eos_token_ids: frozenset[int], chat_templates: Templates, folder: Path) -> None:
        self.vocab_size = codec.vocab_size
        self.bos_token_id = codec.prefix_ids[0] if codec.prefix_ids else None
        self.eos_token_ids = eos_token_ids
        self.special_ids = codec.special_ids
        self._codec = codec
        self._chat_templates = chat_templates
        self._folder = folder

    @classmethod
    def from_folder(cls, folder: Path) -> "Tokenizer":
        """Reads the tokenizer of a checkpoint folder.

        A damaged chat template is reported by `render_chat`: text without it still works.

        Raises:
            TokenizerError: there is none, or it cannot be read.
        """
        folder = Path(folder)
        settings = _read_settings(folder)
        codec = load_codec(folder, settings)
        settings = {**codec.named_tokens, **settings}
        eos = {codec.token_id(settings.get("eos_token"))}
        others = (read_json_object(folder / name, TokenizerError) for name in ("config.json", "generation_config.json"))
        for file in (settings, *others):
            eos |= eos_ids(file, folder)
        try:
            templates: Templates = load_chat_templates(folder, settings)
        except ChatTemplateError as error:
            templates = error
        return cls(codec, frozenset(i for i in eos if i is not None), templates, folder)

    @property
    def has_chat_template(self) -> bool:
        """True when there is a chat template, be it damaged."""
        return bool(self._chat_templates)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids; BOS in front, unless it is there already or add_special_tokens is False.

        Raises:
            PromptError: it is not text, or not valid Unicode.
            TokenizerError: the tokenizer's library fails on it.
        """
        if not isinstance(text, str):
            raise PromptError(f"text must be str, not {type(text).__name__}")
        if lone := re.search("[\ud800-\udfff]", text):
            raise PromptError(
                f"the text holds {lone.group()!r} at character {lone.start()}, half of a UTF-16 pair, which no "
                "tokenizer can read; decode the input with errors='replace'"
            )
        with library_errors(f"a text of {len(text)} characters cannot be encoded"):
            token_ids = self._codec.encode(text)
        if add_special_tokens and self.bos_token_id is not None and token_ids[:1] != [self.bos_token_id]:
            return [*self._codec.prefix_ids, *token_ids]
        return token_ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids; ids that the tokenizer does not know are skipped.

        Raises:
            TokenizerError: they are no ids.
        """
        with library_errors(f"{len(token_ids)} token ids cannot be decoded"):
            return self._codec.decode(token_ids, skip_special_tokens)

    def check_fits(self, vocab_size: int) -> None:
        """Refuses a tokenizer that belongs to another model.

        Special and added tokens may lie beyond the model's vocabulary, as the image token of a text-only Gemma 3
        does: text has their ids only when it names them, and a request with such an id is refused.

        Args:
            vocab_size: number of tokens that the model has embeddings for.

        Raises:
            TokenizerError: ordinary text can have an id that the model does not know.
        """
        largest = self._codec.max_text_id()
        if largest >= vocab_size:
            raise TokenizerError(
                f"the tokenizer in {self._folder} gives ids up to {largest}, but the model's vocabulary ends at "
                f"{vocab_size - 1}; put the model's own tokenizer files into the folder"
            )

    def token(self, token_id: int) -> str:
        """The vocabulary's own spelling of a token; "" for an unknown id."""
        return self._codec.token(token_id)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """A conversation as the model expects it.

        Of several templates, "tool_use" is taken where tools are given and "default" otherwise.

        Args:
            messages: messages, each {"role": ..., "content": ...}.
            add_generation_prompt: whether to end with the beginning of the assistant's turn.
            tools: functions that the model may call, each described by a JSON schema.
            chat_template_kwargs: other variables that the template knows, such as enable_thinking.

        Raises:
            ChatTemplateError: there is no template, the messages are malformed, or it fails or does not know a
                variable.
        """
        templates = self._chat_templates
        if isinstance(templates, ChatTemplateError):
            raise ChatTemplateError(str(templates)) from templates
        remedy = "use the plain prompt (--no-chat), or put a chat_template.jinja into the folder"
        if not templates:
            raise ChatTemplateError(f"{self._folder} has no chat template; {remedy}")
        name = "tool_use" if tools is not None and "tool_use" in templates else "default"
        if name not in templates:
            raise ChatTemplateError(
                f"{self._folder} has no default chat template, only {', '.join(templates)}; {remedy}"
            )
        return templates[name].render(messages, add_generation_prompt, tools, chat_template_kwargs)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of what `render_chat` gives; all special tokens, BOS too, are the template's own."""
        text = self.render_chat(messages, add_generation_prompt, tools, chat_template_kwargs)
        return self.encode(text, add_special_tokens=False)


class Detokenizer:
    """Turns tokens into text as they come, never half a character.

    The tokens since the last complete character are decoded together with each new one. Trailing U+FFFD may
    become a character with the next token: up to three are held back, as many as an incomplete character can
    show. An anchor, a token with text of its own, stands in front for what came before, since the first token of
    a text may lose a space that it has anywhere else.

    Args:
        tokenizer: tokenizer of the tokens that come.
        skip_special_tokens: whether special tokens are left out.
    """

    MAX_WINDOW = 12
    CONTEXT = 6

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._window: list[int] = []
        self._num_shown = 0  # characters of the window's text that are out
        self._anchor = tokenizer.encode("a", add_special_tokens=False)[-1:]
        self._num_anchor_chars = len(tokenizer.decode(self._anchor, skip_special_tokens))
        self._is_first = True  # no text came before the window

    def push(self, token_ids: Sequence[int]) -> str:
        """Takes tokens; returns new text that will not change."""
        return "".join(self._push(token_id) for token_id in token_ids)

    def flush(self) -> str:
        """The rest, an incomplete character as U+FFFD; more tokens may still complete it."""
        return self._decode(self._window, self._is_first)[self._num_shown :]

    def copy(self, skip_special_tokens: bool) -> Self:
        """Another one that goes on from here."""
        twin = copy.copy(self)
        twin._window, twin._skip = list(self._window), skip_special_tokens
        return twin

    def cut(self) -> Self:
        """Another one that goes on behind what was flushed: no token to come completes it."""
        twin = self.copy(self._skip)
        if twin._decode(twin._window, twin._is_first):
            twin._restart()
        return twin

    def _push(self, token_id: int) -> str:
        if self._skip and token_id in self._tokenizer.special_ids:
            return ""
        self._window.append(token_id)
        text = self._decode(self._window, self._is_first)
        end = max(_num_final(text), self._num_shown)
        new = text[self._num_shown : end]
        if text and end == len(text):
            self._restart()
            return new
        self._num_shown = end
        if len(self._window) > self.MAX_WINDOW:  # bytes that are no character, or tokens without text
            self._shorten(text, len(text) - end)
        return new

    def _shorten(self, text: str, num_held: int) -> None:
        """Forgets the window's beginning, as far as it is out and bytes that are shown together are not parted."""
        window, is_first = self._window, self._is_first
        for size in range(self.CONTEXT, self.MAX_WINDOW):
            before = self._decode(window[:-size], is_first)
            after = self._decode(window[-size:], is_first and not before)
            if before + after == text and len(after) >= num_held:
                self._window, self._is_first = window[-size:], is_first and not before
                self._num_shown = len(after) - num_held
                return

    def _restart(self) -> None:
        self._window = []
        self._num_shown = 0
        self._is_first = False

    def _decode(self, window: Sequence[int], is_first: bool) -> str:
        if is_first:
            return self._tokenizer.decode(window, self._skip)
        return self._tokenizer.decode([*self._anchor, *window], self._skip)[self._num_anchor_chars :]


def _num_final(text: str) -> int:
    """Characters that no further token can change."""
    end = text[-3:]
    return len(text) - len(end) + len(end.rstrip(REPLACEMENT))


def _read_settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json; special_tokens_map.json beside it counts where that knows no added tokens yet."""
    settings = read_json_object(folder / "tokenizer_config.json", TokenizerError)
    if "added_tokens_decoder" not in settings:
        settings |= read_json_object(folder / "special_tokens_map.json", TokenizerError)
    check_settings(settings, folder)
    return settings

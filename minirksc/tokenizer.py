"""Text to token ids and back, for the checkpoint's own tokenizer files.

tokenizer.json is read by the `tokenizers` library, a SentencePiece tokenizer.model by `sentencepiece`. BOS
comes exactly once: not before text that begins with it already, such as what a chat template wrote.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from minirksc.chat_template import ChatTemplate, load_chat_template
from minirksc.errors import ChatTemplateError, TokenizerError

REPLACEMENT = "\ufffd"
"""What an incomplete UTF-8 sequence decodes to."""


class Codec(Protocol):
    """One kind of tokenizer file."""

    vocab_size: int
    adds_bos: bool

    def encode(self, text: str) -> list[int]:
        """Token ids without any that the text does not name."""
        ...

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        """Text of token ids; unknown ids are skipped."""
        ...

    def token_id(self, token: str) -> int | None:
        """Id of one token; None when there is no such token."""
        ...

    def token(self, token_id: int) -> str:
        """The vocabulary's own spelling of a token; "" for an unknown id."""
        ...


class Tokenizer:
    """A checkpoint's tokenizer and chat template.

    Attributes:
        vocab_size: of the tokenizer, which may differ from the model's.
        bos_token_id: begins a prompt; None when prompts have no BOS.
        eos_token_ids: all that the checkpoint's files name.
    """

    def __init__(
        self,
        codec: Codec,
        bos_token_id: int | None,
        eos_token_ids: frozenset[int],
        chat_template: ChatTemplate | None,
        folder: Path,
    ) -> None:
        self.vocab_size = codec.vocab_size
        self.bos_token_id = bos_token_id
        self.eos_token_ids = eos_token_ids
        self._codec = codec
        self._chat_template = chat_template
        self._folder = folder

    @classmethod
    def from_folder(cls, folder: Path) -> "Tokenizer":
        """Reads the tokenizer of a checkpoint folder.

        Raises:
            TokenizerError: there is none, or it cannot be read.
        """
        folder = Path(folder)
        settings = _read_json(folder / "tokenizer_config.json")
        codec = _load_codec(folder)
        bos = _special_id(codec, settings.get("bos_token"))
        # The settings win over what the tokenizer file does by itself.
        if not settings.get("add_bos_token", codec.adds_bos):
            bos = None
        files = [settings, *(_read_json(folder / f) for f in ("config.json", "generation_config.json"))]
        eos = {_special_id(codec, settings.get("eos_token"))}
        for file in files:
            ids = file.get("eos_token_id")
            eos |= {i for i in (ids if isinstance(ids, list) else [ids]) if isinstance(i, int)}
        template = load_chat_template(folder, settings)
        return cls(codec, bos, frozenset(i for i in eos if i is not None), template, folder)

    @property
    def has_chat_template(self) -> bool:
        """True when `render_chat` can work."""
        return self._chat_template is not None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids; BOS in front, unless it is there already or add_special_tokens is False."""
        token_ids = self._codec.encode(text)
        if add_special_tokens and self.bos_token_id is not None and token_ids[:1] != [self.bos_token_id]:
            return [self.bos_token_id, *token_ids]
        return token_ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids; ids that the tokenizer does not know are skipped."""
        return self._codec.decode(token_ids, skip_special_tokens)

    def token(self, token_id: int) -> str:
        """The vocabulary's own spelling of a token."""
        return self._codec.token(token_id)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        **template_kwargs: Any,
    ) -> str:
        """A conversation as the model expects it.

        Args:
            messages: each {"role": ..., "content": ...}.
            add_generation_prompt: end with the beginning of the assistant's turn.
            template_kwargs: variables for the template.

        Raises:
            ChatTemplateError: there is no template, the messages are malformed, or it fails.
        """
        if self._chat_template is None:
            raise ChatTemplateError(
                f"{self._folder} has no chat template; use the plain prompt (--no-chat), or put a "
                "chat_template.jinja into the folder"
            )
        return self._chat_template.render(messages, add_generation_prompt, **template_kwargs)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **template_kwargs: Any) -> list[int]:
        """Token ids of a rendered conversation; its BOS is the template's own or the tokenizer's, not both."""
        return self.encode(self.render_chat(messages, **template_kwargs))


class Detokenizer:
    """Turns tokens into text as they come, never half a character.

    Decodes a short window again with every token, since what a token looks like can depend on those before it,
    and gives out what is new in it. Trailing U+FFFD may become a character with the next token: up to three
    are held back, as many as an incomplete character can show.

    Args:
        tokenizer: whose tokens come.
        skip_special_tokens: leave them out.
    """

    MAX_WINDOW = 12
    CONTEXT = 6

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._window: list[int] = []
        self._num_shown = 0  # characters of the window's text that are out

    def push(self, token_ids: Sequence[int]) -> str:
        """Takes tokens; returns new text that will not change."""
        return "".join(self._push(token_id) for token_id in token_ids)

    def flush(self) -> str:
        """The rest, an incomplete character as U+FFFD."""
        text = self._decode()
        new, self._num_shown = text[self._num_shown :], len(text)
        return new

    def _push(self, token_id: int) -> str:
        self._window.append(token_id)
        text = self._decode()
        end = self._num_final(text)
        new, self._num_shown = text[self._num_shown : end], max(end, self._num_shown)
        if len(self._window) > self.MAX_WINDOW:
            num_held = len(text) - self._num_shown
            self._window = self._window[-self.CONTEXT :]
            self._num_shown = max(0, len(self._decode()) - num_held)
        return new

    def _num_final(self, text: str) -> int:
        held = 0
        while held < min(3, len(text)) and text[-1 - held] == REPLACEMENT:
            held += 1
        return len(text) - held

    def _decode(self) -> str:
        return self._tokenizer.decode(self._window, self._skip)


class _JsonCodec:
    """tokenizer.json through the `tokenizers` library."""

    def __init__(self, file: Path) -> None:
        from tokenizers import Tokenizer as Backend

        try:
            self._backend = Backend.from_file(str(file))
        except Exception as error:  # the library raises plain Exception
            raise TokenizerError(f"{file} cannot be read: {error}") from error
        self._backend.no_truncation()
        self._backend.no_padding()
        self.vocab_size: int = self._backend.get_vocab_size()
        # What the file's post-processor puts in front of an empty text is BOS.
        self.adds_bos = bool(self._backend.encode("", add_special_tokens=True).ids)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        text: str = self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def token_id(self, token: str) -> int | None:
        found: int | None = self._backend.token_to_id(token)
        return found

    def token(self, token_id: int) -> str:
        return self._backend.id_to_token(token_id) or ""


class _SentencePieceCodec:
    """tokenizer.model through the `sentencepiece` library."""

    def __init__(self, file: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        try:
            self._backend = SentencePieceProcessor(model_file=str(file))
        except (RuntimeError, OSError, ValueError) as error:
            raise TokenizerError(f"{file} cannot be read: {error}") from error
        self.vocab_size: int = self._backend.vocab_size()
        self.adds_bos = True

    def encode(self, text: str) -> list[int]:
        return list(self._backend.encode(text))

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        known = [i for i in token_ids if 0 <= i < self.vocab_size]
        if skip_special_tokens:
            known = [i for i in known if not self._backend.is_control(i)]
        return str(self._backend.decode(known))

    def token_id(self, token: str) -> int | None:
        found = int(self._backend.piece_to_id(token))
        return found if self._backend.id_to_piece(found) == token else None

    def token(self, token_id: int) -> str:
        return str(self._backend.id_to_piece(token_id)) if 0 <= token_id < self.vocab_size else ""


def _load_codec(folder: Path) -> Codec:
    if (folder / "tokenizer.json").is_file():
        return _JsonCodec(folder / "tokenizer.json")
    if (folder / "tokenizer.model").is_file():
        return _SentencePieceCodec(folder / "tokenizer.model")
    raise TokenizerError(f"{folder} has neither tokenizer.json nor tokenizer.model; give token ids instead")


def _special_id(codec: Codec, token: Any) -> int | None:
    """Id of a special token as tokenizer_config.json names it: a string, or an object with its content."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return codec.token_id(token) if isinstance(token, str) else None


def _read_json(file: Path) -> dict[str, Any]:
    """An optional JSON object; {} when the file is not there."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise TokenizerError(f"{file} is not readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise TokenizerError(f"{file} must hold a JSON object, not {type(content).__name__}")
    return content

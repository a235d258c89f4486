"""Text to token ids and back, for the checkpoint's own tokenizer files.

tokenizer.json is read by the `tokenizers` library, a SentencePiece tokenizer.model by `sentencepiece`. BOS
comes exactly once: not before text that begins with it already, and not before what a chat template wrote.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from minirksc.chat_template import ChatTemplate, load_chat_templates
from minirksc.errors import ChatTemplateError, PromptError, TokenizerError
from minirksc.json_file import read_json_object

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
"""What `Tokenizer.from_folder` reads, the first of them that is there."""

REPLACEMENT = "\ufffd"
"""What an incomplete UTF-8 sequence decodes to."""


class Codec(Protocol):
    """One kind of tokenizer file.

    Attributes:
        vocab_size: number of tokens.
        prefix_ids: what the file asks for in front of a prompt: BOS, as a rule.
        special_ids: tokens that stand for no text.
    """

    vocab_size: int
    prefix_ids: list[int]
    special_ids: frozenset[int]

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
    """A checkpoint's tokenizer and chat templates.

    Args:
        codec: the tokenizer file.
        eos_token_ids: all that the checkpoint's files name.
        chat_templates: by name; or the error that reading them gave, kept for whoever renders a chat.
        folder: the checkpoint, for messages.

    Attributes:
        vocab_size: of the tokenizer, which may differ from the model's.
        bos_token_id: begins a prompt; None when prompts have no BOS.
        eos_token_ids: all that the checkpoint's files name.
        special_ids: tokens that stand for no text.
    """

    def __init__(
        self,
        codec: Codec,
        eos_token_ids: frozenset[int],
        chat_templates: Mapping[str, ChatTemplate] | ChatTemplateError,
        folder: Path,
    ) -> None:
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
        settings = read_json_object(folder / "tokenizer_config.json", TokenizerError)
        codec = _load_codec(folder, settings)
        eos = {_special_id(codec, settings.get("eos_token"))}
        others = (read_json_object(folder / name, TokenizerError) for name in ("config.json", "generation_config.json"))
        for file in (settings, *others):
            ids = file.get("eos_token_id")
            eos |= {i for i in (ids if isinstance(ids, list) else [ids]) if isinstance(i, int)}
        templates: Mapping[str, ChatTemplate] | ChatTemplateError
        try:
            templates = load_chat_templates(folder, settings)
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
        """
        if not isinstance(text, str):
            raise PromptError(f"text must be str, not {type(text).__name__}")
        if lone := re.search("[\ud800-\udfff]", text):
            raise PromptError(
                f"the text holds {lone.group()!r} at character {lone.start()}, half of a UTF-16 pair, which no "
                "tokenizer can read; decode the input with errors='replace'"
            )
        token_ids = self._codec.encode(text)
        if add_special_tokens and self.bos_token_id is not None and token_ids[:1] != [self.bos_token_id]:
            return [*self._codec.prefix_ids, *token_ids]
        return token_ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids; ids that the tokenizer does not know are skipped."""
        return self._codec.decode(token_ids, skip_special_tokens)

    def token(self, token_id: int) -> str:
        """The vocabulary's own spelling of a token; "" for an unknown id."""
        return self._codec.token(token_id)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        **template_kwargs: Any,
    ) -> str:
        """A conversation as the model expects it.

        Of several templates, "tool_use" is taken where tools are given and "default" otherwise.

        Args:
            messages: each {"role": ..., "content": ...}.
            add_generation_prompt: end with the beginning of the assistant's turn.
            template_kwargs: variables for the template.

        Raises:
            ChatTemplateError: there is no template, the messages are malformed, or it fails.
        """
        templates = self._chat_templates
        if isinstance(templates, ChatTemplateError):
            raise ChatTemplateError(str(templates)) from templates
        remedy = "use the plain prompt (--no-chat), or put a chat_template.jinja into the folder"
        if not templates:
            raise ChatTemplateError(f"{self._folder} has no chat template; {remedy}")
        has_tools = template_kwargs.get("tools") is not None and "tool_use" in templates
        name = "tool_use" if has_tools else "default"
        if name not in templates:
            raise ChatTemplateError(
                f"{self._folder} has no default chat template, only {', '.join(templates)}; {remedy}"
            )
        return templates[name].render(messages, add_generation_prompt, **template_kwargs)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **template_kwargs: Any) -> list[int]:
        """Token ids of a rendered conversation; all special tokens, BOS too, are the template's own."""
        return self.encode(self.render_chat(messages, **template_kwargs), add_special_tokens=False)


class Detokenizer:
    """Turns tokens into text as they come, never half a character.

    The tokens since the last complete character are decoded together with each new one. Trailing U+FFFD may
    become a character with the next token: up to three are held back, as many as an incomplete character can
    show. An anchor, a token with text of its own, stands in front for what came before, since the first token of
    a text may lose a space that it has anywhere else.

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
        self._anchor = tokenizer.encode("a", add_special_tokens=False)[-1:]
        self._num_anchor_chars = len(tokenizer.decode(self._anchor, skip_special_tokens))
        self._is_first = True  # no text came before the window

    def push(self, token_ids: Sequence[int]) -> str:
        """Takes tokens; returns new text that will not change."""
        return "".join(self._push(token_id) for token_id in token_ids)

    def flush(self) -> str:
        """The rest, an incomplete character as U+FFFD."""
        text = self._decode()
        new = text[self._num_shown :]
        if text:
            self._restart()
        return new

    def _push(self, token_id: int) -> str:
        if self._skip and token_id in self._tokenizer.special_ids:
            return ""
        self._window.append(token_id)
        text = self._decode()
        end = max(_num_final(text), self._num_shown)
        new = text[self._num_shown : end]
        if text and end == len(text):
            self._restart()
            return new
        self._num_shown = end
        if len(self._window) > self.MAX_WINDOW:  # bytes that are no character, or tokens without text
            num_held = len(text) - end
            self._window = self._window[-self.CONTEXT :]
            self._is_first = self._is_first and end == 0
            self._num_shown = max(0, len(self._decode()) - num_held)
        return new

    def _restart(self) -> None:
        self._window = []
        self._num_shown = 0
        self._is_first = False

    def _decode(self) -> str:
        if self._is_first:
            return self._tokenizer.decode(self._window, self._skip)
        return self._tokenizer.decode([*self._anchor, *self._window], self._skip)[self._num_anchor_chars :]


class _JsonCodec:
    """tokenizer.json through the `tokenizers` library."""

    MAX_ID = 2**31  # the library takes no larger and no negative one

    def __init__(self, file: Path) -> None:
        from tokenizers import Tokenizer as Backend

        try:
            self._backend = Backend.from_file(str(file))
        except Exception as error:  # the library raises plain Exception
            raise TokenizerError(f"{file} cannot be read: {error}") from error
        self._backend.no_truncation()
        self._backend.no_padding()
        self.vocab_size: int = self._backend.get_vocab_size()
        added = self._backend.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        # The file's own post-processor knows what comes in front; tokenizer_config.json has no say in it.
        plain = self.encode("a")
        full: list[int] = self._backend.encode("a", add_special_tokens=True).ids
        begins = (n for n in range(len(full)) if full[n : n + len(plain)] == plain)
        self.prefix_ids = full[: next(begins, 0)]

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        valid = [i for i in token_ids if 0 <= i < self.MAX_ID]
        text: str = self._backend.decode(valid, skip_special_tokens=skip_special_tokens)
        return text

    def token_id(self, token: str) -> int | None:
        found: int | None = self._backend.token_to_id(token)
        return found

    def token(self, token_id: int) -> str:
        return (self._backend.id_to_token(token_id) or "") if 0 <= token_id < self.MAX_ID else ""


class _SentencePieceCodec:
    """tokenizer.model through the `sentencepiece` library.

    That library knows neither control tokens in text nor tokens that were added later: text is cut at both, and
    the pieces between them are its own work.

    Args:
        file: tokenizer.model.
        settings: content of tokenizer_config.json.
        added: tokens that were added later, by id: (text, whether special).
    """

    def __init__(self, file: Path, settings: Mapping[str, Any], added: Mapping[int, tuple[str, bool]]) -> None:
        from sentencepiece import SentencePieceProcessor

        try:
            self._backend = SentencePieceProcessor(model_file=str(file))
        except (RuntimeError, OSError, ValueError) as error:
            raise TokenizerError(f"{file} cannot be read: {error}") from error
        self._num_pieces: int = self._backend.vocab_size()
        self.vocab_size: int = max(self._num_pieces, *(i + 1 for i in added), 0)
        special = {i for i in range(self._num_pieces) if self._backend.is_control(i) or self._backend.is_unknown(i)}
        self._verbatim = {i: str(self._backend.id_to_piece(i)) for i in special}
        self._verbatim |= {i: text for i, (text, _) in added.items()}
        self._ids = {text: i for i, text in self._verbatim.items()}
        self._cut = re.compile("|".join(re.escape(t) for t in sorted(self._ids, key=len, reverse=True)))
        self.special_ids = frozenset(special | {i for i, (_, is_special) in added.items() if is_special})
        self._has_legacy_spaces = bool(settings.get("legacy", True))
        bos = _special_id(self, settings.get("bos_token"))
        bos = self._backend.bos_id() if bos is None else bos
        self.prefix_ids = [bos] if bos >= 0 and settings.get("add_bos_token", True) else []

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        start = 0
        for cut in self._cut.finditer(text):
            ids += [*self._encode_between(text, start, cut.start()), self._ids[cut.group()]]
            start = cut.end()
        return ids + self._encode_between(text, start, len(text))

    def _encode_between(self, text: str, start: int, end: int) -> list[int]:
        part = text[start:end]
        if not part or start == 0 or self._has_legacy_spaces:
            return list(self._backend.encode(part)) if part else []
        # The library begins every text with a space. Newer checkpoints want none after a special token, so
        # other text takes it and goes away again.
        lead = "<unk>"
        return list(self._backend.encode(lead + part))[len(self._backend.encode(lead)) :]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        text = ""
        run: list[int] = []
        for i in token_ids:
            if skip_special_tokens and i in self.special_ids:
                continue
            if i in self._verbatim:
                text += self._decode_run(run, bool(text)) + self._verbatim[i]
                run = []
            elif 0 <= i < self._num_pieces:
                run.append(i)
        return text + self._decode_run(run, bool(text))

    def _decode_run(self, run: list[int], is_inside: bool) -> str:
        if not is_inside:
            return str(self._backend.decode(run))
        lead = list(self._backend.encode("a"))  # the space before a text's first piece would be lost
        return str(self._backend.decode(lead + run))[len(str(self._backend.decode(lead))) :]

    def token_id(self, token: str) -> int | None:
        if token in self._ids:
            return self._ids[token]
        found = int(self._backend.piece_to_id(token))
        return found if self._backend.id_to_piece(found) == token else None

    def token(self, token_id: int) -> str:
        if token_id in self._verbatim:
            return self._verbatim[token_id]
        return str(self._backend.id_to_piece(token_id)) if 0 <= token_id < self._num_pieces else ""


def _num_final(text: str) -> int:
    """Characters that no further token can change."""
    held = 0
    while held < min(3, len(text)) and text[-1 - held] == REPLACEMENT:
        held += 1
    return len(text) - held


def _load_codec(folder: Path, settings: Mapping[str, Any]) -> Codec:
    if (folder / "tokenizer.json").is_file():
        return _JsonCodec(folder / "tokenizer.json")
    if (folder / "tokenizer.model").is_file():
        return _SentencePieceCodec(folder / "tokenizer.model", settings, _added_tokens(folder, settings))
    raise TokenizerError(f"{folder} has neither tokenizer.json nor tokenizer.model; give token ids instead")


def _added_tokens(folder: Path, settings: Mapping[str, Any]) -> dict[int, tuple[str, bool]]:
    """Tokens that a SentencePiece checkpoint has beside its model file: id -> (text, whether special)."""
    added = {
        i: (text, False) for text, i in read_json_object(folder / "added_tokens.json").items() if isinstance(i, int)
    }
    declared = settings.get("added_tokens_decoder")
    for token_id, token in declared.items() if isinstance(declared, Mapping) else ():
        if str(token_id).isdecimal() and isinstance(token, Mapping) and isinstance(token.get("content"), str):
            added[int(token_id)] = (token["content"], bool(token.get("special")))
    return added


def _special_id(codec: Codec, token: Any) -> int | None:
    """Id of a special token as tokenizer_config.json names it: a string, or an object with its content."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return codec.token_id(token) if isinstance(token, str) else None

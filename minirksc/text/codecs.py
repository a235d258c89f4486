"""The kinds of tokenizer files: each gives token ids for text, and text for token ids.

| file | read by | the same ids as |
| --- | --- | --- |
| tekken.json | `tekken`, into the `tokenizers` library | mistral-common |
| tokenizer.json | the `tokenizers` library | transformers |
| tokenizer.model | the `sentencepiece` library | that library, mistral-common |

The first of them that is there wins. tekken.json is what a model was trained with, and a tokenizer.json beside it is
a conversion, wrong in several published checkpoints. tokenizer.json comes before tokenizer.model, since it says
itself what that leaves to other files: added tokens and what stands in front of a prompt.

Text that spells a special token is that token, in every kind: chat templates write them so (unless
tokenizer_config.json has `split_special_tokens`). If text from strangers must be safe from this, such spellings have to
be taken out of it first.
"""

import operator
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minirksc.errors import TokenizerError
from minirksc.json_file import MAX_TOKENIZER_BYTES, read_bytes, read_json_object, read_text
from minirksc.text.tekken import NAMED_TOKENS, mend_split, read_tekken
from minirksc.text.tokenizer_checks import MAX_PREFIX_IDS, check_backend, declared_tokens, library_errors, token_text

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

TOKENIZER_FILES = ("tekken.json", "tokenizer.json", "tokenizer.model")
"""What `load_codec` reads, the first of them that is there."""


class BackendCodec:
    """A tokenizer of the `tokenizers` library.

    Args:
        backend: the tokenizer.
        named_tokens: texts of bos_token and so on, where its file says them.
    """

    MAX_ID = 2**31  # the library takes no larger and no negative one

    def __init__(self, backend: "Backend", named_tokens: Mapping[str, str]) -> None:
        self._backend = backend
        self._backend.no_truncation()
        self._backend.no_padding()
        self.named_tokens = named_tokens
        self.vocab_size: int = self._backend.get_vocab_size()
        added = self._backend.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        # The file's own post-processor knows what comes in front; tokenizer_config.json has no say in it.
        with library_errors("the tokens around a text cannot be read"):
            plain = self.encode("a")
            full: list[int] = self._backend.encode("a", add_special_tokens=True).ids
        begins = (n for n in range(len(full)) if full[n : n + len(plain)] == plain)
        self.prefix_ids = full[: next(begins, 0)]
        if len(self.prefix_ids) > MAX_PREFIX_IDS:
            raise TokenizerError(
                f"the tokenizer puts {len(self.prefix_ids)} tokens in front of a prompt, {MAX_PREFIX_IDS} are allowed"
            )

    def token_id(self, token: Any) -> int | None:
        """Id of one token as tokenizer_config.json names it (see `token_text`); None when there is no such token."""
        return _looked_up(token, self._backend.token_to_id)

    def token(self, token_id: int) -> str:
        """The vocabulary's own spelling of a token; "" for an unknown id."""
        return (self._backend.id_to_token(token_id) or "") if 0 <= token_id < self.MAX_ID else ""

    def max_text_id(self) -> int:
        """Largest id that text can have without naming a special or added token; -1 when there is none."""
        added = self._backend.get_added_tokens_decoder()
        vocab = self._backend.get_vocab(with_added_tokens=False)
        return max((i for i in vocab.values() if i not in added), default=-1)

    def encode(self, text: str) -> list[int]:
        """Token ids without any that the text does not name."""
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        """Text of token ids; unknown ids are skipped."""
        valid = [i for i in token_ids if 0 <= i < self.MAX_ID]
        return str(self._backend.decode(valid, skip_special_tokens=skip_special_tokens))


class SentencePieceCodec:
    """tokenizer.model through the `sentencepiece` library.

    That library knows neither control tokens in text nor tokens that were added later: text is cut at both, and
    the pieces between them are its own work.

    Args:
        file: the file, tokenizer.model.
        settings: content of tokenizer_config.json.
        added: tokens that were added later, by id, each described as in tokenizer_config.json.
    """

    def __init__(self, file: Path, settings: Mapping[str, Any], added: Mapping[int, Mapping[str, Any]]) -> None:
        from sentencepiece import SentencePieceProcessor

        self._backend = SentencePieceProcessor(model_proto=read_bytes(file, TokenizerError, MAX_TOKENIZER_BYTES))
        if not self._backend.vocab_size():
            raise TokenizerError(f"{file} holds no piece; it is empty or damaged")
        self._num_pieces: int = self._backend.vocab_size()
        self.vocab_size: int = max(self._num_pieces, *(i + 1 for i in added), 0)
        special = {i for i in range(self._num_pieces) if self._backend.is_control(i) or self._backend.is_unknown(i)}
        self._verbatim = {i: str(self._backend.id_to_piece(i)) for i in special}
        self._verbatim |= {i: str(token["content"]) for i, token in added.items()}
        self._ids = {text: i for i, text in self._verbatim.items()}
        self._cut = _cuts(self._verbatim, added)
        self.special_ids = frozenset(special | {i for i, token in added.items() if token.get("special")})
        self._has_legacy_spaces = bool(settings.get("legacy", True))
        ids = {"bos_token": self._backend.bos_id(), "eos_token": self._backend.eos_id()}
        self.named_tokens = {name: str(self._backend.id_to_piece(i)) for name, i in ids.items() if i >= 0}
        bos = self.token_id(settings.get("bos_token"))
        bos = self._backend.bos_id() if bos is None else bos
        self.prefix_ids = [bos] if bos >= 0 and settings.get("add_bos_token", True) else []
        # A private character that is no piece: nothing can merge with it.
        private = (chr(code) for code in range(0xE000, 0xF900))
        self._lead = next((c for c in private if self._backend.is_unknown(self._backend.piece_to_id(c))), "")
        self._num_lead_ids = len(self._backend.encode(self._lead))

    def token_id(self, token: Any) -> int | None:
        """Id of one token as tokenizer_config.json names it (see `token_text`); None when there is no such token."""
        return _looked_up(token, self._find)

    def token(self, token_id: int) -> str:
        """The vocabulary's own spelling of a token; "" for an unknown id."""
        if token_id in self._verbatim:
            return self._verbatim[token_id]
        return str(self._backend.id_to_piece(token_id)) if 0 <= token_id < self._num_pieces else ""

    def max_text_id(self) -> int:
        """Largest id that text can have without naming a special or added token; -1 when there is none."""
        return max((i for i in range(self._num_pieces) if i not in self._verbatim), default=-1)

    def encode(self, text: str) -> list[int]:
        """Token ids without any that the text does not name."""
        ids: list[int] = []
        start = 0
        for cut in self._cut.finditer(text):
            ids += self._encode_between(text, start, cut.start())
            ids.append(self._ids[cut[cut.lastindex or 0]])
            start = cut.end()
        return ids + self._encode_between(text, start, len(text))

    def _encode_between(self, text: str, start: int, end: int) -> list[int]:
        part = text[start:end]
        if not part or start == 0 or self._has_legacy_spaces:
            return list(self._backend.encode(part)) if part else []
        # The library begins every text with a space. Newer checkpoints want none after a special token, so
        # other text takes it and goes away again.
        return list(self._backend.encode(self._lead + part))[self._num_lead_ids :]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        """Text of token ids; unknown ids are skipped."""
        text = ""
        run: list[int] = []
        for i in token_ids:
            if skip_special_tokens and i in self.special_ids:
                continue
            if i in self._verbatim:
                text += self._decode_run(run, bool(text)) + self._verbatim[i]
                run = []
            elif 0 <= i < self._num_pieces:
                run.append(operator.index(i))
        return text + self._decode_run(run, bool(text))

    def _decode_run(self, run: list[int], is_inside: bool) -> str:
        if not is_inside:
            return str(self._backend.decode(run))
        lead = list(self._backend.encode("a"))  # the space before a text's first piece would be lost
        return str(self._backend.decode(lead + run))[len(str(self._backend.decode(lead))) :]

    def _find(self, token: str) -> int | None:
        if token in self._ids:
            return self._ids[token]
        found = int(self._backend.piece_to_id(token))
        return found if self._backend.id_to_piece(found) == token else None


Codec = BackendCodec | SentencePieceCodec
"""One kind of tokenizer file. What encodes and decodes raises whatever its library does.

Attributes:
    vocab_size: number of tokens.
    prefix_ids: ids that the file asks for in front of a prompt: BOS, as a rule.
    special_ids: tokens that stand for no text.
    named_tokens: texts of bos_token, eos_token and so on, as far as the file itself says.
"""


def load_codec(folder: Path, settings: Mapping[str, Any]) -> Codec:
    """Reads the first of `TOKENIZER_FILES` in a checkpoint folder.

    Args:
        folder: folder of the checkpoint.
        settings: content of its tokenizer_config.json.

    Raises:
        TokenizerError: there is none, or it cannot be read.
    """
    file = next((folder / name for name in TOKENIZER_FILES if os.path.lexists(folder / name)), None)
    if file is None:
        raise TokenizerError(f"{folder} has none of {', '.join(TOKENIZER_FILES)}; give token ids instead")
    splits_special = bool(settings.get("split_special_tokens"))
    if splits_special and file.name != "tokenizer.json":
        raise TokenizerError(
            f"{folder}: split_special_tokens is true, which only a tokenizer.json can follow, not {file.name}; set it "
            "to false in tokenizer_config.json: special tokens in a text are then taken for what they spell"
        )
    if file.name == "tekken.json":
        return BackendCodec(read_tekken(file), NAMED_TOKENS)
    added = declared_tokens(read_json_object(folder / "added_tokens.json", TokenizerError), settings, folder)
    if file.name == "tokenizer.json":
        backend = _read_json(file, settings, added)
        mend_split(backend, settings, read_json_object(folder / "config.json", TokenizerError))
        backend.encode_special_tokens = splits_special
        return BackendCodec(backend, {})
    with library_errors(f"{file} cannot be read"):
        return SentencePieceCodec(file, settings, added)


def _read_json(file: Path, settings: Mapping[str, Any], added: Mapping[int, Mapping[str, Any]]) -> "Backend":
    """tokenizer.json, with the special tokens that only tokenizer_config.json names, as transformers adds them."""
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Backend

    content = read_text(file, TokenizerError, MAX_TOKENIZER_BYTES)
    with library_errors(f"{file} cannot be read"):
        backend = Backend.from_str(content)
    check_backend(backend, file)
    with library_errors(f"the tokens that tokenizer_config.json names cannot be added to {file}"):
        flags = ("lstrip", "rstrip", "normalized", "single_word", "special")
        tokens = [
            AddedToken(token["content"], **{name: token[name] for name in flags if isinstance(token.get(name), bool)})
            for _, token in sorted(added.items())
        ]
        known = {token.content for token in [*backend.get_added_tokens_decoder().values(), *tokens]}
        extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or ()
        named = [value for name, value in settings.items() if name.endswith("_token")]
        named += extra.values() if isinstance(extra, Mapping) else extra
        texts = dict.fromkeys(map(token_text, named))  # each once
        backend.add_tokens([*tokens, *(AddedToken(text, special=True) for text in texts if text and text not in known)])
    return backend


def _looked_up(token: Any, find: Callable[[str], int | None]) -> int | None:
    """What a function finds for the text of a token; None when it has none."""
    text = token_text(token)
    if text is None:
        return None
    with library_errors(f"the token {text[:80]!r} cannot be looked up"):
        return find(text)


def _cuts(verbatim: Mapping[int, str], added: Mapping[int, Mapping[str, Any]]) -> re.Pattern[str]:
    """Finds tokens in text, the longest first, together with the blanks that they take with them."""
    found = []
    for i, text in sorted(verbatim.items(), key=lambda item: -len(item[1])):
        token = added.get(i, {})
        before, after = (r"\s*" * bool(token.get(side)) for side in ("lstrip", "rstrip"))
        found.append(f"{before}({re.escape(text)}){after}")
    return re.compile("|".join(found))

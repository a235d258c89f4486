"""What a tokenizer's files may claim, and how failures of the libraries that read them are told.

A folder may come from anybody. Checked here: types and sizes of what tokenizer_config.json and its companions say,
and that tokenizer.json does not multiply text. The libraries themselves may panic on a text that is too much for
them, with an exception that is no `Exception`.
"""

import base64
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from minirksc.errors import MinirkscError, TokenizerError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

MAX_TOKEN_ID = 2**24
"""Bound of the ids of tokens that are declared beside a vocabulary; the largest published vocabularies have 262 000."""

MAX_GROWTH = 64
"""Characters that one may become in all steps together; NFKC makes 18 of one."""

MAX_ADDED_CHARS = 1000
"""Characters that a step may put in front of a text, or around each piece of it."""

MAX_PREFIX_IDS = 16
MAX_STEPS = 64
TOKEN_FIELDS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class library_errors:
    """In a `with` block: whatever a tokenizer library raises, panics too, is a `TokenizerError`.

    Args:
        failure: beginning of the message, "FILE cannot be read" for example.
    """

    __slots__ = ("_failure",)

    def __init__(self, failure: str) -> None:
        self._failure = failure

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is not None and not isinstance(error, MinirkscError | KeyboardInterrupt | SystemExit | GeneratorExit):
            raise TokenizerError(f"{self._failure}: {type(error).__name__}: {str(error)[:300]}") from error


def token_text(token: Any) -> str | None:
    """Text of a token as tokenizer_config.json names it, a string or an object with its content; None for neither."""
    text = token.get("content") if isinstance(token, Mapping) else token
    return text if isinstance(text, str) else None


def check_settings(settings: Mapping[str, Any], source: Any) -> None:
    """Refuses fields of tokenizer_config.json whose type cannot be.

    Raises:
        TokenizerError: names the field and its value.
    """
    for name in TOKEN_FIELDS:
        if settings.get(name) is not None:
            _check_token(settings[name], name, source)
    for name in ("extra_special_tokens", "additional_special_tokens"):
        tokens = settings.get(name) or ()
        if not isinstance(tokens, Mapping | list | tuple):
            raise _wrong(name, tokens, "a list or an object of tokens", source)
        for token in tokens.values() if isinstance(tokens, Mapping) else tokens:
            _check_token(token, name, source)
    if settings.get("split_special_tokens") not in (None, False, True):
        raise _wrong("split_special_tokens", settings["split_special_tokens"], "true or false", source)


def declared_tokens(in_file: Mapping[str, Any], settings: Mapping[str, Any], source: Any) -> dict[int, dict[str, Any]]:
    """Tokens that a checkpoint has beside its tokenizer file: id -> description as in tokenizer_config.json.

    Args:
        in_file: content of added_tokens.json: text -> id.
        settings: content of tokenizer_config.json.
        source: folder of the checkpoint, for messages.

    Raises:
        TokenizerError: one is malformed.
    """
    added: dict[int, dict[str, Any]] = {}
    for text, token_id in in_file.items():
        if not isinstance(token_id, int) or isinstance(token_id, bool) or not 0 <= token_id < MAX_TOKEN_ID:
            raise _wrong("added_tokens.json", {text: token_id}, f"an id below {MAX_TOKEN_ID} of each token", source)
        added[token_id] = {"content": text}
    declared = settings.get("added_tokens_decoder") or {}
    if not isinstance(declared, Mapping):
        raise _wrong("added_tokens_decoder", declared, "an object", source)
    for key, token in declared.items():
        token_id = int(key) if key.isascii() and key.isdecimal() and len(key) < 10 else MAX_TOKEN_ID
        if token_id >= MAX_TOKEN_ID or not isinstance(token, Mapping):
            raise _wrong("added_tokens_decoder", {key: token}, f"an object for each id below {MAX_TOKEN_ID}", source)
        _check_token(token, "added_tokens_decoder", source)
        added[token_id] = dict(token)
    return {i: token for i, token in added.items() if token["content"]}


def eos_ids(settings: Mapping[str, Any], source: Any) -> set[int]:
    """Ids that a file names under eos_token_id.

    Raises:
        TokenizerError: they are no ids.
    """
    ids = settings.get("eos_token_id")
    ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise _wrong("eos_token_id", settings["eos_token_id"], "an id or a list of ids", source)
    return set(ids)


def check_backend(backend: "Backend", source: Any) -> None:
    """Refuses a tokenizer that makes much more text of a text, or far more ids.

    Raises:
        TokenizerError: names the step.
    """
    growth = 1
    for step in [*_steps(backend.normalizer), *_steps(backend.decoder)]:
        kind, content = step.get("type"), step.get("content")
        if kind == "Replace" and isinstance(content, str):
            pattern = step.get("pattern")
            text = pattern.get("String") if isinstance(pattern, Mapping) else None
            # Each match of a regular expression may be empty, and so stand at every character.
            growth *= max(1, -(-len(content) // max(1, len(text))) if isinstance(text, str) else 1 + len(content))
        elif kind == "Prepend" and len(str(step.get("prepend"))) > MAX_ADDED_CHARS:
            raise TokenizerError(f"{source} puts more than {MAX_ADDED_CHARS} characters in front of a text")
        elif kind == "Precompiled":
            growth *= max(1, _longest_entry(step.get("precompiled_charsmap"), source) // MAX_GROWTH)
        if growth > MAX_GROWTH:
            raise TokenizerError(f"{source} makes more than {MAX_GROWTH} characters of one ({kind}); it is damaged")
    _steps(backend.pre_tokenizer)
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if len(getattr(backend.model, name, None) or "") > MAX_ADDED_CHARS:
            raise TokenizerError(f"{source} has a {name} of more than {MAX_ADDED_CHARS} characters; it is damaged")


def _steps(part: Any) -> list[Mapping[str, Any]]:
    """The steps of a normalizer or decoder, those of sequences too."""
    steps, found = [json.loads(part.__getstate__())] if part is not None else [], []
    while steps:
        step = steps.pop()
        inner = next((step[name] for name in ("normalizers", "decoders", "pretokenizers") if name in step), None)
        if inner is None:
            found.append(step)
        else:
            steps += inner
        if len(found) + len(steps) > MAX_STEPS:
            raise TokenizerError(f"the tokenizer has more than {MAX_STEPS} steps of one kind; it is damaged")
    return found


def _longest_entry(charsmap: Any, source: Any) -> int:
    """Bytes of the longest text in SentencePiece's table: the size of a trie, the trie, texts that end with 0."""
    try:
        table = base64.b64decode(charsmap or "", validate=True)
    except (TypeError, ValueError) as error:
        raise TokenizerError(f"{source} has a precompiled_charsmap that is no base64: {error}") from error
    texts = table[4 + int.from_bytes(table[:4], "little") :]
    return max(map(len, texts.split(b"\0")), default=0)


def _check_token(token: Any, name: str, source: Any) -> None:
    if token_text(token) is None:
        raise _wrong(name, token, "text, or an object whose content is text", source)


def _wrong(name: str, value: Any, expected: str, source: Any) -> TokenizerError:
    return TokenizerError(f"{source}: {name} is {value!r:.100}, it must be {expected}")

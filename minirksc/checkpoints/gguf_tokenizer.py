"""The tokenizer inside a GGUF file, as a tokenizer of the `tokenizers` library.

Two kinds: byte-level BPE, whose merges the file holds, and SentencePiece's BPE, whose merges follow from scores.
A merge of SentencePiece is any two pieces whose concatenation is a piece; better pieces come first. Gemma's scores
say nothing, its order of ids does.

Source: the split patterns of pre-tokenizers as the tokenizers of GPT-2, SmolLM, Llama 3 and Qwen 2 were published,
and llama.cpp's "default"; Kudo and Richardson 2018, arXiv 1808.06226 (SentencePiece).
"""

import math
from collections.abc import Sequence
from typing import Any

from minirksc.checkpoints.gguf_fields import GgufFields
from minirksc.errors import CheckpointError
from minirksc.text.tekken import FAULTY_PATTERN as LLAMA3_SPLIT
from minirksc.text.tekken import PATTERN as TEKKEN_SPLIT
from minirksc.text.tekken import pairs_of, split_at

UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 2, 3, 4, 5, 6  # GGUF token types
SPACE = "▁"

ALIASES = {
    "llama-bpe": ("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
    "qwen2": ("deepseek-r1-qwen", "kormo", "f2llmv2", "megrez"),
    "gpt-2": ("phi-2", "gigachat", "a.x-4.0", "mellum", "exaone4"),
    "smollm": (),
    "tekken": (),
    "default": (),
}
"""Pre-tokenizers by the name that stands for them here, with others that llama.cpp takes for the same."""

PRE_TOKENIZERS = {alias: name for name, aliases in ALIASES.items() for alias in (name, *aliases)}
WHOLE_WORDS = ("llama-bpe", "tekken")
"""Pre-tokenizers that take whole words from their vocabulary before they look at merges, and begin prompts with BOS."""

MAX_WORD_CHARS = 1000
DEFAULT_SPLITS = (
    r"[\p{P}\$\+<=>\^~\|]+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
    r"\p{N}+",
    r"[0-9][0-9][0-9]",
)
SPLITS = {
    "llama-bpe": (LLAMA3_SPLIT,),
    "qwen2": (LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}"),),
    "tekken": (TEKKEN_SPLIT,),
    "default": DEFAULT_SPLITS,
}

REFUSED = ("add_eos_token", "add_sep_token", "precompiled_charsmap", "remove_extra_whitespaces")
"""Fields that change the token ids and are not translated."""


def build_tokenizer(fields: GgufFields, is_gemma: bool = False) -> Any:
    """The tokenizer of a file.

    Args:
        fields: fields of the tokenizer.
        is_gemma: whether merges follow the order of ids, and tokens of blanks are spelled with blanks.

    Returns:
        A `tokenizers.Tokenizer`.

    Raises:
        CheckpointError: its kind is not known, or its parts do not fit each other.
    """
    from tokenizers import AddedToken, processors

    kind, pre = fields["model"], _pre_tokenizer(fields)
    if kind not in ("gpt2", "llama") or (kind == "gpt2" and pre is None):
        raise CheckpointError(
            f"tokenizer {kind!r:.80} with pre-tokenizer {fields.get('pre')!r:.80} cannot be imported; known: llama, "
            f"and gpt2 with {', '.join(PRE_TOKENIZERS)}"
        )
    for name in REFUSED:
        if fields.get(name):
            raise CheckpointError(f"a tokenizer with {fields.prefix}{name} = {fields[name]!r:.40} cannot be imported")
    words, types = _items(fields, "tokens", str), _items(fields, "token_type", int)
    if len(types) != len(words):
        raise CheckpointError(f"the tokenizer has {len(words)} tokens, but the types of {len(types)}")
    if longest := next((word for word in words if len(word) > MAX_WORD_CHARS), None):
        raise CheckpointError(f"the tokenizer has a token of {len(longest)} characters, {MAX_WORD_CHARS} are allowed")
    try:
        made = _sentencepiece(fields, is_gemma) if kind == "llama" else _byte_level(fields, str(pre))
    except (CheckpointError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises plain Exception, and panics with a BaseException
        raise CheckpointError(f"the tokenizer's merges do not fit its vocabulary: {error}") from error
    added = []
    # A run of blanks that is part of the vocabulary in another spelling is left to the merges.
    for word, kind in zip(words, types, strict=True):
        if kind in (UNKNOWN, CONTROL, USER_DEFINED) and made.token_to_id(word) is not None:
            added.append(AddedToken(word, special=kind != USER_DEFINED, normalized=False))
    made.add_tokens(added)
    if adds_bos(fields):
        bos_id = token_id(fields, "bos")
        if bos_id is None:
            raise CheckpointError(f"{fields.source}: prompts begin with BOS, but {fields.prefix}bos_token_id is absent")
        bos = words[bos_id]
        made.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", bos, "$B:1"], special_tokens=[(bos, bos_id)]
        )
    return made


def token_id(fields: GgufFields, name: str) -> int | None:
    """The id of a special token; None when the file names none.

    Args:
        fields: fields of the tokenizer.
        name: name of the token: "bos", "eos" and so on.

    Raises:
        CheckpointError: the vocabulary has no such id.
    """
    found = fields.get(f"{name}_token_id")
    if found is None:
        return None
    if not isinstance(found, int) or isinstance(found, bool) or not 0 <= found < len(fields["tokens"]):
        raise fields.error(f"{name}_token_id", f"is {found!r:.80}, the vocabulary has {len(fields['tokens'])} tokens")
    return found


def adds_bos(fields: GgufFields) -> bool:
    """Whether prompts begin with BOS; where the file does not say, as llama.cpp does."""
    return bool(fields.get("add_bos_token", fields["model"] == "llama" or _pre_tokenizer(fields) in WHOLE_WORDS))


def _pre_tokenizer(fields: GgufFields) -> str | None:
    """Our name of the pre-tokenizer; None for one that is not known."""
    pre = fields.get("pre", "default")
    return PRE_TOKENIZERS.get(pre) if isinstance(pre, str) else None


def _items(fields: GgufFields, name: str, kind: type) -> list[Any]:
    """A list of items of one kind."""
    items = fields[name]
    if not isinstance(items, list) or not all(isinstance(item, kind) for item in items):
        raise fields.error(name, f"must be a list of {kind.__name__}")
    return items


def _vocabulary(words: Sequence[str], types: Sequence[int]) -> dict[str, int]:
    """Ids by word, without those that fill up the embedding."""
    vocab = {word: i for i, (word, token) in enumerate(zip(words, types, strict=True)) if token != UNUSED}
    num_used = len(words) - list(types).count(UNUSED)
    if len(vocab) != num_used:
        raise CheckpointError(f"the tokenizer's {num_used} tokens are only {len(vocab)} different words")
    return vocab


def _byte_level(fields: GgufFields, pre: str) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    vocab = _vocabulary(fields["tokens"], fields["token_type"])
    merges = [tuple(merge.split(" ")) for merge in _items(fields, "merges", str)]
    made = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre in WHOLE_WORDS))
    if pre == "qwen2":
        made.normalizer = normalizers.NFC()
    if pre in SPLITS:
        made.pre_tokenizer = split_at(*SPLITS[pre])
    else:  # ByteLevel knows GPT-2's pattern
        digits = [pre_tokenizers.Digits(individual_digits=True)] if pre == "smollm" else []
        made.pre_tokenizer = pre_tokenizers.Sequence([*digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    made.decoder = decoders.ByteLevel()
    return made


def _sentencepiece(fields: GgufFields, is_gemma: bool) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    words, types = fields["tokens"], fields["token_type"]
    if is_gemma:
        words = [SPACE * len(word) if word and not word.strip(" ") else word for word in words]
    ranks = range(len(words)) if is_gemma else [-score for score in _items(fields, "scores", float)]
    if len(ranks) != len(words) or any(math.isnan(rank) for rank in ranks):
        raise fields.error("scores", f"must be a number for each of {len(words)} tokens")
    vocab = _vocabulary(words, types)
    unknown = token_id(fields, "unknown")
    made = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=_merges(vocab, ranks, types),
            fuse_unk=True,
            byte_fallback=True,
            unk_token=None if unknown is None else words[unknown],
        )
    )
    has_prefix = bool(fields.get("add_space_prefix", True))
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    made.normalizer = normalizers.Replace(" ", SPACE)
    if has_prefix:
        # A blank in front of the text, also of one that begins with blanks: Metaspace spares a text that begins with
        # its own sign, so that the sign is another one at first.
        blank = pre_tokenizers.Metaspace(replacement=" ", prepend_scheme="first", split=False)
        sign = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="never", split=False)
        made.pre_tokenizer = pre_tokenizers.Sequence([blank, sign])
        steps.append(decoders.Strip(content=" ", left=1))
    made.decoder = decoders.Sequence(steps)
    return made


def _merges(vocab: dict[str, int], ranks: Sequence[float], types: Sequence[int]) -> list[tuple[str, str]]:
    """All pairs of pieces that make a piece, the best piece first; of equally good ones the longest left part."""
    found = []
    for word, i in vocab.items():
        if types[i] in (CONTROL, BYTE):
            continue
        for left, right in pairs_of(word, vocab):
            found.append((ranks[i], -len(left), -len(right), i, left, right))
    return [(left, right) for *_, left, right in sorted(found)]

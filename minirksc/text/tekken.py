"""Mistral's tekken.json as a tokenizer of the `tokenizers` library, and the fault of its published conversions.

The file is a split pattern and a table of byte strings. A byte string's place in the table is its rank: in each
piece of the split text, the two neighbours whose joined bytes have the lowest rank are joined, again and again. The
library does the same with a list of pairs, so the list holds, rank by rank, every pair that joins to that string.
Special tokens have the first ids, the table follows them.

Many a tokenizer.json was converted from this file with another family's pattern; see `mend_split`.

Source: the loader of mistral-common (Apache-2.0) defines the format; fix_mistral_regex of transformers (Apache-2.0)
describes the fault.
"""

import base64
import json
import re
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, AnyStr

from minirksc.errors import TokenizerError
from minirksc.json_file import MAX_TOKENIZER_BYTES, read_json_object
from minirksc.text.tokenizer_checks import library_errors

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

DEFAULT_SPECIAL_TOKENS = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    *("[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]"),
    *("[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"),
)
"""What the first files, which list none, mean: in order of their ids."""

NAMED_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
"""Their parts, under the names that tokenizer_config.json uses."""

PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How tekken tokenizers split text."""

FAULTY_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Llama 3's, which conversions put in its place."""

NUM_SPECIAL = 1000
"""Special tokens of every tekken file so far."""

MAX_SPECIAL = 100_000
MAX_TOKEN_BYTES = 1000


def read_tekken(file: Path) -> "Backend":
    """Reads tekken.json.

    Raises:
        TokenizerError: it is not such a file.
    """
    content = read_json_object(file, TokenizerError, MAX_TOKENIZER_BYTES)
    try:
        config = content["config"]
        num_special, num_ids = config["default_num_special_tokens"], config["default_vocab_size"]
        if not 0 < num_special < num_ids or num_special > MAX_SPECIAL:
            raise ValueError(f"of {num_ids} tokens {num_special} are special; at most {MAX_SPECIAL} can be")
        table = _table(content["vocab"], num_ids - num_special)
        special = _special_tokens(content.get("special_tokens"), num_special)
        with library_errors("its parts do not fit each other"):
            return _build(table, special, config["pattern"])
    except (KeyError, TypeError, ValueError, AttributeError, TokenizerError) as error:
        raise TokenizerError(
            f"{file} is not a tekken file: {error!r:.300}; get it from the model's publisher again"
        ) from error


def mend_split(backend: "Backend", settings: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Gives a converted tekken tokenizer the split of the original, where the conversion is known to be wrong.

    The model was trained with the original, so that its ids are the right ones. `fix_mistral_regex` true or false in
    tokenizer_config.json decides; else a file is mended that has the wrong pattern, word for word. Files that
    transformers 5 or newer wrote are left alone: a model may have been trained with them, and so with the wrong one.

    Args:
        backend: tokenizer of tokenizer.json; changed in place.
        settings: content of tokenizer_config.json.
        config: content of config.json.
    """
    zero_byte = _letters()[0]
    if backend.token_to_id("[INST]") != 3 or backend.id_to_token(NUM_SPECIAL) != zero_byte:
        return  # no tekken vocabulary
    wanted = settings.get("fix_mistral_regex")
    if wanted is None:
        major = re.match(r"\d+", str(config.get("transformers_version", "")))
        is_recent = major is not None and int(major.group()) >= 5
        state = json.loads(backend.pre_tokenizer.__getstate__()) if backend.pre_tokenizer else {}
        patterns = [split.get("pattern") for split in state.get("pretokenizers", []) if split["type"] == "Split"]
        wanted = patterns == [{"Regex": FAULTY_PATTERN}] and not is_recent
    if wanted:
        backend.pre_tokenizer = split_at(PATTERN)


def _build(table: list[bytes], special: list[str], pattern: str) -> "Backend":
    from tokenizers import AddedToken, decoders, models
    from tokenizers import Tokenizer as Backend
    from tokenizers.processors import TemplateProcessing

    letters = _letters()
    spelled = {token: "".join([letters[byte] for byte in token]) for token in table}
    vocab = {text: i for i, text in enumerate(special)}
    vocab |= {text: rank + len(special) for rank, text in enumerate(spelled.values())}
    merges = [(spelled[left], spelled[right]) for token in table for left, right in pairs_of(token, spelled)]
    # A piece that is in the table is one token, whatever the pairs in it: ignore_merges.
    backend = Backend(models.BPE(vocab, merges, ignore_merges=True))
    backend.pre_tokenizer = split_at(pattern)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    bos = NAMED_TOKENS["bos_token"]
    backend.post_processor = TemplateProcessing(single=[bos, "$A"], special_tokens=[(bos, vocab[bos])])
    return backend


def split_at(*patterns: str) -> Any:
    """What cuts text into pieces at the matches of one pattern after another, and makes letters of their bytes."""
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

    splits = [Split(Regex(pattern), "isolated") for pattern in patterns]
    return Sequence([*splits, ByteLevel(add_prefix_space=False, use_regex=False)])


def _table(entries: list[dict[str, Any]], num_ranks: int) -> list[bytes]:
    """The byte strings by rank."""
    table = [base64.b64decode(entry["token_bytes"], validate=True) for entry in entries[:num_ranks]]
    if len(set(table)) < num_ranks or table[:256] != [bytes([i]) for i in range(256)]:
        raise ValueError(f"{num_ranks} different entries are expected in vocab, the 256 bytes first")
    for place, (entry, token) in enumerate(zip(entries, table, strict=False)):
        if entry.get("rank", place) != place or len(token) > MAX_TOKEN_BYTES:
            raise ValueError(f"entry {place} of vocab has the rank {entry.get('rank')} and {len(token)} bytes")
    return table


def pairs_of(token: AnyStr, known: Container[AnyStr]) -> Iterator[tuple[AnyStr, AnyStr]]:
    """Every pair of known tokens that joins to this one, the shortest left part first."""
    for place in range(1, len(token)):
        left, right = token[:place], token[place:]
        if left in known and right in known:
            yield left, right


def _special_tokens(declared: list[dict[str, Any]] | None, num_special: int) -> list[str]:
    """All special tokens in order of their ids, with fillers for ids that have no name."""
    named = dict(enumerate(DEFAULT_SPECIAL_TOKENS))
    if declared is not None:
        named = {token["rank"]: token["token_str"] for token in declared}
    tokens = {i: f"<SPECIAL_{i}>" for i in range(num_special)} | named
    if sorted(tokens) != list(range(num_special)) or len(set(tokens.values())) < num_special:
        raise ValueError(f"special tokens must differ and have the ids 0..{num_special - 1}")
    return list(tokens.values())


def _letters() -> list[str]:
    """The letter that stands for each byte in vocabularies of the library: printable bytes are their own."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]

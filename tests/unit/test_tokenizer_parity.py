"""The same ids as the libraries that the files come from: transformers, mistral-common and sentencepiece."""

import json
import random
import re
import shutil
from pathlib import Path

import pytest

from minirksc.checkpoints.sources import resolve_model
from minirksc.errors import CheckpointError
from minirksc.text.tekken import FAULTY_PATTERN
from minirksc.text.tokenizer import Detokenizer, Tokenizer

CORPUS = [
    "",
    "Hello, world! It's 3.14159 or 1,234,567 - don't you think?",
    "def f(x: int) -> str:\n    if x >= 10:\n\treturn f'{x!r}'  # ok\n\n\nclass A(B):\r\n    pass",
    "HTTPServerURL camelCase snake_case SCREAMING_CASE eBay NaOH pH mL iPhone15Pro ǅ ʰx",
    "日本語のテキストと漢字、中文文本。한국어 텍스트 ภาษาไทย हिन्दी عربي עברית",
    "👩‍👩‍👧‍👦 👍🏽 🇩🇪🇫🇷 ☺️ ✈ 1️⃣",
    "é à n̈ ȡ́ Z̸͉̐a̸l̸g̷o̵ ﬁ ½ ﷺ",
    "\x00\x01\x07\x1b[0m\x7f\x85\u200b\u200e\u2028\u2029\ufeff\ufffd",
    " " * 7 + "x" + " " * 33 + "\n" * 9 + "\t" * 5 + "y \n \n  z" + "\u00a0\u3000 " * 3,
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaabababababababab" + "=" * 70 + "/" * 40,
    "</ s> <s [INST [ INST] <|im_start> <0x41> <unk <|",
    "https://example.org/a/b?c=d&e=%20#f ~/.config $HOME C:\\dir\\file.txt a@b.c",
]
LOOK_ALIKES = ["<s>", "</s>", "<unk>", "[INST]", "[/INST]", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<pad>"]
LOOK_ALIKES += ["[TOOL_CALLS]", "<start_of_turn>", "<SPECIAL_20>", "[AVAILABLE_TOOLS]"]


def with_look_alikes(seed=0, count=60):
    rng = random.Random(seed)
    parts = [*CORPUS[1:], *LOOK_ALIKES * 2, " ", "\n", "  "]
    return ["".join(rng.choices(parts, k=rng.randint(1, 5))) for _ in range(count)]


def random_texts(seed, count=400):
    """Short texts out of few characters: what meets in them seldom meets elsewhere."""
    rng = random.Random(seed)
    characters = sorted(set("".join(CORPUS)))
    few = [rng.sample(characters, rng.randint(2, 9)) for _ in range(count)]
    return ["".join(rng.choices(some, k=rng.randint(1, 40))) for some in few]


TEXTS = [*CORPUS, *with_look_alikes(), *random_texts(1)]


def assert_chunks_join(tokenizer, texts):
    rng = random.Random(0)
    for text in texts:
        ids = tokenizer.encode(text)
        for skip in (True, False):
            detokenizer, shown, place = Detokenizer(tokenizer, skip), "", 0
            while place < len(ids):
                size = rng.randint(1, 7)
                shown += detokenizer.push(ids[place : place + size])
                place += size
            assert shown + detokenizer.flush() == tokenizer.decode(ids, skip)


@pytest.fixture(scope="module")
def data():
    mistral_common = pytest.importorskip("mistral_common")
    return Path(mistral_common.__file__).parent / "data"


@pytest.fixture(scope="module")
def tekken_folder(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tekken")
    shutil.copy(data / "tekken_240911.json", folder / "tekken.json")
    return folder


@pytest.fixture(scope="module")
def tekken(tekken_folder):
    return Tokenizer.from_folder(tekken_folder)


@pytest.fixture(scope="module")
def converted(tekken, tmp_path_factory):
    """tokenizer.json out of the tekken file, with the pattern that published conversions have."""
    from tokenizers import Regex, pre_tokenizers

    folder = tmp_path_factory.mktemp("converted")
    backend = tekken._codec._backend
    right = backend.pre_tokenizer
    split = pre_tokenizers.Split(Regex(FAULTY_PATTERN), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    backend.save(str(folder / "tokenizer.json"))
    backend.pre_tokenizer = right
    (folder / "config.json").write_text('{"model_type": "mistral", "transformers_version": "4.50.0"}')
    return folder


def expected_with_special(tokenizer, encode, text):
    """Ids by a library that knows no special tokens in text: of the text between them, and they themselves."""
    named = sorted((t for t in LOOK_ALIKES if tokenizer._codec.token_id(t) in tokenizer.special_ids), key=len)
    ids = []
    for part in re.split("(" + "|".join(map(re.escape, reversed(named))) + ")", text):
        ids += [tokenizer._codec.token_id(part)] if part in named else encode(part) if part else []
    return ids


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["tekken_240718.json", "tekken_240911.json"])
def test_tekken_gives_the_ids_of_mistral_common(data, name, tmp_path):
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    shutil.copy(data / name, tmp_path / "tekken.json")
    ours, theirs = Tokenizer.from_folder(tmp_path), Tekkenizer.from_file(tmp_path / "tekken.json")
    assert (ours.vocab_size, ours.bos_token_id, ours.eos_token_ids) == (theirs.n_words, theirs.bos_id, {theirs.eos_id})
    assert ours.special_ids == theirs.special_ids
    for text in TEXTS:
        ids = ours.encode(text)
        expected = expected_with_special(ours, lambda part: theirs.encode(part, bos=False, eos=False), text)
        assert ids == ([] if text.startswith("<s>") else [theirs.bos_id]) + expected
        assert ours.decode(ids) == theirs.decode(ids)
        assert ours.decode(ids, skip_special_tokens=False) == "<s>" * (not text.startswith("<s>")) + text
    for token_id in [*range(1500), *range(1500, theirs.n_words, 997)]:
        assert ours.decode([token_id]) == theirs.decode([token_id])


@pytest.mark.oracle
def test_tekken_is_exact_on_100_000_characters(data, tekken):
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    theirs = Tekkenizer.from_file(data / "tekken_240911.json")
    for text in ("a", " ", "\n", "ab", "é", "日本", "x1-", "=/", "🏽", "aA"):
        text *= 100_000 // len(text)
        assert tekken.encode(text, add_special_tokens=False) == theirs.encode(text, bos=False, eos=False)


def test_tekken_in_chunks(tekken):
    assert_chunks_join(tekken, TEXTS)


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["tokenizer.model.v1", *(f"mistral_instruct_tokenizer_{v}" for v in (
    "240216.model.v2", "240323.model.v3", "241114.model.v7", "241114.model.v7m1"))])  # fmt: skip
def test_tokenizer_model_gives_the_ids_of_mistral_common(data, name, tmp_path):
    from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer

    shutil.copy(data / name, tmp_path / "tokenizer.model")
    ours, theirs = Tokenizer.from_folder(tmp_path), SentencePieceTokenizer(data / name)
    assert (ours.vocab_size, ours.bos_token_id, ours.eos_token_ids) == (theirs.n_words, theirs.bos_id, {theirs.eos_id})
    for text in TEXTS:
        ids = ours.encode(text, add_special_tokens=False)
        assert ids == expected_with_special(ours, lambda part: theirs.encode(part, bos=False, eos=False), text)
    assert_chunks_join(ours, TEXTS)


@pytest.mark.oracle
def test_spaces_after_special_tokens_as_in_newer_checkpoints(data, tmp_path):
    """`legacy` false: a special token is followed by exactly the blanks that the text has there."""
    pytest.importorskip("google.protobuf")  # transformers reads the file with it
    from transformers import LlamaTokenizer

    shutil.copy(data / "mistral_instruct_tokenizer_240323.model.v3", tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text('{"legacy": false}')
    ours, theirs = Tokenizer.from_folder(tmp_path), LlamaTokenizer.from_pretrained(tmp_path, legacy=False)
    for text in ("<s>[INST]the fox[/INST] the</s>dog", "[INST] a [/INST] b", "a</s>>= b</s>\n\nc", "</s>日本</s>👩"):
        ids = ours.encode(text, add_special_tokens=False)
        assert ids == theirs.encode(text, add_special_tokens=False)
        assert ours.decode(ids, skip_special_tokens=False) == text
    for text in with_look_alikes(2):
        assert ours.decode(ours.encode(text, add_special_tokens=False), skip_special_tokens=False) == text


@pytest.mark.oracle
def test_a_wrongly_converted_tekken_file_is_mended(converted, tekken):
    from transformers import PreTrainedTokenizerFast

    mended = Tokenizer.from_folder(converted)
    theirs = PreTrainedTokenizerFast.from_pretrained(converted, fix_mistral_regex=True)
    faulty = PreTrainedTokenizerFast(tokenizer_file=str(converted / "tokenizer.json"))
    assert any(faulty.encode(text) != theirs.encode(text) for text in TEXTS)
    for text in TEXTS:
        ids = mended.encode(text, add_special_tokens=False)
        assert ids == theirs.encode(text, add_special_tokens=False) == tekken.encode(text, add_special_tokens=False)


def demo():
    try:
        return resolve_model("smollm2-135m")
    except CheckpointError:
        pytest.skip("the demo model is not installed")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Factory of tokenizer.json files, trained on the corpus."""
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from tokenizers import Tokenizer as Backend

    def make(kind):
        special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        if kind == "gemma":
            backend = Backend(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
            backend.normalizer = normalizers.Replace(" ", "▁")
            backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
            parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
            backend.decoder = decoders.Sequence(parts)
            special += [f"<0x{byte:02X}>" for byte in range(256)]
        else:
            backend = Backend(models.BPE())
            pattern = {"qwen": FAULTY_PATTERN.replace("{1,3}", ""), "llama": FAULTY_PATTERN}[kind]
            split = pre_tokenizers.Split(Regex(pattern), "isolated")
            backend.normalizer = normalizers.NFC() if kind == "qwen" else None
            backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
            backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=800, special_tokens=special, show_progress=False, initial_alphabet=byte_level.alphabet()
        )
        backend.train_from_iterator(CORPUS * 3, trainer)
        if kind != "qwen":
            backend.post_processor = processors.TemplateProcessing(single=["<s>", "$A"], special_tokens=[("<s>", 1)])
        folder = tmp_path_factory.mktemp(kind)
        backend.save(str(folder / "tokenizer.json"))
        return folder

    return make


@pytest.mark.oracle
@pytest.mark.parametrize("kind", ["demo", "gemma", "llama", "qwen"])
def test_tokenizer_json_gives_the_ids_of_transformers(trained, kind):
    from transformers import PreTrainedTokenizerFast

    folder = demo() if kind == "demo" else trained(kind)
    ours, theirs = Tokenizer.from_folder(folder), PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    bos = ours.bos_token_id
    for text in TEXTS:
        plain = ours.encode(text, add_special_tokens=False)
        assert plain == theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text) == (plain if plain[:1] == [bos] else theirs.encode(text))
        for skip in (True, False):
            assert ours.decode(plain, skip) == theirs.decode(
                plain, skip_special_tokens=skip, clean_up_tokenization_spaces=False
            )
    assert_chunks_join(ours, TEXTS)


@pytest.mark.oracle
@pytest.mark.parametrize(
    "settings",
    [
        {"eos_token": "<|eot|>"},
        {"eos_token": {"__type": "AddedToken", "content": "<|eot|>"}, "additional_special_tokens": ["[A]", "[B] "]},
        {"extra_special_tokens": {"image_token": "<image>"}},
        {
            "added_tokens_decoder": {
                "900": {"content": "<think>", "special": False, "normalized": False},
                "901": {"content": "<|eot|>", "special": True, "rstrip": True, "lstrip": True, "normalized": False},
            }
        },
        {"pad_token": "th"},
    ],
)
def test_tokens_that_only_the_settings_name(trained, settings, tmp_path):
    from transformers import PreTrainedTokenizerFast

    shutil.copy(trained("llama") / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    ours, theirs = Tokenizer.from_folder(tmp_path), PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for text in ("a <|eot|>  b", "<think>x</think>", "[A][B] [C]", "<image> the th", "x\n<|eot|>\n<|eot|>"):
        ids = ours.encode(text, add_special_tokens=False)
        assert ids == theirs.encode(text, add_special_tokens=False)
        for skip in (True, False):
            expected = theirs.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            assert ours.decode(ids, skip) == expected
    assert ours.eos_token_ids == (set() if theirs.eos_token is None else {theirs.eos_token_id})

"""tekken.json: exact byte pair merging, its special tokens, and what is mended in conversions of it."""

import base64
import json
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minirksc.errors import TokenizerError
from minirksc.text.tekken import DEFAULT_SPECIAL_TOKENS, FAULTY_PATTERN, PATTERN
from minirksc.text.tokenizer import Detokenizer, Tokenizer

WORDS = ("12", "123", "th", "the", " the", "é", "\u3042", "ab", "ba", "aba", "aa", "bab", "  ")
EXAMPLES = settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])


CONFIG = {"pattern": PATTERN, "default_vocab_size": 30 + 256 + len(WORDS), "default_num_special_tokens": 30}
BYTES = {**CONFIG, "default_vocab_size": 30 + 256}


def b64(token):
    return base64.b64encode(token).decode()


def write_tekken(folder, num_special=30, **changes):
    vocab = [bytes([i]) for i in range(256)] + [word.encode() for word in WORDS]
    content = {
        "config": {
            "pattern": PATTERN,
            "num_vocab_tokens": len(vocab),
            "default_vocab_size": num_special + len(vocab),
            "default_num_special_tokens": num_special,
            "version": "v3",
        },
        "vocab": [
            {"rank": i, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
            for i, token in enumerate(vocab)
        ],
        **changes,
    }
    (folder / "tekken.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def make_tekken(tmp_path_factory):
    """Factory of small tekken tokenizers; `changes` go into the file."""
    return lambda **changes: Tokenizer.from_folder(write_tekken(tmp_path_factory.mktemp("small"), **changes))


@pytest.fixture(scope="module")
def tekken(make_tekken):
    return make_tekken()


def merged(text):
    """Byte pair merging in its plainest form: ranks of the pieces that a piece of split text ends up in."""
    ranks = {bytes([i]): i for i in range(256)} | {word.encode(): 256 + i for i, word in enumerate(WORDS)}
    parts = [bytes([byte]) for byte in text.encode()]
    if text.encode() in ranks:
        return [ranks[text.encode()]]
    while True:
        pairs = [(ranks[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ranks]
        if not pairs:
            return [ranks[part] for part in parts]
        _, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


@EXAMPLES
@given(st.text(st.sampled_from("ab"), max_size=30))
def test_neighbours_of_the_lowest_rank_are_joined_first(tekken, text):
    assert tekken.encode(text, add_special_tokens=False) == [30 + rank for rank in (merged(text) if text else [])]


def test_words_are_split_by_the_pattern_of_the_file(make_tekken):
    assert [make_tekken().token(i) for i in make_tekken().encode("1234 the")][1:] == ["1", "2", "3", "4", "Ġthe"]
    config = {"pattern": r"\d+|\D+", "default_vocab_size": 40 + 256 + len(WORDS), "default_num_special_tokens": 40}
    other = make_tekken(config=config)
    assert [other.token(i) for i in other.encode("1234 the")][1:] == ["123", "4", "Ġthe"]


def test_special_tokens_come_first_and_are_found_in_text(make_tekken):
    tekken = make_tekken()
    assert (tekken.bos_token_id, tekken.eos_token_ids, tekken.special_ids) == (1, {2}, frozenset(range(30)))
    ids = tekken.encode("[INST]the[/INST]<SPECIAL_25></s>")
    assert [i for i in ids if i < 30] == [1, 3, 4, 25, 2] and tekken.decode(ids) == "the"
    assert tekken.decode(ids, skip_special_tokens=False) == "<s>[INST]the[/INST]<SPECIAL_25></s>"
    assert tekken.encode("<s>the") == tekken.encode("the")
    assert [tekken.token(i) for i in range(len(DEFAULT_SPECIAL_TOKENS))] == list(DEFAULT_SPECIAL_TOKENS)
    names = [*("<unk>", "<s>", "</s>"), "[THINK]"]
    listed = make_tekken(special_tokens=[{"rank": i, "token_str": t, "is_control": True} for i, t in enumerate(names)])
    assert listed.encode("[THINK][INST]")[:2] == [1, 3] and listed.token(4) == "<SPECIAL_4>"


def test_only_as_much_of_the_table_counts_as_the_file_says(make_tekken):
    config = {"pattern": PATTERN, "default_vocab_size": 30 + 256 + 2, "default_num_special_tokens": 30}
    small = make_tekken(config=config)
    assert small.vocab_size == 288 and len(small.encode("the", add_special_tokens=False)) == 3


@EXAMPLES
@given(ids=st.lists(st.one_of(st.integers(0, 310), st.integers(30, 320)), max_size=40), data=st.data())
def test_pieces_join_to_the_whole_text(tekken, ids, data):
    skip = data.draw(st.booleans())
    detokenizer, shown, place = Detokenizer(tekken, skip), "", 0
    while place < len(ids):
        step = data.draw(st.integers(1, 5))
        shown += detokenizer.push(ids[place : place + step])
        place += step
    assert shown + detokenizer.flush() == tekken.decode(ids, skip)


@EXAMPLES
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_round_trip(tekken, text):
    assert tekken.decode(tekken.encode(text, add_special_tokens=False), skip_special_tokens=False) == text


def test_it_wins_over_a_conversion_beside_it(tmp_path):
    write_tekken(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "{{ bos_token }}{{ messages[0].content }}"}')
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.encode_chat([{"role": "user", "content": "the"}]) == tokenizer.encode("the")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": {}}, "default_num_special_tokens"),
        ({"vocab": []}, "269 different entries are expected"),
        ({"vocab": [{"rank": 0, "token_bytes": "YQ=="}] * 269}, "269 different entries are expected"),
        ({"special_tokens": [{"rank": 30, "token_str": "<s>"}]}, r"ids 0\.\.29"),
        ({"special_tokens": [{"rank": 3, "token_str": "<s>"}, {"rank": 4, "token_str": "<s>"}]}, "must differ"),
        ({"special_tokens": [{"rank": 3}]}, "token_str"),
        ({"special_tokens": [{"rank": 3, "token_str": 5}]}, "Error"),
        ({"special_tokens": 5}, "Error"),
        ({"config": {**CONFIG, "default_num_special_tokens": 2**40}}, "at most 100000"),
        ({"config": {**CONFIG, "default_vocab_size": 2**60, "default_num_special_tokens": 2**59}}, "at most 100000"),
        ({"config": {**CONFIG, "default_vocab_size": 10}}, "at most 100000"),
        ({"config": {**CONFIG, "default_vocab_size": "x"}}, "Error"),
        ({"config": {**CONFIG, "default_vocab_size": 10**9}}, "999999970 different entries"),
        ({"config": {**CONFIG, "pattern": "("}}, "do not fit each other"),
        ({"config": {**CONFIG, "pattern": 5}}, "do not fit each other"),
        ({"config": 5}, "Error"),
        ({"vocab": [5]}, "Error"),
        ({"vocab": [{"rank": 0, "token_bytes": "!!"}]}, "Error"),
        (
            {"vocab": [{"rank": i + 1, "token_bytes": b64(bytes([i]))} for i in range(256)], "config": BYTES},
            "the rank 1",
        ),
        (
            {
                "vocab": [{"token_bytes": b64(bytes([i]))} for i in range(256)] + [{"token_bytes": b64(bytes(1001))}],
                "config": {**BYTES, "default_vocab_size": 287},
            },
            "1001 bytes",
        ),
    ],
)
def test_a_damaged_file_is_refused(make_tekken, changes, message):
    with pytest.raises(TokenizerError, match=rf"tekken\.json is not a tekken file.*{message}.*publisher"):
        make_tekken(**changes)


@pytest.mark.parametrize(
    ("settings", "version", "is_mended"),
    [
        ({}, None, True),
        ({}, "4.57.1", True),
        ({}, "5.0.0.dev0", False),
        ({}, "10.1", False),
        ({"fix_mistral_regex": False}, "4.50.0", False),
        ({"fix_mistral_regex": True}, "5.1.0", True),
    ],
)
def test_what_decides_whether_it_is_mended(make_tekken, tmp_path, settings, version, is_mended):
    from tokenizers import Regex, pre_tokenizers

    right = make_tekken(num_special=1000)
    split = pre_tokenizers.Split(Regex(FAULTY_PATTERN), "isolated")
    backend = right._codec._backend
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    if version is not None:
        (tmp_path / "config.json").write_text(json.dumps({"transformers_version": version}))
    ids = Tokenizer.from_folder(tmp_path).encode("123", add_special_tokens=False)
    assert len(ids) == (3 if is_mended else 1)  # the right pattern takes digits one by one


def test_another_tokenizer_with_the_same_pattern_is_left_alone(tmp_path):
    from tokenizers import Regex, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    backend = Backend(models.BPE({"1": 0, "2": 1, "12": 2, "[INST]": 3}, [("1", "2")]))
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(FAULTY_PATTERN), "isolated")])
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"fix_mistral_regex": true}')
    assert Tokenizer.from_folder(tmp_path).encode("12") == [2]

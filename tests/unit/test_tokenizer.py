"""Text to tokens and back, BOS exactly once, and never half a character."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minirksc.errors import ChatTemplateError, TokenizerError
from minirksc.tokenizer import Detokenizer, Tokenizer

TEXTS = ["", "hello", " leading and trailing ", "naïve café", "日本語のテキスト", "👩 family", "a\n\n\tb\r\n", "ﷺ ȡ́"]
TEXTS += ["👩\u200d👩\u200d👧\u200d👦", "<s>hi</s>"]


@pytest.fixture(scope="module")
def tokenizer(tiny_llama):
    return Tokenizer.from_folder(tiny_llama(tokenizer=True, chat=True))


@pytest.fixture()
def rewrite(tiny_llama, tmp_path):
    """A tokenizer from the tiny checkpoint's files with other settings."""

    def make(config=(), **settings):
        source = tiny_llama(tokenizer=True, chat=True)
        for name in ("tokenizer.json", "config.json", "tokenizer_config.json"):
            (tmp_path / name).write_text((source / name).read_text())
        file = tmp_path / "tokenizer_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
        file = tmp_path / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **dict(config)}))
        return Tokenizer.from_folder(tmp_path)

    return make


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


def test_bos_comes_once(rewrite):
    tokenizer = rewrite(add_bos_token=True)
    assert tokenizer.encode("a")[0] == tokenizer.bos_token_id == 1
    assert tokenizer.encode("<s>a") == tokenizer.encode("a")
    assert tokenizer.encode("a", add_special_tokens=False)[0] != 1
    chat = [{"role": "user", "content": "a"}]
    assert tokenizer.encode_chat(chat).count(1) == 1
    with_template = rewrite(add_bos_token=True, chat_template="{{ bos_token }}{{ messages[0].content }}")
    assert with_template.encode_chat(chat) == tokenizer.encode("a")


def test_eos_is_all_that_any_file_names(rewrite):
    tokenizer = rewrite(config={"eos_token_id": [2, 4]}, eos_token={"content": "<|im_start|>"})
    assert tokenizer.eos_token_ids == {2, 3, 4}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=40), data=st.data())
def test_pieces_join_to_the_whole_text(tokenizer, text, data):
    ids = tokenizer.encode(text)
    detokenizer, shown, place = Detokenizer(tokenizer), "", 0
    while place < len(ids):
        step = data.draw(st.integers(1, 5))
        shown += detokenizer.push(ids[place : place + step])
        assert not shown.endswith("\ufffd") or "\ufffd" in text
        place += step
    assert shown + detokenizer.flush() == tokenizer.decode(ids)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ids=st.lists(st.integers(0, 400), max_size=60))
def test_any_tokens_can_come_and_nothing_is_taken_back(tokenizer, ids):
    detokenizer = Detokenizer(tokenizer)
    text = "".join(detokenizer.push([i]) for i in ids) + detokenizer.flush()
    whole = tokenizer.decode(ids)
    # Invalid bytes may be replaced one by one or together; valid characters must all be there.
    assert text.replace("\ufffd", "") == whole.replace("\ufffd", "")


def test_half_a_character_is_held_back(tokenizer):
    ids = tokenizer.encode("é")
    detokenizer = Detokenizer(tokenizer)
    assert len(ids) == 2
    assert [detokenizer.push([i]) for i in ids] == ["", "é"]
    detokenizer.push(ids[:1])
    assert detokenizer.flush() == "\ufffd"


def test_a_folder_without_or_with_a_broken_tokenizer(tmp_path):
    with pytest.raises(TokenizerError, match="token ids"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json cannot be read"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.model").write_bytes(b"junk")
    with pytest.raises(TokenizerError, match=r"tokenizer\.model cannot be read"):
        Tokenizer.from_folder(tmp_path)


def test_sentencepiece(tmp_path):
    import sentencepiece

    corpus = tmp_path / "corpus.txt"
    corpus.write_text("the quick brown fox jumps over the lazy dog\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(tmp_path / "tokenizer"), vocab_size=300, model_type="bpe",
        byte_fallback=True, minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    tokenizer = Tokenizer.from_folder(tmp_path)
    ids = tokenizer.encode("the lazy fox ☃ jumps")
    assert ids[0] == tokenizer.bos_token_id == 1 and tokenizer.eos_token_ids == {2}
    assert tokenizer.decode(ids) == "the lazy fox ☃ jumps"
    detokenizer = Detokenizer(tokenizer)
    assert "".join(detokenizer.push([i]) for i in ids) + detokenizer.flush() == "the lazy fox ☃ jumps"


def test_no_chat_template_says_what_to_do(tiny_llama):
    tokenizer = Tokenizer.from_folder(tiny_llama(tokenizer=True))
    assert not tokenizer.has_chat_template
    with pytest.raises(ChatTemplateError, match="--no-chat"):
        tokenizer.encode_chat([{"role": "user", "content": "hi"}])

"""Text to tokens and back, BOS exactly once, and never half a character."""

import io
import json
import os
import re

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from minirksc.errors import ChatTemplateError, PromptError, TokenizerError
from minirksc.text.tokenizer import Detokenizer, Tokenizer

TEXTS = ["", "hello", " leading and trailing ", "naïve café", "日本語のテキスト", "👩 family", "a\n\n\tb\r\n", "ﷺ ȡ́"]
TEXTS += ["👩\u200d👩\u200d👧\u200d👦", "hi</s>", "\x00", "  two  spaces  "]
CHAT = [{"role": "user", "content": "a"}]
CHARACTERS = st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(" a\u0301👩\u200d"))
EXAMPLES = settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def tokenizer(tiny_llama):
    return Tokenizer.from_folder(tiny_llama(tokenizer=True, chat=True))


@pytest.fixture()
def rewrite(tiny_llama, tmp_path):
    """A tokenizer from the tiny checkpoint's files with other settings."""

    def make(config=(), bos=False, **settings):
        from tokenizers import Tokenizer as Backend
        from tokenizers.processors import TemplateProcessing

        source = tiny_llama(tokenizer=True, chat=True)
        backend = Backend.from_file(str(source / "tokenizer.json"))
        if bos:
            backend.post_processor = TemplateProcessing(single=["<s>", "$A"], special_tokens=[("<s>", 1)])
        backend.save(str(tmp_path / "tokenizer.json"))
        for name, changes in (("tokenizer_config.json", settings), ("config.json", dict(config))):
            (tmp_path / name).write_text(json.dumps({**json.loads((source / name).read_text()), **changes}))
        return Tokenizer.from_folder(tmp_path)

    return make


@pytest.fixture(scope="module")
def byte_fallback(tmp_path_factory):
    """tokenizer.json in the manner of Llama 2: letters, other characters as bytes, one space in front lost."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers

    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefgh", "▁a"]
    vocab = {word: i for i, word in enumerate(words)}
    backend = Backend(models.BPE(vocab, [("▁", "a")], byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    folder = tmp_path_factory.mktemp("byte_fallback")
    backend.save(str(folder / "tokenizer.json"))
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def make_sentencepiece(tmp_path_factory):
    """Factory of tokenizers with a tokenizer.model and no tokenizer.json."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the quick brown fox jumps over the lazy dog"] * 50), model_writer=model,
        vocab_size=300, model_type="bpe", byte_fallback=True, minloglevel=2, hard_vocab_limit=False,
        control_symbols=["[INST]"], normalization_rule_name="identity", remove_extra_whitespaces=False,
    )  # fmt: skip

    def make(**settings):
        folder = tmp_path_factory.mktemp("sentencepiece")
        (folder / "tokenizer.model").write_bytes(model.getvalue())
        settings = {"bos_token": "<s>", "eos_token": "</s>", **settings}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        return Tokenizer.from_folder(folder)

    return make


@pytest.fixture(scope="module")
def sentencepiece(make_sentencepiece):
    return make_sentencepiece()


@pytest.fixture(params=["tokenizer", "byte_fallback", "sentencepiece"])
def any_tokenizer(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(any_tokenizer, text):
    ids = any_tokenizer.encode(text, add_special_tokens=False)
    assert any_tokenizer.decode(ids, skip_special_tokens=False) == text


def test_special_tokens_are_left_out_of_text(any_tokenizer):
    ids = any_tokenizer.encode("<s>ab</s>", add_special_tokens=False)
    assert any_tokenizer.decode(ids).strip() == "ab"
    assert {any_tokenizer.token(i) for i in ids} & {"<s>", "</s>"} == {"<s>", "</s>"}


def test_bos_comes_once(rewrite):
    tokenizer = rewrite(bos=True)
    assert tokenizer.encode("a")[0] == tokenizer.bos_token_id == 1
    assert tokenizer.encode("<s>a") == tokenizer.encode("a")
    assert tokenizer.encode("") == [1]
    assert tokenizer.encode("a", add_special_tokens=False) == tokenizer.encode("a")[1:]
    with_template = rewrite(bos=True, chat_template="{{ bos_token }}{{ messages[0].content }}")
    assert with_template.encode_chat(CHAT) == tokenizer.encode("a")
    assert with_template.encode(with_template.render_chat(CHAT)) == tokenizer.encode("a")


@pytest.mark.oracle
@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("setting", [None, False, True])
@pytest.mark.parametrize("template", ["{{ bos_token }}[{{ messages[0].content }}]", "[{{ messages[0].content }}]"])
def test_bos_is_where_transformers_puts_it(rewrite, tmp_path, bos, setting, template):
    from transformers import AutoTokenizer

    ours = rewrite(bos=bos, chat_template=template, **({} if setting is None else {"add_bos_token": setting}))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text)
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False)
    expected = theirs.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    assert ours.encode_chat(CHAT) == expected


def test_eos_is_all_that_any_file_names(rewrite, tmp_path):
    tokenizer = rewrite(config={"eos_token_id": [2, 4]}, eos_token={"content": "<|im_start|>"})
    assert tokenizer.eos_token_ids == {2, 3, 4}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert Tokenizer.from_folder(tmp_path).eos_token_ids == {2, 3, 4, 7}


@pytest.mark.parametrize("text", ["a\ud83d", b"bytes", None])
def test_what_is_not_text_is_refused_by_name(tokenizer, text):
    with pytest.raises(PromptError, match="character 1" if isinstance(text, str) else "must be str"):
        tokenizer.encode(text)


@pytest.mark.parametrize("token_id", [-1, 5000, 2**31, 2**70])
def test_unknown_ids_have_no_text(any_tokenizer, token_id):
    assert any_tokenizer.token(token_id) == ""
    assert any_tokenizer.decode([token_id]) == ""
    assert Detokenizer(any_tokenizer).push([token_id]) == ""


@EXAMPLES
@given(text=st.text(CHARACTERS, max_size=40), data=st.data())
def test_pieces_join_to_the_whole_text(any_tokenizer, text, data):
    ids = any_tokenizer.encode(text)
    detokenizer, shown, place = Detokenizer(any_tokenizer), "", 0
    while place < len(ids):
        step = data.draw(st.integers(1, 5))
        shown += detokenizer.push(ids[place : place + step])
        assert not shown.endswith("\ufffd") or "\ufffd" in text
        place += step
        if data.draw(st.booleans()):  # a look at the rest changes nothing, and a copy goes on where it was
            detokenizer.flush()
            detokenizer = detokenizer.copy(True)
    assert shown + detokenizer.flush() == any_tokenizer.decode(ids)


@EXAMPLES
@given(ids=st.lists(st.integers(0, 400), max_size=60), skip=st.booleans())
@example(ids=[*[99] * 8, 161, 259, 261, 261, 261], skip=False)  # a window that was cut within an incomplete character
def test_any_tokens_can_come_and_text_is_that_of_all(tokenizer, ids, skip):
    detokenizer = Detokenizer(tokenizer, skip)
    text = "".join(detokenizer.push([i]) for i in ids) + detokenizer.flush()
    assert text == tokenizer.decode(ids, skip)


@EXAMPLES
@given(ids=st.lists(st.integers(0, 320), max_size=60), skip=st.booleans())
@pytest.mark.parametrize("name", ["byte_fallback", "sentencepiece"])
def test_any_bytes_can_come_and_no_other_token_is_lost(request, name, ids, skip):
    tokenizer = request.getfixturevalue(name)
    ids = [i for i in ids if not re.match("<0x[0-7]", tokenizer.token(i))]
    detokenizer = Detokenizer(tokenizer, skip)
    text = "".join(detokenizer.push([i]) for i in ids) + detokenizer.flush()
    whole = tokenizer.decode(ids, skip)
    # How bytes that are no character are shown depends on those around them; nothing else may.
    assert [c for c in text if c.isascii()] == [c for c in whole if c.isascii()]


def test_half_a_character_is_held_back(tokenizer):
    ids = tokenizer.encode("é")
    detokenizer = Detokenizer(tokenizer)
    assert len(ids) == 2
    assert [detokenizer.push([i]) for i in ids] == ["", "é"]
    detokenizer.push(ids[:1])
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.push(ids[1:]) == "é"  # nothing is lost by a look at the rest
    detokenizer.push(ids[:1])
    detokenizer = detokenizer.cut()
    assert [detokenizer.push([i]) for i in ids] == ["", "é"]


def test_bytes_of_a_character_are_held_back(byte_fallback):
    ids = byte_fallback.encode("a😀b")
    detokenizer = Detokenizer(byte_fallback)
    assert [detokenizer.push([i]) for i in ids] == ["a", "", "", "", "😀", "b"]


def test_a_space_survives_special_tokens_before_it(any_tokenizer):
    ids = any_tokenizer.encode("a a", add_special_tokens=False)
    special = [any_tokenizer.encode("</s>", add_special_tokens=False)[-1]] * 30
    detokenizer = Detokenizer(any_tokenizer)
    mixed = [ids[0], *special, *ids[1:]]
    assert "".join(detokenizer.push([i]) for i in mixed) == any_tokenizer.decode(mixed) == "a a"


def test_the_work_for_a_token_does_not_grow(tokenizer, monkeypatch):
    longest = 0
    decode = tokenizer.decode

    def watched(ids, skip_special_tokens=True):
        nonlocal longest
        longest = max(longest, len(ids))
        return decode(ids, skip_special_tokens)

    monkeypatch.setattr(tokenizer, "decode", watched)
    half = tokenizer.encode("é")[:1]
    for ids in (half * 500, tokenizer.encode("word " * 100), [9999] * 500, [1] * 500):
        detokenizer = Detokenizer(tokenizer)
        text = "".join(detokenizer.push([i]) for i in ids) + detokenizer.flush()
        assert text == decode(ids)
    assert longest <= Detokenizer.MAX_WINDOW + 2


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
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(TokenizerError, match="JSON object"):
        Tokenizer.from_folder(tmp_path)


def test_sentencepiece(sentencepiece):
    ids = sentencepiece.encode("the lazy fox ☃ jumps")
    assert ids[0] == sentencepiece.bos_token_id == 1 and sentencepiece.eos_token_ids == {2}
    assert sentencepiece.decode(ids) == "the lazy fox ☃ jumps"
    assert sentencepiece.decode(ids, skip_special_tokens=False) == "<s> the lazy fox ☃ jumps"


def test_sentencepiece_finds_control_and_added_tokens_in_text(make_sentencepiece):
    added = {"400": {"content": "<|im_start|>", "special": True}, "401": {"content": "<tool>", "special": False}}
    tokenizer = make_sentencepiece(added_tokens_decoder=added, eos_token="<|im_start|>", legacy=False)
    assert tokenizer.vocab_size == 402 and tokenizer.eos_token_ids == {400}
    ids = tokenizer.encode("<s>[INST]the<tool> fox<|im_start|>")
    assert [i for i in ids if tokenizer.token(i)[0] in "<["] == [1, tokenizer.encode("[INST]")[1], 401, 400]
    assert ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<s>[INST]the<tool> fox<|im_start|>"
    assert tokenizer.decode(ids) == "the<tool> fox"
    legacy = make_sentencepiece(added_tokens_decoder=added)
    assert legacy.decode(legacy.encode("[INST]the"), skip_special_tokens=False) == "<s>[INST] the"


def test_sentencepiece_without_bos(make_sentencepiece):
    tokenizer = make_sentencepiece(add_bos_token=False)
    assert tokenizer.bos_token_id is None and tokenizer.encode("") == []


def test_no_chat_template_says_what_to_do(tiny_llama):
    tokenizer = Tokenizer.from_folder(tiny_llama(tokenizer=True))
    assert not tokenizer.has_chat_template
    with pytest.raises(ChatTemplateError, match=r"tiny_llama.* has no chat template.*--no-chat.*chat_template\.jinja"):
        tokenizer.encode_chat(CHAT)


def test_a_damaged_chat_template_costs_chats_only(rewrite):
    tokenizer = rewrite(chat_template="{% for %}")
    assert tokenizer.decode(tokenizer.encode("text")) == "text" and tokenizer.has_chat_template
    for _ in range(2):
        with pytest.raises(ChatTemplateError, match=r"line 1.*--no-chat"):
            tokenizer.render_chat(CHAT)


def test_named_chat_templates(rewrite):
    named = {"default": "plain", "tool_use": "with {{ tools | length }} tools", "rag": "x"}
    tokenizer = rewrite(chat_template=[{"name": n, "template": t} for n, t in named.items()])
    assert tokenizer.render_chat(CHAT) == "plain"
    assert tokenizer.render_chat(CHAT, tools=[{}, {}]) == "with 2 tools"
    with pytest.raises(ChatTemplateError, match="no default chat template, only rag"):
        rewrite(chat_template=[{"name": "rag", "template": "x"}]).render_chat(CHAT)


def test_a_tokenizer_must_fit_the_model_but_added_tokens_may_lie_beyond(any_tokenizer, tmp_path):
    largest = any_tokenizer._codec.max_text_id()
    any_tokenizer.check_fits(largest + 1)
    with pytest.raises(TokenizerError, match=rf"ids up to {largest}, but.*ends at {largest - 1}; put the model's own"):
        any_tokenizer.check_fits(largest)


def test_the_image_token_of_a_text_only_model_is_no_misfit(byte_fallback, tmp_path):
    backend = byte_fallback._codec._backend
    vocab_size = backend.get_vocab_size()
    backend.add_special_tokens(["<image_soft_token>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_folder(tmp_path)
    tokenizer.check_fits(vocab_size)
    assert tokenizer.vocab_size == vocab_size + 1 and tokenizer.encode("<image_soft_token>") == [vocab_size]


def test_special_tokens_from_the_file_and_from_special_tokens_map(make_sentencepiece, tmp_path):
    folder = make_sentencepiece()._folder
    (tmp_path / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (1, {2})
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": {"content": "[INST]"}}')
    assert Tokenizer.from_folder(tmp_path).eos_token_ids == set(tokenizer.encode("[INST]")[1:])


def test_an_added_token_takes_the_blanks_that_it_says(make_sentencepiece):
    added = {"400": {"content": "<|end|>", "special": True, "rstrip": True}}
    added["401"] = {"content": "<x>", "lstrip": True}
    added["402"] = {"content": "\n\n"}
    tokenizer = make_sentencepiece(added_tokens_decoder=added, legacy=False)

    def decoded(text):
        return tokenizer.decode(tokenizer.encode(text, add_special_tokens=False), skip_special_tokens=False)

    assert decoded("the<|end|> \n fox <x> the\n\n") == "the<|end|>fox<x> the\n\n"
    assert tokenizer.encode("\n\n")[-1] == 402


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("bos_token", [5, ["x"], {"content": 5}, {}, True]),
        ("eos_token", [5, [["x"]]]),
        ("extra_special_tokens", [5, "x", [5], [["x"]], {"a": 5}, True]),
        ("additional_special_tokens", [5, "x", [5], {"a": ["x"]}]),
        (
            "added_tokens_decoder",
            [
                *(5, "x", [1], {"x": {"content": "x"}}, {"1": 5}, {"1": {}}, {"1": {"content": 5}}),
                *({"-1": {"content": "x"}}, {str(2**31): {"content": "x"}}, {"9" * 5000: {"content": "x"}}),
            ],
        ),
        ("eos_token_id", ["x", [["x"]], {"a": 1}, True, 1.5]),
        ("split_special_tokens", ["x", 5, []]),
    ],
)
def test_fields_of_a_wrong_type_are_named(rewrite, name, values):
    for value in values:
        with pytest.raises(TokenizerError, match=name):
            rewrite(**{name: value})


def test_a_vocabulary_without_pieces_is_refused(make_sentencepiece):
    folder = make_sentencepiece()._folder
    whole = (folder / "tokenizer.model").read_bytes()
    for content in (b"", b"\x09" + whole[1:], whole[:5], b"\n"):
        (folder / "tokenizer.model").write_bytes(content)
        with pytest.raises(TokenizerError, match=r"tokenizer\.model"):
            Tokenizer.from_folder(folder)


@pytest.mark.parametrize("eos", ["\udc00", {"content": "\udc00"}])
def test_a_token_that_is_no_text_is_no_token_of_a_vocabulary(make_sentencepiece, eos):
    with pytest.raises(TokenizerError, match="cannot be looked up"):
        make_sentencepiece(eos_token=eos)


def test_a_token_that_is_no_text_is_named(rewrite):
    with pytest.raises(TokenizerError, match="cannot be added"):
        rewrite(eos_token="\udc00")


@pytest.mark.parametrize("content", ['{"x": "y"}', '{"x": -1}', '{"x": 1e9}', '{"x": 99999999}', "[]", "{", "[" * 999])
def test_damaged_companions_are_named(rewrite, content):
    folder = rewrite()._folder
    (folder / "added_tokens.json").write_text(content)
    with pytest.raises(TokenizerError, match=r"added_tokens\.json"):
        Tokenizer.from_folder(folder)


FILES = [
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tekken.json", "generation_config.json"),
]


@pytest.mark.parametrize("name", FILES)
def test_only_regular_files_of_a_sensible_size_are_read(rewrite, name):
    folder = rewrite()._folder
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("added_tokens_decoder", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    file = folder / name
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero"), lambda path: path.touch()):
        file.unlink(missing_ok=True)
        make(file)
        if file.is_file():
            os.truncate(file, 20 << 30)
        with pytest.raises(TokenizerError, match=r"no regular file|21474836480 bytes"):
            Tokenizer.from_folder(folder)


def test_special_tokens_in_a_text_can_be_split(rewrite):
    [special], split = (rewrite(split_special_tokens=value).encode("</s>", False) for value in (False, True))
    assert special in rewrite().special_ids and len(split) > 1 and special not in split


def test_only_tokenizer_json_can_split_special_tokens(make_sentencepiece):
    make_sentencepiece(split_special_tokens=False)
    with pytest.raises(TokenizerError, match="split_special_tokens is true"):
        make_sentencepiece(split_special_tokens=True)


def backend_of(folder, **parts):
    from tokenizers import Tokenizer as Backend
    from tokenizers import models

    backend = Backend(models.BPE({"a": 0, "b": 1}, []))
    for name, part in parts.items():
        setattr(backend, name, part)
    backend.save(str(folder / "tokenizer.json"))
    return folder


def test_a_file_that_multiplies_text_is_refused(tmp_path):
    from tokenizers import Regex, decoders, normalizers, processors

    replace, long = normalizers.Replace, "a" * 1000
    chain = normalizers.Sequence([replace("a", "aaa")] * 4)
    nested = normalizers.Sequence([normalizers.Sequence([replace("a", "aaa")]), chain])
    for part in (replace("a", long), replace(Regex("a?"), long), replace(Regex("$"), long), chain, nested):
        with pytest.raises(TokenizerError, match="characters of one"):
            Tokenizer.from_folder(backend_of(tmp_path, normalizer=part))
    with pytest.raises(TokenizerError, match="characters of one"):
        Tokenizer.from_folder(backend_of(tmp_path, decoder=decoders.Replace("a", long)))
    with pytest.raises(TokenizerError, match="in front of a text"):
        Tokenizer.from_folder(backend_of(tmp_path, normalizer=normalizers.Prepend(long + "a")))
    with pytest.raises(TokenizerError, match="more than 64 steps"):
        Tokenizer.from_folder(backend_of(tmp_path, normalizer=normalizers.Sequence([normalizers.NFC()] * 65)))
    many = processors.TemplateProcessing(single=["b"] * 17 + ["$A"], special_tokens=[("b", 1)])
    with pytest.raises(TokenizerError, match="17 tokens in front"):
        Tokenizer.from_folder(backend_of(tmp_path, post_processor=many))
    usual = normalizers.Sequence([normalizers.NFKC(), normalizers.Prepend("a"), replace(Regex(" {2,}"), "a")])
    assert Tokenizer.from_folder(backend_of(tmp_path, normalizer=usual)).encode("b") == [0, 1]


def test_a_panic_of_the_library_is_an_error(tmp_path, capfd):
    from tokenizers import Regex, pre_tokenizers

    split = pre_tokenizers.Split(Regex(r"(a+)+$"), "isolated")
    tokenizer = Tokenizer.from_folder(backend_of(tmp_path, pre_tokenizer=split))
    with pytest.raises(TokenizerError, match="a text of 25 characters cannot be encoded: PanicException"):
        tokenizer.encode("a" * 24 + "b")
    assert tokenizer.encode("ab") == [0, 1]


@pytest.mark.parametrize("ids", [["x"], [None], [[1]], [1.5]])
def test_what_is_no_id_cannot_be_decoded(any_tokenizer, ids):
    with pytest.raises(TokenizerError, match="1 token ids cannot be decoded"):
        any_tokenizer.decode(ids)


def test_ids_outside_the_vocabulary_are_skipped(any_tokenizer):
    ids = any_tokenizer.encode("a", add_special_tokens=False)
    for other in (-1, any_tokenizer.vocab_size, 2**31, 2**32, 2**64):
        assert any_tokenizer.decode([*ids, other]) == any_tokenizer.decode(ids)


def test_an_interruption_is_no_error_of_the_tokenizer(tokenizer, monkeypatch):
    class Interrupted:
        def encode(self, *_, **__):
            raise KeyboardInterrupt

    monkeypatch.setattr(tokenizer._codec, "_backend", Interrupted())
    with pytest.raises(KeyboardInterrupt):
        tokenizer.encode("a")

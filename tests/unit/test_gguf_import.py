"""GGUF files of every architecture and tokenizer, against transformers' own readers of them."""

import contextlib
import io
import json
import os
import struct

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minirksc.checkpoints.gguf_config import ARCHITECTURES, LLAMA3_BANDS, expected_shapes, make_config
from minirksc.checkpoints.gguf_fields import GgufFields
from minirksc.checkpoints.gguf_header import check_header
from minirksc.checkpoints.gguf_tokenizer import BYTE, CONTROL, UNKNOWN, UNUSED, USER_DEFINED, _merges
from minirksc.checkpoints.sources import import_gguf
from minirksc.errors import CheckpointError

gguf = pytest.importorskip("gguf")

LAYERS, WINDOW = 7, 8
SIZES = {
    "context_length": 128, "embedding_length": 32, "block_count": LAYERS, "feed_forward_length": 48,
    "attention.head_count": 4, "attention.head_count_kv": 2, "attention.layer_norm_rms_epsilon": 1e-6,
    "rope.freq_base": 1e6,
}  # fmt: skip
OWN_FIELDS = {
    "llama": {"rope.dimension_count": 8},
    "qwen2": {},
    # 256 as all published ones: transformers' reader scales queries for it whatever the file says.
    "gemma3": {"attention.key_length": 256, "attention.value_length": 256, "attention.sliding_window": WINDOW},
}
ALPHABET = [chr(c) for c in range(33, 127)]
BYTE_LEVEL = {
    "model": "gpt2",
    "pre": "qwen2",
    "tokens": ["<|endoftext|>", "<|im_end|>", "Ġ", "Ċ", "ĉ", *ALPHABET, "ab", "Ġab", "ĊĊ", "<tool>", "[PAD103]"],
    "token_type": [CONTROL] * 2 + [1] * 100 + [USER_DEFINED, UNUSED],
    "merges": ["a b", "Ġ ab", "Ċ Ċ"],
    "eos_token_id": 1,
    "bos_token_id": 0,
    "add_bos_token": False,
}
TEXTS = [
    "The capital of France", " leading and trailing ", "two  blanks, three   blanks", "", " ", "\n", "\n\n\n x\ty\t\tz",
    "it's THEY'RE I'm don't", "12345 3.14159 1,000", "naïve café", "日本語 中文", "👩‍👧 x", "½Ⅳ١٢٣", "\x00\x7f",
    "if a<b and c>=d: {x[1]}", "ab aab  abab", "a" + " " * 20 + "b", "\r\n\r\n", "▁ literal ▁▁", "e\u0301 o\u0308",
]  # fmt: skip


def write_gguf(path, architecture, tokenizer, fields=(), tensors=(), seed=0):
    """A random model; returns what its config should be made from."""
    writer = gguf.GGUFWriter(str(path), architecture)
    model = {**SIZES, **OWN_FIELDS[architecture], **dict(fields)}
    named = {f"{architecture}.{name}": value for name, value in model.items()}
    named |= {f"tokenizer.ggml.{name}": value for name, value in tokenizer.items()}
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for name, value in named.items():
        kinds.get(type(value), writer.add_array)(name, value)
    rng = np.random.default_rng(seed)
    vocab = {"token_embd.weight": (len(tokenizer["tokens"]), SIZES["embedding_length"])}
    section = GgufFields(path, named, f"{architecture}.")
    config = make_config(ARCHITECTURES[architecture], section, vocab, None)
    for name, shape in expected_shapes(ARCHITECTURES[architecture], config):
        data = rng.standard_normal(shape) * 0.3
        writer.add_tensor(name, (data + 1 if "norm" in name else data).astype(np.float32))
    for name, data in dict(tensors).items():
        writer.add_tensor(name, data.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def trained_tokenizer(**options):
    """A SentencePiece BPE tokenizer as GGUF fields, and the processor that it came from."""
    import sentencepiece

    text = [t for t in TEXTS if t.strip() and "\x00" not in t] * 20 + ["the quick brown fox jumps over a lazy dog"] * 20
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_writer=model, model_type="bpe", vocab_size=480, byte_fallback=True,
        hard_vocab_limit=False, normalization_rule_name="identity", remove_extra_whitespaces=False,
        minloglevel=2, num_threads=1, **options,
    )  # fmt: skip
    own = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    ids = range(own.vocab_size())
    types = [
        CONTROL if own.is_control(i) else UNKNOWN if own.is_unknown(i) else BYTE if own.is_byte(i) else 1 for i in ids
    ]
    symbols = options.get("user_defined_symbols", [])
    words = [own.id_to_piece(i) for i in ids]
    types = [USER_DEFINED if word in symbols else kind for word, kind in zip(words, types, strict=True)]
    fields = {
        "model": "llama",
        "pre": "default",
        "tokens": [word.replace("▁", " ") if word in symbols else word for word in words],
        "scores": [own.get_score(i) for i in ids],
        "token_type": types,
        "bos_token_id": own.bos_id(),
        "eos_token_id": own.eos_id(),
        "unknown_token_id": own.unk_id(),
    }
    return fields, own


@pytest.fixture(scope="module")
def llama_tokenizer():
    return trained_tokenizer()


@pytest.fixture(scope="module")
def gemma_tokenizer():
    symbols = ["<end_of_turn>", "\n\n", "\n\n\n", "\t\t", "▁▁", "▁▁▁", "▁▁▁▁", "<h1>"]
    fields, own = trained_tokenizer(user_defined_symbols=symbols, add_dummy_prefix=False, split_by_whitespace=True)
    fields["token_type"][fields["tokens"].index("<end_of_turn>")] = CONTROL
    return {**fields, "add_space_prefix": False, "add_bos_token": True}, own


@pytest.fixture(scope="module")
def tokenizers(llama_tokenizer, gemma_tokenizer):
    return {"llama": llama_tokenizer[0], "qwen2": BYTE_LEVEL, "gemma3": gemma_tokenizer[0]}


@pytest.mark.oracle
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_are_those_of_transformers_own_reader(tmp_path, tokenizers, architecture):
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    write_gguf(tmp_path / "m.gguf", architecture, tokenizers[architecture])
    folder = import_gguf(tmp_path / "m.gguf", tmp_path / "out", dtype="float32")
    ours, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    theirs = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path, gguf_file="m.gguf"))
    read = load_gguf_checkpoint(str(tmp_path / "m.gguf"), return_tensors=True, model_to_load=theirs)["tensors"]
    assert set(theirs.load_state_dict(read, strict=False).missing_keys) <= {"lm_head.weight"}
    theirs.tie_weights()
    ids = torch.arange(3, 3 + 3 * WINDOW)[None]
    with torch.no_grad():
        logits, expected = ours.eval()(ids).logits, theirs.eval()(ids).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert logits.std() > 0.1


@pytest.mark.oracle
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_token_ids_are_those_of_transformers_own_reader(tmp_path, tokenizers, architecture):
    from transformers import AutoTokenizer

    from minirksc.text.tokenizer import Tokenizer

    write_gguf(tmp_path / "m.gguf", architecture, tokenizers[architecture])
    folder = import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    same, ours = AutoTokenizer.from_pretrained(folder), Tokenizer.from_folder(folder)
    texts = [*TEXTS, "x</s>y", "<unk>", "x<end_of_turn>\n\n\ny", "<h1> <h1>", "<|im_end|>", "a<tool> b"]
    for text in texts:
        # transformers' reader leaves out the composition of Qwen's tokenizer, and the blank in front of a text that
        # begins with blanks, as llama.cpp does not: see the next tests.
        is_other = (architecture == "qwen2" and "\u0301" in text) or (architecture == "llama" and text[:1] in " ▁")
        ids = ours.encode(text) if is_other else theirs.encode(text)
        assert ours.encode(text) == same.encode(text) == ids, text
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip), text


def test_qwen_composes_characters(tmp_path):
    from minirksc.text.tokenizer import Tokenizer

    tokens = [*BYTE_LEVEL["tokens"], "Ã", "©", "Ã©"]
    types = [*BYTE_LEVEL["token_type"], 1, 1, 1]
    more = {"tokens": tokens, "token_type": types, "merges": [*BYTE_LEVEL["merges"], "Ã ©"]}
    write_gguf(tmp_path / "m.gguf", "qwen2", BYTE_LEVEL | more)
    tokenizer = Tokenizer.from_folder(import_gguf(tmp_path / "m.gguf", tmp_path / "out"))
    assert tokenizer.encode("e\u0301") == tokenizer.encode("\u00e9") == [tokens.index("Ã©")]
    assert tokenizer.eos_token_ids == {0, 1}  # both end a turn, whichever the file names
    assert tokenizer.decode([tokens.index("[PAD103]")]) == ""  # it only fills up the embedding


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.sampled_from("theabcqu .,\n\tß日<>h1é"), max_size=30))
def test_pieces_are_those_of_sentencepiece(tmp_path_factory, llama_tokenizer, gemma_tokenizer, text):
    from minirksc.checkpoints.gguf_tokenizer import build_tokenizer

    for (fields, own), is_gemma in ((llama_tokenizer, False), (gemma_tokenizer, True)):
        # A run of blanks that is longer than any piece is cut from both sides, by SentencePiece from the left.
        if " " * 4 in text:
            continue
        made = build_tokenizer(GgufFields("m.gguf", fields, ""), is_gemma)
        ids = made.encode(text, add_special_tokens=False).ids
        assert ids == own.encode(text), text
        assert made.decode(ids) == text


@pytest.mark.oracle
@settings(max_examples=60)
@given(data=st.data(), words=st.lists(st.text("ab", min_size=1, max_size=5), unique=True, max_size=30))
def test_merges_come_in_the_order_of_transformers(data, words):
    from transformers.tokenization_utils_base import generate_merges

    vocab = {word: i for i, word in enumerate(words)}
    scores = data.draw(st.lists(st.sampled_from([0.0, -1.0, -2.5]), min_size=len(words), max_size=len(words)))
    ours = _merges(vocab, [-score for score in scores], [1] * len(words))
    assert ours == generate_merges(vocab, dict(zip(words, scores, strict=True)))


def test_gemma_has_an_end_of_turn_and_bos(tmp_path, tokenizers):
    fields = tokenizers["gemma3"]
    write_gguf(tmp_path / "m.gguf", "gemma3", fields)
    folder = import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    end = fields["tokens"].index("<end_of_turn>")
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [fields["eos_token_id"], end]
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    blanks = {token["content"] for token in tokenizer["added_tokens"] if not token["content"].strip(" ▁")}
    assert blanks == set() and {"▁▁", "▁▁▁"} < set(tokenizer["model"]["vocab"])


def gemma_config(**fields):
    section = {**SIZES, **OWN_FIELDS["gemma3"], **{name.replace("__", "."): value for name, value in fields.items()}}
    return make_config(ARCHITECTURES["gemma3"], GgufFields("m.gguf", section, ""), {}, None)


def test_gemma_fields():
    config = gemma_config()
    assert [kind == "full_attention" for kind in config["layer_types"]] == [False] * 5 + [True, False]
    assert (config["sliding_window"], config["rope_theta"], config["rope_local_base_freq"]) == (WINDOW, 1e6, 1e4)
    assert config["rope_scaling"] is None and config["final_logit_softcapping"] is None
    assert config["query_pre_attn_scalar"] == config["head_dim"] == 256
    config = gemma_config(attention__key_length=16, attention__value_length=16)
    assert config["query_pre_attn_scalar"] == config["head_dim"] == 16
    config = gemma_config(rope__scaling__type="linear", rope__scaling__factor=8.0, rope__freq_base_swa=2e4)
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 8.0} and config["rope_local_base_freq"] == 2e4
    assert gemma_config(final_logit_softcapping=30.0)["final_logit_softcapping"] == 30.0
    assert gemma_config(attention__sliding_window_pattern=2)["layer_types"][:2] == [
        "sliding_attention",
        "full_attention",
    ]
    slides = [True, False, False, True, True, False, True]
    kinds = gemma_config(attention__sliding_window_pattern=slides)["layer_types"]
    assert [kind == "sliding_attention" for kind in kinds] == slides
    assert gemma_config(block_count=62)["query_pre_attn_scalar"] == 32 // 4  # the 27B


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attention__sliding_window_pattern": [True]}, "has 1 layers, the model has 7"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0 cannot be translated"),
        ({"attention__sliding_window": 0}, "attention.sliding_window is 0, expected a positive integer"),
        ({"attention__layer_norm_rms_epsilon": "x"}, "layer_norm_rms_epsilon is 'x', expected a number"),
        ({"block_count": True}, "block_count is True"),
        ({"block_count": 2**32 - 1}, "block_count is 4294967295, no model has over 1000"),
        ({"rope__freq_base": float("nan")}, "freq_base is nan, expected a number"),
        ({"rope__scaling__factor": "x"}, "factor is 'x', expected a number"),
        ({"rope__scaling__type": "yarn"}, "type 'yarn' cannot be translated"),
    ],
)
def test_impossible_fields_are_refused(fields, message):
    with pytest.raises(CheckpointError, match=message):
        gemma_config(**fields)


@pytest.mark.oracle
@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_stored_factors_of_llama_3_become_its_rope(tmp_path, tokenizers, factor):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "llama3", "factor": factor, **LLAMA3_BANDS, "rope_theta": 5e5}
    config = LlamaConfig(hidden_size=256, num_attention_heads=4, head_dim=64, rope_parameters=rope)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    factors = (1 / 5e5 ** (torch.arange(0, 64, 2) / 64) / scaled).numpy()
    fields = {"embedding_length": 256, "rope.dimension_count": 64, "rope.freq_base": 5e5, "block_count": 1}
    for scale, is_known in ((1.0, True), (1.001, False)):
        source, out = tmp_path / f"{is_known}.gguf", tmp_path / f"{is_known}"
        write_gguf(source, "llama", tokenizers["llama"], fields, {"rope_freqs.weight": factors * scale})
        if is_known:
            written = json.loads((import_gguf(source, out) / "config.json").read_text())
            assert written["rope_scaling"] == {"rope_type": "llama3", "factor": factor, **LLAMA3_BANDS}
        else:
            with pytest.raises(CheckpointError, match=r"rope_freqs\.weight\) are not those of Llama 3\.1 or 3\.2"):
                import_gguf(source, out)
    source = tmp_path / "both.gguf"
    write_gguf(
        source, "llama", tokenizers["llama"], fields | {"rope.scaling.factor": 2.0}, {"rope_freqs.weight": factors}
    )
    with pytest.raises(CheckpointError, match="rope_freqs"):
        import_gguf(source, tmp_path / "both")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "t5"}, "tokenizer 't5'.*known: llama, and gpt2 with"),
        ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces = True cannot be imported"),
        ({"precompiled_charsmap": [1, 2]}, "precompiled_charsmap"),
        ({"add_sep_token": True}, "add_sep_token"),
        ({"token_type": [1]}, r"has \d+ tokens, but the types of 1"),
    ],
)
def test_other_tokenizers_are_refused(tmp_path, llama_tokenizer, change, message):
    write_gguf(tmp_path / "m.gguf", "llama", llama_tokenizer[0] | change)
    with pytest.raises(CheckpointError, match=message):
        import_gguf(tmp_path / "m.gguf", tmp_path / "out")


@pytest.mark.parametrize("text", [" a", "  a", "   ", " the cat", "▁a", "a", "\n a", " \n"])
def test_a_leading_blank_is_kept(llama_tokenizer, text):
    from minirksc.checkpoints.gguf_tokenizer import build_tokenizer

    fields, own = llama_tokenizer
    made = build_tokenizer(GgufFields("m.gguf", fields, ""))
    ids = made.encode(text, add_special_tokens=False).ids
    assert ids == own.encode(text)
    assert made.decode(ids) == text.replace("▁", " ")


SPLIT_ALIKE = {
    "qwen2": ["deepseek-r1-qwen", "megrez", "kormo", "f2llmv2"],
    "llama-bpe": ["llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"],
    "gpt-2": ["phi-2", "gigachat", "a.x-4.0", "mellum", "exaone4"],
}


@pytest.mark.parametrize(("known", "alias"), [(known, alias) for known in SPLIT_ALIKE for alias in SPLIT_ALIKE[known]])
def test_names_of_pre_tokenizers_that_mean_the_same(known, alias):
    from minirksc.checkpoints.gguf_tokenizer import build_tokenizer

    made, other = (build_tokenizer(GgufFields("m.gguf", {**BYTE_LEVEL, "pre": pre}, "")) for pre in (known, alias))
    assert made.to_str() == other.to_str()


def test_tekken_splits_as_its_own_file_does():
    from minirksc.checkpoints.gguf_tokenizer import adds_bos, build_tokenizer

    fields = {**BYTE_LEVEL, "pre": "tekken"}
    fields.pop("add_bos_token")
    made = build_tokenizer(GgufFields("m.gguf", fields, ""))
    pieces = [piece for piece, _ in made.pre_tokenizer.pre_tokenize_str("HelloWorld 123")]
    assert pieces == ["Hello", "World", "Ġ", "1", "2", "3"] and adds_bos(GgufFields("m.gguf", fields, ""))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pre": "bloom"}, "pre-tokenizer 'bloom' cannot be imported; known: llama, and gpt2 with llama-bpe, llama3"),
        ({"pre": ["qwen2"]}, "cannot be imported"),
        ({"tokens": 5}, "tokens must be a list of str"),
        ({"tokens": [1]}, "tokens must be a list of str"),
        ({"token_type": ["a"]}, "token_type must be a list of int"),
        ({"merges": [1]}, "merges must be a list of str"),
        ({"merges": ["a"]}, "do not fit its vocabulary"),
        ({"merges": ["q z"]}, "do not fit its vocabulary"),
        ({"bos_token_id": 10**6, "add_bos_token": True}, "bos_token_id is 1000000, the vocabulary has"),
        ({"bos_token_id": None, "add_bos_token": True}, "prompts begin with BOS, but bos_token_id is absent"),
        ({"tokens": ["x" * 1001] * 106}, "a token of 1001 characters"),
    ],
)
def test_fields_of_a_byte_level_tokenizer_that_cannot_be(change, message):
    from minirksc.checkpoints.gguf_tokenizer import build_tokenizer

    change = {"token_type": [1] * len(change["tokens"])} | change if isinstance(change.get("tokens"), list) else change
    with pytest.raises(CheckpointError, match=message):
        build_tokenizer(GgufFields("m.gguf", {**BYTE_LEVEL, **change}, ""))


@pytest.mark.parametrize("scores", [[0.0], ["a"], float("nan"), None])
def test_scores_that_cannot_be(llama_tokenizer, scores):
    from minirksc.checkpoints.gguf_tokenizer import build_tokenizer

    fields = llama_tokenizer[0]
    scores = [scores] * len(fields["tokens"]) if isinstance(scores, float) else scores
    with pytest.raises(CheckpointError, match="scores must be"):
        build_tokenizer(GgufFields("m.gguf", {**fields, "scores": scores}, ""))


def header(num_tensors=0, num_fields=0, rest=b"", version=3):
    return b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_fields) + rest


def field(kind, rest):
    return struct.pack("<Q", 1) + b"a" + struct.pack("<I", kind) + rest


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a readable GGUF file"),
        (b"GGUF", "ends after 4 bytes"),
        (b"GGML" + bytes(60), "does not begin with GGUF"),
        (header(version=1), "version is 1"),
        (header(version=3 << 24), "little-endian"),
        (header(num_tensors=2**60), "claims 0 fields and 1152921504606846976 tensors"),
        (header(num_fields=2**60), "claims 1152921504606846976 fields"),
        (header(num_fields=1), "ends after 24 bytes"),
        (header(num_fields=1, rest=struct.pack("<Q", 2**63)), "claims a text of 9223372036854775808 bytes"),
        (header(num_fields=1, rest=field(8, struct.pack("<Q", 2**40))), "claims a text of"),
        (header(num_fields=1, rest=field(13, b"")), "type 13, which is not known"),
        (header(num_fields=1, rest=field(9, struct.pack("<IQ", 0, 2**60))), "arrays claim more than"),
        (header(num_fields=1, rest=field(9, struct.pack("<IQ", 0, 10**6))), "ends after"),
        (header(num_fields=1, rest=field(9, struct.pack("<IQ", 9, 1) * 1000)), "array of the type 9"),
        (header(num_tensors=1, rest=struct.pack("<QI", 0, 2**31)), "2147483648 dimensions"),
        (header(num_tensors=1, rest=struct.pack("<QIQQIQ", 0, 2, 2**40, 2**40, 0, 0)), "cannot be in"),
    ],
)
def test_what_a_header_claims_must_fit_the_file(tmp_path, content, message):
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        import_gguf(tmp_path / "m.gguf", tmp_path / "out")


def test_only_regular_files_are_imported(tmp_path):
    os.mkfifo(tmp_path / "m.gguf")
    with pytest.raises(CheckpointError, match="no regular file"):
        check_header(tmp_path / "m.gguf")


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_is_an_error_or_a_checkpoint(tmp_path_factory, intact, data):
    """Bytes of the header are replaced, or the file is cut."""
    source = tmp_path_factory.mktemp("damaged") / "m.gguf"
    content = bytearray(intact)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, 6000))
        content[place : place + 8] = data.draw(st.sampled_from([b"\xff" * 8, bytes(8), b"\x01" + bytes(7), b"\x7f"]))
    source.write_bytes(content[: data.draw(st.sampled_from([len(content), 5000, len(content) - 1]))])
    with contextlib.suppress(CheckpointError):
        import_gguf(source, source.parent / "out")


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    source = tmp_path_factory.mktemp("intact") / "m.gguf"
    write_gguf(source, "qwen2", BYTE_LEVEL, {"block_count": 1})
    return source.read_bytes()


def test_words_that_are_there_twice_are_refused(tmp_path, llama_tokenizer):
    fields = llama_tokenizer[0]
    words = [*fields["tokens"][:-1], fields["tokens"][-2]]
    write_gguf(tmp_path / "m.gguf", "llama", fields | {"tokens": words})
    with pytest.raises(CheckpointError, match=r"tokens are only \d+ different words"):
        import_gguf(tmp_path / "m.gguf", tmp_path / "out")

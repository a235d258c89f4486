"""minirksc computes what transformers computes, for every family; see `zoo.py`."""

import importlib
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minirksc import LLM, SamplingParams

pytest.importorskip("transformers")
sys.path.append(str(Path(__file__).parent))  # in importlib mode pytest does not add it
zoo, rows = importlib.import_module("zoo"), importlib.import_module("zoo_rows")

pytestmark = pytest.mark.oracle
TOLERANCE = 2e-4  # of logits; 4e-4 of their spread where that is less
TIE = 1e-4
MIN_BITE = 25 * TOLERANCE
NEW_TOKENS = 24
GREEDY = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)
PROMPTS = {"short": zoo.make_prompt(zoo.SHORT, 1), "long": zoo.make_prompt(zoo.LONG)}

every_row = pytest.mark.parametrize("row", rows.ROWS, ids=lambda row: row.id)


def open_llm(folder, **options):
    return LLM(folder, **{"kv_cache_bytes": "8MiB", "dtype": "float32", **options})


def assert_close(actual, expected, factor=1):
    tolerance = factor * TOLERANCE * min(1.0, 2 * expected.std().item())
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)


def assert_same_tokens(row, model, prompt, actual, expected):
    """Equal up to the first place where transformers itself can hardly tell two tokens apart."""
    for i, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        if ours != theirs:
            logits = zoo.oracle_logits(row, model, [*prompt, *expected[:i]])[-1]
            assert logits[theirs] - logits[ours] < TIE, f"token {i} is {ours}, not {theirs}"
            return


# The oracle itself


@pytest.mark.parametrize("row", [row for row in rows.ROWS if row.bites], ids=lambda row: row.id)
def test_what_a_row_is_there_for_changes_its_logits(row, zoo_dir):
    folder = zoo.build(row, zoo_dir / row.id)
    prompt = PROMPTS["long"]
    with_it = zoo.oracle_logits(row, zoo.load_oracle(row, folder, {}), prompt)
    for feature, changes in row.bites.items():
        without = zoo.oracle_logits(row, zoo.load_oracle(row, folder, changes), prompt)
        assert (with_it - without).abs().max() > MIN_BITE, feature


@pytest.mark.parametrize("row", [row for row in rows.ROWS if row.published], ids=lambda row: row.id)
def test_a_published_config_is_the_same_model(row, zoo_dir):
    folder = zoo.build(row, zoo_dir / row.id)
    published = zoo.oracle_logits(row, zoo.load_oracle(row, folder), PROMPTS["long"])
    assert torch.equal(published, zoo.oracle_logits(row, zoo.load_oracle(row, folder, {}), PROMPTS["long"]))


def test_rows_are_many_and_distinct():
    assert len({row.id for row in rows.ROWS}) == len(rows.ROWS) >= 40
    assert len({row.model_type for row in rows.ROWS}) == 18


# minirksc against the oracle


@every_row
def test_logits(row, zoo_dir):
    folder = zoo.build(row, zoo_dir / row.id)
    model = zoo.load_oracle(row, folder)
    with open_llm(folder) as llm:
        for prompt in PROMPTS.values():
            assert_close(llm.logits(prompt), zoo.oracle_logits(row, model, prompt))


@every_row
def test_greedy_tokens(row, zoo_dir):
    folder = zoo.build(row, zoo_dir / row.id)
    model = zoo.load_oracle(row, folder)
    with open_llm(folder) as llm:
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS.values()], GREEDY)
    for prompt, output in zip(PROMPTS.values(), outputs, strict=True):
        expected = zoo.oracle_greedy(row, model, prompt, NEW_TOKENS)
        assert len(set(expected)) > 4  # a model that repeats itself would prove little
        assert_same_tokens(row, model, prompt, output.outputs[0].token_ids, expected)


@pytest.mark.parametrize("row_id", ["phi3-longrope", "phi3-longrope-published"])
@pytest.mark.parametrize("length", [rows.ORIGINAL - 10, rows.ORIGINAL - 1, rows.ORIGINAL, rows.ORIGINAL + 1])
def test_long_factors_from_the_original_length_on(row_id, length, zoo_dir):
    """Beyond it all positions turn by the long factors, also those that were computed with the short ones."""
    row = rows.BY_ID[row_id]
    folder = zoo.build(row, zoo_dir / row.id)
    model = zoo.load_oracle(row, folder)
    prompt = zoo.make_prompt(length, 2)
    expected = zoo.oracle_greedy(row, model, prompt, NEW_TOKENS)
    with open_llm(folder) as llm:
        assert_close(llm.logits(prompt), zoo.oracle_logits(row, model, prompt))
        output = llm.generate({"prompt_token_ids": prompt}, GREEDY)[0].outputs[0].token_ids
        assert_same_tokens(row, model, prompt, output, expected)
        whole = prompt + expected
        assert_close(llm.logits(whole), zoo.oracle_logits(row, model, whole))


BF16_ROWS = ["llama-bf16", "qwen3-tied-bf16", "gemma-bf16", "gemma2-bf16", "gemma4_unified_text-dense", "phi3-window"]


@pytest.mark.parametrize("row_id", BF16_ROWS)
def test_bfloat16(row_id, zoo_dir):
    """As near to float32 logits as transformers' own bfloat16, up to a quarter; both in units of their spread."""
    row = rows.BY_ID[row_id]
    folder = zoo.build(row, zoo_dir / row.id)
    prompt = PROMPTS["long"]
    exact = zoo.oracle_logits(row, zoo.load_oracle(row, folder), prompt)
    theirs = zoo.oracle_logits(row, zoo.load_oracle(row, folder, dtype=torch.bfloat16), prompt).float()
    with open_llm(folder, dtype="bfloat16") as llm:
        ours = llm.logits(prompt)
    error, yardstick = ((logits - exact).square().mean().sqrt() / exact.std() for logits in (ours, theirs))
    assert error < 1.25 * yardstick + 0.005
    assert error < 0.5


# Configs that nobody wrote by hand


@st.composite
def random_rows(draw, family):
    """A row with sizes and options of any kind that transformers accepts."""
    num_kv_heads = draw(st.sampled_from([1, 2, 3]))
    num_heads = num_kv_heads * draw(st.sampled_from([1, 2, 3]))
    num_layers = draw(st.integers(1, 4))
    per_head = 2 * draw(st.integers(4, 10))
    window = draw(st.integers(1, 40))
    fields = {
        "vocab_size": draw(st.integers(zoo.TEXT_VOCAB, 300)),
        "hidden_size": num_heads * per_head,
        "intermediate_size": draw(st.integers(8, 100)),
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": per_head if family == "phi3" else 2 * draw(st.integers(2, 16)),
        "max_position_embeddings": draw(st.integers(zoo.LONG, 1000)),
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5, 1e-3])),
        "tie_word_embeddings": draw(st.booleans()),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    kinds = st.lists(st.sampled_from([rows.SLIDING, rows.FULL]), min_size=num_layers, max_size=num_layers)
    gemma2_on = "gemma2 gemma3_text vaultgemma"
    gemma4 = "gemma4_text gemma4_unified_text"
    options = {
        "attention_bias": (st.booleans(), f"llama qwen3 gemma smollm3 seed_oss iquestcoder {gemma2_on}"),
        "mlp_bias": (st.booleans(), "llama smollm3 cwm seed_oss iquestcoder"),
        "sliding_window": (st.just(window), f"cwm ministral qwen2 {gemma2_on} {gemma4}"),
        "layer_types": (kinds, f"cwm ministral {gemma2_on} {gemma4}"),
        "query_pre_attn_scalar": (st.integers(4, 40), gemma2_on),
        "attn_logit_softcapping": (st.sampled_from([None, 2.0, 10.0]), "gemma2 vaultgemma"),
        "final_logit_softcapping": (st.sampled_from([None, 0.5, 5.0]), f"{gemma2_on} {gemma4}"),
        "use_sliding_window": (st.booleans(), "qwen2 qwen3 smollm3"),
        "max_window_layers": (st.integers(0, num_layers), "qwen2 qwen3"),
        "no_rope_layer_interval": (st.integers(1, 4), "smollm3"),
        "hidden_size_per_layer_input": (st.just(0), "gemma4_text"),
        "global_head_dim": (st.sampled_from([8, 16, 24]), gemma4),
        "attention_k_eq_v": (st.booleans(), gemma4),
    }
    for name, (values, families) in options.items():
        if family in families.split():
            fields[name] = draw(values)
    if family in ("mistral", "ministral3", "phi3", "qwen3", "smollm3"):
        fields["sliding_window"] = draw(st.sampled_from([None, window]))
    if family in ("llama", "qwen2", "qwen3", "mistral", "ministral", "seed_oss", "smollm3", "gemma", "gemma2"):
        fields |= draw(random_ropes())
    if family == "ministral3":
        fields |= rows.rope("yarn", **rows.MINISTRAL3_ROPE, llama_4_scaling_beta=draw(st.sampled_from([0.0, 0.3])))
    embed_std = 0.05 if "gemma" in family else 0.2
    return zoo.Row(repr(fields), family, fields, weight_std=2 / fields["hidden_size"] ** 0.5, embed_std=embed_std)


def random_ropes():
    original = st.integers(8, 200)
    theta = st.sampled_from([100.0, 1e4, 1e6])
    factor = st.sampled_from([1.0, 2.0, 8.0])
    return st.one_of(
        st.builds(rows.rope, st.just("default"), theta),
        st.builds(rows.rope, st.just("linear"), theta, factor=factor),
        st.builds(
            rows.rope,
            st.just("llama3"),
            theta,
            factor=factor,
            low_freq_factor=st.sampled_from([0.5, 1.0]),
            high_freq_factor=st.sampled_from([2.0, 4.0]),
            original_max_position_embeddings=original,
        ),
        st.builds(
            rows.rope,
            st.just("yarn"),
            theta,
            factor=factor,
            original_max_position_embeddings=original,
            truncate=st.booleans(),
            beta_fast=st.sampled_from([4.0, 32.0]),
            mscale=st.sampled_from([None, 0.7]),
            mscale_all_dim=st.sampled_from([None, 1.2]),
        ),
    )


def check_random_rows(family, num_examples):
    @settings(max_examples=num_examples, suppress_health_check=[HealthCheck.too_slow])
    @given(random_rows(family), st.integers(1, zoo.LONG))
    def check(row, length):
        prompt = zoo.make_prompt(length, 3)
        with TemporaryDirectory() as parent:
            folder = zoo.build(row, Path(parent) / "model")
            expected = zoo.oracle_logits(row, zoo.load_oracle(row, folder), prompt)
            with open_llm(folder) as llm:
                assert_close(llm.logits(prompt), expected, factor=4)  # chance also makes what magnifies rounding

    check()


every_family = pytest.mark.parametrize("family", sorted({row.model_type for row in rows.ROWS}))


@every_family
def test_random_configs(family):
    check_random_rows(family, 5)


@pytest.mark.slow
@every_family
def test_many_random_configs(family):
    check_random_rows(family, 50)

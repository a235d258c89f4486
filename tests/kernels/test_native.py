"""What is the compiled operations' own: attention in pieces, packed weights, and what they refuse.

Elsewhere in this folder they are one more form of each operation. They serve float32 and bfloat16.
"""

import importlib
import itertools
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minirksc.errors import ConfigError
from minirksc.kernels.attention import paged_attention_native as attention_native
from minirksc.kernels.attention.paged_attention import paged_attention_reference
from minirksc.kernels.attention.paged_attention_native import (
    PIECE_KEYS,
    QUERIES,
    paged_attention_native,
    plan_all,
    plan_decode,
)
from minirksc.kernels.attention.reads import find_reads
from minirksc.kernels.native.ops import add_rms_norm_native, gated_act_native, kv_store_native, rms_norm_native, why_not
from minirksc.kernels.weights.linear import Linear, NativePacker, PlainWeight
from minirksc.kernels.weights.native_weight import Bf16Weight, WidenedWeight

sys.path.append(str(Path(__file__).parent))  # in importlib mode pytest does not add it
attention, forms, stores = map(importlib.import_module, ("attention_cases", "forms", "test_kv_store"))

pytestmark, needs_bf16 = forms.needs_native, forms.needs_bf16
DTYPES = [torch.float32, torch.bfloat16]
NAN = float("nan")


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# Attention


def check_attention(case, softcap=None, scale=attention.SCALE):
    q, kv, cache, batch = case
    expected = paged_attention_reference(*case, scale, softcap)
    assert torch.isfinite(expected).all()
    tolerance = 2e-5 if q.dtype == torch.float32 else 2e-2
    for some in [cache, attention.in_tiles(cache)] if attention.has_tiles(q, cache) else [cache]:
        actual = paged_attention_native(q, kv, some, batch, scale, softcap)
        assert actual.dtype == q.dtype
        torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)
        assert torch.equal(paged_attention_native(q, kv, some, batch, scale, softcap), actual)  # with the same plan


@pytest.mark.parametrize("heads", [(7, 7), (9, 3), (32, 1), (97, 1)])
@pytest.mark.parametrize("head_dim", [8, 32, 96, 160, 512])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_of_heads(heads, head_dim, dtype):
    """Beside those of `test_paged_attention.py`."""
    for softcap, block_size in itertools.product((None, 1.5), (4, 16)):
        options = {"heads": heads, "head_dim": head_dim, "block_size": block_size, "dtype": dtype}
        check_attention(attention.make_case([1, 3, 1], [5, 9, 17], **options), softcap, head_dim**-0.5)
        windowed = attention.make_case([1, 3, 1], [5, 9, 17], window=6, apart="own", **options)
        check_attention(windowed, softcap, head_dim**-0.5)


def test_more_heads_than_there_is_room_for_and_an_int8_cache_go_another_way():
    check_attention(attention.make_case([1, 3], [5, 9], heads=(100, 1), head_dim=32, dtype=torch.bfloat16))
    check_attention(attention.make_case([1, 3], [5, 9], head_dim=32, dtype=torch.bfloat16, is_int8=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("context", [1, 15, 16, 17, 63, 64, 65, PIECE_KEYS, PIECE_KEYS + 1, 700])
def test_attention_of_lengths(context, dtype):
    for block_size in (1, 16, 64):
        options = {"head_dim": 32, "block_size": block_size, "dtype": dtype}
        check_attention(attention.make_case([1], [context], **options))
        check_attention(attention.make_case([1, 1], [context, 3], consecutive=True, **options))


@pytest.mark.parametrize("window", [None, 1, 5, 31, 64, 100, 257])
@pytest.mark.parametrize(("query", "context"), [(2, 2), (QUERIES, QUERIES), (QUERIES + 1, 90), (100, 100), (70, 333)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_of_prompts(query, context, window, dtype):
    for softcap, block_size in itertools.product((None, 0.7), (4, 32)):
        options = {"block_size": block_size, "heads": (6, 2), "head_dim": 32, "window": window, "dtype": dtype}
        check_attention(attention.make_case([query], [context], consecutive=True, **options), softcap)
        mixed = attention.make_case([1, query, 1, 2], [35, context, 1, 9], apart="own", **options)
        check_attention(mixed, softcap)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [2, 32, 33, 70])
def test_shared_prefixes_of_many_rows(num_rows, dtype):
    """Beyond 96 query heads a piece goes in several passes."""
    for size in (4, 16):
        options = {"head_dim": 32, "block_size": size, "dtype": dtype}
        tables = [[*range(80), 100 + i, 200 + i] for i in range(num_rows)]
        lens = [80 * size + 1 + i % 7 for i in range(num_rows)]
        check_attention(attention.make_case([1] * num_rows, lens, tables=tables, heads=(3, 1), **options))
        lens = [len(table) * size - 1 for table in attention.NESTED]
        check_attention(attention.make_case([1] * 5, lens, tables=attention.NESTED, **options))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_that_shares_nothing_is_the_same_alone_and_among_others(dtype):
    tables = [list(range(5, 40)), [50, 51, 52], [*range(60, 70), 80], [*range(60, 70), 81]]
    q, kv, cache, batch = attention.make_case(
        [1] * 4, [550, 40, 170, 175], tables=tables, head_dim=32, block_size=16, dtype=dtype
    )
    cache = attention.in_tiles(cache) if attention.has_tiles(q, cache) else cache
    among = paged_attention_native(q, kv, cache, batch, 0.2, None)
    batch = replace(batch, cu_seqlens_q=[0, 1], context_lens=[550], block_tables=tables[:1], kv_tables=tables[:1])
    batch._plans = {}
    assert torch.equal(paged_attention_native(q[:1], kv[:1], cache, batch, 0.2, None), among[:1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_in_a_row_stays_in_that_row(dtype):
    q, kv, cache, batch = attention.make_case([1, 1, 1], [5, 9, 17], head_dim=32, block_size=16, dtype=dtype)
    cache = attention.in_tiles(cache) if attention.has_tiles(q, cache) else cache
    clean = paged_attention_native(q, kv, cache, batch, 0.2, None)
    poisoned = q.clone()
    poisoned[1, 0, 3] = NAN
    out = paged_attention_native(poisoned, kv, cache, batch, 0.2, None)
    assert out[1, 0].isnan().all() and torch.equal(out[[0, 2]], clean[[0, 2]])


@settings(max_examples=150)
@given(
    case=attention.batches(),
    make_plan=st.sampled_from([plan_all, plan_decode]),
    piece_keys=st.sampled_from([PIECE_KEYS, 10, 3, 1]),
    num_queries=st.sampled_from([QUERIES, 2, 1]),
)
def test_every_visible_key_is_in_one_piece_of_a_place_and_no_other(case, make_plan, piece_keys, num_queries):
    queries, lens, options = case
    batch = attention.make_case(queries, lens, **options)[3]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_native, "PIECE_KEYS", piece_keys)
        patch.setattr(attention_native, "QUERIES", num_queries)
        plan = make_plan(batch)
    prefills, _ = find_reads(batch)
    size = batch.block_size
    read = [[] for _ in plan.rows]
    parts, results = [], []
    for begin, end, run_begin, run_end, part, first_key, first_query in plan.pieces.tolist():
        slots = [slot for first, n in plan.runs[run_begin:run_end].tolist() for slot in range(first, first + n)]
        assert slots and end > begin  # a partial result of nothing would be no number
        assert end - begin <= num_queries if first_query >= 0 else len(slots) <= piece_keys
        for place in range(begin, end):
            if first_query >= 0:  # of a prompt: keys are at consecutive positions, of which a query sees some
                position = first_query + place - begin
                seen = range(batch.first_visible(position) - first_key, position + 1 - first_key)
                read[place] += [slots[i] for i in seen]
            else:
                read[place] += slots
        if first_query >= 0:
            continue
        results += range(part, part + end - begin) if part >= 0 else [-1 - part]
        parts += range(part, part + end - begin) if part >= 0 else []
    assert results == list(range(plan.num_results)) and sorted(plan.parts.tolist()) == sorted(parts)
    assert len(plan.prefills) == (len(prefills) if make_plan is plan_decode else 0)
    for place, row in enumerate(plan.rows.tolist()):
        sequence = next(i for i in range(len(lens)) if row < batch.cu_seqlens_q[i + 1])
        position = lens[sequence] - (batch.cu_seqlens_q[sequence + 1] - row)
        table = batch.kv_tables[sequence]
        visible = range(batch.first_visible(position), position + 1)
        assert sorted(read[place]) == sorted(table[p // size] * size + p % size for p in visible)


# Weights


def bfloat16_numbers(*shape, seed=0):
    return randn(*shape, seed=seed).bfloat16()


def pack(kind, weight, bias=None):
    return Linear(weight if kind is Bf16Weight else weight.float(), bias, kind.pack)


KINDS = [pytest.param(Bf16Weight, marks=needs_bf16), WidenedWeight]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 2), (16, 8), (31, 34), (33, 20), (64, 576), (1000, 66)])
@pytest.mark.parametrize("tokens", [0, 1, 2, 5, 6, 7, 13, 14, 15, 29, 230])
def test_products(tokens, shape, kind):
    weight = bfloat16_numbers(*shape)
    x = bfloat16_numbers(tokens, shape[1], seed=1).to(kind.dtype)
    for bias in (None, bfloat16_numbers(shape[0], seed=2).to(kind.dtype)):
        exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
        layer = pack(kind, weight, bias)
        scale = math.sqrt(shape[1])
        torch.testing.assert_close(layer(x), exact.to(kind.dtype), atol=1e-6 * scale, rtol=2**-7)
        torch.testing.assert_close(layer.in_float32(x), exact.float(), atol=2e-6 * scale, rtol=1e-5)
        wide = torch.full((tokens, 2 * shape[1]), NAN, dtype=kind.dtype)
        wide[:, ::2] = x
        assert torch.equal(layer(wide[:, ::2]), layer(x))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40)
@given(st.integers(0, 40), st.integers(1, 90), st.integers(1, 60), st.booleans(), st.integers(0, 9))
def test_products_of_any_shape(kind, tokens, out_features, pairs, with_bias, seed):
    """Small whole numbers: every sum is exact, whatever its order."""
    generator = torch.Generator().manual_seed(seed)

    def numbers(*shape):
        return torch.randint(-3, 4, shape, generator=generator).to(kind.dtype)

    weight, x = numbers(out_features, 2 * pairs), numbers(tokens, 2 * pairs)
    bias = numbers(out_features) if with_bias else None
    layer = pack(kind, weight, bias)
    assert isinstance(layer._weight, kind)
    exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    assert torch.equal(layer.in_float32(x), exact.float()) and torch.equal(layer(x), exact.to(kind.dtype))


@needs_bf16
def test_what_is_rounded_is_what_was_summed_up():
    layer = pack(Bf16Weight, bfloat16_numbers(45, 130), bfloat16_numbers(45, seed=2))
    x = bfloat16_numbers(31, 130, seed=1)
    assert torch.equal(layer(x), layer.in_float32(x).bfloat16())


@needs_bf16
@pytest.mark.parametrize("in_features", [2, 130, 1030])
def test_a_row_does_not_depend_on_the_rows_beside_it(in_features):
    layer = pack(Bf16Weight, bfloat16_numbers(70, in_features), bfloat16_numbers(70, seed=2))
    x = bfloat16_numbers(260, in_features, seed=1)
    together, in_float32 = layer(x), layer.in_float32(x)
    for count in range(1, 41):
        for begin in (0, 17, 260 - count):
            rows = slice(begin, begin + count)
            assert torch.equal(layer(x[rows]), together[rows])
            assert torch.equal(layer.in_float32(x[rows]), in_float32[rows])


@pytest.mark.parametrize("kind", KINDS)
def test_nan_and_infinity_in_a_row_of_a_product_stay_there(kind):
    layer = pack(kind, bfloat16_numbers(70, 130))
    x = bfloat16_numbers(260, 130, seed=1).to(kind.dtype)
    together = layer(x)
    x[5, 3], x[6, 0] = NAN, math.inf
    assert torch.equal(layer(x)[[0, 4, 7, 100]], together[[0, 4, 7, 100]])
    assert not layer(x)[5:7].isfinite().any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 2), (31, 34), (64, 20), (100, 6)])
def test_rows_are_as_they_were_given(shape, kind):
    weight = bfloat16_numbers(*shape)
    indices = torch.tensor([shape[0] - 1, 0, shape[0] // 2, 0])
    layer = pack(kind, weight, bfloat16_numbers(shape[0], seed=1).to(kind.dtype))
    embed = layer.embedder()
    assert torch.equal(embed(indices), weight[indices].to(kind.dtype))
    assert torch.equal(
        embed(torch.cat((indices, indices))[::2]), weight[torch.cat((indices, indices))[::2]].to(kind.dtype)
    )
    x = bfloat16_numbers(3, shape[1], seed=2).to(kind.dtype)
    assert torch.equal(layer.rows(indices.tolist())(x), layer(x)[:, indices])
    assert layer.num_bytes >= 2 * weight.numel() and isinstance(layer._weight, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_the_bits_that_were_given(kind):
    bits = torch.randint(-(2**15), 2**15, (75, 34), generator=torch.Generator().manual_seed(0)).to(torch.int16)
    weight = bits.view(torch.bfloat16)  # NaN, infinities, denormal numbers and both zeros
    indices = torch.randint(75, (200,), generator=torch.Generator().manual_seed(1))  # so many that cores share them
    found = kind.pack(bits_as(weight, kind.dtype)).rows(indices)
    words = torch.int16 if kind is Bf16Weight else torch.int32
    assert torch.equal(found.view(words), bits_as(weight, kind.dtype)[indices].view(words))
    assert kind.pack(bits_as(weight, kind.dtype)).rows(indices[:0]).shape == (0, 34)


def bits_as(weight, dtype):
    """bfloat16 numbers as float32 by their bits, since a conversion may change those of NaN."""
    if dtype == torch.bfloat16:
        return weight
    return (weight.view(torch.int16).int() << 16).view(torch.float32)


@pytest.mark.parametrize("where", [(0, 0), (7, 3), (8, 0), (19, 39)])
@pytest.mark.parametrize(
    ("number", "fits"),
    [(1 + 2**-8, False), (1 + 2**-7, True), (1e-40, False), (2.0**-130, True), (3.4e38, False), (-0.0, True)],
)
def test_a_number_that_bfloat16_cannot_hold_is_not_packed(number, fits, where):
    weight = bfloat16_numbers(20, 40).float()
    weight[where] = number
    packed = WidenedWeight.pack(weight)
    assert (packed is not None) == fits
    if fits:
        assert torch.equal(packed.rows(torch.arange(20)), weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_processor_of_256_bits_reads_bfloat16_numbers_in_16(dtype, monkeypatch):
    monkeypatch.setattr("minirksc.kernels.weights.linear.computes_in", lambda dtype, device: dtype == torch.float32)
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX2")
    weight = torch.randint(-9, 9, (33, 20), generator=torch.Generator().manual_seed(0)).to(dtype)
    layer, x = Linear(weight, torch.ones(33, dtype=dtype), NativePacker()), torch.ones(2, 20, dtype=dtype)
    assert isinstance(layer._weight, WidenedWeight) and layer(x).dtype == dtype
    assert torch.equal(layer(x), Linear(weight, torch.ones(33, dtype=dtype))(x))
    other = Linear(randn(33, 20), None, NativePacker())
    assert not isinstance(other._weight, WidenedWeight)  # 24 digits


@needs_bf16
def test_an_odd_number_of_inputs_is_left_to_others():
    assert Bf16Weight.pack(bfloat16_numbers(4, 5)) is None
    plain = Linear(bfloat16_numbers(4, 5), None, PlainWeight)
    assert plain(bfloat16_numbers(2, 5)).shape == (2, 4)


# What is not served


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes_never_reach_the_compiled_code(dtype):
    assert "not in" in why_not(dtype, {64})
    x = torch.ones(2, 8, dtype=dtype)
    with pytest.raises(ConfigError, match="float32 or bfloat16"):
        rms_norm_native(x, None, 1e-5)
    with pytest.raises(ConfigError, match="float32 or bfloat16"):
        add_rms_norm_native(x, x.clone(), None, None, 1e-5)
    with pytest.raises(ConfigError, match="float32 or bfloat16"):
        gated_act_native(x, "silu")
    with pytest.raises(ConfigError, match="float32 or bfloat16"):
        forms.store(kv_store_native, **stores.make_case(dtype=dtype))
    for queries in ([1, 1], [3, 2]):
        case = attention.make_case(queries, [5, 9], dtype=dtype)
        with pytest.raises(ConfigError, match="float32 or bfloat16"):
            paged_attention_native(*case, 1.0, None)


def test_why_a_model_is_not_served():
    assert why_not(torch.float32, {64, 20}) == "head_dim 20 is no multiple of 8"
    assert why_not(torch.bfloat16, {64, 128}) is None


def test_norm_weights_that_would_be_misread_are_refused():
    x, wide, narrow = torch.ones(2, 64), torch.ones(64), torch.ones(64, dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match="one dtype for all norms"):
        rms_norm_native(x, narrow, 1e-5)
    with pytest.raises(ConfigError, match="one dtype for all norms"):
        add_rms_norm_native(x.bfloat16(), x.bfloat16(), narrow, wide, 1e-5)

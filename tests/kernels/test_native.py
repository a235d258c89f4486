"""The compiled operations of a CPU against the references, on shapes and memory chosen to hurt.

They serve float32 and bfloat16; NaN is wherever nothing may be read.
"""

import importlib
import math
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from minirksc.kernels.attention_reads import find_reads
from minirksc.kernels.gated_act import ACTIVATIONS, gated_act_reference
from minirksc.kernels.linear import Linear, PlainWeight
from minirksc.kernels.native_ops import (
    add_rms_norm_native,
    gated_act_native,
    has_bf16_products,
    kv_store_native,
    native,
    rms_norm_native,
    why_not,
)
from minirksc.kernels.native_weight import Bf16Weight, WidenedWeight
from minirksc.kernels.paged_attention import paged_attention_reference
from minirksc.kernels.paged_attention_native import PIECE_KEYS, TILE, paged_attention_native, plan_all, plan_decode
from minirksc.kernels.rms_norm import add_rms_norm_reference, rms_norm_reference

sys.path.append(str(Path(__file__).parent))  # in importlib mode pytest does not add it
attention, stores = importlib.import_module("attention_cases"), importlib.import_module("test_kv_store")

pytestmark = pytest.mark.skipif(native is None, reason="nothing is compiled")
needs_bf16 = pytest.mark.skipif(not has_bf16_products, reason="this processor does not multiply bfloat16")
DTYPES = [torch.float32, torch.bfloat16]
NAN = float("nan")


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def in_nan(x):
    """A copy whose rows lie in memory that is NaN between and around them, and that memory."""
    memory = torch.full((x.shape[0] + 2, x.shape[-1] + 3), NAN, dtype=x.dtype)
    inside = memory[1:-1, 1:-2]
    return inside.copy_(x), memory


def close(actual, expected):
    tolerance = 4e-6 if expected.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance, equal_nan=True)


# Norms and activation


def norm_weight(kind, size, dtype, seed):
    return None if kind == "none" else 1 + randn(size, seed=seed).to(torch.float32 if kind == "float32" else dtype) / 3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["none", "float32", "of x"])
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (3, 41), (7, 576), (40, 1000)])
def test_rms_norm(shape, kind, dtype):
    if kind == "float32" and dtype == torch.float32:
        return  # it is that of x
    x, weight = randn(*shape, dtype=dtype) * 9, norm_weight(kind, shape[1], dtype, 1)
    for given_x in (x, in_nan(x)[0], randn(shape[0], 2 * shape[1], dtype=dtype)[:, ::2]):
        before = given_x.clone()
        close(rms_norm_native(given_x, weight, 1e-5), rms_norm_reference(given_x, weight, 1e-5))
        assert torch.equal(given_x, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["none", "float32", "of x"])
@pytest.mark.parametrize("update_kind", ["none", "float32", "of x"])
@pytest.mark.parametrize("shape", [(4, 72), (31, 576)])
def test_add_rms_norm(shape, update_kind, kind, dtype):
    if {kind, update_kind} == {"float32", "of x"} and dtype == torch.bfloat16:
        return  # the norms of one model are of one kind
    hidden, memory = in_nan(randn(*shape, dtype=dtype))
    update, _ = in_nan(randn(*shape, dtype=dtype, seed=2) * 5)
    norms = norm_weight(update_kind, shape[1], dtype, 3), norm_weight(kind, shape[1], dtype, 4)
    expected_hidden = hidden.clone()
    expected = add_rms_norm_reference(expected_hidden, update, *norms, 1e-5)
    close(add_rms_norm_native(hidden, update, *norms, 1e-5), expected)
    close(hidden, expected_hidden)
    assert memory.isnan().sum() == memory.numel() - hidden.numel()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (3, 37), (5, 1536), (40, 511)])
def test_gated_act(shape, activation, dtype):
    rows, size = shape
    x, _ = in_nan(randn(rows, 2 * size, dtype=dtype) * 4)
    close(gated_act_native(x, activation), gated_act_reference(x, activation))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gates_of_any_size_and_none(activation):
    gates = torch.tensor([1e30, -1e30, 200.0, -200.0, 88.5, -88.5, 0.0, math.inf, NAN])
    out = gated_act_native(torch.cat((gates, torch.ones(9)))[None], activation)[0]
    close(out, gated_act_reference(torch.cat((gates, torch.ones(9)))[None], activation)[0])


# Cache


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [None, "float32", "of qkv"])
@pytest.mark.parametrize("rotary_dim", [None, 8, 16])
@pytest.mark.parametrize("int8", [False, True])
def test_kv_store(int8, rotary_dim, norm, dtype):
    for flags in ({}, {"v_norm": True}, {"growth": True}):
        stores.check(
            kv_store_native, stores.make_case(rotary_dim=rotary_dim, norm=norm, int8=int8, dtype=dtype, **flags)
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(3, 3), (4, 1), (5, 1), (9, 3), (5, 0)])
@pytest.mark.parametrize("head_dim", [8, 80, 256])
def test_kv_store_of_heads(head_dim, heads, dtype):
    slots = (11, 2, 7, 0, 5, 9)
    case = stores.make_case(
        heads=heads, head_dim=head_dim, rotary_dim=head_dim, norm="of qkv", dtype=dtype, slots=slots, num_blocks=4
    )
    stores.check(kv_store_native, case)


# Attention


def check_attention(case, softcap=None, scale=attention.SCALE):
    q, _, cache, batch = case
    expected = paged_attention_reference(*case[:3], batch, scale, softcap)
    actual = paged_attention_native(*case[:3], batch, scale, softcap)
    assert actual.dtype == q.dtype and torch.isfinite(expected).all()
    tolerance = 2e-5 if q.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)
    assert torch.equal(paged_attention_native(*case[:3], batch, scale, softcap), actual)  # with the same plan
    assert batch is case[3] and cache is case[2]


@pytest.mark.parametrize("heads", [(2, 2), (4, 1), (5, 1), (9, 3), (8, 1), (96, 1)])
@pytest.mark.parametrize("head_dim", [8, 32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_of_heads(heads, head_dim, dtype):
    options = {"heads": heads, "head_dim": head_dim, "dtype": dtype}
    for softcap in (None, 1.5):
        check_attention(attention.make_case([1, 3, 1], [5, 9, 17], **options), softcap, head_dim**-0.5)
        windowed = attention.make_case([1, 3, 1], [5, 9, 17], window=6, apart="own", **options)
        check_attention(windowed, softcap, head_dim**-0.5)


def test_more_heads_than_there_is_room_for_and_an_int8_cache_go_another_way():
    check_attention(attention.make_case([1, 3], [5, 9], heads=(100, 1), head_dim=32, dtype=torch.bfloat16))
    check_attention(attention.make_case([1, 3], [5, 9], head_dim=32, dtype=torch.bfloat16, is_int8=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("context", [1, 15, 16, 17, 63, 64, 65, PIECE_KEYS, PIECE_KEYS + 1, 700])
def test_attention_of_lengths(context, dtype):
    for block_size in (1, 16):
        options = {"head_dim": 32, "block_size": block_size, "dtype": dtype}
        check_attention(attention.make_case([1], [context], **options))
        check_attention(attention.make_case([1, 1], [context, 3], consecutive=True, **options))


@pytest.mark.parametrize("window", [None, 1, 5, 31, 64, 100, 257])
@pytest.mark.parametrize(("query", "context"), [(2, 2), (TILE, TILE), (TILE + 1, 90), (100, 100), (70, 333)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_of_prompts(query, context, window, dtype):
    options = {"block_size": 4, "heads": (6, 2), "head_dim": 32, "window": window, "dtype": dtype}
    for softcap in (None, 0.7):
        check_attention(attention.make_case([query], [context], consecutive=True, **options), softcap)
        mixed = attention.make_case([1, query, 1, 2], [35, context, 1, 9], apart="own", **options)
        check_attention(mixed, softcap)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [2, 32, 33, 70])
def test_shared_prefixes_of_many_rows(num_rows, dtype):
    """Beyond 96 query heads a piece goes in several passes."""
    prefix = list(range(80))
    tables = [[*prefix, 100 + i, 200 + i] for i in range(num_rows)]
    lens = [321 + i % 7 for i in range(num_rows)]
    case = attention.make_case([1] * num_rows, lens, tables=tables, heads=(3, 1), head_dim=32, dtype=dtype)
    check_attention(case)
    check_attention(
        attention.make_case([1] * 5, [39, 43, 39, 43, 7], tables=attention.NESTED, head_dim=32, dtype=dtype)
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_scores_neither_overflow_nor_lose_the_others(dtype):
    for options in ({}, {"window": 7, "apart": "own"}):
        q, kv, cache, batch = attention.make_case([1, 4, 1], [40, 13, 40], head_dim=32, dtype=dtype, **options)
        check_attention((q * 300, kv, cache, batch))


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_in_a_row_stays_in_that_row(dtype):
    q, kv, cache, batch = attention.make_case([1, 1, 1], [5, 9, 17], head_dim=32, dtype=dtype)
    clean = paged_attention_native(q, kv, cache, batch, 0.2, None)
    poisoned = q.clone()
    poisoned[1, 0, 3] = NAN
    out = paged_attention_native(poisoned, kv, cache, batch, 0.2, None)
    assert out[1, 0].isnan().all() and torch.equal(out[[0, 2]], clean[[0, 2]])


@settings(max_examples=50, deadline=None)
@given(
    case=attention.batches(),
    softcap=st.sampled_from([None, 0.3, 50.0]),
    dtype=st.sampled_from(DTYPES),
    wide=st.booleans(),
)
def test_attention_of_random_batches(case, softcap, dtype, wide):
    queries, lens, options = case
    check_attention(
        attention.make_case(queries, lens, **options | {"dtype": dtype, "head_dim": 32 if wide else 8}), softcap
    )


@settings(max_examples=100, deadline=None)
@given(case=attention.batches(), make_plan=st.sampled_from([plan_all, plan_decode]))
def test_every_visible_key_is_in_one_piece_of_a_place_and_no_other(case, make_plan):
    queries, lens, options = case
    batch = attention.make_case(queries, lens, **options)[3]
    plan = make_plan(batch)
    prefills, _ = find_reads(batch)
    size = batch.block_size
    read = [[] for _ in plan.rows]
    parts = []
    for begin, end, run_begin, run_end, part, first_key, first_query in plan.pieces.tolist():
        slots = [slot for first, n in plan.runs[run_begin:run_end].tolist() for slot in range(first, first + n)]
        for place in range(begin, end):
            if first_query >= 0:  # of a prompt: keys are at consecutive positions, of which a query sees some
                position = first_query + place - begin
                seen = range(batch.first_visible(position) - first_key, position + 1 - first_key)
                read[place] += [slots[i] for i in seen]
            else:
                read[place] += slots
        parts += [] if part < 0 else range(part, part + end - begin)
    assert sorted(parts) == list(range(len(plan.parts))) == sorted(plan.parts.tolist())
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


@needs_bf16
def test_a_row_does_not_depend_on_the_rows_beside_it():
    layer = pack(Bf16Weight, bfloat16_numbers(70, 130))
    x = bfloat16_numbers(260, 130, seed=1)
    together = layer(x)
    for begin in (0, 17, 113, 259):
        for count in (1, 2, 3, 8, 14, 15, 40):
            assert torch.equal(layer(x[begin : begin + count]), together[begin : begin + count])


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


@pytest.mark.parametrize("odd", [1 + 2**-8, 1e-40, 3.4e38, NAN])
def test_what_bfloat16_cannot_hold_is_not_packed(odd):
    weight = bfloat16_numbers(20, 40).float()
    assert WidenedWeight.pack(weight) is not None
    weight[7, 3] = odd
    packed = WidenedWeight.pack(weight)
    exact = torch.equal(weight.bfloat16().float(), weight)
    assert packed is None or exact or math.isnan(odd)


@needs_bf16
def test_an_odd_number_of_inputs_is_left_to_others():
    assert Bf16Weight.pack(bfloat16_numbers(4, 5)) is None
    plain = Linear(bfloat16_numbers(4, 5), None, PlainWeight)
    assert plain(bfloat16_numbers(2, 5)).shape == (2, 4)


# What is not served


def test_other_dtypes_never_reach_the_compiled_code():
    for dtype in (torch.float16, torch.float64):
        assert "not in" in why_not(dtype, {64})
        x = torch.ones(2, 8, dtype=dtype)
        for call in (lambda x=x: rms_norm_native(x, None, 1e-5), lambda x=x: gated_act_native(x, "silu")):
            with pytest.raises(KeyError):
                call()
    assert why_not(torch.float32, {64, 20}) == "head_dim 20 is no multiple of 8"
    assert why_not(torch.bfloat16, {64, 128}) is None

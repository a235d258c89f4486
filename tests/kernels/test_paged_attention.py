"""Paged attention: the forms of a CPU against the reference, on shapes and caches chosen to hurt."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minirksc.kernels.attention import paged_attention_native as attention_native
from minirksc.kernels.attention import paged_attention_torch as attention_torch
from minirksc.kernels.attention.paged_attention import paged_attention_reference
from minirksc.kernels.attention.paged_attention_native import paged_attention_native
from minirksc.kernels.attention.paged_attention_torch import make_plan, paged_attention_torch
from minirksc.kernels.attention.prefix_attention import (
    Segment,
    common_prefix_len,
    merge_into,
    merge_partials_reference,
    own_ranges,
    shared_segments,
)
from minirksc.kernels.native.ops import why_not

sys.path.append(str(Path(__file__).parent))  # in importlib mode pytest does not add it
cases, forms = importlib.import_module("attention_cases"), importlib.import_module("forms")
make_case, batches, NESTED, SCALE = cases.make_case, cases.batches, cases.NESTED, cases.SCALE


def tiled_native(q, kv, cache, *more):
    return paged_attention_native(q, kv, cases.in_tiles(cache), *more)


NAN = float("nan")
ALL = [paged_attention_torch, paged_attention_native, paged_attention_reference]
FORMS = forms.parameters(ALL)
# Between the form in the dtype and the reference, which computes in float32 and rounds once.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def forms_that_serve(q, cache):
    """All that go their own way: an int8 cache goes the torch form's."""
    found = [paged_attention_torch]
    if cache.scales is None and why_not(q.dtype, {q.shape[2]}) is None:
        found.append(paged_attention_native)
        if cases.has_tiles(q, cache):
            found.append(tiled_native)
    return found


def check(case, softcap=None, scale=SCALE):
    q, kv, cache, batch = case
    before = [tensor.clone() for tensor in (q, *cache) if tensor is not None]
    expected = paged_attention_reference(q, kv, cache, batch, scale, softcap)
    assert torch.isfinite(expected).all()
    tolerance = TOLERANCE[q.dtype]
    for form in forms_that_serve(q, cache):
        actual = form(q, kv, cache, batch, scale, softcap)
        assert actual.dtype == q.dtype
        torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance, msg=lambda m, f=form: f"{f}: {m}")
        again = form(q, kv, cache, batch, scale, softcap)  # with the plan and the buffers of the first layer
        assert torch.equal(again, actual)
    after = [tensor for tensor in (q, *cache) if tensor is not None]
    torch.testing.assert_close(after, before, equal_nan=True, atol=0, rtol=0)


@pytest.mark.parametrize("heads", [(2, 2), (4, 1), (5, 1), (10, 2), (8, 1), (9, 3)])
@pytest.mark.parametrize("head_dim", [8, 64, 80, 96, 128, 256, 512])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_heads_and_dims(heads, head_dim, dtype, softcap):
    options = {"heads": heads, "head_dim": head_dim, "dtype": dtype}
    scale = head_dim**-0.5
    check(make_case([1, 3, 1], [5, 9, 17], **options), softcap, scale)
    check(make_case([1, 3, 1], [5, 9, 17], window=6, apart="own", **options), softcap, scale)
    check(make_case([1, 3, 1], [5, 9, 17], is_int8=True, **options), softcap, scale)


@pytest.mark.parametrize("context", [1, 3, 4, 5, 8, 13, 31])
@pytest.mark.parametrize("query", [1, 2, 4, 5])
def test_block_borders(query, context):
    if query <= context:
        check(make_case([query], [context]))
        check(make_case([query, 1], [context, 7], consecutive=True))


@pytest.mark.parametrize("window", [1, 2, 3, 4, 5, 7, 8, 9, 13, 64])
@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("consecutive", [True, False])
def test_windows_at_block_borders(window, softcap, consecutive):
    for context in (1, 4, 5, 9, 13, 16, 31):
        for query in (1, 2, 5, context):
            options = {"window": window, "consecutive": consecutive, "apart": None if consecutive else "own"}
            if query <= context:
                check(make_case([query], [context], **options), softcap)
                check(make_case([query, 1, 1], [context, 17, 6], **options), softcap)


@pytest.mark.parametrize(
    ("form", "dtype"),
    [
        *forms.with_dtypes(ALL, [torch.float32]),
        pytest.param(tiled_native, torch.bfloat16, marks=forms.needs_bf16, id="tiled_native"),
    ],
)
@pytest.mark.parametrize("window", [None, 1, 2, 3, 4, 5, 8, 11, 23, 24, 100])
@pytest.mark.parametrize("queries", [1, 2, 7, 24])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_key_is_visible_exactly_when_it_is_not_after_the_query_nor_a_window_before(
    form, dtype, window, queries, softcap
):
    """Keys of zero make all weights equal, and each value is its own position's unit vector: the output is the mask."""
    context = 24
    size = 16 if form is tiled_native else 4
    options = {"heads": (2, 1), "head_dim": 32, "block_size": size, "window": window, "apart": "own", "dtype": dtype}
    q, kv, cache, batch = make_case([queries, 1], [context, context], **options)
    cache.kv.zero_()
    first_query = context - queries
    for table in batch.kv_tables:
        for position in range(context):
            if table[position // size] >= 0:
                cache.kv[table[position // size], position % size, 1, 0, position] = 1.0
    kv.zero_()
    for row, position in enumerate([*range(first_query, context), context - 1]):
        kv[row, 1, 0, position] = 1.0
    out = form(q, kv, cache, batch, SCALE, softcap)  # [queries + 1, 2, 32]
    for row, at in enumerate([*range(first_query, context), context - 1]):
        visible = [j for j in range(context) if j <= at and (window is None or j > at - window)]
        expected = torch.zeros(32)
        expected[visible] = 1 / len(visible)
        assert (out[row][:, [j for j in range(32) if j not in visible]] == 0).all()
        rtol = 1e-5 if dtype == torch.float32 else 2**-8
        torch.testing.assert_close(out[row].float(), expected.expand(2, 32), atol=1e-6, rtol=rtol)


@pytest.mark.parametrize("form", FORMS)
def test_a_softcap_bounds_the_scores(form):
    q, kv, cache, batch = make_case([1, 4], [9, 13])
    flat = form(q * 1e4, kv, cache, batch, SCALE, 1e-6)
    mean = form(q * 0, kv, cache, batch, SCALE, None)
    torch.testing.assert_close(flat, mean, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("softcap", [1e2, 1e4])
def test_a_softcap_far_from_any_score_changes_nothing(form, softcap):
    q, kv, cache, batch = make_case([1, 4], [9, 13])
    tolerance = 2e-3 if softcap == 1e2 else 1e-5  # tanh(x / c) c is x - x^3 / 3c^2
    loose = form(q, kv, cache, batch, SCALE, softcap)
    torch.testing.assert_close(loose, form(q, kv, cache, batch, SCALE, None), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("softcap", [None, 50.0])
def test_large_scores_neither_overflow_nor_lose_the_others(softcap):
    for options in ({}, {"window": 7, "apart": "own"}):
        q, kv, cache, batch = make_case([1, 4, 1], [40, 13, 40], **options)
        check((q * 300, kv, cache, batch), softcap)


@pytest.mark.parametrize("window", [None, 1, 5, 8, 9, 17, 23, 100])
@pytest.mark.parametrize("softcap", [None, 0.7])
def test_a_shared_prefix_equals_no_sharing(window, softcap):
    prefix = [7, 3, 11, 5, 2, 9]
    tables = [[*prefix, 20 + i, 30 + i] for i in range(5)]
    lens = [25, 26, 27, 29, 32]
    for apart in (None, "all", "own"):
        options = {"tables": tables, "window": window, "apart": apart}
        check(make_case([1] * 5, lens, **options), softcap)
        check(make_case([1, 1, 3, 1, 1], lens, **options), softcap)


@pytest.mark.parametrize("softcap", [None, 0.7])
def test_nested_prefixes(softcap):
    case = make_case([1] * 5, [len(t) * 4 - 1 for t in NESTED], tables=NESTED)
    assert len(case[3].plan("torch", make_plan).shared) == 3
    check(case, softcap)


@pytest.mark.parametrize("window", [*range(1, 46), 100])
def test_nested_prefixes_that_leave_the_window_one_after_the_other(window):
    lens = [len(t) * 4 - 1 for t in NESTED]
    for apart in (None, "all", "own"):
        check(make_case([1] * 5, lens, tables=NESTED, window=window, apart=apart))


def test_a_prefix_is_shared_as_far_as_every_sharer_sees_it():
    prefix = list(range(12))
    tables = [[*prefix, 20], [*prefix, 21, 22]]
    case = make_case([1, 1], [50, 54], tables=tables, window=30, apart="all")
    ((segment, _),) = case[3].plan("torch", make_plan).shared
    assert (segment.block_begin, segment.block_end) == (6, 12)  # position 54 - 30 is the first of block 6
    check(case)


@pytest.mark.parametrize("window", [None, 700, 2048])
def test_many_scattered_runs_and_long_own_contexts(window):
    options = {"block_size": 16, "head_dim": 8, "window": window}
    check(make_case([1, 1], [2100, 2300], **options))
    check(make_case([1, 1], [2100, 2300], consecutive=True, **options))
    check(make_case([40], [300], window=window))
    check(make_case([1, 1, 40], [2100, 2300, 300], is_int8=True, **options))


@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("window", [None, 1, 100, 255, 256, 257, 300, 1000])
@pytest.mark.parametrize(("query", "context"), [(256, 256), (257, 400), (600, 600), (513, 900)])
def test_prefills_of_several_tiles(query, context, window, softcap):
    options = {"block_size": 16, "head_dim": 8, "heads": (2, 1), "window": window}
    check(make_case([query], [context], consecutive=True, **options), softcap)
    check(make_case([query, 1], [context, 35], apart="own", **options), softcap)


@pytest.mark.filterwarnings("error")  # torch warns of a buffer that it has to resize
def test_layers_of_other_shapes_use_the_same_plan():
    """Gemma 4's full layers have other heads than a window's; layers of equal windows may differ as well."""
    lens = [9, 13, 30]
    cases = [make_case([1, 1, 1], lens, heads=heads, head_dim=dim) for heads, dim in [((4, 2), 16), ((4, 1), 32)]]
    batch = cases[0][3]
    for q, kv, cache, own in [cases[0], cases[1], cases[0]]:
        assert own.kv_tables == batch.kv_tables
        check((q, kv, cache, batch))


@settings(max_examples=250)
@given(
    case=batches((8, 12, 32)),
    softcap=st.sampled_from([None, None, 0.3, 2.0, 50.0]),
    max_gather=st.sampled_from([4096, 30, 10]),
)
def test_random_batches(case, softcap, max_gather):
    queries, lens, options = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_torch, "MAX_GATHER_TOKENS", max_gather)
        patch.setattr(attention_native, "PIECE_KEYS", max_gather)
        patch.setattr(attention_native, "QUERIES", 2 if max_gather == 10 else 32)
        check(make_case(queries, lens, **options), softcap)


@settings(max_examples=200)
@given(case=batches())
def test_every_visible_position_is_read_once_and_no_other(case):
    """What a place reads alone and the segments that it shares are together exactly what it sees."""
    queries, lens, options = case
    batch = make_case([1] * len(queries), lens, **options)[3]
    plan = batch.plan("torch", make_plan)
    size = batch.block_size
    order, _ = shared_segments(batch.block_tables, [(n - 1) // size for n in lens])
    segments = [segment for segment, _ in plan.shared]
    for place, row in enumerate(order):
        first_key = batch.first_visible(lens[row] - 1)
        read = [p for b, e in own_ranges(place, first_key, lens[row], segments, size) for p in range(b, e)]
        assert read  # the merge needs a finite partial to begin with
        for segment in segments:
            if segment.row_begin <= place < segment.row_end:
                assert segment.block_end > segment.block_begin
                read += range(segment.block_begin * size, segment.block_end * size)
        assert sorted(read) == list(range(first_key, lens[row]))


def test_shared_segments_nest_in_sorted_order():
    tables = [[1, 2, 3, 4, 9, 9], [1, 2, 3, 4, 5, 6], [7], [1, 2, 3, 4, 9, 8]]
    order, segments = shared_segments(tables, [5, 5, 0, 5])
    assert order == [2, 1, 0, 3]
    assert segments == [Segment(1, 4, 0, 4)]  # one more block in common is too little for a segment of its own
    assert own_ranges(0, 0, 1, segments, 4) == [(0, 1)]
    assert own_ranges(1, 0, 24, segments, 4) == [(16, 24)]


@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)))
def test_common_prefix_len(a, b):
    expected = 0
    while expected < min(len(a), len(b)) and a[expected] == b[expected]:
        expected += 1
    assert common_prefix_len(a, b) == expected


def test_merge_into_equals_attention_over_the_union():
    gen = torch.Generator().manual_seed(1)
    scores = torch.randn((3, 2, 10), generator=gen) * 5
    values = torch.randn((10, 4), generator=gen)
    whole = scores.softmax(-1) @ values
    parts = [
        (scores[..., s].softmax(-1) @ values[s], scores[..., s].logsumexp(-1))
        for s in (slice(0, 3), slice(3, 9), slice(9, 10))
    ]
    merged, lse = merge_partials_reference([p[0] for p in parts], [p[1] for p in parts])
    torch.testing.assert_close(merged, whole)
    torch.testing.assert_close(lse, scores.logsumexp(-1))
    out, acc = parts[0]
    for other, other_lse in parts[1:]:
        merge_into(out, acc, other, other_lse)
    torch.testing.assert_close(out, whole)
    torch.testing.assert_close(acc, lse)


@pytest.mark.parametrize("where", ["key", "value", "query", "all keys"])
@pytest.mark.parametrize("position", [0, 47, 48, 255, 256, 270])  # at the edges of tiles and pieces
@pytest.mark.parametrize(("dtype", "is_int8"), [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True)])
def test_nan_in_what_a_query_sees_makes_its_result_nan(dtype, is_int8, position, where):
    """Alone, beside a branch with the same prefix, in a few new tokens, in a prompt; and it stays in its sequence."""
    prefix = list(range(16))
    for num_queries, tables in (1, None), (1, [[*prefix, 16], [*prefix, 17], [20, 21, 22]]), (2, None), (130, None):
        queries, lens = ([num_queries, 1], [271, 40]) if tables is None else ([1, 1, 1], [271, 271, 40])
        options = {"block_size": 16, "head_dim": 32, "dtype": dtype, "is_int8": is_int8, "tables": tables}
        q, kv, cache, batch = make_case(queries, lens, **options)
        first_query = 271 - num_queries
        q, kv = q.clone(), kv.clone()
        if where == "query":
            q[0, 1, 3] = NAN
        for at in range(271) if where == "all keys" else [position] if where != "query" else []:
            numbers = cache.kv if cache.scales is None else cache.scales
            numbers[batch.kv_tables[0][at // 16], at % 16, int(where == "value")] = NAN
            if at >= first_query:
                kv[at - first_query, int(where == "value")] = NAN
        sees = [first_query + row >= position or where == "all keys" for row in range(num_queries)]
        sees += [position < 256 or where == "all keys"] * (tables is not None)
        for form in (*forms_that_serve(q, cache), paged_attention_reference):
            out = form(q, kv, cache, batch, SCALE, None)
            assert out[-1].isfinite().all()
            if where == "query":
                assert out[0, 1].isnan().all() and out[0, 0].isfinite().all() and out[1:].isfinite().all()
            else:
                assert out[:-1][sees].isnan().all()


def test_merge_reference_takes_empty_parts():
    out, lse = merge_partials_reference(
        [torch.full((1, 1, 2), float("nan")), torch.ones((1, 1, 2))],
        [torch.full((1, 1), float("-inf")), torch.zeros((1, 1))],
    )
    assert out.tolist() == [[[1.0, 1.0]]] and lse.tolist() == [[0.0]]

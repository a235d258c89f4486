"""Paged attention: the fast form against the reference, on shapes and caches chosen to hurt."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from minirksc.kernels.paged_attention import (
    AttentionBatch,
    paged_attention,
    paged_attention_reference,
)
from minirksc.kernels.prefix_attention import (
    Segment,
    common_prefix_len,
    merge_into,
    merge_partials_reference,
    shared_segments,
)

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


def make_case(
    query_lens,
    context_lens,
    *,
    heads=(4, 2),
    head_dim=16,
    block_size=4,
    tables=None,
    seed=0,
    dtype=torch.float32,
    consecutive=False,
):
    """Random queries and a cache whose unused slots are NaN."""
    gen = torch.Generator().manual_seed(seed)
    needed = [-(-n // block_size) for n in context_lens]
    if tables is None:
        num_blocks = sum(needed) + 3
        ids = torch.arange(num_blocks) if consecutive else torch.randperm(num_blocks, generator=gen)
        ids = iter(ids.tolist())
        tables = [[next(ids) for _ in range(n)] for n in needed]
    num_blocks = max(max(t, default=0) for t in tables) + 2
    cache = torch.full((num_blocks, block_size, 2, heads[1], head_dim), float("nan"), dtype=dtype)
    written = {}
    for table, context in zip(tables, context_lens, strict=True):
        for position in range(context):
            slot = (table[position // block_size], position % block_size)
            if slot not in written:
                written[slot] = torch.randn((2, heads[1], head_dim), generator=gen).to(dtype)
                cache[slot] = written[slot]
    cu = [0]
    for n in query_lens:
        cu.append(cu[-1] + n)
    qkv = torch.randn((cu[-1], heads[0] + 2 * heads[1], head_dim), generator=gen).to(dtype)
    q = qkv[:, : heads[0]]  # strided, as the decoder passes it
    kv = qkv[:, heads[0] :].unflatten(1, (2, heads[1]))
    for i, (n, context) in enumerate(zip(query_lens, context_lens, strict=True)):
        for j in range(n):
            position = context - n + j
            kv[cu[i] + j] = cache[tables[i][position // block_size], position % block_size]
    batch = AttentionBatch(cu, context_lens, tables, block_size, torch.device("cpu"))
    return q, kv, cache, batch


def check(case, dtype=torch.float32):
    q, kv, cache, batch = case
    before = cache.clone()
    expected = paged_attention_reference(q, kv, cache, batch, 0.25)
    actual = paged_attention(q, kv, cache, batch, 0.25)
    assert torch.isfinite(expected).all()
    torch.testing.assert_close(actual, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    torch.testing.assert_close(cache, before, equal_nan=True, atol=0, rtol=0)


@pytest.mark.parametrize("heads", [(2, 2), (4, 1), (5, 1), (9, 3), (8, 1)])
@pytest.mark.parametrize("head_dim", [8, 64, 80])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_and_dims(heads, head_dim, dtype):
    check(make_case([1, 3, 1], [5, 9, 17], heads=heads, head_dim=head_dim, dtype=dtype), dtype)


@pytest.mark.parametrize("context", [1, 3, 4, 5, 8, 13, 31])
@pytest.mark.parametrize("query", [1, 2, 4, 5])
def test_block_borders(query, context):
    if query <= context:
        check(make_case([query], [context]))
        check(make_case([query, 1], [context, 7], consecutive=True))


def test_a_shared_prefix_equals_no_sharing():
    prefix = [7, 3, 11, 5, 2, 9]
    tables = [[*prefix, 20 + i, 30 + i] for i in range(5)]
    lens = [25, 26, 27, 29, 32]
    check(make_case([1] * 5, lens, tables=tables))
    check(make_case([1, 1, 3, 1, 1], lens, tables=tables))


def test_nested_prefixes():
    root, left, right = [1, 2, 3, 4, 5], [6, 7, 8, 9], [10, 11, 12, 13, 14]
    tables = [[*root, *left, 20], [*root, *right, 21], [*root, *left, 22], [*root, *right, 23], [40, 41]]
    lens = [37, 44, 38, 41, 6]
    case = make_case([1] * 5, [len(t) * 4 - 1 for t in tables], tables=tables)
    assert len(case[3].plan().shared) == 3
    check(case)
    assert len(lens) == 5


def test_many_scattered_runs_and_long_own_contexts():
    check(make_case([1, 1], [2100, 2300], block_size=16, head_dim=8))
    check(make_case([1, 1], [2100, 2300], block_size=16, head_dim=8, consecutive=True))
    check(make_case([40], [300]))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_random_batches(data):
    size = data.draw(st.sampled_from([1, 2, 4, 16]))
    sequences = data.draw(
        st.lists(st.tuples(st.integers(1, 6), st.integers(0, 40), st.integers(0, 30)), min_size=1, max_size=6)
    )
    prefix = list(range(100, 130))
    tables, lens, queries = [], [], []
    free = iter(range(5000))
    for query, past, shared in sequences:
        context = query + past
        num_shared = min(shared, past // size, len(prefix))
        total = -(-context // size)
        tables.append(prefix[:num_shared] + [next(free) + 200 for _ in range(total - num_shared)])
        lens.append(context)
        queries.append(query)
    check(make_case(queries, lens, tables=tables, block_size=size, heads=(4, 2), head_dim=8))


def test_shared_segments_nests_and_keeps_rows_own():
    tables = [[1, 2, 3, 4, 9, 9], [1, 2, 3, 4, 5, 6], [7], [1, 2, 3, 4, 9, 8]]
    order, segments, own = shared_segments(tables, [5, 5, 0, 5])
    assert order == [2, 1, 0, 3]
    assert segments == [Segment(1, 4, 0, 4)]
    assert own == [0, 4, 4, 4]


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


def test_merge_reference_takes_empty_parts():
    out, lse = merge_partials_reference(
        [torch.full((1, 1, 2), float("nan")), torch.ones((1, 1, 2))],
        [torch.full((1, 1), float("-inf")), torch.zeros((1, 1))],
    )
    assert out.tolist() == [[[1.0, 1.0]]] and lse.tolist() == [[0.0]]

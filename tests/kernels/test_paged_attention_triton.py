"""The attention kernel in Triton's interpreter, against the reference, on shapes and caches chosen to hurt."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minirksc.errors import ConfigError
from minirksc.kernels.attention.block_mass import attend_with_mass, block_mass_reference
from minirksc.kernels.attention.launch_table import max_head_dim, max_short_rows
from minirksc.kernels.attention.paged_attention import attend, paged_attention_reference, paged_attention_triton
from minirksc.kernels.attention.prefix_attention import (
    is_worth_sharing,
    merge_partials_reference,
    merge_partials_triton,
)
from minirksc.kernels.attention.work_list import Shape, adaptive_chunk, find_work, make_work_list
from minirksc.kernels.kv.layer_cache import LayerCache

sys.path.append(str(Path(__file__).parent))  # in importlib mode pytest does not add it
cases = importlib.import_module("attention_cases")
make_case, NESTED, SCALE = cases.make_case, cases.NESTED, cases.SCALE
bf16_products = importlib.import_module("interpreter_bf16").bf16_products

# The reference computes in float32 and rounds once; the kernel's second product takes its probabilities in the dtype.
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
INT8_TOLERANCE = {torch.float32: 2e-3, torch.float16: 4e-3, torch.bfloat16: 2e-2}  # multiplied as float16
DTYPES = [torch.float32, torch.float16]
NAN, INF = float("nan"), float("inf")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, which the interpreter computes with


def shape_of(q, cache):
    return Shape(q.shape[1], cache.kv.shape[3], q.shape[2], q.dtype, cache.kv.dtype, "sm_90")


def with_lse(q, cache, batch, softcap):
    """The result, and the log-sum-exp of each query's scores."""
    lse = q.new_empty(q.shape[:2], dtype=torch.float32)
    return attend(q, cache, batch, find_work(q, cache, batch), SCALE, softcap, lse), lse


def check(case, softcap=None, scale=SCALE, chunk=None):
    q, kv, cache, batch = case
    batch.key_chunk = chunk or batch.key_chunk
    before = [tensor.clone() for tensor in (q, *cache) if tensor is not None]
    expected = paged_attention_reference(q, kv, cache, batch, scale, softcap)
    actual = paged_attention_triton(q, kv, cache, batch, scale, softcap)
    assert actual.dtype == q.dtype and actual.shape == q.shape
    tolerance = (TOLERANCE if cache.scales is None else INT8_TOLERANCE)[q.dtype]
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)
    after = [tensor for tensor in (q, *cache) if tensor is not None]
    torch.testing.assert_close(after, before, equal_nan=True, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("heads", "head_dim"),
    [
        *[((1, 1), 2), ((2, 2), 32), ((9, 3), 64), ((4, 1), 64), ((5, 1), 80), ((2, 2), 96), ((8, 1), 96)],
        *[((4, 1), 128), ((5, 1), 128), ((1, 1), 256), ((8, 1), 256), ((4, 1), 512)],
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_and_dims(heads, head_dim, dtype):
    if head_dim > max_head_dim(dtype):
        dtype = torch.float16
    options = {"heads": heads, "head_dim": head_dim, "dtype": dtype, "block_size": 16}
    check(make_case([1, 3], [17, 37], **options), scale=head_dim**-0.5)
    check(make_case([1, 3], [5, 19], window=6, apart="own", **options), softcap=1.5, scale=head_dim**-0.5)
    check(make_case([1, 3], [5, 19], is_int8=True, **options), scale=head_dim**-0.5)


@pytest.mark.parametrize(("heads", "head_dim"), [((5, 1), 80), ((4, 2), 64), ((2, 1), 512)])
def test_in_bfloat16(heads, head_dim):
    options = {"heads": heads, "head_dim": head_dim, "dtype": torch.bfloat16, "block_size": 16}
    check(make_case([1, 3, 70], [140, 37, 75], **options), scale=head_dim**-0.5, chunk=64)
    check(make_case([1, 3], [5, 19], window=6, apart="own", **options), softcap=1.5, scale=head_dim**-0.5)
    check(make_case([1, 3], [5, 19], is_int8=True, **options), scale=head_dim**-0.5)


@pytest.mark.parametrize("where", ["key", "value", "query", "all keys"])
@pytest.mark.parametrize("position", [0, 63, 64, 129])  # in the first and the last range, at their edges
@pytest.mark.parametrize("is_int8", [False, True])
def test_nan_in_what_a_query_sees_makes_its_result_nan(is_int8, position, where):
    options = {"block_size": 64, "heads": (2, 1), "dtype": torch.bfloat16, "is_int8": is_int8}
    for num_queries, chunk in (1, 64), (1, 256), (2, 64), (33, 64):  # keys split, in one range, a few, a prompt
        q, kv, cache, batch = make_case([num_queries, 1], [130, 40], **options)
        batch.key_chunk = chunk
        clean = paged_attention_triton(q, kv, cache, batch, SCALE, None)
        if where == "query":
            q = q.clone()
            q[0, 1, 3] = NAN
        for at in range(130) if where == "all keys" else [position] if where != "query" else []:
            numbers = cache.kv if cache.scales is None else cache.scales
            numbers[batch.kv_tables[0][at // 64], at % 64, int(where == "value")] = NAN
        out, lse = with_lse(q, cache, batch, None)
        if where == "query":
            assert out[0, 1].isnan().all() and lse[0, 1].isnan()
            assert torch.equal(out[0, 0], clean[0, 0]) and torch.equal(out[1:], clean[1:])
            continue
        sees = [130 - num_queries + row >= position or where == "all keys" for row in range(num_queries)]
        assert out[:-1][sees].isnan().all() and torch.equal(out[-1], clean[-1])
        assert where == "value" or lse[:-1][sees].isnan().all()


@pytest.mark.parametrize("chunk", [64, 256])
def test_scores_that_are_all_minus_infinity_give_no_number(chunk):
    """And among others they have no weight."""
    q, kv, cache, batch = make_case([1], [130], block_size=16, heads=(2, 1))
    batch.key_chunk = chunk
    q[:, :, 0] = 1.0
    table = batch.kv_tables[0]
    cache.kv[table[8], 1, 0, :, 0] = -INF  # the last key: at an edge
    expected = paged_attention_reference(q, kv, cache, batch, SCALE, None)
    out = paged_attention_triton(q, kv, cache, batch, SCALE, None)
    torch.testing.assert_close(out, expected, atol=3e-6, rtol=3e-6)
    cache.kv[table, :, 0, :, 0] = -INF
    assert paged_attention_triton(q, kv, cache, batch, SCALE, None).isnan().all()


@pytest.mark.parametrize("queries", [1, 70])
@pytest.mark.parametrize(
    ("dtype", "is_int8", "gap", "size"),  # by how many nats the sink is ahead; of the other values
    [
        *[(torch.bfloat16, True, gap, size) for gap in (4, 11, 14, 20) for size in (0.02, 40.0)],
        *[(torch.float16, True, gap, 1.0) for gap in (4, 11, 14)],  # beyond, the result is below its numbers
        *[(torch.float16, False, gap, 1.0) for gap in (4, 11, 14)],
    ],
)
def test_what_is_left_beside_an_attention_sink_is_exact(dtype, is_int8, gap, size, queries):
    """The first key has nearly all of the weight and a value of zero, as in trained models: the rest is the result."""
    context, head_dim = 300, 16
    q, kv, cache, batch = make_case([queries], [context], block_size=16, heads=(1, 1), head_dim=head_dim)
    q.zero_()
    q[..., 0] = gap
    slots = cache.kv.flatten(0, 1)  # a view
    own = [batch.kv_tables[0][p // 16] * 16 + p % 16 for p in range(context)]
    slots[own, 0] = 0.0
    slots[own[0], 0, 0, 0] = 1.0
    slots[own, 1] = (slots[own, 1] * 0.3 + 1) * size
    slots[own[0], 1] = 0.0
    cache = cases.quantised(cache.kv) if is_int8 else LayerCache(cache.kv.to(dtype))
    if is_int8:
        cache.scales[batch.kv_tables[0][0], 0, 1] = 0.0
        cache.kv[batch.kv_tables[0][0], 0, 1] = 0
        cache.scales.masked_fill_(cache.scales.isnan() & (cache.kv == 0).all(-1), 0.0)
    stored = cache.kv.flatten(0, 1)[own].double()
    if is_int8:
        stored = stored * cache.scales.flatten(0, 1)[own].double().unsqueeze(-1)
    weights = (stored[:, 0, 0] @ q[0, 0].double()).softmax(0)
    expected = weights @ stored[:, 1, 0]
    out = paged_attention_triton(q.to(dtype), kv, cache, batch, 1.0, None)[-1, 0].double()
    bound = {torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    assert (out - expected).norm() <= bound * expected.norm()


@pytest.mark.parametrize("block_size", [1, 2, 8, 16, 32, 64, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_block_sizes(block_size, dtype):
    for context in sorted({1, max(1, block_size - 1), block_size, block_size + 1}):
        options = {"block_size": block_size, "dtype": dtype, "heads": (2, 1)}
        check(make_case([1, min(3, context)], [context, context], **options))
        check(make_case([1], [context], window=5, apart="own", is_int8=block_size > 8, **options))


@pytest.mark.parametrize("head_dim", [64, 256])  # whose tiles are 64 and 32 keys
def test_contexts_at_the_edges_of_tiles(head_dim):
    for context in (31, 32, 33, 61, 63, 64, 65, 127, 128, 129, 191):
        check(make_case([1], [context], head_dim=head_dim, block_size=16, heads=(2, 1)))


@pytest.mark.parametrize("window", [1, 2, 15, 16, 17, 63, 64, 65, 100])
@pytest.mark.parametrize("softcap", [None, 0.7])
def test_windows_at_the_edges_of_blocks_and_tiles(window, softcap):
    options = {"window": window, "block_size": 16, "apart": "own", "heads": (2, 1)}
    check(make_case([1, 2, 1], [64, 130, 17], **options), softcap)


@pytest.mark.parametrize("window", [None, 1, 40, 63, 64, 65, 200])
@pytest.mark.parametrize(("query", "context"), [(65, 65), (70, 191), (129, 129)])
def test_prompts_of_several_tiles(query, context, window):
    options = {"block_size": 16, "heads": (2, 1), "window": window, "apart": "own"}
    check(make_case([query, 1], [context, 35], **options))
    check(make_case([query], [context], dtype=torch.float16, is_int8=True, **options), softcap=5.0)


def test_large_scores_neither_overflow_nor_lose_the_others():
    for softcap in (None, 50.0):
        q, kv, cache, batch = make_case([1, 4, 1], [40, 13, 40], block_size=16)
        check((q * 300, kv, cache, batch), softcap)


@pytest.mark.parametrize("is_int8", [False, True])
def test_a_long_context_is_split_and_merged(is_int8):
    case = make_case([1, 1, 4], [641, 256, 390], block_size=16, heads=(2, 1), is_int8=is_int8)
    check(case, chunk=128)
    q, _, cache, batch = case
    work = batch.plan(shape_of(q, cache), None)
    assert work.parts.tolist() == [[0, 6], [6, 2], [8, 4], [12, 4], [16, 4], [20, 4]]
    check(make_case([1], [641], block_size=16, heads=(2, 1)))


def test_an_adaptive_chunk_gives_the_same():
    case = make_case([1, 1, 4], [1500, 700, 800], block_size=16, heads=(2, 2))
    case[3].key_chunk = None
    check(case)
    work = case[3].plan(shape_of(case[0], case[2]), None)
    assert work.num_parts < 6 + 3 + 4 * 4  # fewer than fixed chunks of 256 make


def test_with_a_fixed_chunk_a_row_is_the_same_alone_and_among_others():
    options = {"block_size": 16, "heads": (2, 1), "seed": 3}
    tables = [list(range(5, 27)), [40, 41, 42], [50, 51]]
    alone = make_case([1], [345], tables=tables[:1], **options)
    among = make_case([1, 1, 1], [345, 40, 31], tables=tables, **options)
    alone = (among[0][:1], alone[1], LayerCache(among[2].kv), alone[3])
    out = [paged_attention_triton(*case, SCALE, None) for case in (alone, among)]
    assert torch.equal(out[0][0], out[1][0])


@pytest.mark.parametrize("window", [None, 5, 64, 120])
def test_a_shared_prefix_equals_no_sharing(window):
    prefix = [7, 3, 11, 5, 2, 9]
    tables = [[*prefix, 20 + i, 30 + i] for i in range(5)]
    options = {"tables": tables, "window": window, "block_size": 16, "heads": (2, 1), "apart": "own"}
    check(make_case([1] * 5, [100, 107, 108, 116, 128], **options))
    check(make_case([1, 1, 3, 1, 40], [100, 107, 108, 116, 128], is_int8=True, **options), softcap=2.0)


def test_groups_nested_two_deep_are_items_of_their_own():
    deep = [[*range(8), *range(20, 28), *range(40 + 10 * i, 48 + 10 * i), 100 + i] for i in (0, 0, 1)]
    deep[1][-1] = 110
    wide = [*range(8), 60 + 8, 120]
    tables = [wide, deep[0], deep[2], deep[1]]
    case = make_case([1] * 4, [len(t) * 16 - 3 for t in tables], tables=tables, block_size=16, heads=(4, 1))
    check(case)
    q, _, cache, batch = case
    work = batch.plan(shape_of(q, cache), None)
    shared = [item for item in work.items.tolist() if item[1] > 1]
    assert sorted((n, begin, end) for _, n, _, begin, end, *_ in shared) == [
        (2, 256, 384),
        (3, 128, 256),
        (4, 0, 128),
    ]
    # Each place's partials have numbers of their own, and no number is left out.
    seen = {place: [] for place in range(4)}
    for begin, n, *_, part in work.items.tolist():
        for place in range(begin, begin + n):
            seen[place].append(part)
    counts = {place: work.parts[work.tokens[place]][1].item() for place in range(4)}
    assert all(sorted(parts) == list(range(counts[place])) for place, parts in seen.items())


def test_more_sharers_than_a_program_has_rows():
    tables = [[*range(8), 20 + i] for i in range(9)]
    check(make_case([1] * 9, [8 * 16 + 5] * 9, tables=tables, block_size=16, heads=(8, 1)))


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_log_sum_exp(softcap):
    q, _, cache, batch = make_case([1, 1, 3, 70], [301, 20, 33, 75], block_size=16, heads=(2, 1))
    _, lse = with_lse(q, cache, batch, softcap)
    row = 0
    for n, context, table in zip([1, 1, 3, 70], [301, 20, 33, 75], batch.kv_tables, strict=True):
        keys = cache.kv[table].flatten(0, 1)[:context, 0, 0]
        for i in range(n):
            scores = (q[row] @ keys[: context - n + 1 + i].T) * SCALE  # [heads, keys]
            scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
            torch.testing.assert_close(lse[row], scores.logsumexp(-1) * 1.4426950408889634, atol=1e-5, rtol=1e-5)
            row += 1


@pytest.mark.parametrize("block_size", [8, 16, 64, 128])
@pytest.mark.parametrize("window", [None, 50])
def test_block_mass(block_size, window):
    prefix = list(range(512 // block_size))
    tables = [[*prefix, 100 + i, 200 + i, 300 + i] for i in range(3)]
    options = {"block_size": block_size, "heads": (4, 2), "window": window, "tables": tables}
    q, kv, cache, batch = make_case([1, 1, 3], [520, 517, 519], **options)
    out, mass = attend_with_mass(q, cache, batch, SCALE, None)
    expected = paged_attention_reference(q, kv, cache, batch, SCALE, None)
    torch.testing.assert_close(out, expected, atol=3e-6, rtol=3e-6)
    torch.testing.assert_close(mass, block_mass_reference(q, cache, batch, SCALE, None), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(mass.sum(-1), torch.ones(5))


def test_padding_is_neither_read_nor_written():
    """Items without places and tokens without partials: what a captured graph has beyond its batch."""
    q, kv, cache, batch = make_case([1, 1], [300, 40], block_size=16, heads=(2, 1))
    shape = shape_of(q, cache)
    work = make_work_list(batch, shape)
    junk = torch.full((3, 8), 1_000_000, dtype=torch.int32)
    junk[:, 1] = 0
    work.items = torch.cat((work.items, junk))
    work.num_short += 3
    work.parts = torch.cat((work.parts, torch.zeros((2, 2), dtype=torch.int32)))
    batch.plan(shape, lambda batch: work)
    padded = torch.cat((q, torch.full((2, *q.shape[1:]), float("nan"))))
    out = paged_attention_triton(padded, kv, cache, batch, SCALE, None)
    expected = paged_attention_reference(q, kv, cache, batch, SCALE, None)
    torch.testing.assert_close(out[:2], expected, atol=3e-6, rtol=3e-6)
    assert torch.equal(out[2:], torch.zeros_like(out[2:]))


def test_nothing_to_do():
    q, kv, cache, batch = make_case([1, 2], [5, 9], block_size=16)
    batch.cu_seqlens_q, batch.context_lens = [0, 0, 0], [5, 9]
    assert paged_attention_triton(q[:0], kv[:0], cache, batch, SCALE, None).shape == (0, *q.shape[1:])


def test_sequences_without_new_tokens_are_left_out():
    q, kv, cache, batch = make_case([1, 2], [5, 9], block_size=16)
    expected = paged_attention_triton(q, kv, cache, batch, SCALE, None)
    more = make_case([1, 2], [5, 9], block_size=16)[3]
    more.cu_seqlens_q, more.context_lens = [0, 1, 1, 3], [5, 0, 9]
    more.block_tables = more.kv_tables = [batch.kv_tables[0], [], batch.kv_tables[1]]
    assert torch.equal(paged_attention_triton(q, kv, cache, more, SCALE, None), expected)


def test_a_cache_of_more_than_2_to_the_31_elements():
    """Untouched pages of an empty tensor take no memory."""
    block, size = 2**31 // (16 * 2 * 64) + 5, 16
    q, kv, small, batch = make_case([1, 2], [20, 40], block_size=size, heads=(2, 1), head_dim=64, is_int8=True)
    big = torch.empty((block + len(small.kv), *small.kv.shape[1:]), dtype=torch.int8)
    scales = torch.empty(big.shape[:-1], dtype=torch.float32)
    big[block:], scales[block:] = small.kv, small.scales
    far = make_case([1, 2], [20, 40], block_size=size, heads=(2, 1), head_dim=64, is_int8=True)[3]
    far.kv_tables = far.block_tables = [[block + entry for entry in table] for table in batch.kv_tables]
    expected = paged_attention_triton(q, kv, small, batch, SCALE, None)
    assert torch.equal(paged_attention_triton(q, kv, LayerCache(big, scales), far, SCALE, None), expected)


@pytest.mark.parametrize("max_examples", [15, pytest.param(200, marks=pytest.mark.slow)])
def test_random_batches(max_examples):
    softcaps, chunks = st.sampled_from([None, None, 0.3, 2.0, 50.0]), st.sampled_from([64, None])
    test = given(case=cases.batches(), softcap=softcaps, chunk=chunks)(check_random_batch)
    settings(max_examples=max_examples)(test)()


def check_random_batch(case, softcap, chunk):
    queries, lens, options = case
    size = options["block_size"]
    options["block_size"] = 4 if size == 3 else size
    if size == 3:
        options["tables"] = None
    check(make_case(queries, lens, **options), softcap, chunk=chunk)


@settings(max_examples=100)
@given(case=cases.batches(), chunk=st.sampled_from([64, 128, 256]), num_heads=st.sampled_from([1, 4, 40]))
def test_items_cover_what_each_token_sees_exactly_once(case, chunk, num_heads):
    queries, lens, options = case
    batch = make_case(queries, lens, **{**options, "dtype": torch.float32, "is_int8": False})[3]
    batch.block_size = 4 if options["block_size"] == 3 else batch.block_size
    shape = Shape(num_heads, 1, 64, torch.float16, torch.float16, "sm_90")
    batch.key_chunk = chunk
    work = make_work_list(batch, shape)
    keys_of = {token: [] for token in range(batch.cu_seqlens_q[-1])}
    position_of = {}
    for index, (begin, n, _, kv_begin, kv_end, full_begin, full_end, part) in enumerate(work.items.tolist()):
        tile = work.tile if index < work.num_short else work.prefill_tile
        assert 0 < n * num_heads <= tile.rows and kv_begin < kv_end
        assert full_begin % tile.tile == full_end % tile.tile == 0
        for place in range(begin, begin + n):
            token, position = work.tokens[place].item(), work.positions[place].item()
            position_of[token] = position
            first = batch.first_visible(position)
            keys_of[token] += [key for key in range(kv_begin, kv_end) if first <= key <= position]
            if full_begin < full_end:
                assert max(first, kv_begin) <= full_begin and full_end <= min(kv_end, position + 1)
            assert (part == -1) == (work.parts[token][1].item() == 1)
    for token, keys in keys_of.items():
        position = position_of[token]
        assert sorted(keys) == list(range(batch.first_visible(position), position + 1))


def test_an_adaptive_chunk_grows_with_the_work():
    assert adaptive_chunk([300], 8, 528) == 256
    assert adaptive_chunk([32768] * 64, 8, 528) == 256 * 124
    assert adaptive_chunk([], 8, 528) == 256


def test_sharing_must_save_more_than_its_partials_cost():
    def gain(sequences, keys):
        return is_worth_sharing(4, num_sequences=sequences, num_queries=sequences, num_keys=keys, kv_itemsize=2)

    assert not gain(1, 10_000) and not gain(2, 16) and gain(2, 64) and gain(8, 64)


@pytest.mark.parametrize("head_dim", [16, 80, 512])
def test_merging_partials(head_dim):
    counts = [0, 1, 2, 3, 17, 40]
    gen = torch.Generator().manual_seed(0)
    outs = torch.randn((sum(counts), 3, head_dim), generator=gen)
    lses = torch.randn((sum(counts), 3), generator=gen) * 20
    lses[5] = float("-inf")  # an empty range: its partial is not read
    outs[5] = float("nan")
    begins = [sum(counts[:i]) for i in range(len(counts))]
    parts = torch.tensor(list(zip(begins, counts, strict=True)), dtype=torch.int32)
    out = torch.full((len(counts), 3, head_dim), 7.0)
    lse = torch.full((len(counts), 3), 7.0)
    merge_partials_triton(outs, lses, parts, out, lse)
    assert (out[0] == 0).all() and lse[0].isneginf().all()
    assert (out[1] == 7).all() and (lse[1] == 7).all()  # its one partial was written as the result
    ln2 = 0.6931471805599453
    for i, (begin, n) in enumerate(zip(begins[2:], counts[2:], strict=True), start=2):
        pieces = [outs[j : j + 1] for j in range(begin, begin + n)]
        expected, expected_lse = merge_partials_reference(
            pieces, [lses[j : j + 1] * ln2 for j in range(begin, begin + n)]
        )
        torch.testing.assert_close(out[i], expected[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(lse[i], expected_lse[0] / ln2, atol=1e-5, rtol=1e-5)


def refused(case, match, **changes):
    q, kv, cache, batch = case
    with pytest.raises(ConfigError, match=match):
        paged_attention_triton(changes.get("q", q), kv, changes.get("cache", cache), batch, SCALE, None)


def test_what_the_kernel_cannot_serve_is_refused():
    case = make_case([1], [5], block_size=16, heads=(2, 1))
    q, _, cache, _ = case
    refused(case, "float64", q=q.double())
    refused(case, "float16 for queries of torch.float32", cache=LayerCache(cache.kv.half()))
    refused(case, "int8 with no scales", cache=LayerCache(cache.kv.to(torch.int8)))
    refused(case, "strides", q=q.transpose(1, 2).contiguous().transpose(1, 2))
    refused(
        case,
        "contiguous",
        cache=LayerCache(cache.kv.transpose(0, 1).contiguous().transpose(0, 1)),
    )
    refused(make_case([1], [5], block_size=3), "powers of two")
    refused(make_case([1], [5], block_size=512), "powers of two to 256")
    refused(make_case([1], [5], block_size=16, head_dim=258), "head_dim 258 in torch.float32; it takes 256")
    refused(make_case([1], [5], block_size=16, head_dim=520, dtype=torch.float16), "512 in 16 bits")
    most = max_short_rows(64, torch.float32)
    refused(make_case([1], [5], block_size=16, heads=(most + 1, 1)), f"1 to {most} query heads")

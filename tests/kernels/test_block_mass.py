"""Attention with block mass: each form against the reference, on decode steps chosen to hurt."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minirksc.errors import ConfigError
from minirksc.kernels.attention import block_mass_torch
from minirksc.kernels.attention import paged_attention_torch as attention_torch
from minirksc.kernels.attention.block_mass import paged_attention_mass_reference, paged_attention_mass_triton
from minirksc.kernels.attention.block_mass_native import paged_attention_mass_native
from minirksc.kernels.attention.block_mass_torch import paged_attention_mass_torch
from minirksc.kernels.attention.paged_attention_native import paged_attention_native
from minirksc.kernels.attention.paged_attention_torch import make_plan, paged_attention_torch
from minirksc.kernels.backend import BACKENDS

sys.path.append(str(Path(__file__).parent))  # in importlib mode pytest does not add it
cases = importlib.import_module("attention_cases")
make_case, batches, NESTED, SCALE = cases.make_case, cases.batches, cases.NESTED, cases.SCALE

FORMS = [paged_attention_mass_torch, paged_attention_mass_triton]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-4, torch.bfloat16: 2e-4}  # of q: that of the log-sum-exp


def decode_case(lens, **options):
    return make_case([1] * len(lens), lens, **options)


def check(case, softcap=None, scale=SCALE):
    """The forms of a CPU, twice, since the second layer uses the plan and the buffers of the first."""
    q, kv, cache, batch = case
    before = [tensor.clone() for tensor in (q, *cache) if tensor is not None]
    _, expected = paged_attention_mass_reference(q, kv, cache, batch, scale, softcap)
    served = [(paged_attention_mass_torch, paged_attention_torch, cache)]
    if cases.has_tiles(q, cache):
        served.append((paged_attention_mass_native, paged_attention_native, cases.in_tiles(cache)))
    for form, attention, some in served * 2:
        out, mass = form(q, kv, some, batch, scale, softcap)
        assert torch.equal(out, attention(q, kv, some, batch, scale, softcap))
        assert mass.dtype == torch.float32 and mass.shape == expected.shape
        torch.testing.assert_close(mass, expected, atol=TOLERANCE[q.dtype], rtol=TOLERANCE[q.dtype])
    after = [tensor for tensor in (q, *cache) if tensor is not None]
    torch.testing.assert_close(after, before, equal_nan=True, atol=0, rtol=0)


@pytest.mark.parametrize("heads", [(2, 2), (4, 1), (5, 1), (10, 2), (9, 3)])
@pytest.mark.parametrize("head_dim", [8, 64, 80, 256])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_heads_and_dims(heads, head_dim, dtype, softcap):
    scale = head_dim**-0.5
    for block_size in (4, 16):
        options = {"heads": heads, "head_dim": head_dim, "dtype": dtype, "block_size": block_size}
        check(decode_case([5, 9, 17], **options), softcap, scale)
        check(decode_case([5, 9, 17], window=6, apart="own", **options), softcap, scale)
        check(decode_case([5, 9, 17], is_int8=True, **options), softcap, scale)


@pytest.mark.parametrize("context", [1, 3, 4, 5, 8, 13, 31])
def test_block_borders(context):
    for consecutive in (True, False):
        check(decode_case([context], consecutive=consecutive))
        check(decode_case([context, 7], consecutive=consecutive))


@pytest.mark.parametrize("window", [1, 2, 3, 4, 5, 7, 8, 9, 13, 64])
@pytest.mark.parametrize("softcap", [None, 0.7])
def test_windows_at_block_borders(window, softcap):
    for context in (1, 4, 5, 9, 13, 16, 31):
        for options in ({"consecutive": True}, {"apart": "own"}):
            check(decode_case([context], window=window, **options), softcap)
            check(decode_case([context, 17, 6], window=window, **options), softcap)


@pytest.mark.parametrize("window", [None, 1, 5, 8, 9, 17, 23, 100])
@pytest.mark.parametrize("softcap", [None, 0.7])
def test_a_shared_prefix_equals_no_sharing(window, softcap):
    prefix = [7, 3, 11, 5, 2, 9]
    tables = [[*prefix, 20 + i, 30 + i] for i in range(5)]
    for apart in (None, "all", "own"):
        check(decode_case([25, 26, 27, 29, 32], tables=tables, window=window, apart=apart), softcap)


@pytest.mark.parametrize("window", [None, *range(1, 46, 3), 100])
def test_nested_prefixes_whose_rows_are_not_in_order(window):
    lens = [len(table) * 4 - 1 for table in NESTED]
    for apart in (None, "all", "own"):
        case = decode_case(lens, tables=NESTED, window=window, apart=apart)
        assert case[3].plan("torch", make_plan).rows is not None
        check(case)


@pytest.mark.parametrize("window", [None, 700, 2060])
def test_long_contexts_row_by_row_and_in_pieces(window):
    options = {"block_size": 16, "head_dim": 8, "window": window}
    for more in ({}, {"consecutive": True}, {"is_int8": True}, {"dtype": torch.bfloat16}):
        case = decode_case([2100, 2300], **options, **more)
        assert len(case[3].plan("torch", make_plan).own) == (1 if window == 700 else 2)
        check(case)


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("apart", [None, "own"])
def test_rows_that_are_gathered_in_several_parts(window, apart, monkeypatch):
    monkeypatch.setattr(attention_torch, "MAX_GATHER_TOKENS", 24)
    prefix = [40, 41]
    tables = [[*prefix, 50], [42, 43, 44, 45, 46], *([*prefix, i] for i in range(60, 65)), [70], [71, 72]]
    for options in ({}, {"is_int8": True}, {"dtype": torch.float16}):
        case = decode_case([10, 19, 9, 10, 11, 12, 10, 4, 5], tables=tables, window=window, apart=apart, **options)
        sizes = [own.end - own.begin for own in case[3].plan("torch", make_plan).own]
        assert max(sizes) > 1 and len(sizes) > 2
        check(case)


def test_a_shared_run_of_several_pieces(monkeypatch):
    monkeypatch.setattr(block_mass_torch, "PIECE", 7)  # cuts blocks in two
    for consecutive in (True, False):
        ids = list(range(40)) if consecutive else list(range(80, 0, -2))
        tables = [[*ids, 100 + i] for i in range(3)]
        case = decode_case([161, 162, 164], tables=tables)
        (keys,) = [keys for _, keys in case[3].plan("torch", make_plan).shared]
        assert isinstance(keys, list) == consecutive
        check(case)


@pytest.mark.parametrize("window", [None, *range(1, 90, 7), 300, 700])
@pytest.mark.parametrize("block_size", [16, 32])
def test_blocks_of_tiles(block_size, window):
    options = {"block_size": block_size, "head_dim": 32, "dtype": torch.bfloat16, "window": window}
    for apart in (None, "own"):
        check(decode_case([1, 15, 16, 17, 33, 64, 65, 300, 600], apart=apart, **options), 3.0)
    lens = [len(table) * block_size - 1 for table in NESTED]
    check(decode_case(lens, tables=NESTED, **options))
    tables = [[*range(20), 30 + i, 40 + i] for i in range(9)]
    check(decode_case([20 * block_size + 3 + i for i in range(9)], tables=tables, **options))


@pytest.mark.parametrize("form", [paged_attention_mass_reference, *FORMS])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_equal_keys_weigh_alike(form, softcap):
    q, kv, cache, batch = decode_case([40, 21], block_size=16, heads=(2, 1), window=30, apart="own")
    for table in batch.kv_tables:
        cache.kv[[block for block in table if block >= 0]] = 0.0
    _, mass = form(q, kv, cache, batch, SCALE, softcap)
    expected = torch.tensor([[6.0, 16, 8], [16, 5, 0]]) / torch.tensor([[30.0], [21]])
    torch.testing.assert_close(mass, expected)


@pytest.mark.parametrize("form", FORMS)
def test_large_scores_neither_overflow_nor_lose_the_others(form):
    for options in ({}, {"window": 40, "apart": "own"}):
        q, kv, cache, batch = decode_case([100, 13, 70], block_size=16, **options)
        _, expected = paged_attention_mass_reference(q * 100, kv, cache, batch, SCALE, None)
        _, mass = form(q * 100, kv, cache, batch, SCALE, None)
        torch.testing.assert_close(mass, expected, atol=1e-3, rtol=1e-3)  # float32 scores of several hundreds
        torch.testing.assert_close(mass.sum(-1), torch.ones(3), atol=1e-3, rtol=0)


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("is_int8", [False, True])
def test_the_kernels_against_the_reference(window, is_int8):
    tables = [[*range(32), 100 + i, 200 + i] for i in range(3)]
    case = decode_case([520, 517, 530], block_size=16, window=window, tables=tables, is_int8=is_int8)
    out, mass = paged_attention_mass_triton(*case, SCALE, 3.0)
    expected_out, expected = paged_attention_mass_reference(*case, SCALE, 3.0)
    tolerance = 2e-3 if is_int8 else 3e-6
    torch.testing.assert_close(out, expected_out, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(mass, expected, atol=tolerance, rtol=tolerance)


@settings(max_examples=200)
@given(case=batches(), softcap=st.sampled_from([None, None, 0.3, 2.0, 50.0]))
def test_random_batches(case, softcap):
    queries, lens, options = case
    lens = [context - query + 1 for query, context in zip(queries, lens, strict=True)]
    options["tables"] = [
        table[: -(-n // options["block_size"])] for table, n in zip(options["tables"], lens, strict=True)
    ]
    case = decode_case(lens, **options)
    check(case, softcap)
    _, mass = paged_attention_mass_torch(*case, SCALE, softcap)
    torch.testing.assert_close(mass.sum(-1), torch.ones(len(lens)), atol=1e-4, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
@pytest.mark.parametrize("queries", [[1, 3], [2, 1], [0, 1]])
def test_steps_that_are_not_decode_steps_are_refused(backend, queries):
    case = make_case(queries, [20, 20], block_size=16)
    with pytest.raises(ConfigError, match=rf"sequence {queries.index(1) ^ 1} has .* it must be 1"):
        backend.paged_attention_mass(*case, SCALE, None)

"""Copies inside the cache: each form against plain lists, and turned keys against keys that were stored there."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minirksc.errors import ConfigError
from minirksc.kernels.backend import BACKENDS
from minirksc.kernels.kv import kv_copy
from minirksc.kernels.kv.kv_copy import (
    copy_blocks_reference,
    copy_blocks_torch,
    copy_blocks_triton,
    copy_rotated_reference,
    copy_rotated_torch,
    copy_rotated_triton,
    part_launch,
)
from minirksc.kernels.kv.kv_store import kv_store_reference
from minirksc.kernels.kv.layer_cache import LayerCache, multiply_out
from minirksc.kernels.kv.placement import HeadNorms, Placement
from minirksc.kernels.rope import rope_tables

sys.path.append(str(Path(__file__).parent))  # in importlib mode pytest does not add it
attention = importlib.import_module("attention_cases")

BLOCK_FORMS = [copy_blocks_reference, copy_blocks_torch, copy_blocks_triton]


def copy_rotated_in_tiles(cache, *more):
    if cache.scales is None:
        attention.run_in_tiles(lambda tiles: copy_rotated_torch(tiles, *more), cache)
    else:
        copy_rotated_torch(cache, *more)


FORMS = [copy_rotated_reference, copy_rotated_torch, copy_rotated_triton, copy_rotated_in_tiles]
NAN = float("nan")

# Of keys up to about 5, rounded once; in bfloat16 the interpreter cuts off where a GPU rounds.
TOLERANCE = {torch.float32: 4e-6, torch.float16: 4e-3, torch.bfloat16: 4e-2}


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def equal(actual, expected):
    torch.testing.assert_close(actual, expected, atol=0, rtol=0, equal_nan=True)


def make_blocks(num_layers, num_blocks, *shape, dtype=torch.float32):
    """Block 0 is NaN where that can be, all others are different from each other."""
    cache = (randn(num_layers, num_blocks, *shape) * 40).to(dtype)
    cache[:, 0] = NAN if dtype.is_floating_point else 99
    return cache


@pytest.mark.parametrize("form", BLOCK_FORMS)
@pytest.mark.parametrize(
    "copies",
    [
        [],
        [(2, 0)],
        [(0, 3)],
        [(2, 0), (2, 4), (3, 1)],
        [(1, 2), (2, 3)],  # a source that is a destination before
        [(1, 2), (2, 1)],
        [(2, 2)],
    ],
)
@pytest.mark.parametrize(
    ("dtype", "shape"), [(torch.float16, (4, 2, 3, 8)), (torch.int8, (1, 2, 1, 6)), (torch.float32, (4, 2, 3))]
)
def test_blocks_become_what_their_sources_were(dtype, shape, copies, form):
    cache = make_blocks(2, 5, *shape, dtype=dtype)
    expected = list(cache.unbind(1))
    for source, destination in copies:
        expected[destination] = cache[:, source]
    expected = torch.stack(expected, dim=1)
    form(cache, copies)
    equal(cache, expected)


@given(data=st.data())
@settings(max_examples=40)
def test_any_copies(data):
    num_layers, num_blocks = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 6))
    shape = data.draw(st.lists(st.integers(1, 5), min_size=0, max_size=3))
    dtype = data.draw(st.sampled_from((torch.float32, torch.float16, torch.bfloat16, torch.int8)))
    destinations = data.draw(st.permutations(range(num_blocks)))[: data.draw(st.integers(0, num_blocks))]
    copies = [(data.draw(st.integers(0, num_blocks - 1)), destination) for destination in destinations]
    cache = make_blocks(num_layers, num_blocks, *shape, dtype=dtype)
    expected = cache.clone()
    copy_blocks_reference(expected, copies)
    for form in (copy_blocks_torch, copy_blocks_triton):
        copied = cache.clone()
        form(copied, copies)
        equal(copied, expected)


def test_a_block_of_several_parts():
    cache = make_blocks(2, 3, 16, 2, 5, 33, dtype=torch.float32)  # 21 KB, so that the second part is not full
    assert cache[0, 0].numel() > part_launch(cache[0, 0].numel(), 4)[0]
    expected = cache.clone()
    expected[:, 2] = cache[:, 1]
    copy_blocks_triton(cache, [(1, 2)])
    equal(cache, expected)


@pytest.mark.parametrize(
    ("block_numbers", "itemsize", "launch"),
    [(32768, 2, (8192, 4)), (256, 4, (256, 1)), (5, 1, (8, 1)), (8192, 1, (8192, 2))],
)
def test_a_thread_copies_128_bytes(block_numbers, itemsize, launch):
    assert part_launch(block_numbers, itemsize) == launch


class Recorder:
    def __init__(self):
        self.grids = []

    def __getitem__(self, grid):
        self.grids.append(grid)
        return lambda *args, **kwargs: None


def test_one_launch_for_all_copies_and_layers(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(kv_copy, "_copy_blocks_kernel", recorder)
    cache = torch.empty(24, 9, 16, 2, 8, 128, dtype=torch.float16, device="meta")
    copy_blocks_triton(cache, [(0, 3), (0, 4), (1, 5)])
    assert recorder.grids == [(3, 24, 4)]
    copy_blocks_triton(cache, [(0, 3), (3, 4)])  # torch's form
    copy_blocks_triton(cache, [])
    assert len(recorder.grids) == 1


@pytest.mark.parametrize("copies", [[(0, 5)], [(5, 0)], [(1, 2), (-1, 0)], [(1, -1)]])
def test_blocks_that_are_not_there_are_refused(copies):
    cache = torch.zeros(2, 5, 4)
    with pytest.raises(ConfigError, match="blocks are 0 to 4"):
        copy_blocks_triton(cache, copies)


def test_blocks_with_gaps_are_refused():
    with pytest.raises(ConfigError, match="must be contiguous"):
        copy_blocks_triton(torch.zeros(2, 5, 8)[..., ::2], [(0, 1)])


def test_block_offsets_beyond_32_bits():
    """The kernel is given a cache that begins 2^31 blocks before the memory that it may write."""
    cache = make_blocks(2, 4, 64, dtype=torch.int8)
    expected = cache.clone()
    copy_blocks_reference(expected, [(1, 3), (2, 0)])
    shift = 2**31
    num_bytes = shift * 64

    class Earlier(torch.Tensor):
        def data_ptr(self):
            return super().data_ptr() - num_bytes

    copies = torch.tensor([(1, 3), (2, 0)]) + shift
    arguments = (cache.as_subclass(Earlier), copies, cache.stride(0))
    kv_copy._copy_blocks_kernel[(2, 2, 1)](*arguments, BLOCK_NUMBERS=64, PART=64)
    equal(cache, expected)


def tables(deltas, rotary_dim, dtype=torch.float32):
    inv_freq = 100.0 ** -(torch.arange(0, rotary_dim, 2) / rotary_dim)
    return rope_tables(torch.tensor(deltas), inv_freq, 1.0, dtype)


def make_cache(num_blocks, block_size, num_kv_heads, head_dim, dtype):
    shape = (num_blocks, block_size, 2, num_kv_heads, head_dim)
    if dtype == torch.int8:
        return LayerCache(torch.full(shape, 99, dtype=torch.int8), torch.full(shape[:-1], NAN))
    return LayerCache(torch.full(shape, NAN, dtype=dtype))


def stored(slots, positions, rotary_dim, heads=(1, 3), head_dim=16, dtype=torch.float32, num_blocks=4, block_size=3):
    """A cache that holds the same keys and values, those of token i as at positions[i] and in slots[i]."""
    num_heads, num_kv_heads = heads
    cache = make_cache(num_blocks, block_size, num_kv_heads, head_dim, dtype)
    activations = torch.float32 if dtype == torch.int8 else dtype
    qkv = randn(len(slots), num_heads + 2 * num_kv_heads, head_dim, dtype=activations)
    rope = tables(positions, rotary_dim, activations)
    placement = Placement(rope, None, cache, torch.tensor(slots))
    kv_store_reference(qkv, HeadNorms(num_heads, None, None, False, 1e-6), placement)
    return cache


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("rotary_dim", [4, 16])
@pytest.mark.parametrize("form", FORMS)
def test_a_turned_key_is_the_key_of_its_new_position(form, rotary_dim, dtype):
    old, new = [4, 5, 6], [40, 2, 6]
    sources, destinations = [7, 0, 5], [2, 11, 3]
    cache = stored(sources, old, rotary_dim, dtype=dtype)
    before = LayerCache(*(part if part is None else part.clone() for part in cache))
    rope = tables([b - a for a, b in zip(old, new, strict=True)], rotary_dim)
    form(cache, torch.tensor(sources), torch.tensor(destinations), rope)
    wanted = stored(destinations, new, rotary_dim, dtype=dtype)
    kv, expected = (multiply_out(*slots(part), torch.float32).float() for part in (cache, wanted))
    keys, expected_keys = kv[destinations, 0], expected[destinations, 0]
    if dtype == torch.int8:
        step = slots(wanted)[1][destinations, 0].unsqueeze(-1)
        assert ((keys - expected_keys).abs() < 1.6 * step).all()  # rounded twice, not once: two half steps and more
    else:
        rounding = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}[dtype]
        torch.testing.assert_close(keys, expected_keys, atol=rounding, rtol=rounding)
    equal(kv[destinations, 1], expected[destinations, 1])
    others = [slot for slot in range(12) if slot not in destinations]
    for part, untouched in zip(slots(cache), slots(before), strict=True):
        if part is not None:
            equal(part[others], untouched[others])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("form", FORMS)
def test_without_tables_all_numbers_are_copied_as_they_are(form, dtype):
    """Head_dim 24 is no power of two, and 5 heads are more than a program's."""
    sources, destinations = [7, 0, 5], [2, 11, 3]
    cache = stored(sources, [4, 5, 6], 24, heads=(1, 5), head_dim=24, dtype=dtype)
    expected = [part if part is None else part.clone() for part in slots(cache)]
    form(cache, torch.tensor(sources), torch.tensor(destinations), None)
    for part, wanted in zip(slots(cache), expected, strict=True):
        if part is not None:
            wanted[destinations] = wanted[sources]
            equal(part, wanted)


def slots(cache):
    return [part if part is None else part.flatten(0, 1) for part in cache]


@given(data=st.data())
@settings(max_examples=30)
def test_all_forms_of_turned_copies_agree(data):
    num_kv_heads, head_dim = data.draw(st.integers(1, 9)), 2 * data.draw(st.integers(1, 65))
    dtype = data.draw(st.sampled_from((torch.float32, torch.float16, torch.bfloat16, torch.int8)))
    block_size, num_blocks = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    order = data.draw(st.permutations(range(block_size * num_blocks)))
    half = len(order) // 2
    destinations = order[: data.draw(st.integers(0, min(half, 3)))]
    sources = [data.draw(st.sampled_from(order[half:])) for _ in destinations]  # one may go to several places
    rotary_dim = 2 * data.draw(st.integers(1, head_dim // 2))
    table_dtype = data.draw(st.sampled_from((torch.float32, torch.bfloat16 if dtype == torch.int8 else dtype)))
    rope = tables([data.draw(st.integers(-50, 50)) for _ in sources], rotary_dim, table_dtype)
    cache = make_cache(num_blocks, block_size, num_kv_heads, head_dim, dtype)
    shape = (len(order[half:]), 2, num_kv_heads)
    slots(cache)[0][order[half:]] = (randn(*shape, head_dim) * (1 if dtype != torch.int8 else 40)).to(dtype)
    if cache.scales is not None:
        slots(cache)[1][order[half:]] = randn(*shape, seed=1).abs()
    results = []
    for form in FORMS:
        copy = LayerCache(*(part if part is None else part.clone() for part in cache))
        slots_dtype = data.draw(st.sampled_from((torch.int64, torch.int32)))
        form(copy, torch.tensor(sources, dtype=slots_dtype), torch.tensor(destinations, dtype=slots_dtype), rope)
        results.append(copy)
    for result in results[1:]:
        if dtype == torch.int8:
            assert (result.kv.short() - results[0].kv).abs().max() <= 1
            torch.testing.assert_close(result.scales, results[0].scales, equal_nan=True, atol=1e-6, rtol=1e-5)
        else:
            tolerance = TOLERANCE[dtype]
            torch.testing.assert_close(result.kv, results[0].kv, equal_nan=True, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("slots_dtype", [torch.int32, torch.int64])
def test_slot_offsets_beyond_32_bits(slots_dtype):
    cache = stored([7, 0], [3, 4], 16, dtype=torch.int8)
    expected = LayerCache(*(part.clone() for part in cache))
    sources, destinations = torch.tensor([7, 0], dtype=slots_dtype), torch.tensor([1, 5], dtype=slots_dtype)
    rope = tables([9, -4], 16)
    copy_rotated_reference(expected, sources, destinations, rope)
    shift = 2**31 - 100

    def earlier(tensor):
        num_bytes = shift * tensor[0, 0].numel() * tensor.itemsize

        class Earlier(torch.Tensor):
            def data_ptr(self):
                return super().data_ptr() - num_bytes

        return tensor.as_subclass(Earlier)

    copy_rotated_triton(LayerCache(*map(earlier, cache)), sources + shift, destinations + shift, rope)
    assert (cache.kv.short() - expected.kv).abs().max() <= 1
    torch.testing.assert_close(cache.scales, expected.scales, equal_nan=True)


REFUSED = {
    "other slots than tables": {"sources": torch.zeros(3, dtype=torch.int64)},
    "slots that are no numbers": {"destinations": torch.zeros(2)},
    "tables that differ": {"rope": (torch.zeros(2, 1, 16), torch.zeros(2, 1, 8))},
    "slots of other numbers": {"sources": torch.zeros(3, dtype=torch.int64), "rope": None},
    "a cache with gaps": {"cache": LayerCache(torch.zeros(4, 3, 2, 3, 32)[..., ::2])},
    "an odd head_dim": {"cache": LayerCache(torch.zeros(4, 3, 2, 3, 17))},
    "scales that do not fit": {
        "cache": LayerCache(torch.zeros(4, 3, 2, 3, 16).to(torch.int8), torch.zeros(4, 3, 2, 1))
    },
    "tables wider than heads": {"cache": LayerCache(torch.zeros(4, 3, 2, 3, 8))},
}


@pytest.mark.parametrize("change", REFUSED.values(), ids=REFUSED)
def test_what_the_kernel_cannot_serve_is_refused(change):
    rope = tables([1, 2], 16)
    slots_of = {"sources": torch.tensor([0, 1]), "destinations": torch.tensor([2, 3])}
    case = {"cache": make_cache(4, 3, 3, 16, torch.float32), **slots_of, "rope": rope, **change}
    with pytest.raises(ConfigError, match=r"must be|takes"):
        copy_rotated_triton(**case)


@pytest.mark.parametrize("form", FORMS)
def test_no_turned_copies(form):
    cache = make_cache(2, 2, 1, 4, torch.int8)
    none = torch.empty(0, dtype=torch.int64)
    form(cache, none, none, tables([], 4))
    form(cache, none, none, None)
    assert cache.scales.isnan().all()


def test_backends_have_these_forms():
    assert [BACKENDS[name].copy_rotated for name in ("reference", "torch", "triton")] == FORMS[:3]

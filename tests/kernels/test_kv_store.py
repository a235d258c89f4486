"""Norm, rotation and the cache's write in one: each form against the reference, and the reference against float64."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minirksc.errors import ConfigError
from minirksc.kernels.kv import kv_store
from minirksc.kernels.kv.int8 import round_to_int8
from minirksc.kernels.kv.kv_store import heads_of_program, kv_store_reference, kv_store_torch, kv_store_triton
from minirksc.kernels.kv.layer_cache import LayerCache, multiply_out
from minirksc.kernels.native.ops import kv_store_native
from minirksc.kernels.rope import rope_tables

sys.path.append(str(Path(__file__).parent))  # in importlib mode pytest does not add it
attention, forms = importlib.import_module("attention_cases"), importlib.import_module("forms")

# Of numbers up to about 5. In bfloat16 the interpreter cuts off where a GPU rounds, and the torch form rounds twice
# in a rotation: several casts of 2^-7 each.
TOLERANCE = {torch.float32: 4e-6, torch.float16: 1e-2, torch.bfloat16: 1e-1}
DTYPES = list(TOLERANCE)


def tiled_native(*, cache, **case):
    """What a cache holds slot by slot, one of tiles holds in its own order."""
    if cache is None or cache.scales is not None:
        forms.store(kv_store_native, **case, cache=cache)
    else:
        attention.run_in_tiles(lambda tiles: forms.store(kv_store_native, **case, cache=tiles), cache)


ALL = [kv_store_torch, kv_store_triton, kv_store_native, tiled_native]
FORMS = forms.parameters(ALL)
NAN = float("nan")


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make_cache(num_blocks, block_size, num_kv_heads, head_dim, dtype, int8):
    """A cache that nobody has written: NaN, and in int8 wild numbers whose scales are NaN."""
    shape = (num_blocks, block_size, 2, num_kv_heads, head_dim)
    if int8:
        return LayerCache(torch.full(shape, 99, dtype=torch.int8), torch.full(shape[:-1], NAN))
    return LayerCache(torch.full(shape, NAN, dtype=dtype))


def make_case(
    heads=(4, 2),
    head_dim=16,
    dtype=torch.float32,
    norm=None,
    v_norm=False,
    rotary_dim=None,
    growth=False,
    int8=False,
    block_size=3,
    num_blocks=3,
    slots=(7, 0, 4),
    slots_dtype=torch.int64,
):
    """Arguments of the op by name. qkv is a slice of wider memory, and that is NaN around it."""
    num_heads, num_kv_heads = heads
    tokens = len(slots)
    memory = torch.full((tokens + 2, num_heads + 2 * num_kv_heads + 2, head_dim), NAN, dtype=dtype)
    qkv = memory[1:-1, 1:-1].copy_(randn(tokens, num_heads + 2 * num_kv_heads, head_dim, dtype=dtype))
    weight_dtype = torch.float32 if norm == "float32" else dtype
    rope = None
    if rotary_dim is not None:
        inv_freq = 100.0 ** -(torch.arange(0, rotary_dim, 2) / rotary_dim)
        rope = rope_tables(torch.arange(tokens) * 17, inv_freq, 1.1, dtype)
    return {
        "qkv": qkv,
        "num_heads": num_heads,
        "q_norm": None if norm is None else 1 + randn(head_dim, seed=1).to(weight_dtype) / 5,
        "k_norm": None if norm is None else 1 + randn(head_dim, seed=2).to(weight_dtype) / 5,
        "v_norm": v_norm,
        "eps": 1e-6,
        "rope": rope,
        "query_growth": 1 + randn(tokens, 1, 1, seed=3).to(dtype) / 9 if growth else None,
        "cache": make_cache(num_blocks, block_size, num_kv_heads, head_dim, dtype, int8) if num_kv_heads else None,
        "slots": torch.tensor(slots, dtype=slots_dtype),
    }


def run(form, case):
    """(qkv, the memory that it lies in, cache) afterwards; the case itself stays as it is."""
    memory = case["qkv"]._base.clone()
    qkv = memory[1:-1, 1:-1]
    cache = None if case["cache"] is None else LayerCache(*(None if x is None else x.clone() for x in case["cache"]))
    given = {**case, "qkv": qkv, "cache": cache}
    form(**given) if form is tiled_native else forms.store(form, **given)
    return qkv, memory, cache


def close(actual, expected, dtype):
    torch.testing.assert_close(actual, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype], equal_nan=True)


def check(form, case):
    dtype, cache, num_heads = case["qkv"].dtype, case["cache"], case["num_heads"]
    expected_qkv, _, expected_cache = run(kv_store_reference, case)
    qkv, memory, stored = run(form, case)
    assert torch.isfinite(qkv).all()
    assert memory.isfinite().sum() == qkv.numel()  # nothing around qkv was written
    close(qkv[:, :num_heads], expected_qkv[:, :num_heads], dtype)
    if cache is None:
        return
    if cache.scales is None:
        close(qkv, expected_qkv, dtype)
        close(stored.kv, expected_cache.kv, dtype)  # NaN where the reference leaves it
    else:
        close(stored.scales, expected_cache.scales, dtype)
        # What differs in the last bit before it is rounded may become the neighbouring number.
        off = (stored.kv.short() - expected_cache.kv).abs()
        assert off.max() <= (1 if dtype != torch.bfloat16 else 3) and (dtype != torch.float32 or not off.any())
    read_back = multiply_out(*(x if x is None else x.flatten(0, 1) for x in stored), dtype)
    for token, slot in enumerate(case["slots"].tolist()):
        if slot >= 0:  # a step sees what later steps see; the interpreter cuts off where torch rounds
            kv = qkv[token, num_heads:].view_as(read_back[slot])
            torch.testing.assert_close(kv, read_back[slot], atol=0, rtol=2**-7 if dtype == torch.bfloat16 else 0)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("norm", [None, "float32", "of qkv"])
@pytest.mark.parametrize("rotary_dim", [None, 8, 16])
@pytest.mark.parametrize(("form", "dtype"), forms.with_dtypes(ALL, DTYPES))
def test_all_that_a_layer_can_ask_for(form, rotary_dim, norm, int8, dtype):
    flags = {"v_norm": norm == "float32", "growth": norm is None}
    check(form, make_case(rotary_dim=rotary_dim, norm=norm, int8=int8, dtype=dtype, **flags))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("flags", [{"v_norm": True}, {"growth": True}, {"norm": "of qkv"}])
def test_each_flag_alone(flags, int8, form):
    check(form, make_case(int8=int8, **flags))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("heads", [(3, 3), (4, 1), (5, 1), (9, 3), (7, 7)])
@pytest.mark.parametrize("int8", [False, True])
def test_numbers_of_heads(heads, int8, form):
    check(form, make_case(heads=heads, head_dim=64, rotary_dim=64, norm="of qkv", v_norm=True, int8=int8))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("head_dim", [2, 32, 64, 80, 96, 128, 256, 512])
@pytest.mark.parametrize("part", [1, 4])
def test_head_dims(part, head_dim, form):
    rotary_dim = max(2, head_dim // part)
    half = torch.bfloat16 if forms.is_compiled(form) else torch.float16
    check(form, make_case(head_dim=head_dim, rotary_dim=rotary_dim, norm="of qkv", dtype=half))
    check(form, make_case(head_dim=head_dim, rotary_dim=rotary_dim, norm="float32", int8=True))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("flags", [{}, {"norm": "of qkv", "rotary_dim": 8, "growth": True}, {"rotary_dim": 16}])
def test_queries_alone_where_keys_and_values_are_another_layers(flags, form):
    case = make_case(heads=(5, 0), v_norm=True, **flags)
    check(form, case)
    if not flags:
        assert torch.equal(run(form, case)[0], case["qkv"])


@pytest.mark.parametrize("form", [kv_store_reference, *FORMS])
def test_what_is_stored_is_what_float64_gives(form):
    case = make_case(rotary_dim=8, norm="float32", v_norm=True, growth=True)
    _, _, cache = run(form, case)
    q, k, v = case["qkv"].double().split((4, 2, 2), dim=1)

    def normed(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    angle = torch.arange(3)[:, None, None] * 17 * 100.0 ** -(torch.arange(0, 8, 2).double() / 8)

    def turned(x):
        a, b, rest = x[..., :4], x[..., 4:8], x[..., 8:]
        cos, sin = angle.cos() * 1.1, angle.sin() * 1.1
        return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1)

    q = turned(normed(q, case["q_norm"])) * case["query_growth"].double()
    k, v = turned(normed(k, case["k_norm"])), normed(v, 1)
    close(run(form, case)[0].double(), torch.cat((q, k, v), dim=1), torch.float16)  # the angles are float32
    for token, slot in enumerate((7, 0, 4)):
        torch.testing.assert_close(
            cache.kv[slot // 3, slot % 3].double(), torch.stack((k, v), dim=1)[token], atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("form", [kv_store_reference, kv_store_triton])
def test_a_token_without_a_slot_is_not_stored(form, int8):
    case = make_case(slots=(-1, 5, -1, 2), slots_dtype=torch.int32, rotary_dim=16, int8=int8)
    check(form, case)
    _, _, cache = run(form, case)
    written = (cache.kv[..., 0] if cache.scales is None else cache.scales)[..., 0, 0].isfinite()
    assert written.flatten().nonzero().flatten().tolist() == [2, 5]


@pytest.mark.parametrize("form", [kv_store_reference, *FORMS])
@pytest.mark.parametrize("int8", [False, True])
def test_no_tokens(int8, form):
    run(form, make_case(slots=(), rotary_dim=16, norm="of qkv", int8=int8))


@pytest.mark.parametrize("form", [kv_store_reference, *FORMS])
def test_nan_stays_in_its_head_and_its_token(form):
    case = make_case(rotary_dim=8, norm="of qkv", v_norm=True)
    clean, _, _ = run(form, case)
    case["qkv"][1, 5, 3] = NAN  # of the second key
    qkv, _, cache = run(form, case)
    assert qkv[1, 5].isnan().all()
    qkv[1, 5] = clean[1, 5]
    assert torch.equal(qkv, clean) and cache.kv[0, 0, 0, 1].isnan().all() and cache.kv[0, 0, 1].isfinite().all()


@forms.needs_native
def test_what_several_cores_share_is_what_one_does():
    case = make_case(
        heads=(9, 3), head_dim=64, rotary_dim=64, norm="float32", slots=range(40), block_size=7, num_blocks=6
    )
    check(kv_store_native, case)


@pytest.mark.parametrize("form", FORMS)
@given(data=st.data())
@settings(max_examples=30)
def test_any_shape(form, data):
    half = torch.bfloat16 if forms.is_compiled(form) else torch.float16
    num_heads, num_kv_heads = data.draw(st.integers(1, 9)), data.draw(st.integers(0, 4))
    head_dim = 2 * data.draw(st.integers(1, 48))
    block_size, num_blocks = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4))
    slots = data.draw(st.permutations(range(block_size * num_blocks)))[: data.draw(st.integers(0, 3))]
    case = make_case(
        heads=(num_heads, num_kv_heads),
        head_dim=head_dim,
        dtype=data.draw(st.sampled_from((torch.float32, half))),
        norm=data.draw(st.sampled_from((None, "float32", "of qkv"))),
        v_norm=data.draw(st.booleans()),
        rotary_dim=data.draw(st.none() | st.integers(1, head_dim // 2).map(lambda half: 2 * half)),
        growth=data.draw(st.booleans()),
        int8=data.draw(st.booleans()),
        block_size=block_size,
        num_blocks=num_blocks,
        slots=slots,
        slots_dtype=data.draw(st.sampled_from((torch.int64, torch.int32))),
    )
    check(form, case)


@given(
    rows=st.lists(st.lists(st.floats(-1e4, 1e4, width=32), min_size=4, max_size=4), min_size=1, max_size=5),
    scale=st.sampled_from((1.0, 1e-30, 1e-38, 1e34)),
)
def test_int8_is_off_by_half_a_step_at_most(rows, scale):
    x = torch.tensor(rows) * scale
    numbers, scales = round_to_int8(x)
    assert numbers.abs().max() <= 127 and scales.isfinite().all()
    off = (multiply_out(numbers, scales, torch.float32) - x).abs().amax(-1)
    assert (off <= scales * 0.5001 + 1e-30).all()
    is_zero = (x == 0).all(-1)
    assert not scales[is_zero].any() and not numbers[is_zero].any()


@pytest.mark.parametrize("form", [kv_store_reference, *FORMS])
def test_int8_of_zeros_is_zero_and_nan_stays_nan(form):
    case = make_case(int8=True)
    case["qkv"][0, 4:] = 0
    case["qkv"][1, 5, 3] = NAN  # of the second key
    case["qkv"][2, 6] = torch.linspace(-1, 1, 16) * 1e-35  # of the first value
    qkv, _, cache = run(form, case)
    assert not qkv[0, 4:].any() and not cache.scales.flatten(0, 1)[7].any() and not cache.kv.flatten(0, 1)[7].any()
    assert cache.scales.flatten(0, 1)[0, 0].isnan().tolist() == [False, True]
    assert qkv[1, 5].isnan().all() and torch.isfinite(qkv[1, 6:]).all()
    assert torch.isfinite(qkv[2]).all() and qkv[2, 6].abs().max() < 1e-34


@pytest.mark.parametrize("slots_dtype", [torch.int32, torch.int64])
def test_offsets_beyond_32_bits(slots_dtype):
    """The kernel is given a cache that begins 2^31 slots before the memory that it may write."""
    case = make_case(int8=True, slots_dtype=slots_dtype)
    _, _, expected = run(kv_store_reference, case)
    shift = 2**31 - 100  # slots; in bytes and in numbers far beyond
    kv, scales = (x.clone() for x in case["cache"])

    def earlier(tensor):
        num_bytes = shift * tensor[0, 0].numel() * tensor.itemsize

        class Earlier(torch.Tensor):
            def data_ptr(self):
                return super().data_ptr() - num_bytes

        return tensor.as_subclass(Earlier)

    forms.store(
        kv_store_triton, **{**case, "cache": LayerCache(earlier(kv), earlier(scales)), "slots": case["slots"] + shift}
    )
    assert torch.equal(kv, expected.kv)
    torch.testing.assert_close(scales, expected.scales, equal_nan=True)


def meta(case):
    """The same without memory, as the ahead-of-time compiler's cases have it."""

    def to_meta(value):
        if isinstance(value, LayerCache):
            return LayerCache(*map(to_meta, value))
        if isinstance(value, tuple):
            return tuple(map(to_meta, value))
        return value.to("meta") if isinstance(value, torch.Tensor) else value

    return {name: to_meta(value) for name, value in case.items()}


@pytest.mark.parametrize(
    ("flags", "grid"),
    [
        ({"rotary_dim": 64, "head_dim": 64, "heads": (32, 8)}, [(3, 6)]),
        ({"head_dim": 64, "heads": (32, 8)}, [(3, 2)]),  # q stays as it is
        ({"head_dim": 64, "heads": (32, 0)}, []),
        ({"head_dim": 64, "heads": (32, 0), "growth": True}, [(3, 4)]),
        ({"slots": (), "rotary_dim": 16}, []),
    ],
)
def test_one_launch_and_only_for_what_changes(flags, grid, monkeypatch):
    launches = []

    class Recorder:
        def __getitem__(self, grid):
            launches.append(grid)
            return lambda *args, **kwargs: None

    monkeypatch.setattr(kv_store, "_kv_store_kernel", Recorder())
    forms.store(kv_store_triton, **meta(make_case(**flags)))
    assert launches == grid


@pytest.mark.parametrize(
    ("head_dim", "num_heads", "heads"), [(64, 32, 8), (80, 32, 4), (128, 3, 4), (256, 8, 2), (512, 8, 1), (1024, 9, 1)]
)
def test_a_warp_takes_512_numbers(head_dim, num_heads, heads):
    assert heads_of_program(head_dim, num_heads) == heads


def wrong(**changes):
    return lambda case: case.update(changes)


def wrong_cache(**changes):
    def change(case):
        parts = {name: make(part) for (name, make), part in zip(changes.items(), case["cache"], strict=False)}
        case["cache"] = case["cache"]._replace(**parts)

    return change


REFUSED = {
    "float64": lambda case: case.update(qkv=case["qkv"].double()),
    "odd number of kv heads": lambda case: case.update(qkv=case["qkv"][:, :-1]),
    "no heads": wrong(num_heads=0),
    "more heads than there are": wrong(num_heads=9),
    "two dimensions": lambda case: case.update(qkv=case["qkv"][0]),
    "strided heads": lambda case: case.update(qkv=torch.empty(3, 8, 32)[..., ::2]),
    "weight of another size": wrong(q_norm=torch.empty(8)),
    "weight of another dtype": wrong(k_norm=torch.empty(16, dtype=torch.float16)),
    "tables of other tokens": wrong(rope=(torch.empty(2, 1, 16), torch.empty(2, 1, 16))),
    "tables wider than heads": wrong(rope=(torch.empty(3, 1, 18), torch.empty(3, 1, 18))),
    "tables that differ": wrong(rope=(torch.empty(3, 1, 16), torch.empty(3, 1, 8))),
    "tables of another layout": wrong(rope=(torch.empty(3, 1, 16), torch.empty(3, 1, 32)[..., :16])),
    "growth of another shape": wrong(query_growth=torch.empty(3)),
    "no cache": wrong(cache=None),
    "a cache that is not needed": lambda case: case.update(qkv=case["qkv"][:, :4]),
    "cache of other heads": wrong_cache(kv=lambda kv: kv[..., :1, :].contiguous()),
    "cache of another dtype": wrong_cache(kv=lambda kv: kv.half()),
    "cache with gaps": wrong_cache(kv=lambda kv: kv[:, :2]),
    "int8 without scales": wrong_cache(kv=lambda kv: kv.to(torch.int8)),
    "scales without int8": lambda case: case.update(cache=LayerCache(case["cache"].kv, case["cache"].kv[..., 0])),
    "slots of other tokens": wrong(slots=torch.zeros(2, dtype=torch.int64)),
    "slots of another dtype": wrong(slots=torch.zeros(3)),
}


@pytest.mark.parametrize("change", REFUSED.values(), ids=REFUSED)
def test_what_the_kernel_cannot_serve_is_refused_before_anything_is_written(change):
    case = make_case(rotary_dim=16)
    change(case)
    before = case["qkv"].clone()
    with pytest.raises(ConfigError, match=r"must be|takes"):
        forms.store(kv_store_triton, **case)
    torch.testing.assert_close(case["qkv"], before, atol=0, rtol=0, equal_nan=True)


def test_odd_and_huge_head_dims_are_refused():
    for head_dim in (15, 1026):
        case = make_case() | {"qkv": torch.empty(3, 8, head_dim)}
        with pytest.raises(ConfigError, match=f"head_dim is {head_dim}"):
            forms.store(kv_store_triton, **case)

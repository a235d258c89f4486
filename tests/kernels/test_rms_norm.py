"""Norms, alone and with the residual addition before them: each form against the reference and against float64."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from minirksc.errors import ConfigError
from minirksc.kernels.native.ops import add_rms_norm_native, rms_norm_native
from minirksc.kernels.rms_norm import (
    MAX_SIZE,
    add_rms_norm_reference,
    add_rms_norm_torch,
    add_rms_norm_triton,
    rms_norm_reference,
    rms_norm_torch,
    rms_norm_triton,
    row_launch,
)

sys.path.append(str(Path(__file__).parent))  # in importlib mode pytest does not add it
forms = importlib.import_module("forms")

TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}
INTERPRETER_BFLOAT16 = 4e-2  # the interpreter cuts off where a GPU rounds: up to three casts of 2^-7
DTYPES = list(TOLERANCE)
FORMS = [rms_norm_reference, rms_norm_torch, rms_norm_triton, rms_norm_native]
ADD_FORMS = [add_rms_norm_reference, add_rms_norm_torch, add_rms_norm_triton, add_rms_norm_native]
# In bfloat16 the interpreter cuts off where the others round.
IN_16_BITS = [
    *forms.with_dtypes([rms_norm_reference, rms_norm_torch, rms_norm_triton], [torch.float16]),
    *forms.with_dtypes([rms_norm_reference, rms_norm_torch, rms_norm_native], [torch.bfloat16]),
]


def close(actual, expected, form=None):
    tolerance = TOLERANCE[expected.dtype]
    if expected.dtype == torch.bfloat16 and form in (rms_norm_triton, add_rms_norm_triton):
        tolerance = INTERPRETER_BFLOAT16
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def in_nan(x):
    """A copy whose rows lie in memory that is NaN between and around them, and that memory."""
    memory = torch.full((x.shape[0] + 2, *x.shape[1:-1], x.shape[-1] + 3), float("nan"), dtype=x.dtype)
    inside = memory[1:-1, ..., 1:-2]
    return inside.copy_(x), memory


def exact_norm(x, weight, eps):
    normed = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    return normed if weight is None else normed * weight.double()


def make_weight(kind, size, dtype, seed=1):
    return None if kind == "none" else randn(size, dtype=torch.float32 if kind == "float32" else dtype, seed=seed)


@pytest.mark.parametrize(("form", "dtype"), forms.with_dtypes(FORMS, DTYPES))
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (3, 41), (7, 576), (40, 1000)])
def test_rms_norm(shape, form, dtype):
    x, weight = randn(*shape, dtype=dtype) * 9, randn(shape[1], dtype=dtype, seed=1)
    close(form(x, weight, 1e-5), rms_norm_reference(x, weight, 1e-5), form)
    strided = randn(shape[0], 2 * shape[1], dtype=dtype)[:, ::2]
    close(form(strided, weight, 1e-5), rms_norm_reference(strided, weight, 1e-5), form)


@pytest.mark.parametrize(("form", "dtype"), forms.with_dtypes(FORMS, DTYPES))
@pytest.mark.parametrize("kind", ["none", "float32", "of x"])
@pytest.mark.parametrize("shape", [(5, 64), (3, 4, 16), (2, 1, 3, 20), (0, 4, 8), (1, 3, 80)])
def test_rms_norm_of_heads_and_kinds_of_weight(shape, kind, form, dtype):
    wide = randn(shape[0], 2 * shape[1], *shape[2:], dtype=dtype) * 9
    x = wide[:, : shape[1]]  # as the heads of q in qkv
    before = wide.clone()
    weight = make_weight(kind, shape[-1], dtype)
    out = form(x, weight, 1e-5)
    assert out.dtype == dtype and out.shape == x.shape
    close(out, exact_norm(x.double(), weight, 1e-5).to(dtype), form)
    assert torch.equal(wide, before)


@pytest.mark.parametrize(("form", "dtype"), IN_16_BITS)
def test_a_float32_norm_weight_is_applied_before_the_only_rounding(form, dtype):
    x = randn(50, 64, dtype=dtype)
    # Lost when the weight or the normed value is rounded first.
    weight = 1 + randn(64, seed=1) * torch.finfo(dtype).eps / 5
    exact = exact_norm(x.double(), weight, 1e-6).to(dtype)
    wrong = (form(x, weight, 1e-6) != exact).float().mean()
    assert wrong < 0.01  # float32 against float64 at the edge between two neighbours
    twice = form(x, None, 1e-6) * weight.to(dtype)
    assert (twice != exact).float().mean() > 0.1  # the data can tell them apart


@pytest.mark.parametrize(("form", "dtype"), IN_16_BITS)
def test_a_16_bit_norm_weight_is_applied_to_the_rounded_value(form, dtype):
    x, weight = randn(50, 64, dtype=dtype), randn(64, dtype=dtype, seed=1)
    twice = exact_norm(x.double(), None, 1e-6).to(dtype) * weight
    once = exact_norm(x.double(), weight, 1e-6).to(dtype)
    assert (once != twice).float().mean() > 0.1
    assert (form(x, weight, 1e-6) != twice).float().mean() < 0.01


def kinds_of_weights(form, dtype):
    """(of the update's norm, of the norm); the compiled form takes both norms of a model to be of one kind."""
    kinds = ["none", "float32", "of x"]
    one_kind = form is add_rms_norm_native and dtype != torch.float32
    return [(a, b) for a in kinds for b in kinds if not (one_kind and {a, b} == {"float32", "of x"})]


@pytest.mark.parametrize(("form", "dtype"), forms.with_dtypes(ADD_FORMS, DTYPES))
@pytest.mark.parametrize("shape", [(4, 72), (31, 577)])
def test_add_rms_norm(shape, form, dtype):
    for update_kind, kind in kinds_of_weights(form, dtype):
        check_add_rms_norm(form, shape, update_kind, kind, dtype)


def check_add_rms_norm(form, shape, update_kind, kind, dtype):
    hidden, memory = in_nan(randn(*shape, dtype=dtype))
    update, _ = in_nan(randn(*shape, dtype=dtype, seed=2) * 5)
    update_before = update.clone()
    update_norm, weight = make_weight(update_kind, shape[1], dtype, seed=3), make_weight(kind, shape[1], dtype)
    added = update.double()
    if update_norm is not None:
        added = exact_norm(added, update_norm, 1e-5)
    total = hidden.double() + added
    out = form(hidden, update, update_norm, weight, 1e-5)
    assert out.dtype == dtype
    close(hidden, total.to(dtype), form)
    close(out, exact_norm(hidden.double(), weight, 1e-5).to(dtype), form)  # of the sum as it was rounded
    assert torch.equal(update, update_before)
    assert memory.isnan().sum() == memory.numel() - hidden.numel()


@pytest.mark.parametrize(("norm", "dtype"), IN_16_BITS)
def test_what_is_normed_is_the_sum_as_it_was_rounded(norm, dtype):
    form = ADD_FORMS[FORMS.index(norm)]
    hidden, update, weight = (randn(20, 64, dtype=dtype, seed=seed) for seed in range(3))
    exact = hidden.double() + update.double()
    out = form(hidden, update, None, weight[0], 1e-6)
    assert torch.equal(out, norm(hidden, weight[0], 1e-6))
    assert not torch.equal(out, norm(exact.float(), weight[0].float(), 1e-6).to(dtype))  # the data can tell them apart


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_torch_form_is_an_addition_and_a_norm_to_the_bit(dtype):
    hidden, update, weight = (randn(5, 48, dtype=dtype, seed=seed) for seed in range(3))
    update_norm, weight = weight[0], weight[1]
    for norm in (None, update_norm):
        total = hidden + (update if norm is None else rms_norm_torch(update, norm, 1e-6))
        mine = hidden.clone()
        out = add_rms_norm_torch(mine, update, norm, weight, 1e-6)
        assert torch.equal(mine, total) and torch.equal(out, rms_norm_torch(total, weight, 1e-6))


kinds = st.sampled_from(["none", "float32", "of x"])
FAST = [
    (rms_norm_triton, add_rms_norm_triton, torch.float16),
    pytest.param((rms_norm_native, add_rms_norm_native, torch.bfloat16), marks=forms.needs_native),
]


@pytest.mark.parametrize("fast_forms", FAST, ids=["triton", "native"])
@settings(max_examples=30)
@given(st.integers(0, 4), st.integers(1, 600), kinds, kinds, st.booleans(), st.sampled_from([1e-6, 0.1]))
def test_fast_forms_equal_the_reference(fast_forms, tokens, size, update_kind, kind, is_half, eps):
    norm, add_norm, half = fast_forms
    dtype = half if is_half else torch.float32
    assume((update_kind, kind) in kinds_of_weights(add_norm, dtype))
    update_norm, weight = make_weight(update_kind, size, dtype, seed=3), make_weight(kind, size, dtype)
    hidden = randn(tokens, size, dtype=dtype) * 3
    update, _ = in_nan(randn(tokens, size, dtype=dtype, seed=2))
    slow, fast = hidden.clone(), hidden.clone()  # of another stride than the update
    expected = add_rms_norm_reference(slow, update, update_norm, weight, eps)
    close(add_norm(fast, update, update_norm, weight, eps), expected)
    close(fast, slow)
    close(norm(update, weight, eps), rms_norm_reference(update, weight, eps))


@pytest.mark.parametrize("fast_forms", FAST, ids=["triton", "native"])
def test_rows_of_one_number_may_have_any_stride(fast_forms):
    norm, add_norm, _ = fast_forms
    wide = randn(3, 2)
    x, expected = wide[:, ::2].as_strided((3, 1), (2, 0)), rms_norm_reference(wide[:, :1], None, 1e-6)
    close(norm(x, None, 1e-6), expected)
    close(add_norm(torch.zeros(3, 1), x, None, None, 1e-6), expected)


@pytest.mark.parametrize("form", forms.parameters(FORMS))
def test_a_zero_row_stays_zero_and_nan_stays_in_its_row(form):
    assert torch.equal(form(torch.zeros(2, 20), randn(20), 1e-6), torch.zeros(2, 20))
    x = randn(3, 20)
    clean = form(x, None, 1e-6)
    x[1, 7] = float("nan")
    poisoned = form(x, None, 1e-6)
    assert poisoned[1].isnan().all() and torch.equal(poisoned[[0, 2]], clean[[0, 2]])


def test_every_row_fits_the_program_that_is_chosen_for_it():
    for size in (1, 31, 32, 64, 80, 576, 2048, 2049, 4096, 5376, 8192, MAX_SIZE):
        block, num_warps = row_launch(size)
        assert size <= block < 2 * size and block & (block - 1) == 0
        assert 1 <= num_warps <= 16 and num_warps & (num_warps - 1) == 0 and block // num_warps >= min(block, 512)


@pytest.mark.parametrize(
    ("x", "weight", "words"),
    [
        (torch.zeros(2, 8, dtype=torch.float64), None, "float64"),
        (torch.zeros(2, 8, dtype=torch.int32), None, "int32"),
        (torch.zeros(1, MAX_SIZE + 1), None, f"1 to {MAX_SIZE}"),
        (torch.zeros(2, 0), None, "0 numbers"),
        (torch.zeros(2, 8), torch.zeros(4), r"\[4\]"),
        (torch.zeros(2, 8), torch.zeros(16)[::2], "contiguous"),
        (torch.zeros(2, 8), torch.zeros(8, dtype=torch.float16), "float16"),
        (torch.zeros(2, 8, dtype=torch.float16), torch.zeros(8, dtype=torch.bfloat16), "bfloat16"),
    ],
)
def test_what_the_kernel_cannot_serve_is_refused(x, weight, words):
    with pytest.raises(ConfigError, match=words):
        rms_norm_triton(x, weight, 1e-6)
    with pytest.raises(ConfigError, match=words):
        add_rms_norm_triton(x, x, weight, None, 1e-6)


@pytest.mark.parametrize(
    ("update", "words"),
    [
        (torch.ones(2, 7), r"\[2, 7\]"),
        (torch.ones(2, 8, dtype=torch.float16), "float16"),
        (torch.ones(2, 16)[:, ::2], "stride"),
    ],
)
def test_a_refused_update_leaves_hidden_as_it_was(update, words):
    hidden = torch.ones(2, 8)
    with pytest.raises(ConfigError, match=words):
        add_rms_norm_triton(hidden, update, None, None, 1e-6)
    assert torch.equal(hidden, torch.ones(2, 8))

"""The gated activation of an MLP: each form against the reference, and the reference against float64."""

import importlib
import math
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from minirksc.errors import ConfigError
from minirksc.kernels.gated_act import ACTIVATIONS, gated_act_reference, gated_act_torch, gated_act_triton, tile_launch
from minirksc.kernels.native.ops import gated_act_native

sys.path.append(str(Path(__file__).parent))  # in importlib mode pytest does not add it
forms = importlib.import_module("forms")

# The interpreter's numpy warns of an exp() that overflows to infinity, which is what the formula wants there.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}
DTYPES = list(TOLERANCE)
FORMS = [gated_act_reference, gated_act_torch, gated_act_triton, gated_act_native]


def close(actual, expected):
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize(("form", "dtype"), forms.with_dtypes(FORMS, DTYPES))
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("intermediate", [1, 37, 1024, 1536])
def test_gated_act(intermediate, form, activation, dtype):
    x = randn(3, 2 * intermediate, dtype=dtype) * 4
    before = x.clone()
    gate, up = x.double().chunk(2, -1)
    act = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate=activation[5:] or "none")
    out = form(x, activation)
    assert out.is_contiguous() and out.dtype == dtype
    close(out, (act * up).to(dtype))
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("form", "half"),
    [*forms.with_dtypes([gated_act_triton], [torch.float16]), *forms.with_dtypes([gated_act_native], [torch.bfloat16])],
)
@settings(max_examples=30)
@given(
    st.integers(0, 40),
    st.integers(1, 1100),
    st.sampled_from(ACTIVATIONS),
    st.booleans(),
    st.integers(0, 5),
)
def test_fast_forms_equal_the_reference_on_rows_of_a_wider_tensor(
    form, half, tokens, intermediate, activation, is_half, gap
):
    dtype = half if is_half else torch.float32
    tokens = tokens if form is gated_act_native else tokens % 4  # the interpreter takes its time
    wide = torch.full((tokens, 2 * intermediate + gap), float("nan"), dtype=dtype)
    x = wide[:, gap:].copy_(randn(tokens, 2 * intermediate, dtype=dtype))
    close(form(x, activation), gated_act_reference(x, activation))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@forms.needs_native
def test_compiled_gates_of_any_size_and_none(activation, dtype):
    """At each place of a register and in what is left over."""
    gates = torch.tensor([1e30, -1e30, 200.0, -200.0, 88.5, -88.5, 0.0, -0.0, math.inf, math.nan])
    x = torch.cat((gates, torch.ones(10)))[None].to(dtype)
    expected = gated_act_reference(x, activation)
    actual = gated_act_native(x, activation)
    torch.testing.assert_close(actual, expected, equal_nan=True)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("form", forms.parameters(FORMS))
def test_large_gates_are_open_or_shut(form, activation):
    out = form(torch.tensor([[1e4, -1e4, 0.0, 2.0, 2.0, 2.0]]), activation)
    assert out.tolist() == [[2e4, 0.0, 0.0]]


def test_tiles_are_powers_of_two_and_not_wider_than_needed():
    for intermediate in (1, 37, 1023, 1024, 1025, 14336):
        block, num_warps = tile_launch(intermediate)
        assert block & (block - 1) == 0 and block < 2 * intermediate + 1 and block // num_warps >= min(block, 512)


@pytest.mark.parametrize(
    ("x", "activation", "words"),
    [
        (torch.zeros(2, 8), "relu", "relu"),
        (torch.zeros(2, 8, dtype=torch.float64), "silu", "float64"),
        (torch.zeros(2, 7), "silu", r"\[2, 7\]"),
        (torch.zeros(2, 0), "silu", r"\[2, 0\]"),
        (torch.zeros(8), "silu", r"\[8\]"),
        (torch.zeros(2, 16)[:, ::2], "silu", "stride 2"),
    ],
)
def test_what_the_kernel_cannot_serve_is_refused(x, activation, words):
    with pytest.raises(ConfigError, match=words):
        gated_act_triton(x, activation)

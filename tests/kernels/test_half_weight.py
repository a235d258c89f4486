"""Weights in float16: exact or not at all."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minirksc.kernels.weights import half_weight
from minirksc.kernels.weights.half_weight import ENGINES, HalfWeight
from minirksc.kernels.weights.linear import Linear, OneDnnWeight, pack_torch

has_engine = pytest.mark.skipif(torch.backends.quantized.engine not in ENGINES, reason="torch has no FBGEMM here")


def bfloat16_numbers(*shape, seed=0, scale=0.1):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).bfloat16().float()


def checked(weight, tokens=3, bias=None, seed=1):
    """The packed weight, held to the product in float64."""
    half = HalfWeight.pack(weight)
    assert half is not None
    x = torch.randn(tokens, weight.shape[1], generator=torch.Generator().manual_seed(seed))
    expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    scale = (x.abs().double() @ weight.abs().double().T).max().item() if tokens else 1.0
    torch.testing.assert_close(half(x, bias).double(), expected, rtol=0, atol=1e-6 * scale + 1e-30)
    return half


@has_engine
@settings(max_examples=60)
@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 90),
    tokens=st.integers(0, 20),
    exponent=st.integers(-60, 60),
    chunk=st.sampled_from([64, 500, 2**21]),
    with_bias=st.booleans(),
)
def test_the_product_is_that_of_the_weight_itself(rows, columns, tokens, exponent, chunk, with_bias):
    # Numbers of 8 digits, between 1 and 4 before scaling, of both signs, and zeros.
    weight = torch.randint(-255, 256, (rows, columns), generator=torch.Generator().manual_seed(rows)).float() / 64
    bias = bfloat16_numbers(rows) * 2.0**exponent if with_bias else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(half_weight, "CHUNK_NUMBERS", chunk)
        half = checked(weight * 2.0**exponent, tokens, bias)
        chosen = [rows - 1, 0, rows // 2]
        assert torch.equal(half.rows(torch.tensor(chosen)), (weight * 2.0**exponent)[chosen])


@has_engine
def test_a_wide_range_is_scaled_and_a_wider_one_refused():
    weight = bfloat16_numbers(8, 16)
    weight[0, 0], weight[1, 1] = 1.0, 2.0**-20 * 1.5078125  # below float16's range of full digits
    assert not torch.equal(weight.half().float(), weight)
    checked(weight)
    weight[2, 2] = 2.0**-40
    assert HalfWeight.pack(weight) is None
    assert HalfWeight.pack(torch.randn(8, 16)) is None  # 24 digits


@pytest.mark.parametrize("hostile", [float("nan"), float("inf"), 1e38, 1e-45])
def test_what_float16_cannot_hold_stays_float32(hostile):
    weight = bfloat16_numbers(8, 16)
    weight[3, 4] = hostile
    assert HalfWeight.pack(weight) is None
    x = bfloat16_numbers(2, 16)
    torch.testing.assert_close(Linear(weight, pack=pack_torch)(x), x @ weight.T, equal_nan=True)


def test_zeros():
    assert torch.equal(Linear(torch.zeros(4, 6), pack=pack_torch)(torch.ones(2, 6)), torch.zeros(2, 4))


@has_engine
def test_nan_and_infinity_in_one_row_of_activations_stay_there():
    half = HalfWeight.pack(bfloat16_numbers(32, 48))
    x = bfloat16_numbers(9, 48)
    expected = half(x, None)
    x[4, 7], x[6, 1] = float("nan"), float("inf")
    out = half(x, None)
    others = [i for i in range(9) if i not in (4, 6)]
    assert torch.equal(out[others], expected[others])
    assert out[4].isnan().all() and not out[6].isfinite().any()


@has_engine
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_checkpoint_of_16_bits_is_read_in_16_bits(dtype, monkeypatch):
    # As on a processor that does not compute in them.
    monkeypatch.setattr("minirksc.kernels.weights.linear.computes_in", lambda dtype, device: dtype == torch.float32)
    layer = Linear(bfloat16_numbers(16, 32).to(dtype), pack=pack_torch)
    assert isinstance(layer._weight, HalfWeight) and layer.num_bytes == 2 * 16 * 32
    assert layer(torch.ones(2, 32, dtype=dtype)).dtype == dtype
    assert isinstance(layer.rows([3, 1])._weight, HalfWeight)


def test_another_engine_of_torch_is_left_alone(monkeypatch):
    """The process may have chosen one without these kernels: then the weight stays float32."""
    before = torch.backends.quantized.engine
    others = [name for name in torch.backends.quantized.supported_engines if name not in ENGINES]
    if not others:
        pytest.skip("torch has no other engine here")
    torch.backends.quantized.engine = others[0]
    try:
        assert isinstance(Linear(bfloat16_numbers(16, 32), pack=pack_torch)._weight, OneDnnWeight)
        assert torch.backends.quantized.engine == others[0]
    finally:
        torch.backends.quantized.engine = before

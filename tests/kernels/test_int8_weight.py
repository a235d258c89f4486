"""Weights of 8 bits: what is rounded how, and that nothing else is lost."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minirksc.kernels.native.ops import has_bf16_products
from minirksc.kernels.weights import int8_weight
from minirksc.kernels.weights.int8_weight import GROUP, Int8Weight, round_groups, why_not_int8
from minirksc.kernels.weights.linear import Linear, NativePacker

needs_bf16 = pytest.mark.skipif(not has_bf16_products, reason="this processor has no AVX512-BF16 and VNNI")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def product_of(x: Tensor, weight: Tensor) -> Tensor:
    """What is promised, in float64: both rounded, and multiplied exactly."""
    numbers, scales = round_groups(weight)
    pad = -x.shape[1] % GROUP
    groups = torch.nn.functional.pad(x.float(), (0, pad)).unflatten(1, (-1, GROUP))  # [tokens, groups, GROUP]
    most = groups.abs().amax(-1, keepdim=True)
    inverse = torch.where(most > 0, torch.full_like(most, 127) / most, 0)  # `127 / most` would round twice
    rounded = (groups * inverse).round().double() * (most / 127).double()
    return rounded.flatten(1) @ (numbers * scales.double().unsqueeze(-1)).flatten(1).T


@needs_bf16
@settings(max_examples=40)
@given(st.integers(0, 40), st.integers(1, 3 * GROUP + 1), st.integers(1, 70), st.booleans())
def test_a_product_is_that_of_the_rounded_numbers(tokens: int, in_features: int, out_features: int, has_bias: bool):
    weight = randn(out_features, in_features).bfloat16()
    x = randn(tokens, in_features, seed=1).bfloat16()
    bias = randn(out_features, seed=2).bfloat16() if has_bias else None
    layer = Linear(weight, bias, NativePacker(int8=True))
    expected = product_of(x, weight) + (0 if bias is None else bias)
    torch.testing.assert_close(layer.in_float32(x).double(), expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(layer(x), layer.in_float32(x).bfloat16(), rtol=0, atol=0)


@needs_bf16
@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 200])
def test_a_row_does_not_depend_on_the_rows_beside_it(tokens: int):
    layer, x = Linear(randn(77, 130), None, NativePacker(int8=True)), randn(tokens, 130, seed=1).bfloat16()
    together = layer.in_float32(x)
    assert torch.equal(together, torch.cat([layer.in_float32(row) for row in x.split(1)]))


@needs_bf16
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_spoils_its_own_rows_alone(value: float):
    layer, x = Linear(randn(40, 130), None, NativePacker(int8=True)), randn(10, 130, seed=1).bfloat16()
    expected = layer.in_float32(x)
    x[3, 100] = value
    out = layer.in_float32(x)
    assert out[3].isnan().all()
    assert torch.equal(out[[0, 1, 2, 4, 5, 6, 7, 8, 9]], expected[[0, 1, 2, 4, 5, 6, 7, 8, 9]])
    weight = randn(40, 130)
    weight[5, 7] = value
    spoilt = Linear(weight, None, NativePacker(int8=True)).in_float32(randn(2, 130, seed=1).bfloat16())
    assert spoilt[:, 5].isnan().all() and spoilt.isnan().sum() == 2


@needs_bf16
def test_zeros_are_zeros():
    layer = Linear(torch.zeros(33, 70), None, NativePacker(int8=True))
    assert not layer(randn(3, 70).bfloat16()).any()
    assert not Linear(randn(33, 70), None, NativePacker(int8=True))(torch.zeros(3, 70).bfloat16()).any()


def test_groups_are_rounded_to_the_nearest_step_of_their_own():
    weight = torch.zeros(3, GROUP + 4)
    weight[0, :4] = torch.tensor([1.0, -127.0, 0.4, 63.6])
    weight[0, GROUP:] = torch.tensor([2.0, -254.0, 3.2, 0.0])
    weight[2, :4] = torch.tensor([2e-3, -1e-3, 1e-3, 0.0])
    given = weight.clone()
    numbers, scales = round_groups(weight)
    assert torch.equal(weight, given)
    assert numbers.shape == (3, 2, GROUP) and scales.shape == (3, 2)
    assert numbers[0, 0, :4].tolist() == [1, -127, 0, 64] and numbers[0, 1, :4].tolist() == [1, -127, 2, 0]
    assert numbers[2, 0, 0] == 127 and numbers[2, 0, 1:4].tolist() in ([-64, 64, 0], [-63, 63, 0])
    assert scales.flatten().tolist() == pytest.approx([1.0, 2.0, 0.0, 0.0, 2e-3 / 127, 0.0], rel=2**-8)


@needs_bf16
def test_its_rows_are_what_it_multiplies_with_and_pack_to_the_same():
    weight = randn(70, 130).bfloat16()
    packed = Int8Weight(weight)
    numbers, scales = round_groups(weight)
    rows = packed.rows(torch.tensor([69, 0, 33]))
    assert torch.equal(rows, (numbers * scales.float().unsqueeze(-1)).flatten(1)[[69, 0, 33], :130])
    layer, x = Linear(weight, randn(70).bfloat16(), NativePacker(int8=True)), randn(3, 130, seed=1).bfloat16()
    assert torch.equal(layer.rows([69, 0, 33])(x), layer(x)[:, [69, 0, 33]])


@needs_bf16
def test_a_matrix_that_is_rounded_in_several_parts(monkeypatch: pytest.MonkeyPatch):
    weight, x = randn(333, 70), randn(3, 70, seed=1).bfloat16()
    expected = Linear(weight, None, NativePacker(int8=True))(x)
    monkeypatch.setattr(int8_weight, "AT_ONCE", 64 * 70)
    assert torch.equal(Linear(weight, None, NativePacker(int8=True))(x), expected)


@needs_bf16
def test_it_takes_half_of_the_bytes():
    layer = Linear(randn(1024, 1024).bfloat16(), None, NativePacker(int8=True))
    assert 2**20 <= layer.num_bytes <= 1.07 * 2**20


def test_why_it_cannot_serve():
    assert "float32" in str(why_not_int8(torch.float32))
    assert (why_not_int8(torch.bfloat16) is None) == has_bf16_products

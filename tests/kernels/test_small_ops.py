"""Norm, rope, activation, linear and cache writes: each fast form against its reference."""

import pytest
import torch
from minirksc.kernels.gated_act import ACTIVATIONS, gated_act, gated_act_reference
from minirksc.kernels.kv_store import copy_blocks, kv_store, kv_store_reference
from minirksc.kernels.linear import Linear
from minirksc.kernels.rms_norm import rms_norm, rms_norm_reference
from minirksc.kernels.rope import rope, rope_reference, rope_tables

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}
DTYPES = list(TOLERANCE)


def close(actual, expected):
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (3, 41), (7, 576)])
def test_rms_norm(shape, dtype):
    x, weight = randn(*shape, dtype=dtype) * 9, randn(shape[1], dtype=dtype, seed=1)
    close(rms_norm(x, weight, 1e-5), rms_norm_reference(x, weight, 1e-5))
    wide = randn(shape[0], 2 * shape[1], dtype=dtype)
    strided = wide[:, ::2]
    close(rms_norm(strided, weight, 1e-5), rms_norm_reference(strided, weight, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", [None, torch.float32, "of x"])
@pytest.mark.parametrize("shape", [(5, 64), (3, 4, 16), (2, 1, 3, 20), (0, 4, 8)])
def test_rms_norm_of_heads_and_kinds_of_weight(shape, weight_dtype, dtype):
    wide = randn(shape[0], 2 * shape[1], *shape[2:], dtype=dtype) * 9
    x = wide[:, : shape[1]]  # as the heads of q in qkv
    before = wide.clone()
    weight = None
    if weight_dtype is not None:
        weight = randn(shape[-1], dtype=dtype if weight_dtype == "of x" else weight_dtype, seed=1)
    for form in (rms_norm, rms_norm_reference):
        out = form(x, weight, 1e-5)
        assert out.dtype == dtype and out.shape == x.shape
        exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()
        exact = exact if weight is None else exact * weight.double()
        close(out, exact.to(dtype))
    assert torch.equal(wide, before)


def test_a_float32_norm_weight_is_applied_before_the_only_rounding():
    x = randn(50, 64, dtype=torch.bfloat16)
    weight = 1 + randn(64, seed=1) / 500  # lost when the weight or the normed value is rounded first
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    for form in (rms_norm, rms_norm_reference):
        wrong = (form(x, weight, 1e-6) != exact.bfloat16()).float().mean()
        assert wrong < 0.01  # float32 against float64 at the edge between two neighbours
        twice = form(x, None, 1e-6) * weight.bfloat16()
        assert (twice != exact.bfloat16()).float().mean() > 0.1  # the data can tell them apart


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated_act(activation, dtype):
    x = randn(5, 2 * 37, dtype=dtype) * 4
    before = x.clone()
    close(gated_act(x, activation), gated_act_reference(x, activation))
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rotary_dim", [4, 16])
def test_rope(rotary_dim, dtype):
    inv_freq = 10000.0 ** -(torch.arange(0, rotary_dim, 2) / rotary_dim)
    cos, sin = rope_tables(torch.tensor([0, 1, 5, 5000]), inv_freq, 1.25, dtype)
    qkv = randn(4, 7, 16, dtype=dtype)
    fast, slow = qkv.clone(), qkv.clone()
    rope(fast[:, :5], cos, sin)
    rope_reference(slow[:, :5], cos, sin)
    close(fast, slow)
    assert torch.equal(fast[:, 5:], qkv[:, 5:]) and torch.equal(fast[..., rotary_dim:], qkv[..., rotary_dim:])


def test_rope_turns_pairs_by_their_angle():
    cos, sin = rope_tables(torch.tensor([3]), torch.tensor([0.5, 0.25]), 1.0, torch.float32)
    x = torch.tensor([[[1.0, 0.0, 0.0, 2.0]]])
    rope(x, cos, sin)
    angle = torch.tensor([1.5, 0.75])
    expected = [angle[0].cos(), -2 * angle[1].sin(), angle[0].sin(), 2 * angle[1].cos()]
    torch.testing.assert_close(x.flatten(), torch.stack(expected))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 1.19])
def test_rope_tables_with_frequencies_of_each_token_are_those_of_each_alone(scale, dtype):
    positions = torch.tensor([0, 3, 3, 511, 100_000])
    inv_freq = torch.rand((5, 6), generator=torch.Generator().manual_seed(0))  # [tokens, rotary_dim / 2]
    cos, sin = rope_tables(positions, inv_freq, scale, dtype)
    assert cos.shape == sin.shape == (5, 1, 12) and cos.dtype == sin.dtype == dtype
    for i in range(5):
        one_cos, one_sin = rope_tables(positions[i : i + 1], inv_freq[i], scale, dtype)
        assert torch.equal(cos[i : i + 1], one_cos) and torch.equal(sin[i : i + 1], one_sin)
        angle = (positions[i].float() * inv_freq[i]).double()  # float32 angles are the convention of all models
        close(cos[i, 0], (angle.cos() * scale).repeat(2).to(dtype))
        close(sin[i, 0], torch.cat((-angle.sin(), angle.sin())).mul(scale).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 2, 17])
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_packed_equals_plain(tokens, with_bias, dtype):
    weight = randn(33, 20, dtype=dtype)
    bias = randn(33, dtype=dtype, seed=2) if with_bias else None
    x = randn(tokens, 20, dtype=dtype, seed=3)
    plain = Linear(weight, bias, prepack=False)(x)
    packed = Linear(weight, bias)(x)
    assert packed.dtype == dtype
    torch.testing.assert_close(packed, plain, atol=10 * TOLERANCE[dtype], rtol=2e-2)


def test_kv_store_writes_only_its_slots():
    kv = randn(3, 2, 2, 4)
    slots = torch.tensor([5, 0, 11])
    fast, slow = torch.full((4, 3, 2, 2, 4), float("nan")), torch.full((4, 3, 2, 2, 4), float("nan"))
    kv_store(kv, fast, slots)
    kv_store_reference(kv, slow, slots)
    torch.testing.assert_close(fast, slow, equal_nan=True, atol=0, rtol=0)
    assert torch.equal(fast[1, 2], kv[0]) and torch.isnan(fast[3, 0]).all()


def test_copy_blocks_reads_all_sources_first():
    cache = torch.arange(4.0).reshape(1, 4, 1, 1, 1, 1).expand(2, 4, 3, 2, 1, 2).clone()
    copy_blocks(cache, [(0, 1), (1, 2)])
    assert cache[1, :, 0, 0, 0, 0].tolist() == [0.0, 0.0, 1.0, 3.0]

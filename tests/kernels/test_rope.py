"""Rotary positions: both forms, and the tables."""

import pytest
import torch

from minirksc.kernels.rope import rope_reference, rope_tables, rope_torch

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}
DTYPES = list(TOLERANCE)


def close(actual, expected):
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rotary_dim", [4, 16])
def test_rope(rotary_dim, dtype):
    inv_freq = 10000.0 ** -(torch.arange(0, rotary_dim, 2) / rotary_dim)
    cos, sin = rope_tables(torch.tensor([0, 1, 5, 5000]), inv_freq, 1.25, dtype)
    qkv = randn(4, 7, 16, dtype=dtype)
    fast, slow = qkv.clone(), qkv.clone()
    rope_torch(fast[:, :5], cos, sin)
    rope_reference(slow[:, :5], cos, sin)
    close(fast, slow)
    assert torch.equal(fast[:, 5:], qkv[:, 5:]) and torch.equal(fast[..., rotary_dim:], qkv[..., rotary_dim:])


@pytest.mark.parametrize("form", [rope_reference, rope_torch])
def test_rope_turns_pairs_by_their_angle(form):
    cos, sin = rope_tables(torch.tensor([3]), torch.tensor([0.5, 0.25]), 1.0, torch.float32)
    x = torch.tensor([[[1.0, 0.0, 0.0, 2.0]]])
    form(x, cos, sin)
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

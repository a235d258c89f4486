"""The linear layer: packed for the processor against plain."""

import pytest
import torch

from minirksc.kernels.weights.linear import Linear, NativePacker, pack_torch

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-1, torch.float16: 2e-2}


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("tokens", [1, 2, 17])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("pack", [pack_torch, NativePacker()])
def test_linear_packed_equals_plain(pack, tokens, with_bias, dtype):
    weight = randn(33, 20, dtype=dtype)
    bias = randn(33, dtype=dtype, seed=2) if with_bias else None
    x = randn(tokens, 20, dtype=dtype, seed=3)
    plain = Linear(weight, bias)(x)
    packed = Linear(weight, bias, pack)(x)
    assert packed.dtype == dtype
    torch.testing.assert_close(packed, plain, atol=TOLERANCE[dtype], rtol=2e-2)

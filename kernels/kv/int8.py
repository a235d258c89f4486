"""Numbers of an int8 KV cache: a head of a token is x ~ number * scale.

scale = max |x| / 127, float32, and number = floor(x * 127 / max |x| + 1/2), which is within +-127. Reading back is
`layer_cache.multiply_out`. In kernels a head may lie in several tiles, so the three steps are functions of their own.
"""

import torch
from torch import Tensor

from minirksc.kernels.jit import tl, triton

SMALLEST_MAX = 1e-30
"""127 / max |x| is finite from here on; the numbers of what is smaller are closer to zero than they might be."""


def round_to_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers and scales of an int8 cache.

    Args:
        x: `[..., head_dim]`, any float dtype.

    Returns:
        (numbers `[..., head_dim]` int8, scales `[...]` float32). The scale of a head with NaN is NaN.
    """
    x32 = x.float()
    largest = x32.abs().amax(-1)  # [...]
    factor = 127 / largest.clamp(min=SMALLEST_MAX)
    numbers = (x32 * factor.unsqueeze(-1)).add_(0.5).floor_().clamp_(-127, 127)
    return numbers.to(torch.int8), largest / 127


@triton.jit
def abs_max_bits(x):
    """Largest |x| of each row, `[rows]`, as the bits of a float32: as integers they are in order, with NaN on top."""
    return tl.max(tl.abs(x).to(tl.int32, bitcast=True), 1)


@triton.jit
def int8_scales(bits):
    """(what rows are multiplied by for their numbers, their scales), `[rows]` float32 each, of `abs_max_bits`."""
    largest = bits.to(tl.float32, bitcast=True)
    return tl.div_rn(127.0, tl.maximum(largest, 1e-30)), tl.div_rn(largest, 127.0)  # SMALLEST_MAX


@triton.jit
def int8_numbers(x, factor):
    """Whole numbers within +-127, as float32."""
    return tl.minimum(tl.maximum(tl.floor(x * factor[:, None] + 0.5), -127.0), 127.0)

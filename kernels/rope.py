"""Rotary position embedding, half-rotation layout: element i of a head is paired with element i + dim / 2.

Angles, cosines and sines are computed in float32 and cast to the activations' dtype. The engine rotates where it
stores (`kv_store`, `kv_copy`), so that there is no kernel of its own, only what those two share.
Source: Su et al. 2021, arXiv 2104.09864.
"""

import torch
from torch import Tensor

from minirksc.kernels.jit import tl, triton

RopeTables = tuple[Tensor, Tensor]
"""(cos, sin), each `[tokens, 1, rotary_dim]`; see `rope_tables`."""


def rope_tables(positions: Tensor, inv_freq: Tensor, scale: float, dtype: torch.dtype) -> RopeTables:
    """Cosines and signed sines of every position, made once a step and used by all layers.

    Args:
        positions: `[tokens]` int64.
        inv_freq: `[rotary_dim / 2]` or, where each token has its own, `[tokens, rotary_dim / 2]`; float32.
        scale: attention factor, multiplied into both tables.
        dtype: type of the result.

    Returns:
        (cos, sin), each `[tokens, 1, rotary_dim]`. The first half of sin is negated, so that
        `x * cos + roll(x, rotary_dim / 2) * sin` rotates.
    """
    angles = positions.float()[:, None] * inv_freq  # [tokens, rotary_dim / 2]
    cos, sin = angles.cos().mul_(scale), angles.sin().mul_(scale)
    cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
    return cos.to(dtype).unsqueeze(1), sin.to(dtype).unsqueeze(1)


def rope_reference(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """The specification: rotates x in place, pair by pair, in float32.

    Args:
        x: `[tokens, heads, head_dim]`; the first rotary_dim of head_dim are rotated, the rest stays.
        cos: `[tokens, 1, rotary_dim]`, from `rope_tables`.
        sin: `[tokens, 1, rotary_dim]`, from `rope_tables`.
    """
    half = cos.shape[-1] // 2
    a, b = x[..., : 2 * half].to(torch.float32, copy=True).chunk(2, dim=-1)
    c, s = cos[..., half:].float(), sin[..., half:].float()
    x[..., :half] = (a * c - b * s).to(x.dtype)
    x[..., half : 2 * half] = (b * c + a * s).to(x.dtype)


def rope_torch(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """The same in three passes, in the input's dtype."""
    rotary_dim = cos.shape[-1]
    part = x if rotary_dim == x.shape[-1] else x[..., :rotary_dim]
    rolled = part.roll(rotary_dim // 2, -1)
    part.mul_(cos).addcmul_(rolled, sin)


@triton.jit
def rotated(low, high, cos_ptr, sin_ptr, cols, HALF: tl.constexpr):
    """Both halves of heads of one token, `[heads, cols]` float32 each, rotated; the tables' second half is read."""
    cos = tl.load(cos_ptr + HALF + cols, mask=cols < HALF, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + HALF + cols, mask=cols < HALF, other=0.0).to(tl.float32)[None, :]
    return low * cos - high * sin, high * cos + low * sin

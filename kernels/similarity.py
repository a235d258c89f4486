"""How alike hidden states of two places are: the cosine of each layer, weighted by its depth.

sigma = sum over layers l of w_l cos(h_l, a_l), where w_l = exp(alpha l / L) / sum over k of exp(alpha k / L): the
deeper a layer, the more it counts. Computed in float32. The cosine is 0 where a vector is zero, or so small that the
sum of its squares is.

In the kernel one program does all layers of a pair, since sums across programs would need a second launch. It holds a
layer's two vectors in registers, forms the three sums of a cosine from them, and has the next layer's loads under way
meanwhile. It decides nothing: who shares what, and from which similarity on, is the caller's.

Source: equation 2 of the description of ASKS, the sharing of attention states between branches.
"""

import torch
from torch import Tensor

from minirksc.errors import ConfigError
from minirksc.kernels.jit import DTYPES, tl, triton
from minirksc.kernels.rms_norm import row_launch

MAX_SIZE = 16384


def layer_weights(num_layers: int, alpha: float, device: torch.device | str = "cpu") -> Tensor:
    """The weight of each layer, exp(alpha l / num_layers) over the sum of these; 0 for alpha weighs all alike.

    Args:
        num_layers: number of layers, at least 1.
        alpha: how much more the deeper layers count.
        device: where the result lies.

    Returns:
        `[num_layers]` float32, of sum 1.
    """
    depths = torch.arange(num_layers, dtype=torch.float32, device=device) / num_layers
    return torch.softmax(alpha * depths, 0)


def similarity_reference(hidden: Tensor, anchor: Tensor, weights: Tensor) -> Tensor:
    """The specification.

    Args:
        hidden: `[pairs, layers, size]`, any float dtype.
        anchor: `[pairs, layers, size]`, or `[layers, size]` for all pairs; dtype of hidden.
        weights: `[layers]` float32, see `layer_weights`.

    Returns:
        `[pairs]` float32, between -1 and 1 for weights of sum 1.
    """
    h, a = hidden.float(), anchor.float()
    h_norm, a_norm = h.square().sum(-1).sqrt(), a.square().sum(-1).sqrt()  # [pairs, layers], [(pairs,) layers]
    cosines = (h * a).sum(-1) / h_norm / a_norm  # [pairs, layers]
    cosines = torch.where((h_norm == 0) | (a_norm == 0), 0.0, cosines)
    return (cosines * weights).sum(-1)


def similarity_torch(hidden: Tensor, anchor: Tensor, weights: Tensor) -> Tensor:
    """The same without temporaries of hidden's size, where that is float32."""
    h, a = hidden.float(), anchor.float()
    norms = torch.linalg.vector_norm(h, dim=-1) * torch.linalg.vector_norm(a, dim=-1)  # [pairs, layers]
    cosines = torch.linalg.vecdot(h, a) / norms
    return torch.where(norms == 0, 0.0, cosines) @ weights


@triton.jit
def _similarity_kernel(
    hidden_ptr,
    anchor_ptr,
    weights_ptr,
    out_ptr,
    stride_hidden_pair,
    stride_hidden_layer: tl.constexpr,
    stride_anchor_pair,  # 0 where all pairs have the same
    stride_anchor_layer: tl.constexpr,
    LAYERS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < SIZE
    hidden_ptr += pair * stride_hidden_pair + cols
    anchor_ptr += pair * stride_anchor_pair + cols
    total = 0.0
    for layer in tl.range(LAYERS, num_stages=2):  # the next layer is on its way while this one is summed
        h = tl.load(hidden_ptr, mask=mask, other=0.0).to(tl.float32)
        a = tl.load(anchor_ptr, mask=mask, other=0.0).to(tl.float32)
        hidden_ptr += stride_hidden_layer
        anchor_ptr += stride_anchor_layer
        h_square, a_square = tl.sum(h * h, 0), tl.sum(a * a, 0)
        cosine = tl.sum(h * a, 0) * tl.rsqrt(h_square) * tl.rsqrt(a_square)
        cosine = tl.where((h_square == 0) | (a_square == 0), 0.0, cosine)
        total += tl.load(weights_ptr + layer) * cosine
    tl.store(out_ptr + pair, total)


def similarity_triton(hidden: Tensor, anchor: Tensor, weights: Tensor) -> Tensor:
    """The kernel.

    Raises:
        ConfigError: a dtype, a shape or a stride that the kernel cannot serve.
    """
    _check(hidden, anchor, weights)
    pairs, layers, size = hidden.shape
    out = torch.empty(pairs, dtype=torch.float32, device=hidden.device)
    if pairs == 0:
        return out
    block, num_warps = row_launch(size)
    _similarity_kernel[(pairs,)](
        hidden,
        anchor,
        weights,
        out,
        hidden.stride(0),
        hidden.stride(1),
        anchor.stride(0) if anchor.dim() == 3 else 0,
        anchor.stride(-2),
        LAYERS=layers,
        SIZE=size,
        BLOCK=block,
        enable_fp_fusion=True,
        num_warps=num_warps,
        num_stages=2,
    )
    return out


def _check(hidden: Tensor, anchor: Tensor, weights: Tensor) -> None:
    if hidden.dtype not in DTYPES or anchor.dtype != hidden.dtype:
        types = f"hidden is {hidden.dtype} and the anchor {anchor.dtype}"
        raise ConfigError(f"{types}; both must be one of float32, float16 and bfloat16, the same")
    if hidden.dim() != 3 or anchor.shape not in (hidden.shape, hidden.shape[1:]):
        shapes = f"hidden has shape {list(hidden.shape)} and the anchor {list(anchor.shape)}"
        raise ConfigError(f"{shapes}; they must be [pairs, layers, size], and the anchor that or [layers, size]")
    if not 0 < hidden.shape[2] <= MAX_SIZE:
        raise ConfigError(f"vectors have {hidden.shape[2]} numbers; the kernel takes 1 to {MAX_SIZE}")
    if hidden.shape[0] > 0 and hidden.shape[2] > 1 and (hidden.stride(2) != 1 or anchor.stride(-1) != 1):
        strides = f"{hidden.stride(2)} and {anchor.stride(-1)}"
        raise ConfigError(f"vectors of hidden and anchor have strides {strides}; they must be contiguous, of stride 1")
    if weights.shape != hidden.shape[1:2] or weights.dtype != torch.float32 or not weights.is_contiguous():
        given = f"weights are {list(weights.shape)} {weights.dtype}"
        raise ConfigError(f"{given}; they must be [{hidden.shape[1]}] float32, contiguous")

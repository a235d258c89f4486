"""Root-mean-square normalisation, y = x / sqrt(mean(x^2) + eps) * weight over the last dimension, and with a sum.

Accumulates in float32. The normalised value is cast to the weight's dtype before the weight is applied: Llama's
weights have the model's dtype, so that the product is rounded twice; Gemma's are kept in float32, with their offset
added, so that it is rounded once. `add_rms_norm` is what stands between two blocks of a decoder: it adds a block's
output to the residual stream, which is rounded to its dtype, and norms the sum for the next block.

In the kernel one program holds one row in registers, so that memory is read once. Rows of up to 16384 numbers.
Source: Zhang and Sennrich 2019, arXiv 1910.07467.
"""

import torch
from torch import Tensor

from minirksc.errors import ConfigError
from minirksc.kernels.jit import DTYPES, launch_options, tl, triton

MAX_SIZE = 16384


def rms_norm_reference(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """The specification: normalise in float32, cast to the weight's dtype, multiply, cast to x.dtype.

    Args:
        x: `[..., size]`, any float dtype.
        weight: `[size]`, dtype of x or float32; None for none.
        eps: number added to the mean square.

    Returns:
        `[..., size]`, dtype of x.
    """
    x32 = x.float()
    normed = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    return normed.to(x.dtype) if weight is None else (normed.to(weight.dtype) * weight).to(x.dtype)


def rms_norm_torch(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """The same in few passes and with one temporary of x's size.

    torch's own rms_norm makes several on a CPU: 18 times slower at 1024 tokens of 576.
    """
    x32 = x.float()
    norm: Tensor = torch.linalg.vector_norm(x32, dim=-1, keepdim=True)  # [..., 1]
    scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    normed = x32 * scale
    return normed.to(x.dtype) if weight is None else normed.to(weight.dtype).mul_(weight).to(x.dtype)


def add_rms_norm_reference(
    hidden: Tensor, update: Tensor, update_norm: Tensor | None, weight: Tensor | None, eps: float
) -> Tensor:
    """The specification of a residual addition and the norm that follows it.

    Args:
        hidden: `[tokens, size]`, the residual stream; overwritten by its sum with the update.
        update: `[tokens, size]`, dtype of hidden.
        update_norm: `[size]`, the weight of a norm of the update before the addition; None for no such norm.
        weight: `[size]`, the weight of the norm of the sum; None for a norm without a weight.
        eps: number added to both mean squares.

    Returns:
        `[tokens, size]`, the normed sum, dtype of hidden.
    """
    if update_norm is not None:
        update = rms_norm_reference(update, update_norm, eps)
    hidden.copy_((hidden.float() + update.float()).to(hidden.dtype))
    return rms_norm_reference(hidden, weight, eps)


def add_rms_norm_torch(
    hidden: Tensor, update: Tensor, update_norm: Tensor | None, weight: Tensor | None, eps: float
) -> Tensor:
    """The same in few passes."""
    if update_norm is not None:
        update = rms_norm_torch(update, update_norm, eps)
    return rms_norm_torch(hidden.add_(update), weight, eps)


@triton.jit
def _rms_normed(x, weight, eps, dtype, SIZE: tl.constexpr):
    # x: [BLOCK] float32, zero from SIZE on. The result is float32 that holds the rounded value.
    normed = x * tl.rsqrt(tl.sum(x * x, 0) / SIZE + eps)
    if weight is not None:
        normed = normed.to(weight.dtype).to(tl.float32) * weight.to(tl.float32)
    return normed.to(dtype).to(tl.float32)


@triton.jit
def _rms_norm_kernel(
    x_ptr,  # overwritten by the sum where there is an update
    update_ptr,
    update_norm_ptr,
    weight_ptr,
    out_ptr,  # contiguous
    stride_x,
    stride_update,
    eps,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < SIZE
    dtype = x_ptr.dtype.element_ty
    x_ptr += row * stride_x
    # All loads come before the first sum, so that the row waits for memory once.
    x = tl.load(x_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    weight = None
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + cols, mask=mask, other=0.0)
    if update_ptr is not None:
        update = tl.load(update_ptr + row * stride_update + cols, mask=mask, other=0.0).to(tl.float32)
        if update_norm_ptr is not None:
            update_norm = tl.load(update_norm_ptr + cols, mask=mask, other=0.0)
            update = _rms_normed(update, update_norm, eps, dtype, SIZE)
        x = (x + update).to(dtype).to(tl.float32)
        tl.store(x_ptr + cols, x.to(dtype), mask=mask)
    out = _rms_normed(x, weight, eps, dtype, SIZE)
    tl.store(out_ptr + row * SIZE + cols, out.to(dtype), mask=mask)


def row_launch(size: int) -> tuple[int, int]:
    """(numbers that a program holds, its warps) for rows of this size.

    A warp gets 512 numbers: loads of 128 bits at 16 bits a number, for warps of 32 and of 64 threads.
    """
    block: int = triton.next_power_of_2(size)
    return block, min(16, max(1, block // 512))


def rms_norm_triton(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """The kernel.

    Raises:
        ConfigError: a dtype or a size that the kernel cannot serve.
    """
    size = x.shape[-1]
    _check(x, {"weight": weight})
    rows = x.reshape(-1, size)  # a view, unless leading dimensions of x do not follow each other
    rows = rows if rows.stride(-1) == 1 or size == 1 else rows.contiguous()
    return _launch(rows, None, None, weight, eps).view(x.shape)


def add_rms_norm_triton(
    hidden: Tensor, update: Tensor, update_norm: Tensor | None, weight: Tensor | None, eps: float
) -> Tensor:
    """The kernel: one launch, which reads hidden and the update once.

    Raises:
        ConfigError: a dtype, a shape or a stride that the kernel cannot serve.
    """
    size = hidden.shape[-1]
    _check(hidden, {"update_norm": update_norm, "weight": weight})
    if hidden.dim() != 2 or update.shape != hidden.shape or update.dtype != hidden.dtype:
        raise ConfigError(
            f"hidden is {list(hidden.shape)} {hidden.dtype} and the update {list(update.shape)} {update.dtype}; "
            "both must be [tokens, size] of one dtype"
        )
    if len(hidden) and size > 1 and (hidden.stride(1) != 1 or update.stride(1) != 1):
        strides = f"{hidden.stride(1)} and {update.stride(1)}"
        raise ConfigError(f"the rows of hidden and update have strides {strides}; they must be contiguous, of stride 1")
    return _launch(hidden, update, update_norm, weight, eps)


def _launch(
    rows: Tensor, update: Tensor | None, update_norm: Tensor | None, weight: Tensor | None, eps: float
) -> Tensor:
    """The normed rows, `[rows, size]`, after their update."""
    num_rows, size = rows.shape
    out = rows.new_empty(rows.shape)
    block, num_warps = row_launch(size)
    if num_rows:
        _rms_norm_kernel[(num_rows,)](
            rows,
            update,
            update_norm,
            weight,
            out,
            rows.stride(0),
            0 if update is None else update.stride(0),
            eps,
            SIZE=size,
            BLOCK=block,
            **launch_options(num_warps),
        )
    return out


def _check(x: Tensor, weights: dict[str, Tensor | None]) -> None:
    size = x.shape[-1]
    if x.dtype not in DTYPES:
        raise ConfigError(f"rows are {x.dtype}; the kernel takes float32, float16 and bfloat16")
    if not 0 < size <= MAX_SIZE:
        raise ConfigError(f"rows have {size} numbers; the kernel takes 1 to {MAX_SIZE}")
    for name, weight in weights.items():
        check_norm_weight(name, weight, size, x.dtype)


def check_norm_weight(name: str, weight: Tensor | None, size: int, dtype: torch.dtype) -> None:
    """Refuses the weight of a norm that a kernel cannot read.

    Args:
        name: name of the argument.
        weight: weight; None for none.
        size: number of elements that it must have.
        dtype: type of what is normed.

    Raises:
        ConfigError: a dtype, a shape or a stride is wrong.
    """
    if weight is None or (
        weight.shape == (size,) and weight.is_contiguous() and weight.dtype in (dtype, torch.float32)
    ):
        return
    given = f"{name} is {list(weight.shape)} {weight.dtype}"
    raise ConfigError(f"{given}; it must be [{size}], contiguous, {dtype} or float32")

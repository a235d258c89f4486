"""What the compiled operations can take: they are given addresses, and read and write as far as the sizes say.

Tensors are checked in each call, in a microsecond or two; a recorded step makes no calls. Slots, rows of weights and
whatever else are numbers in a tensor are checked where they are read (`kernels/native`), or in the plan of a step.
"""

import torch
from torch import Tensor

from minirksc.errors import ConfigError

DTYPES = (torch.float32, torch.bfloat16)


def is_plain(tensor: object, dtype: torch.dtype, *shape: int) -> bool:
    """Whether it is of the CPU, of this dtype and shape, number after number.

    Args:
        tensor: any object.
        dtype: type that it must have.
        shape: sizes that it must have.
    """
    return (
        isinstance(tensor, Tensor)
        and tensor.is_cpu
        and tensor.dtype is dtype
        and tensor.shape == shape
        and tensor.is_contiguous()
    )


def is_rows(tensor: object, dtype: torch.dtype, *shape: int) -> bool:
    """Whether it is of the CPU, of this dtype and shape, in any layout; arguments as of `is_plain`."""
    return isinstance(tensor, Tensor) and tensor.is_cpu and tensor.dtype is dtype and tensor.shape == shape


def is_some(tensor: object, num_dimensions: int) -> bool:
    """Whether it is of the CPU, of one of `DTYPES`, and each token's numbers lie together, apart from those of others.

    Args:
        tensor: any object.
        num_dimensions: number of dimensions that it must have: 2, `[tokens, size]`, or 3, `[tokens, heads, size]`.
    """
    if not (isinstance(tensor, Tensor) and tensor.is_cpu and tensor.dtype in DTYPES):
        return False
    shape, stride = tensor.shape, tensor.stride()
    if len(shape) != num_dimensions or (stride[-1] != 1 and shape[-1] > 1):
        return False
    size = shape[-1]
    if num_dimensions == 3:
        if stride[1] != size and shape[1] > 1:
            return False
        size *= shape[1]
    return stride[0] >= size or shape[0] < 2


def refused(name: str, given: object, limit: str) -> ConfigError:
    """The error that says what was given for an argument, and what it must be."""
    if isinstance(given, Tensor):
        is_strided = given.layout is torch.strided
        strides = f", strides {list(given.stride())}" if is_strided and not given.is_contiguous() else ""
        what = f"{list(given.shape)} {given.dtype} on {given.device}{strides}"
    else:
        what = repr(given)[:80]
    return ConfigError(f"{name} is {what}; the compiled operation takes {limit}")

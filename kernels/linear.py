"""Linear layer, y = x W^T + b, with its weight packed once for the processor that it runs on.

Packing at load instead of at every call makes a decode step on a CPU about twice as fast. A CPU that computes in the
weight's own 16 bits takes oneDNN's blocked layout. Any other computes in float32, since emulated 16-bit products are
several times slower; it reads the weight in 16 bits all the same where float16 holds it exactly (`half_weight`), and
else as float32 in oneDNN's layout. The packed weight is the only copy: the caller drops the plain one.
"""

from collections.abc import Sequence

import torch
from minirksc.kernels.half_weight import HalfWeight
from torch import Tensor
from torch.nn import functional as F


def computes_in(dtype: torch.dtype, device: torch.device) -> bool:
    """True where matrix products of this dtype run on the hardware, not in emulation."""
    if device.type != "cpu" or dtype == torch.float32:
        return True
    return dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def auto_dtype(stored: object, device: torch.device) -> torch.dtype:
    """What dtype="auto" means: the checkpoint's own where the device computes in it, else float32.

    Args:
        stored: the dtype's name in config.json; anything else counts as float32.
        device: where the model would run.
    """
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(str(stored), torch.float32)
    return dtype if computes_in(dtype, device) else torch.float32


class PlainWeight:
    """A weight as it is: the reference, and what a GPU reads."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight
        self.num_bytes = weight.numel() * weight.itemsize

    def rows(self, indices: Sequence[int]) -> Tensor:
        """These rows, `[indices, in_features]`."""
        return self._weight[list(indices)]

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """`[tokens, in_features]` -> x W^T + bias."""
        return F.linear(x, self._weight, bias)


class OneDnnWeight:
    """A weight in the blocked layout of oneDNN for this processor."""

    def __init__(self, weight: Tensor) -> None:
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight)
        self.num_bytes = weight.numel() * weight.itemsize

    def rows(self, indices: Sequence[int]) -> Tensor:
        """These rows, `[indices, in_features]`; unpacks all."""
        dense: Tensor = self._packed.to_dense()
        return dense[list(indices)]

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """`[tokens, in_features]` -> x W^T + bias."""
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, bias, "none", [], "")
        return out


class Linear:
    """A weight and an optional bias, ready to be applied.

    Args:
        weight: `[out_features, in_features]`.
        bias: `[out_features]` or None.
        prepack: pack for the CPU; False keeps the plain form (the reference).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, prepack: bool = True) -> None:
        if prepack and not computes_in(weight.dtype, weight.device):
            weight, bias = weight.float(), None if bias is None else bias.float()
        self._prepack = prepack
        self._dtype = weight.dtype
        self._weight = _pack(weight) if prepack and weight.device.type == "cpu" else PlainWeight(weight)
        self._bias = bias

    @property
    def num_bytes(self) -> int:
        """Of the weight, as it is read in each pass."""
        return self._weight.num_bytes

    def rows(self, indices: Sequence[int]) -> "Linear":
        """The layer that computes these outputs alone."""
        bias = None if self._bias is None else self._bias[list(indices)]
        return Linear(self._weight.rows(indices), bias, self._prepack)

    def __call__(self, x: Tensor) -> Tensor:
        """`[tokens, in_features]` -> `[tokens, out_features]`, dtype of x."""
        return self._weight(x.to(self._dtype), self._bias).to(x.dtype)


def _pack(weight: Tensor) -> HalfWeight | OneDnnWeight | PlainWeight:
    half = HalfWeight.pack(weight) if weight.dtype == torch.float32 else None
    if half is not None:
        return half
    return OneDnnWeight(weight) if torch._C._has_mkldnn else PlainWeight(weight)

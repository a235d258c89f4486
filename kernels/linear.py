"""Linear layer, y = x W^T + b, with its weight packed once for the processor that it runs on.

On a CPU oneDNN reads a weight in its own blocked layout; packing at load instead of at every call makes a decode
step about twice as fast. A 16-bit weight on a CPU that does not compute in that type is packed as float32, which
holds it exactly: emulated 16-bit products are several times slower. The packed weight is the only copy: the
caller drops the plain one.
"""

from collections.abc import Sequence

import torch
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


class Linear:
    """A weight and an optional bias, ready to be applied.

    Args:
        weight: `[out_features, in_features]`.
        bias: `[out_features]` or None.
        prepack: pack for oneDNN on a CPU; False keeps the plain form (the reference).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, prepack: bool = True) -> None:
        self.packed = prepack and weight.device.type == "cpu" and torch._C._has_mkldnn
        if self.packed and not computes_in(weight.dtype, weight.device):
            weight, bias = weight.float(), None if bias is None else bias.float()
        self.dtype = weight.dtype
        self.bias = bias
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight) if self.packed else weight

    def rows(self, indices: Sequence[int]) -> "Linear":
        """The layer that computes these outputs alone; unpacks the weight once."""
        dense = self.weight.to_dense() if self.packed else self.weight  # [out_features, in_features]
        bias = None if self.bias is None else self.bias[list(indices)]
        return Linear(dense[list(indices)], bias, prepack=self.packed)

    def __call__(self, x: Tensor) -> Tensor:
        """`[tokens, in_features]` -> `[tokens, out_features]`, dtype of x."""
        if self.packed:
            out: Tensor = torch.ops.mkldnn._linear_pointwise(x.to(self.dtype), self.weight, self.bias, "none", [], "")
            return out.to(x.dtype)
        return F.linear(x, self.weight, self.bias)

"""Linear layer, y = x W^T + b, with its weight packed once for the processor that it runs on.

On a CPU oneDNN reads a weight in its own blocked layout; packing at load instead of at every call makes a
decode step about twice as fast. The packed weight is the only copy: the caller drops the plain one.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def can_prepack(dtype: torch.dtype, device: torch.device) -> bool:
    """True where oneDNN takes a prepacked weight of this dtype on this machine."""
    if device.type != "cpu" or not torch._C._has_mkldnn:
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


class Linear:
    """A weight and an optional bias, ready to be applied.

    Args:
        weight: `[out_features, in_features]`.
        bias: `[out_features]` or None.
        prepack: pack for oneDNN where it can be done; False keeps the plain form (the reference).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, prepack: bool = True) -> None:
        self.bias = bias
        self.packed = prepack and can_prepack(weight.dtype, weight.device)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight) if self.packed else weight

    def __call__(self, x: Tensor) -> Tensor:
        """`[tokens, in_features]` -> `[tokens, out_features]`."""
        if self.packed:
            out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
            return out
        return F.linear(x, self.weight, self.bias)

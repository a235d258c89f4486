"""Weights of 8 bits for the compiled products: an approximation, asked for by name.

Half the bytes to read, and twice as many products an instruction. Every 32 consecutive numbers of a row become whole
numbers from -127 to 127 times one scale, max |w| / 127 rounded to bfloat16. What the matrix is multiplied with is
rounded in the same way, for each product anew, with scales in float32. Products and sums of a group are exact; groups
are added in float32:

    y = sum over groups g of s_g t_g sum over i in g of q_i p_i,    w_i = s_g q_i,  x_i = t_g p_i

The instruction takes q_i + 128, from 1 to 255: what that adds, 128 times the sum of a group's p_i, is taken off.

One scale for a whole row, and 64 numbers of a token to a scale, would be faster by a tenth, and are 2.2 times as far
from the model that is rounded (mean divergence of the next token's distribution, SmolLM2-135M).

Source: GGML's Q8_0 (github.com/ggml-org/ggml, src/ggml-quants.c), whose scales are float16.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from minirksc.kernels.native.ops import has_bf16_products, native
from minirksc.kernels.weights.native_weight import BF16_PANEL, Empty, check_product

GROUP = 32
"""Consecutive numbers that share a scale; `INT8_GROUP` in `kernels/native/ops.h`."""

QUAD = 4

LARGEST = 127
SHIFT = 128

AT_ONCE = 2**19
"""Numbers that are rounded at once: they stay in the cache, and float32 copies take no room to speak of."""


def why_not_int8(dtype: torch.dtype) -> str | None:
    """Why there are no such products; None: there are.

    Args:
        dtype: type of the activations.
    """
    if dtype != torch.bfloat16:
        return f"it multiplies bfloat16 activations, not {str(dtype).removeprefix('torch.')}"
    return None if has_bf16_products else "this processor has no AVX512-BF16 and VNNI, or the extension was not built"


def round_groups(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest whole numbers.

    Args:
        weight: `[out_features, in_features]`; a last group that is not full has zeros at its end.

    Returns:
        (`[out_features, groups, GROUP]` int8, scales `[out_features, groups]` bfloat16); NaN or an infinity makes its
        group's scale NaN.
    """
    groups = F.pad(weight.float(), (0, -weight.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
    scales = (groups.abs().amax(-1) / LARGEST).bfloat16()  # [out_features, groups]
    numbers = groups / scales.float().clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(-1)
    numbers = numbers.round_().nan_to_num_(0).clamp_(-LARGEST, LARGEST)
    return numbers.to(torch.int8), scales.where(scales.isfinite(), torch.nan)


class Int8Weight:
    """A matrix of 8 bits, in panels of 32 outputs, of each of which four consecutive inputs are one word.

    A row's result does not depend on the rows that it is computed with.

    Args:
        weight: `[out_features, in_features]`, any floating dtype.
        empty: function that allocates the packed form.

    Attributes:
        num_bytes: bytes that a product reads.
        dtype: type of what it multiplies.
    """

    dtype = torch.bfloat16

    def __init__(self, weight: Tensor, empty: Empty = torch.empty) -> None:
        out_features, in_features = weight.shape
        self._shape = (out_features, in_features)
        panels, groups = -(-out_features // BF16_PANEL), -(-in_features // GROUP)
        self._packed = empty(panels, groups * GROUP // QUAD, BF16_PANEL, QUAD, dtype=torch.uint8)
        self._scales = empty(panels, groups, BF16_PANEL, dtype=torch.bfloat16)
        self._groups = groups
        some = max(1, AT_ONCE // (BF16_PANEL * in_features))  # panels
        for begin in range(0, panels, some):
            rows = weight[begin * BF16_PANEL : (begin + some) * BF16_PANEL]
            numbers, scales = round_groups(F.pad(rows, (0, 0, 0, -len(rows) % BF16_PANEL)))
            numbers = (numbers.view(torch.uint8) ^ SHIFT).view(-1, BF16_PANEL, groups * GROUP // QUAD, QUAD)  # + 128
            self._packed[begin : begin + some] = numbers.transpose(1, 2)
            self._scales[begin : begin + some] = scales.view(-1, BF16_PANEL, groups).transpose(1, 2)
        self.num_bytes = sum(one.numel() * one.itemsize for one in (self._packed, self._scales))

    def rows(self, indices: Tensor) -> Tensor:
        """These rows, rounded: `[indices]` int64 -> `[indices, in_features]` float32."""
        panels, columns = indices // BF16_PANEL, indices % BF16_PANEL
        words = self._packed.view(torch.int32).squeeze(-1)  # [panels, in_features / 4, 32]
        numbers = words[panels, :, columns].view(torch.uint8).float().sub_(SHIFT).unflatten(1, (-1, GROUP))
        scales = self._scales[panels, :, columns].unsqueeze(-1)  # [indices, groups, 1]
        rows: Tensor = (numbers * scales).flatten(1)[:, : self._shape[1]]
        return rows

    def __call__(self, x: Tensor, bias: Tensor | None, in_float32: bool = False) -> Tensor:
        """`[tokens, in_features]` bfloat16 -> x W^T + bias, `[tokens, out_features]`; on request as it is summed up.

        Raises:
            ConfigError: it would misread x or the bias.
        """
        check_product(x, bias, self._shape, self.dtype)
        x = x.contiguous()
        out_features, in_features = self._shape
        num_tokens = x.shape[0]
        numbers = x.new_empty(num_tokens, self._groups, GROUP, dtype=torch.int8)
        scales = x.new_empty(num_tokens, self._groups, 2, dtype=torch.int32)
        out = x.new_empty(num_tokens, out_features, dtype=torch.float32 if in_float32 else None)
        native.linear_int8(
            x, self._packed, self._scales, bias, numbers, scales, out, len(x), in_features, out_features, in_float32
        )
        return out

"""Weights of 8 bits for the compiled products: an approximation, asked for by name.

Half the bytes to read, and twice as many products an instruction. Each row of the matrix is rounded to whole numbers
from -127 to 127 times a scale of its own: scale = max |w| / 127. What is multiplied with it is rounded too, for each
product anew: every 64 consecutive numbers of a token have one scale of theirs. Products and sums of a group are exact;
groups are added in float32:

    y = s sum over groups g of t_g sum over i in g of q_i p_i,    w_i = s q_i,  x_i = t_g p_i

The instruction takes q_i + 128, from 1 to 255: what that adds, 128 times the sum of a group's p_i, is taken off.

Source: rounding activations as they come, a scale a group, as in GGML's Q8_0 (github.com/ggml-org/ggml,
src/ggml-quants.c); rounding whole rows of the weight, as in LLM.int8() (arXiv 2208.07339).
"""

import torch
from minirksc.kernels.native_ops import has_bf16_products, native, pointer
from minirksc.kernels.native_weight import BF16_PANEL, Empty
from torch import Tensor

GROUP = 64
"""Numbers of a token that share a scale; `INT8_GROUP` in `kernels/native/ops.h`."""

QUAD = 4
LANES = 16
LARGEST = 127
SHIFT = 128


def why_not_int8(dtype: torch.dtype) -> str | None:
    """Why there are no such products; None: there are.

    Args:
        dtype: of the activations.
    """
    if dtype != torch.bfloat16:
        return f"it multiplies bfloat16 activations, not {str(dtype).removeprefix('torch.')}"
    return None if has_bf16_products else "this processor has no AVX512-BF16 and VNNI, or the extension was not built"


def round_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest whole numbers.

    Args:
        weight: `[out_features, in_features]`.

    Returns:
        (int8 of the same shape, scales `[out_features]` float32); NaN or an infinity makes a row's scale NaN.
    """
    weight = weight.float()
    scales = weight.abs().amax(1) / LARGEST
    numbers = (weight / scales.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(1)).round_().nan_to_num_(0)
    scales = scales.where(scales.isfinite(), torch.nan)
    return numbers.clamp_(-LARGEST, LARGEST).to(torch.int8), scales


class Int8Weight:
    """A matrix of 8 bits, in panels of 32 outputs, of each of which four consecutive inputs are one word.

    A row's result does not depend on the rows that it is computed with.

    Args:
        weight: `[out_features, in_features]`, any floating dtype.
        empty: allocates the packed form.

    Attributes:
        num_bytes: that a product reads.
        dtype: of what it multiplies.
    """

    dtype = torch.bfloat16

    def __init__(self, weight: Tensor, empty: Empty = torch.empty) -> None:
        self._shape = out_features, in_features = weight.shape
        panels, groups = -(-out_features // BF16_PANEL), -(-in_features // GROUP)
        numbers, scales = round_rows(weight)
        padded = torch.full((panels * BF16_PANEL, groups * GROUP), SHIFT, dtype=torch.uint8)
        padded[:out_features, :in_features] = numbers.short() + SHIFT
        self._packed = empty(panels, groups * GROUP // QUAD, BF16_PANEL, QUAD, dtype=torch.uint8)
        self._packed.copy_(padded.view(panels, BF16_PANEL, -1, QUAD).transpose(1, 2))
        self._scales = empty(panels * BF16_PANEL, dtype=torch.float32).zero_()
        self._scales[:out_features] = scales
        self._groups = groups
        self.num_bytes = sum(one.numel() * one.itemsize for one in (self._packed, self._scales))

    def rows(self, indices: Tensor) -> Tensor:
        """These rows, rounded: `[indices]` int64 -> `[indices, in_features]` float32."""
        words = self._packed.view(torch.int32).squeeze(-1)  # [panels, in_features / 4, 32]
        numbers = words[indices // BF16_PANEL, :, indices % BF16_PANEL].view(torch.uint8)
        return (numbers[:, : self._shape[1]].float() - SHIFT) * self._scales[indices].unsqueeze(1)

    def __call__(self, x: Tensor, bias: Tensor | None, in_float32: bool = False) -> Tensor:
        """`[tokens, in_features]` bfloat16 -> x W^T + bias, `[tokens, out_features]`; on request as it is summed up."""
        x = x.contiguous()
        out_features, in_features = self._shape
        num_tokens = x.shape[0]
        numbers = x.new_empty(num_tokens, self._groups, GROUP, dtype=torch.int8)
        scales = x.new_empty(num_tokens, self._groups, 2, dtype=torch.int32)
        out = x.new_empty(num_tokens, out_features, dtype=torch.float32 if in_float32 else None)
        native.linear_int8(
            x.data_ptr(),
            self._packed.data_ptr(),
            self._scales.data_ptr(),
            pointer(bias),
            numbers.data_ptr(),
            scales.data_ptr(),
            out.data_ptr(),
            num_tokens,
            in_features,
            out_features,
            in_float32,
        )
        return out

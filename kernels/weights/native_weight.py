"""bfloat16 weights packed for the compiled products (`kernels/native`).

Decoding on a CPU waits for the weights, and a prompt for the arithmetic.
- A processor that multiplies bfloat16 (AVX512-BF16) computes as it is stored, with sums in float32 (`linear_bf16.cpp`).
- Any other computes in float32. A bfloat16 number is the upper half of a float32, and to widen it takes a shift, in a
  register: so the weights are read in half the bytes, and nothing is rounded but the sums (`linear.cpp`). A matrix with
  a number that bfloat16 cannot hold has no such form.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from minirksc.errors import ConfigError
from minirksc.kernels.native.check import is_plain, is_rows, refused
from minirksc.kernels.native.ops import has_bf16_products, native

BF16_PANEL = 32
WIDENED_PANEL = 16
"""Outputs that are packed side by side."""

Empty = Callable[..., Tensor]
"""Allocates the packed form, called as `torch.empty` is."""


class PanelWeight:
    """A matrix that the compiled code has packed, in panels of outputs.

    Args:
        packed: numbers as `pack` has made them.
        shape: numbers of outputs and of inputs, (out_features, in_features).

    Attributes:
        num_bytes: bytes that a product reads.
        dtype: type of what it multiplies.
    """

    dtype: torch.dtype

    def __init__(self, packed: Tensor, shape: tuple[int, int]) -> None:
        self.num_bytes = packed.numel() * packed.itemsize
        self._packed = packed
        self._shape = shape

    def rows(self, indices: Tensor) -> Tensor:
        """These rows as they were given, `[indices]` int64 -> `[indices, in_features]`, of `dtype`.

        Raises:
            ConfigError: there is no such row.
        """
        if not isinstance(indices, Tensor) or indices.dim() != 1 or not is_rows(indices, torch.int64, len(indices)):
            raise refused("indices", indices, "[indices] int64 of the CPU")
        out_features, in_features = self._shape
        indices = indices.contiguous()
        out = torch.empty(len(indices), in_features, dtype=self.dtype)
        unpack = native.unpack_rows_bf16 if self.dtype == torch.bfloat16 else native.unpack_rows
        bad: int = unpack(self._packed, indices, out, *out.shape, out_features)
        if bad >= 0:
            raise ConfigError(f"row {int(indices[bad])} is none of the matrix, which has 0 to {out_features - 1}")
        return out


class Bf16Weight(PanelWeight):
    """A matrix in panels of 32 outputs, of each of which two consecutive inputs are one word.

    A row's result does not depend on the rows that it is computed with.
    """

    dtype = torch.bfloat16  # packed: [panels, in_features / 2, 32] int32

    @staticmethod
    def pack(weight: Tensor, empty: Empty = torch.empty) -> "Bf16Weight | None":
        """Packs `[out_features, in_features]` bfloat16; None: not on this processor, or an odd number of inputs.

        Raises:
            ConfigError: it would misread the weight.
        """
        out_features, in_features = _shape(weight, Bf16Weight.dtype)
        if not has_bf16_products or in_features % 2:
            return None
        packed = empty(-(-out_features // BF16_PANEL), in_features // 2, BF16_PANEL, dtype=torch.int32)
        native.pack_weight_bf16(weight.contiguous(), packed, out_features, in_features)
        return Bf16Weight(packed, (out_features, in_features))

    def __call__(self, x: Tensor, bias: Tensor | None, in_float32: bool = False) -> Tensor:
        """`[tokens, in_features]` bfloat16 -> x W^T + bias, `[tokens, out_features]`; on request as it is summed up.

        Raises:
            ConfigError: it would misread x or the bias.
        """
        check_product(x, bias, self._shape, self.dtype)
        out_features, in_features = self._shape
        out = x.new_empty(x.shape[0], out_features, dtype=torch.float32 if in_float32 else None)
        native.linear_bf16(x.contiguous(), self._packed, bias, out, x.shape[0], in_features, out_features, in_float32)
        return out


class WidenedWeight(PanelWeight):
    """A matrix in panels of 16 outputs, of which i and i + 8 are one word; multiplied in float32."""

    dtype = torch.float32  # packed: [panels, in_features, 8] int32

    @staticmethod
    def pack(weight: Tensor, empty: Empty = torch.empty) -> "WidenedWeight | None":
        """Packs `[out_features, in_features]` float32; None: bfloat16 does not hold it exactly.

        Raises:
            ConfigError: it would misread the weight.
        """
        out_features, in_features = _shape(weight, WidenedWeight.dtype)
        packed = empty(-(-out_features // WIDENED_PANEL), in_features, WIDENED_PANEL // 2, dtype=torch.int32)
        is_exact = native.pack_weight(weight.contiguous(), packed, out_features, in_features)
        return WidenedWeight(packed, (out_features, in_features)) if is_exact else None

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """`[tokens, in_features]` float32 -> x W^T + bias, `[tokens, out_features]`.

        Raises:
            ConfigError: it would misread x or the bias.
        """
        check_product(x, bias, self._shape, self.dtype)
        out_features, in_features = self._shape
        out = x.new_empty(x.shape[0], out_features)
        native.linear(x.contiguous(), self._packed, bias, out, x.shape[0], in_features, out_features)
        return out


def check_product(x: Tensor, bias: Tensor | None, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Refuses what a product by a matrix of this shape would misread.

    Args:
        x: rows that are multiplied.
        bias: numbers that are added; None for none.
        shape: numbers of outputs and of inputs, (out_features, in_features).
        dtype: type that both must have.

    Raises:
        ConfigError: it is one of them.
    """
    out_features, in_features = shape
    if not isinstance(x, Tensor) or x.dim() != 2 or not is_rows(x, dtype, x.shape[0], in_features):
        raise refused("x", x, f"[tokens, {in_features}] {dtype} of the CPU")
    if bias is not None and not is_plain(bias, dtype, out_features):
        raise refused("bias", bias, f"[{out_features}] {dtype} of the CPU, contiguous")


def _shape(weight: Tensor, dtype: torch.dtype) -> tuple[int, int]:
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not is_rows(weight, dtype, *weight.shape):
        raise refused("weight", weight, f"[out_features, in_features] {dtype} of the CPU")
    out_features, in_features = weight.shape
    return out_features, in_features

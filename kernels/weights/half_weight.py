"""Weights that float16 holds exactly, read in half the bytes and multiplied in float32.

Decoding on a CPU waits for the weights. A checkpoint of 16 bits that runs in float32 needs no 32 to be read: FBGEMM's
kernels take float16 weights and float32 activations, and widen each weight in a register. bfloat16 has fewer digits
than float16 but a wider range, so that a power of two brings nearly every matrix into it; where it does not bring all
numbers of a matrix exactly, there is no half weight of it. Nothing is rounded: products and sums are float32.

Source: FBGEMM, PackedGemmMatrixFP16 (github.com/pytorch/FBGEMM, include/fbgemm/FbgemmFP16.h), through torch's
`quantized.linear_dynamic_fp16`, which quantises nothing but the weight.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

ENGINES = ("fbgemm", "x86")
"""Of torch's quantised operators: those that have the float16 kernels. "x86" is the default there, ARM has another."""

MAX_EXPONENT = 15
"""The largest number is brought below 2 to this; float16 ends just below 2**16."""

CHUNK_NUMBERS = 2**21
"""Numbers that are packed at once: packing reads across rows, five times slower where they leave the cache."""


class HalfWeight:
    """A matrix in float16, in chunks of rows.

    Args:
        chunks: rows of the matrix, packed by `quantized.linear_prepack_fp16`.
        exponent: power of two that the numbers were multiplied by.
        chunk_rows: number of rows of each chunk but the last.
        num_numbers: number of elements of the matrix.

    Attributes:
        num_bytes: bytes that a product reads.
        dtype: type of what it multiplies.
    """

    dtype = torch.float32

    def __init__(self, chunks: Sequence[torch.ScriptObject], exponent: int, chunk_rows: int, num_numbers: int) -> None:
        self.num_bytes = 2 * num_numbers
        self._chunks = chunks
        self._factor = 2.0**-exponent
        self._chunk_rows = chunk_rows

    @staticmethod
    def pack(weight: Tensor) -> "HalfWeight | None":
        """Packs `[out_features, in_features]` float32 of the CPU; None: it cannot be exact, or torch has no FBGEMM."""
        if torch.backends.quantized.engine not in ENGINES:
            return None
        half = _pack(weight, 0)
        if half is None:
            largest = float(max(-weight.amin(), weight.amax()))
            half = _pack(weight, MAX_EXPONENT - math.frexp(largest)[1]) if 0 < largest < math.inf else None
        return half

    def rows(self, indices: Tensor) -> Tensor:
        """These rows as they were given, `[indices, in_features]` float32; unpacks a chunk for each."""
        return torch.stack([self._row(index) for index in indices.tolist()])

    def _row(self, index: int) -> Tensor:
        chunk, row = divmod(index, self._chunk_rows)
        weight: Tensor = torch.ops.quantized.linear_unpack_fp16(self._chunks[chunk])[0]
        return weight[row] * self._factor

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """`[tokens, in_features]` float32 -> x W^T + bias, `[tokens, out_features]`."""
        parts = [torch.ops.quantized.linear_dynamic_fp16(x, chunk) for chunk in self._chunks]
        out = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        if self._factor != 1:
            out.mul_(self._factor)
        return out if bias is None else out.add_(bias)


def _pack(weight: Tensor, exponent: int) -> HalfWeight | None:
    """The weight times 2 to the exponent; None: it is not exact."""
    chunk_rows = max(1, CHUNK_NUMBERS // weight.shape[1])
    chunks = []
    for rows in weight.split(chunk_rows):
        scaled = rows * 2.0**exponent if exponent else rows
        if not (torch.equal(scaled.half().float(), scaled) and math.isfinite(float(scaled.sum()))):
            return None
        chunks.append(torch.ops.quantized.linear_prepack_fp16(scaled.contiguous(), None))
    return HalfWeight(chunks, exponent, chunk_rows, weight.numel())

"""Linear layer, y = x W^T + b, with its weight packed once for the processor that it runs on.

Packing at load instead of at every call makes a decode step on a CPU about twice as fast. A CPU that computes in the
weight's own 16 bits takes our panels (`native_weight`), or oneDNN's blocked layout where nothing is compiled. Any other
computes in float32, since emulated 16-bit products are several times slower; it reads the weight in 16 bits all the
same where they hold it exactly (`native_weight`, or `half_weight`), and else as float32 in oneDNN's layout. The packed
weight is the only copy: the caller drops the plain one.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from minirksc.kernels.huge_pages import Arena
from minirksc.kernels.weights.half_weight import HalfWeight
from minirksc.kernels.weights.int8_weight import Int8Weight
from minirksc.kernels.weights.native_weight import Bf16Weight, WidenedWeight


def computes_in(dtype: torch.dtype, device: torch.device) -> bool:
    """True where matrix products of this dtype run on the hardware, not in emulation."""
    if device.type != "cpu" or dtype == torch.float32:
        return True
    return dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def auto_dtype(stored: object, device: torch.device) -> torch.dtype:
    """What dtype="auto" means: the checkpoint's own where the device computes in it, else float32.

    Args:
        stored: name of the dtype in config.json; anything else counts as float32.
        device: device that the model would run on.
    """
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(str(stored), torch.float32)
    return dtype if computes_in(dtype, device) else torch.float32


class Weight(Protocol):
    """One form of a matrix `[out_features, in_features]`.

    Attributes:
        num_bytes: bytes that a product reads.
        dtype: type of what it multiplies.
    """

    num_bytes: int
    dtype: torch.dtype

    def rows(self, indices: Tensor) -> Tensor:
        """These rows, to what it holds of them: `[indices]` int64 -> `[indices, in_features]`."""
        ...

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """`[tokens, in_features]` -> x W^T + bias, `[tokens, out_features]`, dtype of both."""
        ...


class PlainWeight:
    """A weight as it is: the reference, and what a GPU reads."""

    def __init__(self, weight: Tensor) -> None:
        self.dtype = weight.dtype
        self._weight = weight
        self.num_bytes = weight.numel() * weight.itemsize

    def rows(self, indices: Tensor) -> Tensor:
        """As in `Weight`."""
        return F.embedding(indices, self._weight)

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """As in `Weight`."""
        return F.linear(x, self._weight, bias)


class OneDnnWeight:
    """A weight in the blocked layout of oneDNN for this processor."""

    def __init__(self, weight: Tensor) -> None:
        self.dtype = weight.dtype
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight)
        self.num_bytes = weight.numel() * weight.itemsize

    def rows(self, indices: Tensor) -> Tensor:
        """As in `Weight`; unpacks all."""
        dense: Tensor = self._packed.to_dense()
        return dense[indices]

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """As in `Weight`."""
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, bias, "none", [], "")
        return out


Pack = Callable[[Tensor], Weight]
"""Makes the form of a matrix that a backend multiplies with."""


def pack_torch(weight: Tensor) -> Weight:
    """The best form that torch has for this CPU."""
    if not computes_in(weight.dtype, weight.device):
        weight = weight.float()
    half = HalfWeight.pack(weight) if weight.dtype == torch.float32 else None
    if half is not None:
        return half
    return OneDnnWeight(weight) if torch._C._has_mkldnn else PlainWeight(weight)


class NativePacker:
    """Packs the matrices of one model: the compiled form where there is one that is the fastest of this CPU.

    Else torch's. The compiled ones lie together in large pages.

    Args:
        int8: whether they are rounded to 8 bits; only where `int8_weight.why_not_int8` has nothing against it.
    """

    def __init__(self, *, int8: bool = False) -> None:
        self._memory = Arena()
        self._int8 = int8

    def __call__(self, weight: Tensor) -> Weight:
        """See `Pack`."""
        if self._int8:
            return Int8Weight(weight, self._memory.empty)
        computes = computes_in(weight.dtype, weight.device)
        packed: Weight | None = None
        if weight.dtype == torch.bfloat16 and computes:
            packed = Bf16Weight.pack(weight, self._memory.empty)
        elif torch.backends.cpu.get_cpu_capability() == "AVX2" and (weight.dtype == torch.float32 or not computes):
            packed = WidenedWeight.pack(weight.float(), self._memory.empty)
        return pack_torch(weight) if packed is None else packed


class Linear:
    """A weight and an optional bias, ready to be applied.

    Args:
        weight: `[out_features, in_features]`.
        bias: `[out_features]` or None.
        pack: function that makes the form of the weight; `PlainWeight` is the reference.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, pack: Pack = PlainWeight) -> None:
        self._pack = pack
        self._device = weight.device
        self._weight = pack(weight)
        self._bias = None if bias is None else bias.to(self._weight.dtype)

    @property
    def num_bytes(self) -> int:
        """Bytes of the weight, as it is read in each pass."""
        return self._weight.num_bytes

    def embedder(self) -> Callable[[Tensor], Tensor] | None:
        """Reads rows of the weight, where its form gives them as fast as a plain matrix does; else None."""
        return None if isinstance(self._weight, OneDnnWeight | HalfWeight) else self._weight.rows

    def rows(self, indices: Sequence[int]) -> "Linear":
        """The layer that computes these outputs alone."""
        places = torch.tensor(list(indices), dtype=torch.int64, device=self._device)
        bias = None if self._bias is None else self._bias[places]
        return Linear(self._weight.rows(places), bias, self._pack)

    def __call__(self, x: Tensor) -> Tensor:
        """`[tokens, in_features]` -> `[tokens, out_features]`, dtype of x."""
        weight = self._weight
        if x.dtype is weight.dtype:  # `to` costs more than asking, in each of a step's hundreds of products
            return weight(x, self._bias)
        return weight(x.to(weight.dtype), self._bias).to(x.dtype)

    def in_float32(self, x: Tensor) -> Tensor:
        """The same, `[tokens, out_features]` float32, not rounded to the dtype of x where that can be avoided."""
        if isinstance(self._weight, Bf16Weight | Int8Weight) and x.dtype is self._weight.dtype:
            return self._weight(x, self._bias, in_float32=True)
        return self(x).float()

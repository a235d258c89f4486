"""The compiled operations of `kernels/native`, under the signatures of their references.

On a CPU a decode step is hundreds of small operations, and torch takes 2 to 10 us for each of the several that make up
one of ours. The extension does one in one call, in one pass over the data. It is built where there is a compiler when
the package is installed, and nothing depends on it: `why_not` says why it cannot serve, and the torch forms do.

It runs float32 and bfloat16 on x86-64 with AVX2, and shares the threads of torch: both use one OpenMP. An int8 cache
goes through the torch forms.
"""

import importlib
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import torch
from minirksc.kernels.confidence import Confidence
from minirksc.kernels.gated_act import ACTIVATIONS
from minirksc.kernels.kv_store import kv_store_torch
from minirksc.kernels.layer_cache import LayerCache
from minirksc.kernels.rope import RopeTables
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16)
INSTRUCTIONS = ("AVX2", "AVX512")


def _load() -> tuple[ModuleType | None, str | None]:
    """(the extension, why it is not there)."""
    capability = torch.backends.cpu.get_cpu_capability()
    if capability not in INSTRUCTIONS:
        return None, f"this processor has no AVX2 (torch calls it {capability})"
    try:
        return importlib.import_module("minirksc.kernels._native"), None
    except ImportError as error:
        return None, f"it was not built ({error}); install with a C++ compiler and Python's headers at hand"


native: Any
native, _missing = _load()

has_bf16_products = native is not None and bool(native.has_bf16_products())
"""The processor multiplies bfloat16 numbers (AVX512-BF16)."""

is_bfloat16 = {torch.float32: False, torch.bfloat16: True}
"""No other dtype may reach the compiled operations: they would misread its numbers."""


def why_not(dtype: torch.dtype, head_dims: Iterable[int]) -> str | None:
    """Why the compiled operations cannot serve a model; None: they can.

    Args:
        dtype: of its activations.
        head_dims: of its layers.
    """
    if native is None:
        return _missing
    if dtype not in DTYPES:
        return f"it computes in float32 and bfloat16, not in {str(dtype).removeprefix('torch.')}"
    odd = sorted(size for size in head_dims if size % 8)
    return f"head_dim {odd[0]} is no multiple of 8" if odd else None


def rms_norm_native(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Arguments and result as in `rms_norm_reference`."""
    x = x.contiguous()
    out = torch.empty_like(x)
    _norm(x.view(-1, x.shape[-1]), None, None, weight, out, eps)
    return out


def add_rms_norm_native(
    hidden: Tensor, update: Tensor, update_norm: Tensor | None, weight: Tensor | None, eps: float
) -> Tensor:
    """Arguments and result as in `add_rms_norm_reference`; `hidden` has rows of consecutive numbers."""
    out = hidden.new_empty(hidden.shape)
    _norm(hidden, update if update.stride(-1) == 1 else update.contiguous(), update_norm, weight, out, eps)
    return out


def _norm(
    x: Tensor, update: Tensor | None, update_norm: Tensor | None, weight: Tensor | None, out: Tensor, eps: float
) -> None:
    some_weight = update_norm if weight is None else weight
    dtypes = {one.dtype for one in (update_norm, weight) if one is not None}
    if len(dtypes) > 1 or not dtypes <= {torch.float32, x.dtype}:  # another would be misread, beyond its end
        raise TypeError(f"norm weights are {dtypes} beside {x.dtype}; they must be of one dtype, float32 or that one")
    native.add_rms_norm(
        x.data_ptr(),
        pointer(update),
        pointer(update_norm),
        pointer(weight),
        out.data_ptr(),
        *x.shape,
        x.stride(0),
        0 if update is None else update.stride(0),
        is_bfloat16[x.dtype],
        some_weight is not None and some_weight.dtype == torch.float32,
        eps,
    )


def gated_act_native(gate_up: Tensor, activation: str) -> Tensor:
    """Arguments and result as in `gated_act_reference`."""
    gate_up = gate_up if gate_up.stride(-1) == 1 else gate_up.contiguous()
    num_tokens, width = gate_up.shape
    out = gate_up.new_empty(num_tokens, width // 2)
    native.gated_act(
        gate_up.data_ptr(),
        out.data_ptr(),
        num_tokens,
        width // 2,
        gate_up.stride(0),
        ACTIVATIONS.index(activation),
        is_bfloat16[gate_up.dtype],
    )
    return out


def kv_store_native(
    qkv: Tensor,
    num_heads: int,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    v_norm: bool,
    eps: float,
    rope: RopeTables | None,
    query_growth: Tensor | None,
    cache: LayerCache | None,
    slots: Tensor,
) -> None:
    """Arguments as in `kv_store_reference`. Every token has a slot: -1 is not among them."""
    if cache is not None and cache.scales is not None:
        kv_store_torch(qkv, num_heads, q_norm, k_norm, v_norm, eps, rope, query_growth, cache, slots)
        return
    num_tokens, num_all_heads, head_dim = qkv.shape
    cos, sin = (None, None) if rope is None else rope
    slots = slots.long()
    norm = k_norm if q_norm is None else q_norm
    native.kv_store(
        qkv.data_ptr(),
        pointer(q_norm),
        pointer(k_norm),
        pointer(cos),
        pointer(sin),
        pointer(query_growth),
        None if cache is None else cache.kv.data_ptr(),
        slots.data_ptr(),
        num_tokens,
        qkv.stride(0),
        num_heads,
        (num_all_heads - num_heads) // 2,
        head_dim,
        0 if cos is None else cos.shape[-1],
        v_norm,
        cache is not None and cache.is_tiled,
        is_bfloat16[qkv.dtype],
        norm is not None and norm.dtype == torch.float32,
        eps,
    )


def confidence_native(logits: Tensor) -> Confidence:
    """Argument and result as in `confidence_reference`."""
    rows, vocab = logits.shape
    logits = logits.float()
    if vocab > 1 and logits.stride(1) != 1:
        logits = logits.contiguous()
    argmax = torch.empty(rows, dtype=torch.int64)
    results = torch.empty(4, rows)
    native.confidence(logits.data_ptr(), argmax.data_ptr(), results.data_ptr(), rows, vocab, logits.stride(0))
    return Confidence(argmax, *results)


def pointer(tensor: Tensor | None) -> int | None:
    """Of its first number."""
    return None if tensor is None else tensor.data_ptr()

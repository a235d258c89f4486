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
from torch import Tensor

from minirksc.errors import ConfigError
from minirksc.kernels.confidence import Confidence
from minirksc.kernels.gated_act import ACTIVATIONS
from minirksc.kernels.kv.kv_store import kv_store_torch
from minirksc.kernels.kv.layer_cache import TILE
from minirksc.kernels.kv.placement import HeadNorms, Placement
from minirksc.kernels.native.check import DTYPES, is_plain, is_rows, is_some, refused

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
        dtype: type of its activations.
        head_dims: sizes of the heads of its layers.
    """
    if native is None:
        return _missing
    if dtype not in DTYPES:
        return f"it computes in float32 and bfloat16, not in {str(dtype).removeprefix('torch.')}"
    odd = sorted(size for size in head_dims if size % 8)
    return f"head_dim {odd[0]} is no multiple of 8" if odd else None


def rms_norm_native(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Arguments and result as in `rms_norm_reference`.

    Raises:
        ConfigError: a tensor that it would misread.
    """
    if not isinstance(x, Tensor) or not x.is_cpu or x.dtype not in DTYPES or x.dim() == 0:
        raise refused("x", x, "[..., size] float32 or bfloat16 of the CPU")
    x = x.contiguous()
    out = torch.empty_like(x)
    _norm(x.view(x.shape[:-1].numel(), x.shape[-1]), None, None, weight, out, eps)
    return out


def add_rms_norm_native(
    hidden: Tensor, update: Tensor, update_norm: Tensor | None, weight: Tensor | None, eps: float
) -> Tensor:
    """Arguments and result as in `add_rms_norm_reference`; `hidden` has rows of consecutive numbers.

    Raises:
        ConfigError: a tensor that it would misread.
    """
    if not is_some(hidden, 2):
        raise refused("hidden", hidden, "[tokens, size] float32 or bfloat16 of the CPU, each row by itself")
    if not is_rows(update, hidden.dtype, *hidden.shape):
        raise refused("update", update, f"{list(hidden.shape)} {hidden.dtype} of the CPU, as hidden")
    out = hidden.new_empty(hidden.shape)
    _norm(hidden, update if update.stride(-1) == 1 else update.contiguous(), update_norm, weight, out, eps)
    return out


def _norm(
    x: Tensor, update: Tensor | None, update_norm: Tensor | None, weight: Tensor | None, out: Tensor, eps: float
) -> None:
    is_float32 = _is_float32(update_norm, weight, x.shape[1], x.dtype)
    if x.numel() == 0:
        return
    strides = x.stride(0), 0 if update is None else update.stride(0)
    native.add_rms_norm(x, update, update_norm, weight, out, *x.shape, *strides, is_bfloat16[x.dtype], is_float32, eps)


def _is_float32(weight: Tensor | None, other: Tensor | None, size: int, dtype: torch.dtype) -> bool:
    """Whether two weights of norms are float32; else they are of the dtype of what is normed."""
    of = dtype
    for one in (weight, other):
        if isinstance(one, Tensor) and one.dtype is torch.float32:
            of = torch.float32
    for one in (weight, other):
        if one is not None and not is_plain(one, of, size):
            raise refused("a norm's weight", one, f"[{size}] {of} of the CPU, contiguous, one dtype for all norms")
    return of is torch.float32


def gated_act_native(gate_up: Tensor, activation: str) -> Tensor:
    """Arguments and result as in `gated_act_reference`.

    Raises:
        ConfigError: an activation that there is not, or a tensor that it would misread.
    """
    if activation not in ACTIVATIONS:
        raise ConfigError(f"activation {activation!r} is unknown; there are {', '.join(ACTIVATIONS)}")
    if isinstance(gate_up, Tensor) and gate_up.dim() and gate_up.stride(-1) != 1:
        gate_up = gate_up.contiguous()
    if not is_some(gate_up, 2) or gate_up.shape[1] % 2:
        raise refused("gate_up", gate_up, "[tokens, 2 * intermediate] float32 or bfloat16 of the CPU")
    num_tokens, width = gate_up.shape
    out = gate_up.new_empty(num_tokens, width // 2)
    if out.numel() > 0:
        kind = ACTIVATIONS.index(activation), is_bfloat16[gate_up.dtype]
        native.gated_act(gate_up, out, num_tokens, width // 2, gate_up.stride(0), *kind)
    return out


def kv_store_native(qkv: Tensor, norms: HeadNorms, placement: Placement) -> None:
    """Arguments as in `kv_store_reference`. Every token has a slot: -1 is not among them.

    Raises:
        ConfigError: a tensor that it would misread, or a slot that the cache has not; nothing is written then.
    """
    num_heads, q_norm, k_norm, v_norm, eps = norms
    rope, query_growth, cache, slots = placement
    if cache is not None and cache.scales is not None:
        kv_store_torch(qkv, norms, placement)
        return
    check_heads("qkv", qkv)
    num_tokens, num_all_heads, head_dim = qkv.shape
    num_kv_heads = (num_all_heads - num_heads) // 2
    if not 0 < num_heads <= num_all_heads or num_heads + 2 * num_kv_heads != num_all_heads:
        raise ConfigError(f"{num_heads} heads of q among {num_all_heads}; the others must be as many of k as of v")
    is_float32 = _is_float32(q_norm, k_norm, head_dim, qkv.dtype)
    cos, sin = (None, None) if rope is None else rope
    if rope is not None:
        rotary_dim = cos.shape[-1] if isinstance(cos, Tensor) and cos.dim() else 0
        for name, table in (("cos", cos), ("sin", sin)):
            if not is_plain(table, qkv.dtype, num_tokens, 1, rotary_dim) or rotary_dim % 2 or rotary_dim > head_dim:
                limit = f"[{num_tokens}, 1, even and up to {head_dim}] {qkv.dtype} of the CPU, contiguous"
                raise refused(name, table, f"{limit}, as its fellow")
    if query_growth is not None and not is_plain(query_growth, qkv.dtype, num_tokens, 1, 1):
        raise refused("query_growth", query_growth, f"[{num_tokens}, 1, 1] {qkv.dtype} of the CPU, contiguous")
    num_slots = 0
    if cache is not None:
        num_slots = slots_of(cache.kv, qkv.dtype, num_kv_heads, head_dim)
        slots = slots.long()
        if not is_plain(slots, torch.int64, num_tokens):
            raise refused("slots", slots, f"[{num_tokens}] integers of the CPU, contiguous")
    if qkv.numel() == 0:
        return
    stored = (None, None) if cache is None else (cache.kv, slots)
    sizes = num_tokens, qkv.stride(0), num_heads, num_kv_heads, head_dim, 0 if cos is None else cos.shape[-1]
    kinds = v_norm, cache is not None and cache.is_tiled, is_bfloat16[qkv.dtype], is_float32
    bad: int = native.kv_store(qkv, q_norm, k_norm, cos, sin, query_growth, *stored, num_slots, *sizes, *kinds, eps)
    if bad >= 0:
        raise ConfigError(f"slot {int(slots[bad])} of token {bad} is none of the cache, which has 0 to {num_slots - 1}")


def check_heads(name: str, heads: Tensor) -> None:
    """Refuses what is not `[tokens, heads, head_dim]`, the heads of a token one after the other.

    Args:
        name: name of the argument.
        heads: heads of all tokens.

    Raises:
        ConfigError: it is something else.
    """
    if not is_some(heads, 3):
        raise refused(name, heads, "[tokens, heads, head_dim] float32 or bfloat16 of the CPU, a token's heads together")


def slots_of(kv: Tensor, dtype: torch.dtype, num_kv_heads: int, head_dim: int) -> int:
    """How many slots a layer's cache has.

    Args:
        kv: numbers of the `LayerCache`.
        dtype: type that its numbers must have.
        num_kv_heads: number of heads that it must have.
        head_dim: size of a head that it must have.

    Raises:
        ConfigError: it is no such cache.
    """
    if isinstance(kv, Tensor) and kv.is_cpu and kv.dtype is dtype and kv.is_contiguous():
        blocks, size, *rest = kv.shape if kv.dim() > 1 else (0, 0)
        if rest == [2, num_kv_heads, head_dim]:
            return blocks * size
        if rest == [2, num_kv_heads, TILE, head_dim] and head_dim % 2 == 0:
            return blocks * size * TILE
    tiles = f"[blocks, tiles, 2, {num_kv_heads}, {TILE}, {head_dim}]"
    limit = f"[blocks, size, 2, {num_kv_heads}, {head_dim}] or {tiles} {dtype} of the CPU, contiguous"
    raise refused("the cache", kv, limit)


def confidence_native(logits: Tensor) -> Confidence:
    """Argument and result as in `confidence_reference`.

    Raises:
        ConfigError: it would misread the logits.
    """
    if not isinstance(logits, Tensor) or not logits.is_cpu or logits.dim() != 2 or logits.shape[1] == 0:
        raise refused("logits", logits, "[rows, vocab] of the CPU, of one number at least")
    rows, vocab = logits.shape
    logits = logits.float()
    if vocab > 1 and logits.stride(1) != 1:
        logits = logits.contiguous()
    argmax = torch.empty(rows, dtype=torch.int64)
    results = torch.empty(4, rows)
    native.confidence(logits, argmax, results, rows, vocab, logits.stride(0))
    return Confidence(argmax, *results)

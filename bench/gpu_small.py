"""Cases of `bench.gpu` for the small kernels: our launch against torch's ops, plain and compiled."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.harness import OURS
from minirksc.kernels import confidence, gated_act, rms_norm
from minirksc.kernels.kv import kv_store
from minirksc.kernels.kv.layer_cache import LayerCache
from minirksc.kernels.kv.placement import HeadNorms, Placement
from minirksc.kernels.rope import rope_tables

TOLERANCE = 0.01
"""Largest |out - exact| / |exact| as norms, as for the attention."""

Args = tuple[Any, ...]


@dataclass(frozen=True)
class SmallCase:
    """One op at one size.

    Attributes:
        name: op and sizes.
        make: function device -> new arguments, the same numbers each time.
        results: function (arguments, what the op returned) -> what is compared.
        num_bytes: bytes that must go through memory.
        reference, composed, kernel: forms of the op.
    """

    name: str
    make: Callable[[torch.device], Args]
    results: Callable[[Args, Any], Sequence[Tensor]]
    num_bytes: int
    reference: Callable[..., Any]
    composed: Callable[..., Any]
    kernel: Callable[..., Any]

    def arms(self) -> dict[str, Callable[[], Callable[..., Any]]]:
        """Name -> makes the form of the op."""
        return {
            OURS: lambda: self.kernel,
            "torch": lambda: self.composed,
            "torch.compile": lambda: torch.compile(self.composed),
        }

    def prepare(self, form: Callable[..., Any], device: torch.device) -> tuple[Callable[[], object], float]:
        """A call of one form on arguments of its own, and its error at the first call.

        Ops that work in place go on with what they made: sizes are those of the first call, numbers stay finite.
        """
        exact_args, args = self.make(device), self.make(device)
        exact = self.results(exact_args, self.reference(*exact_args))
        got = self.results(args, form(*args))
        return lambda: form(*args), relative_error(got, exact)


def relative_error(got: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Largest |got - exact| / |exact|, as norms of whole tensors; inf for NaN."""
    errors = [(a.float() - b.float()).norm() / b.float().norm() for a, b in zip(got, exact, strict=True)]
    return float(torch.stack(errors).nan_to_num(float("inf")).max())


def all_cases(quick: bool, dtype: torch.dtype = torch.bfloat16) -> Iterator[SmallCase]:
    """Sizes of an 8B model at 1, 64 and 2048 tokens; logits of a vocabulary of 151,936 for 1 and 64."""
    for tokens in (1, 64) if quick else (1, 64, 2048):
        yield add_rms_norm_case(tokens, 4096, dtype)
        yield gated_act_case(tokens, 14336, dtype)
        yield kv_store_case(tokens, 32, 8, 128, dtype)
    for rows in (1, 64):
        yield confidence_case(rows, 151936)


def add_rms_norm_case(tokens: int, size: int, dtype: torch.dtype) -> SmallCase:
    """Residual sum and norm."""

    def make(device: torch.device) -> Args:
        normal = _normal(device, dtype)
        return normal(tokens, size), normal(tokens, size), None, normal(size), 1e-6

    return SmallCase(
        name=f"add_rms_norm {tokens} x {size}",
        make=make,
        results=lambda args, out: [args[0], out],
        num_bytes=(4 * tokens + 1) * size * dtype.itemsize,
        reference=rms_norm.add_rms_norm_reference,
        composed=rms_norm.add_rms_norm_torch,
        kernel=rms_norm.add_rms_norm_triton,
    )


def gated_act_case(tokens: int, intermediate: int, dtype: torch.dtype) -> SmallCase:
    """SwiGLU."""
    return SmallCase(
        name=f"gated_act {tokens} x {intermediate}",
        make=lambda device: (_normal(device, dtype)(tokens, 2 * intermediate), "silu"),
        results=lambda args, out: [out],
        num_bytes=3 * tokens * intermediate * dtype.itemsize,
        reference=gated_act.gated_act_reference,
        composed=gated_act.gated_act_torch,
        kernel=gated_act.gated_act_triton,
    )


def kv_store_case(tokens: int, num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> SmallCase:
    """Norm and rotation of queries and keys, and keys and values into the cache."""
    block_size, num_blocks = 16, tokens // 16 + 2

    def make(device: torch.device) -> Args:
        normal = _normal(device, dtype)
        inv_freq = 10000.0 ** -(torch.arange(0, head_dim, 2, device=device) / head_dim)
        rope = rope_tables(torch.arange(tokens, device=device), inv_freq, 1.0, dtype)
        cache = LayerCache(torch.zeros((num_blocks, block_size, 2, num_kv_heads, head_dim), dtype=dtype, device=device))
        slots = torch.arange(tokens, device=device).flip(0)
        qkv = normal(tokens, num_heads + 2 * num_kv_heads, head_dim)
        weights = normal(2, head_dim)
        norms = HeadNorms(num_heads, weights[0], weights[1], False, 1e-6)
        return qkv, norms, Placement(rope, None, cache, slots)

    return SmallCase(
        name=f"kv_store {tokens} x {num_heads}/{num_kv_heads} x {head_dim}",
        make=make,
        results=lambda args, _: [args[0], args[2].cache.kv],
        num_bytes=tokens * (2 * num_heads + 6 * num_kv_heads + 2) * head_dim * dtype.itemsize,
        reference=kv_store.kv_store_reference,
        composed=kv_store.kv_store_torch,
        kernel=kv_store.kv_store_triton,
    )


def confidence_case(rows: int, vocab: int) -> SmallCase:
    """Best token, its probability, entropy and log-sum-exp of float32 logits."""
    return SmallCase(
        name=f"confidence {rows} x {vocab}",
        make=lambda device: (_normal(device, torch.float32)(rows, vocab) * 4,),
        results=lambda args, out: list(out),
        num_bytes=rows * vocab * 4,
        reference=confidence.confidence_reference,
        composed=confidence.confidence_torch,
        kernel=confidence.confidence_triton,
    )


def _normal(device: torch.device, dtype: torch.dtype) -> Callable[..., Tensor]:
    random = torch.Generator(device).manual_seed(0)
    return lambda *shape: torch.empty(shape, dtype=dtype, device=device).normal_(generator=random)

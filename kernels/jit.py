"""Triton, or what stands in for it where it is not installed.

A kernel file holds its kernel beside the reference and the torch form, so it must be importable by people who only
use those. Without Triton `@triton.jit` leaves a function as it is; it is never called, since the "triton" backend
is refused (`kernels.backend`).
"""

from typing import Any

import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""Of the activations that kernels take."""

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:

    class _StandIn:
        """Has every attribute that a kernel file asks for when it is imported."""

        constexpr = None

        def jit(self, *args: Any, **options: Any) -> Any:
            """The function itself, or with options a decorator that gives it back."""
            return args[0] if args else lambda kernel: kernel

    triton = tl = _StandIn()

__all__ = ["DTYPES", "tl", "triton"]

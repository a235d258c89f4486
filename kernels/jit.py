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


def launch_options(num_warps: int, num_stages: int | None = 1) -> dict[str, int | bool]:
    """Options of a launch.

    Fusion of multiplication and addition is asked for, since its default changes with Triton 3.10.

    Args:
        num_warps: warps of a program.
        num_stages: stages of the software pipeline; None: as many as Triton takes for the device.
    """
    options: dict[str, int | bool] = {"enable_fp_fusion": True, "num_warps": num_warps}
    return options if num_stages is None else {**options, "num_stages": num_stages}


__all__ = ["DTYPES", "launch_options", "tl", "triton"]

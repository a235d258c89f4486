"""Gated activation of an MLP: act(gate) * up, with gate and up side by side in one tensor.

With s(x) = 1 / (1 + exp(-x)): silu(x) = x s(x); gelu_tanh(x) = x (1 + tanh(u)) / 2, which is x s(2u), for
u = sqrt(2 / pi) (x + 0.044715 x^3); gelu(x) = x (1 + erf(x / sqrt(2))) / 2. The reference and the kernel compute in
float32 and round once; the torch form rounds the activation too.

In the kernel one program takes a tile of a row, so that a single row of a wide MLP fills many multiprocessors.
Sources: Shazeer 2020, arXiv 2002.05202 (SwiGLU, GeGLU); Hendrycks and Gimpel 2016, arXiv 1606.08415 (GELU).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from minirksc.errors import ConfigError
from minirksc.kernels.jit import DTYPES, launch_options, tl, triton

ACTIVATIONS = ("silu", "gelu_tanh", "gelu")


def gated_act_reference(gate_up: Tensor, activation: str) -> Tensor:
    """The specification, in float32.

    Args:
        gate_up: `[tokens, 2 * intermediate]`, gate first.
        activation: name in `ACTIVATIONS`.

    Returns:
        `[tokens, intermediate]`, dtype of gate_up.
    """
    gate, up = gate_up.float().chunk(2, dim=-1)  # [tokens, intermediate] each
    if activation == "silu":
        act = gate / (1 + torch.exp(-gate))
    elif activation == "gelu_tanh":
        inner = (2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)
        act = 0.5 * gate * (1 + torch.tanh(inner))
    else:
        act = 0.5 * gate * (1 + torch.erf(gate / 2**0.5))
    return (act * up).to(gate_up.dtype)


def gated_act_torch(gate_up: Tensor, activation: str) -> Tensor:
    """The same in two passes, in the input's dtype."""
    gate, up = gate_up.chunk(2, dim=-1)  # [tokens, intermediate] each
    if activation == "silu":
        return F.silu(gate).mul_(up)
    return F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none").mul_(up)


@triton.jit
def _gated_act_kernel(
    gate_up_ptr,
    out_ptr,  # contiguous
    stride_token,
    INTERMEDIATE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < INTERMEDIATE
    gate_ptr = gate_up_ptr + token * stride_token
    gate = tl.load(gate_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_ptr + INTERMEDIATE + cols, mask=mask, other=0.0).to(tl.float32)
    if ACTIVATION == "silu":
        act = gate * tl.sigmoid(gate)
    elif ACTIVATION == "gelu_tanh":
        act = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))  # 2 sqrt(2 / pi)
    else:
        act = 0.5 * gate * (1 + tl.erf(gate * 0.7071067811865476))  # 1 / sqrt(2)
    out = (act * up).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + token * INTERMEDIATE + cols, out, mask=mask)


def tile_launch(intermediate: int) -> tuple[int, int]:
    """(columns of a tile, warps of its program).

    A warp gets 512 columns: loads of 128 bits at 16 bits a number, for warps of 32 and of 64 threads.
    """
    block = min(1024, triton.next_power_of_2(intermediate))
    return block, max(1, block // 512)


def gated_act_triton(gate_up: Tensor, activation: str) -> Tensor:
    """The kernel.

    Raises:
        ConfigError: an activation, a dtype, a shape or a stride that the kernel cannot serve.
    """
    if activation not in ACTIVATIONS:
        raise ConfigError(f"activation {activation!r} is unknown; the kernel has {', '.join(ACTIVATIONS)}")
    if gate_up.dtype not in DTYPES:
        raise ConfigError(f"gate_up is {gate_up.dtype}; the kernel takes float32, float16 and bfloat16")
    if gate_up.dim() != 2 or gate_up.shape[1] % 2 or gate_up.shape[1] == 0:
        raise ConfigError(f"gate_up has shape {list(gate_up.shape)}; it must be [tokens, 2 * intermediate]")
    tokens, intermediate = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((tokens, intermediate), dtype=gate_up.dtype, device=gate_up.device)
    if tokens == 0:
        return out
    if gate_up.stride(1) != 1:
        raise ConfigError(f"rows of gate_up have stride {gate_up.stride(1)}; they must be contiguous, of stride 1")
    block, num_warps = tile_launch(intermediate)
    _gated_act_kernel[(tokens, triton.cdiv(intermediate, block))](
        gate_up,
        out,
        gate_up.stride(0),
        INTERMEDIATE=intermediate,
        ACTIVATION=activation,
        BLOCK=block,
        **launch_options(num_warps),
    )
    return out

"""Gated activation of an MLP: act(gate) * up, with gate and up side by side in one tensor.

Source: Shazeer 2020, arXiv 2002.05202 (SwiGLU, GeGLU).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

ACTIVATIONS = ("silu", "gelu_tanh", "gelu")


def gated_act_reference(gate_up: Tensor, activation: str) -> Tensor:
    """The specification, in float32.

    Args:
        gate_up: `[tokens, 2 * intermediate]`, gate first.
        activation: one of `ACTIVATIONS`.

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


def gated_act(gate_up: Tensor, activation: str) -> Tensor:
    """The same in two passes, in the input's dtype."""
    gate, up = gate_up.chunk(2, dim=-1)  # [tokens, intermediate] each
    if activation == "silu":
        return F.silu(gate).mul_(up)
    return F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none").mul_(up)

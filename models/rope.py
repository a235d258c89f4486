"""Inverse wavelengths of rotary embeddings, by kind.

default: theta^(-2i/d). linear: that, divided by `factor` (positions are squeezed). llama3: long wavelengths
are divided by `factor`, short ones kept, and those between interpolated.

Source: Su et al. 2021, arXiv 2104.09864; Chen et al. 2023, arXiv 2306.15595 (linear); the Llama 3.1 model
card's reference code (llama3).
"""

import math

import torch
from minirksc.models.spec import RopeSpec
from torch import Tensor

from minirksc.errors import UnsupportedModelError

KINDS = ("default", "linear", "llama3")


def inv_freq(rope: RopeSpec) -> Tensor:
    """Radians per position of each rotated pair: `[rotary_dim / 2]` float32.

    Raises:
        UnsupportedModelError: the kind is not implemented.
    """
    exponents = torch.arange(0, rope.rotary_dim, 2, dtype=torch.int64).float() / rope.rotary_dim
    base = 1.0 / (rope.theta**exponents)  # [rotary_dim / 2]
    parameters = dict(rope.parameters)
    if rope.kind == "default":
        return base
    if rope.kind == "linear":
        return base / parameters["factor"]
    if rope.kind == "llama3":
        return _llama3(base, parameters)
    raise UnsupportedModelError(f"rope type {rope.kind!r} is not implemented; known: {', '.join(KINDS)}")


def _llama3(base: Tensor, parameters: dict[str, float]) -> Tensor:
    factor, original = parameters["factor"], parameters["original_max_position_embeddings"]
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    wavelength = 2 * math.pi / base
    blend = ((original / wavelength - low) / (high - low)).clamp(0, 1)  # 0: long wave, 1: short wave
    # In this order, so that each result is to the bit what transformers computes.
    return (1 - blend) * base / factor + blend * base

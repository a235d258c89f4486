"""Rotary embeddings by kind: how fast each pair of elements turns with the position.

With d = rotary_dim and i = 0 .. d/2 - 1, pair i turns by theta^(-2i/d) radians a position. What the kinds change:

- linear: divided by `factor`; positions are squeezed.
- dynamic: beyond the original length L, theta grows with the position p of a token:
  theta * (f (p + 1) / L - (f - 1))^(d / (d - 2)). Made from the token's own position, keys never change once they
  are written; a model that is given a long prompt at once elsewhere turns all of them by the prompt's last position.
- yarn: pairs that turn often within L are kept, slow ones divided by `factor`, those between interpolated.
- llama3: the same idea with bands of wavelengths.
- longrope: a factor a pair, from one list up to L and from another for all positions of a longer sequence.
- proportional: only the first pairs turn, as if all d did; the others stand still.

Source: Su et al. 2021, arXiv 2104.09864; Chen et al. 2023, arXiv 2306.15595 (linear); Peng et al. 2023, arXiv
2309.00071 (dynamic, yarn); the Llama 3.1 model card's reference code (llama3); Ding et al. 2024, arXiv 2402.13753
(longrope); transformers' modeling_rope_utils.py (proportional, and the spelling of every parameter).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from minirksc.errors import UnsupportedModelError
from minirksc.kernels.rope import rope_tables
from minirksc.models.spec import RopeSpec


class Rotary:
    """Cosines and sines of one `RopeSpec`.

    Args:
        rope: spec of the rotation.
        device: device on which tables are made.

    Raises:
        UnsupportedModelError: the kind is not implemented.
    """

    def __init__(self, rope: RopeSpec, device: torch.device) -> None:
        self._rope = rope
        self._freq = inv_freq(rope).to(device)  # [rotary_dim / 2]
        self._long_freq = inv_freq(rope, is_long=True).to(device) if rope.kind == "longrope" else None

    def tables(self, positions: Tensor, sequence_lens: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Tables for `kernels.rope`.

        Args:
            positions: `[tokens]` int64.
            sequence_lens: `[tokens]` int64, known length of each token's sequence.
            dtype: dtype of the result.

        Returns:
            (cos, sin), each `[tokens, 1, rotary_dim]`.
        """
        freq = self._freq
        if self._rope.kind == "dynamic":
            freq = _dynamic(self._rope, positions)  # [tokens, rotary_dim / 2]
        elif self._long_freq is not None:
            is_long = sequence_lens > self._rope.number("original_max_position_embeddings")
            freq = torch.where(is_long[:, None], self._long_freq, freq)  # [tokens, rotary_dim / 2]
        return rope_tables(positions, freq, self._rope.attention_factor, dtype)

    @property
    def can_shift(self) -> bool:
        """Whether keys at p and p + d are a rotation apart that depends on d alone; `UNSHIFTABLE` says why not."""
        return self._rope.kind not in UNSHIFTABLE

    def shift_tables(self, shifts: Tensor) -> tuple[Tensor, Tensor]:
        """Tables that turn keys stored at positions p into those of positions p + shift.

        The attention factor is in the stored keys already, and not in these tables. They are exact up to float32
        angles: an angle of position p is off by up to p * 2^-24 radians, here as in all tables.

        Args:
            shifts: `[tokens]` int64, new position minus old; may be negative.

        Returns:
            (cos, sin), each `[tokens, 1, rotary_dim]` float32, for `kernels.kv.kv_copy`.

        Raises:
            UnsupportedModelError: not `can_shift`.
        """
        if (kind := self._rope.kind) in UNSHIFTABLE:
            raise UnsupportedModelError(
                f"keys of {kind} rope cannot be moved to other positions: {UNSHIFTABLE[kind]}; compute them anew"
            )
        return rope_tables(shifts, self._freq, 1.0, torch.float32)


def inv_freq(rope: RopeSpec, is_long: bool = False) -> Tensor:
    """Radians per position of each rotated pair: `[rotary_dim / 2]` float32.

    Args:
        rope: spec of the rotation.
        is_long: whether it is for a sequence beyond the original length, where the kind makes a difference.

    Raises:
        UnsupportedModelError: the kind is not implemented.
    """
    if rope.kind not in KINDS:
        raise UnsupportedModelError(f"rope type {rope.kind!r} is not implemented; known: {', '.join(KINDS)}")
    name = "long_factor" if is_long else "short_factor"
    factors = torch.tensor(rope.numbers(name)) if rope.kind == "longrope" else 1.0
    return KINDS[rope.kind](rope, 1.0 / (factors * rope.theta ** _exponents(rope)))


def _exponents(rope: RopeSpec, device: torch.device | None = None) -> Tensor:
    return torch.arange(0, rope.rotary_dim, 2, dtype=torch.int64, device=device).float() / rope.rotary_dim


def _plain(rope: RopeSpec, base: Tensor) -> Tensor:
    return base


def _linear(rope: RopeSpec, base: Tensor) -> Tensor:
    return base / rope.number("factor")


def _dynamic(rope: RopeSpec, positions: Tensor) -> Tensor:
    """`[tokens, rotary_dim / 2]`: each token's own."""
    factor, original, dim = rope.number("factor"), rope.number("original_max_position_embeddings"), rope.rotary_dim
    length = (positions + 1).clamp(min=int(original)).float()
    theta = rope.theta * (factor * length / original - (factor - 1)) ** (dim / (dim - 2))  # [tokens]
    return 1.0 / (theta[:, None] ** _exponents(rope, positions.device))


def _yarn(rope: RopeSpec, base: Tensor) -> Tensor:
    dim, original = rope.rotary_dim, rope.number("original_max_position_embeddings")

    def pair_that_turns(times: float) -> float:
        """Index, as a fraction, of the pair that turns so often within the original length."""
        return dim * math.log(original / (times * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair_that_turns(rope.number("beta_fast")), pair_that_turns(rope.number("beta_slow"))
    if rope.number("truncate"):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high += 0.001 if low == high else 0.0
    slow = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)  # 0: fast, 1: slow
    return base / rope.number("factor") * slow + base * (1 - slow)


def _llama3(rope: RopeSpec, base: Tensor) -> Tensor:
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    wavelength = 2 * math.pi / base
    original = rope.number("original_max_position_embeddings")
    blend = ((original / wavelength - low) / (high - low)).clamp(0, 1)  # 0: long wave, 1: short wave
    # In this order, so that each result is to the bit what transformers computes.
    return (1 - blend) * base / rope.number("factor") + blend * base


def _proportional(rope: RopeSpec, base: Tensor) -> Tensor:
    num_turning = int(rope.number("partial_rotary_factor") * rope.rotary_dim // 2)
    still = torch.zeros(rope.rotary_dim // 2 - num_turning)
    return torch.cat((base[:num_turning], still)) / rope.number("factor")


KINDS: dict[str, Callable[[RopeSpec, Tensor], Tensor]] = {
    "default": _plain,
    "linear": _linear,
    "dynamic": _plain,
    "yarn": _yarn,
    "llama3": _llama3,
    "longrope": _plain,
    "proportional": _proportional,
}
"""From the plain radians a position to the kind's own. Dynamic and longrope depend on more: see `Rotary`."""

UNSHIFTABLE = {
    "dynamic": "beyond the original length each position turns at a speed of its own",
    "longrope": "how fast a key turns depends on how long its sequence was when it was written",
}
"""Kinds whose keys cannot be moved, see `Rotary.can_shift`: the rotation from p to p + d depends on more than d."""

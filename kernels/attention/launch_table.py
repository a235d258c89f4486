"""How the attention kernel is launched: a table, not a tuner.

Keyed by architecture, head_dim, block size and rows. The entries come from the static report
(`python -m bench.static_kernels`): none spills, none needs more shared memory than its target has, and K and V tiles
have two buffers wherever there is room. They are to be confirmed on each GPU (`python -m bench.gpu`).

No run-time autotune: it measures and waits at the first call of each shape, which breaks the capture of a CUDA graph,
and it ranks by launch overhead (https://github.com/triton-lang/triton/issues/10596).
"""

from typing import NamedTuple

import torch

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
SHORT_ROWS = (16, 32, 64)
PROGRAMS_A_MULTIPROCESSOR = 4
"""That its registers and shared memory hold at once, about, for items of few queries."""


class AttentionTile(NamedTuple):
    """A launch of the attention kernel.

    Attributes:
        rows: number of queries times heads of a group in one program.
        tile: number of keys an iteration.
        stages: stages of the software pipeline; keys and values have stages - 1 buffers.
        warps: number of warps of a program.
        registers: registers that a thread may have on NVIDIA; of 168, three programs of 4 warps fit a multiprocessor.
    """

    rows: int
    tile: int
    stages: int
    warps: int
    registers: int = 255


_T = AttentionTile
PREFILL = 0
"""Stands for rows that the table chooses."""

_NVIDIA_SHORT: dict[int, dict[int, AttentionTile]] = {
    16: {64: _T(16, 64, 3, 4, 128), 128: _T(16, 64, 3, 4, 168), 256: _T(16, 32, 3, 4), 512: _T(16, 16, 3, 4)},
    32: {64: _T(32, 64, 3, 4), 128: _T(32, 64, 3, 4), 256: _T(32, 32, 3, 4), 512: _T(32, 16, 3, 8)},
}
_SM_90 = {
    **_NVIDIA_SHORT,
    64: {64: _T(64, 64, 3, 4), 128: _T(64, 64, 3, 4), 256: _T(64, 32, 2, 8), 512: _T(32, 16, 3, 8)},
    PREFILL: {64: _T(64, 64, 3, 4), 128: _T(128, 64, 3, 8), 256: _T(64, 32, 2, 8), 512: _T(32, 16, 3, 8)},
}
TABLE: dict[str, dict[int, dict[int, AttentionTile]]] = {
    # Below 99 KiB of shared memory, so that sm_86, sm_89 and sm_120 can use it too.
    "sm_80": {
        **_NVIDIA_SHORT,
        64: {64: _T(64, 32, 3, 4), 128: _T(64, 32, 3, 4), 256: _T(64, 32, 2, 8), 512: _T(32, 16, 3, 8)},
        PREFILL: {64: _T(128, 64, 3, 8), 128: _T(64, 32, 3, 4), 256: _T(64, 32, 2, 8), 512: _T(32, 16, 3, 8)},
    },
    "sm_90": _SM_90,
    "sm_100": _SM_90,
    # 64 KiB of shared memory in all.
    "gfx942": {
        16: {64: _T(16, 32, 2, 4), 128: _T(16, 32, 2, 4), 256: _T(16, 16, 2, 4), 512: _T(16, 16, 2, 4)},
        32: {64: _T(32, 32, 2, 4), 128: _T(32, 32, 2, 4), 256: _T(32, 16, 2, 4), 512: _T(32, 16, 1, 4)},
        64: {64: _T(64, 32, 2, 4), 128: _T(64, 32, 2, 4), 256: _T(64, 16, 2, 8), 512: _T(32, 16, 1, 4)},
        PREFILL: {64: _T(64, 32, 2, 4), 128: _T(64, 32, 2, 4), 256: _T(64, 16, 2, 8), 512: _T(32, 16, 1, 4)},
    },
}
"""architecture -> rows -> padded head_dim, for 16-bit and int8 keys. Above 256, more than 32 rows spill."""

FLOAT32_TABLE = {64: _T(32, 16, 2, 4), 128: _T(32, 16, 2, 4), 256: _T(16, 16, 2, 8)}
"""padded head_dim -> the launch of all rows. Exact, but no way to speed: three products for one. Above head_dim 256 no
launch holds its numbers in registers."""


def architecture(device: torch.device) -> str:
    """The entry of `ARCHITECTURES` whose launches suit a device; a newer or unknown one gets the nearest older."""
    if device.type != "cuda":
        return "sm_90"  # the interpreter: any will do
    if torch.version.hip is not None:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) in ((8, 6), (8, 9)) or major >= 12:
        return "sm_80"  # 100 KiB of shared memory: what fits sm_80's entries, which are the smallest
    return "sm_100" if major >= 10 else "sm_90" if major == 9 else "sm_80"


def num_programs(device: torch.device) -> int:
    """Programs of few queries that a device runs at once, about."""
    if device.type != "cuda":
        return PROGRAMS_A_MULTIPROCESSOR
    return PROGRAMS_A_MULTIPROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count


def product_dtype(dtype: torch.dtype, kv_dtype: torch.dtype) -> torch.dtype:
    """What queries and keys are multiplied in: int8 numbers in float16, which holds them exactly."""
    return torch.float16 if kv_dtype == torch.int8 else dtype


def max_head_dim(dtype: torch.dtype) -> int:
    """The largest head_dim, for products of this dtype."""
    return 256 if dtype == torch.float32 else 512


def max_short_rows(head_dim: int, dtype: torch.dtype) -> int:
    """Queries times query heads a KV head, up to which a sequence's keys are split and shared; more is a prefill."""
    if dtype == torch.float32:
        return FLOAT32_TABLE[_padded(head_dim)].rows
    return 32 if head_dim > 256 else SHORT_ROWS[-1]


def attention_tile(
    architecture: str, head_dim: int, block_size: int, rows: int | None, dtype: torch.dtype, kv_dtype: torch.dtype
) -> AttentionTile:
    """The launch for a shape.

    Args:
        architecture: name of `ARCHITECTURES`.
        head_dim: size of a head, at most `max_head_dim`.
        block_size: number of tokens a block, a power of two. The entries of today suit all of them: a tile lies in a
            block, or is gathered from several.
        rows: number of queries times heads of a group that the largest item has, at most `max_short_rows`; None: it is
            one of a prompt.
        dtype: type of the queries.
        kv_dtype: type of the cache.
    """
    if product_dtype(dtype, kv_dtype) == torch.float32:
        return FLOAT32_TABLE[_padded(head_dim)]
    size = PREFILL if rows is None else next(size for size in SHORT_ROWS if size >= rows)
    tile = TABLE[architecture][size][_padded(head_dim)]
    if kv_dtype == torch.int8:  # keys and values are widened in registers
        tile = tile._replace(registers=255)
        if head_dim > 64 and tile.rows >= 64:
            return tile._replace(rows=64, tile=min(32, tile.tile))
    return tile


def _padded(head_dim: int) -> int:
    return max(64, 1 << (head_dim - 1).bit_length())


def compile_options(architecture: str, registers: int) -> dict[str, int]:
    """What bounds the registers of a thread.

    Without a number NVIDIA's assembler picks one, and spills some bytes to fit one more program on a multiprocessor.
    """
    return {} if architecture.startswith("gfx") else {"maxnreg": registers}


def dot_precision(architecture: str) -> str:
    """How float32 products are made: NVIDIA's tensor cores by three TF32 products, about as exact; AMD's directly."""
    return "ieee" if architecture.startswith("gfx") else "tf32x3"

"""FP8 weights: how they are scaled, and which scale belongs to which of them.

A weight is stored in e4m3 with scales beside it, one for the tensor, a row or a block; it is their product. It is
computed in float32 and rounded once, to the dtype that the model runs in. Activations are not rounded to FP8, as the
kernels that these checkpoints are published for do it: the result is more precise than theirs, and the scales of
activations and of the KV cache are of no use here.

Source: DeepSeek-V3 (arXiv 2412.19437), section 3.3, for blocks.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from minirksc.models.weights.entry import Scale, TensorEntry

Extent = tuple[int | None, int | None]
"""(rows, columns) that share one scale; None: all there are."""

WHOLE: Extent = (None, None)
ROW: Extent = (1, None)
WEIGHT_DTYPE = "F8_E4M3"
SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0")
SCALE_NAMES = ("weight_scale_inv", "weight_scale")
"""Beside `weight`. Both multiply: the first is the inverse of what the weight was multiplied with."""

OF_ACTIVATIONS = re.compile(r"\.(input_scale|activation_scale|output_scale|qscale_act|(attn\.)?(q|k|v|kv|prob)_scale)$")
"""Tensors beside the weights that say how activations, keys and values are rounded elsewhere."""


@dataclass(frozen=True)
class Fp8:
    """How the weights of an FP8 checkpoint are scaled.

    Attributes:
        extents: possible extents of a scale; which of them a weight has is told by its scale's shape.
    """

    extents: tuple[Extent, ...]

    def __str__(self) -> str:
        names = {WHOLE: "per tensor", ROW: "per channel"}
        said = [names.get(extent) or f"{extent[0]}x{extent[1]} blocks" for extent in self.extents]
        return f"fp8 ({', '.join(said)})"


def with_scales(entries: Mapping[str, TensorEntry], fp8: Fp8) -> tuple[dict[str, TensorEntry], list[str], list[str]]:
    """Gives each FP8 weight its scale.

    Args:
        entries: tensors by name.
        fp8: scales that they have.

    Returns:
        (the tensors without scales, names that are of no use, problems in words).
    """
    found: dict[str, TensorEntry] = {}
    skipped: list[str] = []
    problems: list[str] = []
    for name, entry in entries.items():
        module, _, kind = name.rpartition(".")
        if kind in SCALE_NAMES:
            weight = entries.get(f"{module}.weight")
            if weight is None:
                problems.append(f"{name} in {entry.file.name} is a scale without {module}.weight")
            elif weight.dtype != WEIGHT_DTYPE:
                problems.append(f"{name} in {entry.file.name} scales a weight of {weight.dtype}, not of {WEIGHT_DTYPE}")
        elif OF_ACTIVATIONS.search(name):
            skipped.append(name)
        else:
            if entry.dtype == WEIGHT_DTYPE:
                scales = [entries[f"{module}.{one}"] for one in SCALE_NAMES if f"{module}.{one}" in entries]
                scale = _scale(name, entry, scales, fp8)
                if isinstance(scale, str):
                    problems.append(scale)
                else:
                    entry = replace(entry, scale=scale)
            found[name] = entry
    if not any(entry.dtype == WEIGHT_DTYPE for entry in entries.values()):
        problems.append(
            f"no weight is of {WEIGHT_DTYPE}, and config.json says that they are {fp8}; if they have been widened, "
            "scales and all, remove its quantization_config"
        )
    return found, skipped, problems


def _scale(name: str, weight: TensorEntry, scales: list[TensorEntry], fp8: Fp8) -> Scale | str:
    """The scale of a weight, or what is wrong with it."""
    where = f"{name} in {weight.file.name}"
    if not name.endswith(".weight") or len(weight.shape) != 2:
        return f"{where} is of {weight.dtype} {list(weight.shape)}; only matrices are read so"
    if len(scales) != 1:
        return f"{where} is of {weight.dtype} and has {len(scales)} scales beside it, of {' and '.join(SCALE_NAMES)}"
    scale = scales[0]
    if scale.dtype not in SCALE_DTYPES:
        return f"unsupported dtype {scale.dtype} of the scale of {where}; known: {', '.join(SCALE_DTYPES)}"
    rows, columns = weight.shape
    expected = []
    for extent in fp8.extents:
        across = (min(extent[0] or rows, rows) or 1, min(extent[1] or columns, columns) or 1)
        blocks = (-(-rows // across[0]), -(-columns // across[1]))
        shapes: list[tuple[int, ...]] = [(), (1,)] if extent == WHOLE else [blocks]
        if scale.shape in shapes:
            return Scale(scale, across)
        expected += [str(list(shape)) for shape in shapes]
    return (
        f"mis-shaped scale of {where}: {list(scale.shape)}; a weight of {list(weight.shape)} in {fp8} has "
        f"{' or '.join(expected)}"
    )

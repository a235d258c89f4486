"""FP8 checkpoints: what config.json says about them, and which scale belongs to which weight.

A weight is stored in e4m3 with scales beside it, one for the tensor, a row or a block; it is their product. It is
computed in float32 and rounded once, to the dtype that the model runs in. Activations are not rounded to FP8, as the
kernels that these checkpoints are published for do it: the result is more precise than theirs, and the scales of
activations and of the KV cache are of no use here.

Source: DeepSeek-V3 (arXiv 2412.19437), section 3.3, for blocks; the configuration classes of transformers
(FineGrainedFP8Config) and of compressed-tensors (QuantizationArgs) for what the fields mean.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from minirksc.errors import UnsupportedModelError
from minirksc.models.weights.entry import Scale, TensorEntry

Extent = tuple[int | None, int | None]
"""(rows, columns) that share one scale; None: all there are."""

WHOLE: Extent = (None, None)
ROW: Extent = (1, None)
PUBLISHED_BLOCK = (128, 128)
"""What weight_block_size is for transformers where a file leaves it out."""

WEIGHT_DTYPE = "F8_E4M3"
SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0")
SCALE_NAMES = ("weight_scale_inv", "weight_scale")
"""Beside `weight`. Both multiply: the first is the inverse of what the weight was multiplied with."""

OF_ACTIVATIONS = re.compile(r"\.(input_scale|activation_scale|output_scale|qscale_act|(attn\.)?(q|k|v|kv|prob)_scale)$")
"""Tensors beside the weights that say how activations, keys and values are rounded elsewhere."""

FORMATS = ("float-quantized", "naive-quantized", "mixed-precision")
NEUTRAL: tuple[Any, ...] = (None, False, [], {})
# What the rest may be: fields that say how the weights were made, or what is done to activations.
FP8_FIELDS = frozenset(
    {
        *("quant_method", "fmt", "weight_block_size", "activation_scheme", "modules_to_not_convert", "ignored_layers"),
        *("modules_to_convert", "dequantize", "scale_fmt", "expert_dtype", "kv_cache_scheme", "kv_cache_quant_method"),
    }
)
COMPRESSED_FIELDS = frozenset(
    {
        *("quant_method", "format", "config_groups", "ignore", "kv_cache_scheme", "quantization_status", "version"),
        "global_compression_ratio",
    }
)
WEIGHTS_FIELDS = frozenset(
    {
        *("num_bits", "type", "symmetric", "strategy", "block_structure", "dynamic", "observer", "observer_kwargs"),
        *("scale_dtype", "zp_dtype"),
    }
)


@dataclass(frozen=True)
class Fp8:
    """How the weights of an FP8 checkpoint are scaled.

    Attributes:
        extents: of a scale; which of them a weight has is told by its scale's shape.
    """

    extents: tuple[Extent, ...]

    def __str__(self) -> str:
        names = {WHOLE: "per tensor", ROW: "per channel"}
        said = [names.get(extent) or f"{extent[0]}x{extent[1]} blocks" for extent in self.extents]
        return f"fp8 ({', '.join(said)})"


def read_fp8(quantised: Any) -> Fp8 | None:
    """What an object `quantization_config` says of FP8 weights; None where another method made them.

    Raises:
        UnsupportedModelError: it is a form of FP8 that is not read, or says something that nothing reads.
    """
    if not isinstance(quantised, Mapping):
        return None
    method = quantised.get("quant_method")
    if method == "fp8":
        _only("", quantised, FP8_FIELDS)
        _choice("fmt", quantised.get("fmt"), (None, "e4m3", "float8_e4m3fn"))
        _choice("activation_scheme", quantised.get("activation_scheme"), (None, "dynamic", "static"))
        _choice("scale_fmt", quantised.get("scale_fmt"), (None, "float", "ue8m0"))
        _choice("expert_dtype", quantised.get("expert_dtype"), (None, "fp8"))
        if "weight_block_size" not in quantised:
            return Fp8((WHOLE, PUBLISHED_BLOCK))
        block = quantised["weight_block_size"]
        return Fp8((WHOLE if block is None else _block("weight_block_size", block),))
    if method == "compressed-tensors":
        return _compressed(quantised)
    return None


def _compressed(quantised: Mapping[str, Any]) -> Fp8 | None:
    """Groups of modules, each with its own scheme; None where one of them is not of 8-bit floats."""
    groups = quantised.get("config_groups")
    schemes = list(groups.values()) if isinstance(groups, Mapping) else []
    extents: dict[Extent, None] = {}
    for scheme in schemes:
        weights = scheme.get("weights") if isinstance(scheme, Mapping) else None
        if not isinstance(weights, Mapping) or (weights.get("type"), weights.get("num_bits")) != ("float", 8):
            return None
        if any(each.get("format") not in (None, *FORMATS) for each in (quantised, scheme)):
            return None
        _only("config_groups: weights: ", weights, WEIGHTS_FIELDS)
        _choice("symmetric", weights.get("symmetric"), (None, True))
        strategy = _choice("strategy", weights.get("strategy"), ("tensor", "channel", "block"))
        if strategy == "block":
            extents[_block("block_structure", weights.get("block_structure"))] = None
        else:
            extents[WHOLE if strategy == "tensor" else ROW] = None
    sparsity = quantised.get("sparsity_config")
    is_dense = sparsity in NEUTRAL or (isinstance(sparsity, Mapping) and sparsity.get("format") == "dense")
    _only("", quantised, COMPRESSED_FIELDS | ({"sparsity_config"} if is_dense else frozenset()))
    return Fp8(tuple(extents)) if extents else None


def _only(where: str, given: Mapping[str, Any], known: frozenset[str]) -> None:
    unread = {name: value for name, value in given.items() if name not in known and value not in NEUTRAL}
    if unread:
        listed = ", ".join(f"{name!r:.60} {value!r:.60}" for name, value in list(unread.items())[:8])
        raise UnsupportedModelError(
            f"quantization_config: {where}nothing reads {listed}, which may change what the weights mean; take the "
            "checkpoint that it was made from"
        )


def _choice(name: str, value: Any, known: tuple[Any, ...]) -> Any:
    if not any(value is one or (isinstance(value, str) and value == one) for one in known):
        listed = ", ".join(repr(one) for one in known if one is not None)
        raise UnsupportedModelError(
            f"quantization_config: {name} {value!r:.80} is not supported; known for FP8 weights: {listed}"
        )
    return value


def _block(name: str, value: Any) -> Extent:
    sizes = value.split("x") if isinstance(value, str) else value
    if isinstance(sizes, list) and len(sizes) == 2:
        rows, columns = (int(n) if isinstance(n, str) and re.fullmatch("[0-9]{1,9}", n) else n for n in sizes)
        if type(rows) is type(columns) is int and 0 < rows < 2**31 and 0 < columns < 2**31:
            return rows, columns
    raise UnsupportedModelError(
        f"quantization_config: {name} {value!r:.80} must be two positive integers, rows and columns of a block"
    )


def with_scales(entries: Mapping[str, TensorEntry], fp8: Fp8) -> tuple[dict[str, TensorEntry], list[str], list[str]]:
    """Gives each FP8 weight its scale.

    Args:
        entries: tensors by name.
        fp8: how they are scaled.

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
        elif entry.dtype == WEIGHT_DTYPE:
            scales = [entries[f"{module}.{one}"] for one in SCALE_NAMES if f"{module}.{one}" in entries]
            scale = _scale(name, entry, scales, fp8)
            if isinstance(scale, str):
                problems.append(scale)
            else:
                entry = replace(entry, scale=scale)
            found[name] = entry
        else:
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
        shapes: list[tuple[int, ...]] = [(-(-rows // across[0]), -(-columns // across[1]))]
        if extent == WHOLE:
            shapes = [(), (1,)]
        if scale.shape in shapes:
            return Scale(scale, across)
        expected += [str(list(shape)) for shape in shapes]
    return (
        f"mis-shaped scale of {where}: {list(scale.shape)}; a weight of {list(weight.shape)} in {fp8} has "
        f"{' or '.join(expected)}"
    )

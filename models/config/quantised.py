"""Quantised checkpoints: which ones run, and the name of the method of all others.

Not every one says so in config.json, so tensors are looked at as well.

Source: the configuration classes of transformers (FineGrainedFP8Config) and of compressed-tensors (QuantizationArgs)
for what the fields mean.
"""

import re
from collections.abc import Mapping
from typing import Any

from minirksc.errors import UnsupportedModelError, listing
from minirksc.models.weights.fp8 import ROW, WHOLE, Extent, Fp8

SUFFIXES = {
    ".qweight": "AWQ",
    **dict.fromkeys((".weight_packed", ".weight_shape"), "compressed-tensors"),
    ".weight_scale_2": "nvfp4",
    **dict.fromkeys((".SCB", ".absmax", ".quant_map"), "bitsandbytes"),
    ".codebooks": "AQLM",
    ".weight_scale_inv": "fp8",
    ".weight_scale": "fp8 or int8",
    **dict.fromkeys((".input_scale", ".qscale_weight", ".qscale_act"), "fp8"),
    "_blocks": "mxfp4",
}
"""Ends of tensor names, the most telling first."""

ELSEWHERE = {"quantization": "MLX", "compression_config": "compressed-tensors"}
"""Fields of config.json in which tools say so that do not write quantization_config."""

PUBLISHED_BLOCK = (128, 128)
"""What weight_block_size is for transformers where a file leaves it out."""

FORMATS = ("float-quantized", "naive-quantized", "mixed-precision")
NEUTRAL: tuple[Any, ...] = (None, False, [], {})
Known = Mapping[str, tuple[Any, ...] | None]
"""Fields that are read or change nothing here, with the values that they may have; None for any."""

FP8_FIELDS: Known = {
    "fmt": (None, "e4m3", "float8_e4m3fn"),
    "activation_scheme": (None, "dynamic", "static"),
    "scale_fmt": (None, "float", "ue8m0"),
    "expert_dtype": (None, "fp8"),
    **dict.fromkeys(("quant_method", "weight_block_size", "modules_to_not_convert", "ignored_layers", "dequantize")),
    **dict.fromkeys(("modules_to_convert", "kv_cache_scheme", "kv_cache_quant_method")),
}
COMPRESSED_FIELDS: Known = {
    **dict.fromkeys(("quant_method", "format", "config_groups", "ignore", "kv_cache_scheme", "quantization_status")),
    **dict.fromkeys(("version", "global_compression_ratio")),
}
EXTENTS = {"tensor": WHOLE, "channel": ROW}
WEIGHTS_FIELDS: Known = {
    "symmetric": (None, True),
    "strategy": (*EXTENTS, "block"),
    **dict.fromkeys(("num_bits", "type", "block_structure", "dynamic", "observer", "observer_kwargs", "scale_dtype")),
    "zp_dtype": None,
}

ORDER = ".g_idx"
"""End of the names of tensors that say in which order columns were quantised; only GPTQ keeps it."""

ENDINGS = (ORDER, *SUFFIXES)
INTEGERS = ("U32", "I32", "U8", "I8")


def shown(value: Any) -> str:
    """A name out of a file as a message has it, however long it is and whatever it is made of."""
    return value if isinstance(value, str) and len(value) <= 200 and value.isprintable() else f"{value!r:.200}"


def refusal(what: str, method: str) -> UnsupportedModelError:
    """That a method is not read.

    Args:
        what: name of what is quantised.
        method: name of the method, and what tells of it.
    """
    return UnsupportedModelError(
        f"{what} is quantised ({method}); read are weights in float32, float16 and bfloat16, and in FP8 with a scale a "
        "tensor, a row or a block. Take the checkpoint that it was made from"
    )


def fp8_of(config: Mapping[str, Any]) -> Fp8 | None:
    """How the weights of a checkpoint are stored in FP8, as its config.json says; None where they are not quantised.

    Raises:
        UnsupportedModelError: they are quantised in a way that is not read.
    """
    given = config.get("quantization_config")
    if given is None:
        for name, tool in ELSEWHERE.items():
            if config.get(name) is not None:
                raise refusal("the checkpoint", f"{tool}: {name} {config[name]!r:.80}")
        return None
    fp8 = _fp8(given) if isinstance(given, Mapping) else None
    if fp8 is None:
        raise refusal("the checkpoint", _method(given))
    return fp8


def _fp8(quantised: Mapping[str, Any]) -> Fp8 | None:
    """What an object `quantization_config` says of FP8 weights; None where another method made them."""
    method = quantised.get("quant_method")
    if method == "fp8":
        _check("", quantised, FP8_FIELDS)
        if "weight_block_size" not in quantised:
            return Fp8((WHOLE, PUBLISHED_BLOCK))
        block = quantised["weight_block_size"]
        return Fp8((WHOLE if block is None else _block("weight_block_size", block),))
    return _compressed(quantised) if method == "compressed-tensors" else None


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
        _check("config_groups: weights: ", weights, WEIGHTS_FIELDS)
        extent = EXTENTS.get(weights["strategy"]) or _block("block_structure", weights.get("block_structure"))
        extents[extent] = None
    sparsity = quantised.get("sparsity_config")
    is_dense = isinstance(sparsity, Mapping) and sparsity.get("format") == "dense"
    _check("", quantised, {**COMPRESSED_FIELDS, "sparsity_config": None} if is_dense else COMPRESSED_FIELDS)
    return Fp8(tuple(extents)) if extents else None


def _check(where: str, given: Mapping[str, Any], known: Known) -> None:
    """Refuses a field that nothing reads and that is not neutral, and a value that is not read."""
    unread = {name: value for name, value in given.items() if name not in known and value not in NEUTRAL}
    if unread:
        listed = listing([f"{name!r:.60} {value!r:.60}" for name, value in unread.items()], ", ")
        raise UnsupportedModelError(
            f"quantization_config: {where}nothing reads {listed}, which may change what the weights mean; take the "
            "checkpoint that it was made from"
        )
    for name, values in known.items():
        value = given.get(name)
        if values is not None and not any(value is one or (isinstance(value, str) and value == one) for one in values):
            listed = ", ".join(repr(one) for one in values if one is not None)
            raise UnsupportedModelError(
                f"quantization_config: {name} {value!r:.80} is not supported; known for FP8 weights: {listed}"
            )


def _block(name: str, value: Any) -> Extent:
    sizes = value.split("x") if isinstance(value, str) else value
    if isinstance(sizes, list) and len(sizes) == 2:
        rows, columns = (int(n) if isinstance(n, str) and re.fullmatch("[0-9]{1,9}", n) else n for n in sizes)
        if type(rows) is type(columns) is int and 0 < rows < 2**31 and 0 < columns < 2**31:
            return rows, columns
    raise UnsupportedModelError(
        f"quantization_config: {name} {value!r:.80} must be two positive integers, rows and columns of a block"
    )


def _method(given: Any) -> str:
    """The name of a method, as far as config.json tells it."""
    if not isinstance(given, Mapping):
        return f"{given!r:.200}"
    method = given.get("quant_method")
    if method is None and {"bits", "group_size"} <= given.keys():
        method = "MLX"
    if method is None and any(str(name).startswith(("load_in_", "bnb_")) for name in given):
        method = "bitsandbytes"
    if method is None:
        return f"{dict(given)!r:.200}"
    details = [f"{name} {shown(given[name])}" for name in ("quant_algo", "format") if given.get(name)]
    return ", ".join([shown(method), *details])


def quantisation_of(dtypes: Mapping[str, str]) -> tuple[str, str] | None:
    """The method that a checkpoint's tensors tell of.

    Args:
        dtypes: dtype codes of all tensors, by their names.

    Returns:
        (method, a tensor that shows it); None for a checkpoint that is not quantised.
    """
    suspects = [name for name, dtype in dtypes.items() if name.endswith(ENDINGS) or dtype.startswith("F8_")]
    if not suspects:
        scaled = {name.removesuffix("scales") + "weight" for name in dtypes if name.endswith(".scales")}
        integers = [name for name, dtype in dtypes.items() if dtype in INTEGERS and name in scaled]
        return ("MLX", integers[0]) if integers else None
    has_order = any(name.endswith(ORDER) for name in suspects)
    for suffix, method in SUFFIXES.items():
        if name := next((name for name in suspects if name.endswith(suffix)), None):
            return ("GPTQ" if method == "AWQ" and has_order else method), name
    return "fp8", suspects[0]

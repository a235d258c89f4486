"""Quantised checkpoints: which ones run, and the name of the method of all others.

Not every one says so in config.json, so tensors are looked at as well.
"""

from collections.abc import Mapping
from typing import Any

from minirksc.errors import UnsupportedModelError
from minirksc.models.weights.fp8 import Fp8, read_fp8

SUFFIXES = {
    ".weight_packed": "compressed-tensors",
    ".weight_shape": "compressed-tensors",
    ".weight_scale_2": "nvfp4",
    ".SCB": "bitsandbytes",
    ".absmax": "bitsandbytes",
    ".quant_map": "bitsandbytes",
    ".codebooks": "AQLM",
    ".weight_scale_inv": "fp8",
    ".weight_scale": "fp8 or int8",
    ".input_scale": "fp8",
    ".qscale_weight": "fp8",
    ".qscale_act": "fp8",
    "_blocks": "mxfp4",
}
"""Ends of tensor names, the most telling first."""

ELSEWHERE = {"quantization": "MLX", "compression_config": "compressed-tensors"}
"""Fields of config.json in which tools say so that do not write quantization_config."""

ENDINGS = (".qweight", ".g_idx", *SUFFIXES)
INTEGERS = ("U32", "I32", "U8", "I8")


def shown(value: Any) -> str:
    """A name out of a file as a message has it, however long it is and whatever it is made of."""
    return value if isinstance(value, str) and len(value) <= 200 and value.isprintable() else f"{value!r:.200}"


def refusal(what: str, method: str) -> UnsupportedModelError:
    """That a method is not read.

    Args:
        what: is quantised.
        method: its name, and what tells of it.
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
    fp8 = read_fp8(given)
    if fp8 is None:
        raise refusal("the checkpoint", _method(given))
    return fp8


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
        dtypes: dtype code of every tensor, by name.

    Returns:
        (method, a tensor that shows it); None for a checkpoint that is not quantised.
    """
    suspects = [name for name, dtype in dtypes.items() if name.endswith(ENDINGS) or dtype.startswith("F8_")]
    if not suspects:
        return _mlx(dtypes)
    integers = next((name for name in suspects if name.endswith(".qweight")), None)
    if integers is not None:
        # Only GPTQ keeps the order in which columns were quantised.
        return ("GPTQ" if any(name.endswith(".g_idx") for name in suspects) else "AWQ"), integers
    for suffix, method in SUFFIXES.items():
        if name := next((name for name in suspects if name.endswith(suffix)), None):
            return method, name
    return "fp8", suspects[0]


def _mlx(dtypes: Mapping[str, str]) -> tuple[str, str] | None:
    for name, dtype in dtypes.items():
        if dtype in INTEGERS and name.endswith(".weight") and name.removesuffix("weight") + "scales" in dtypes:
            return "MLX", name
    return None

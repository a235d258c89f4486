"""Recognises quantised checkpoints by their tensors: not every one says so in config.json."""

from collections.abc import Mapping

SUFFIXES = {
    ".weight_packed": "compressed-tensors",
    ".weight_shape": "compressed-tensors",
    ".weight_scale_inv": "fp8",
    ".weight_scale": "fp8 or int8",
    ".input_scale": "fp8",
    ".qscale_weight": "fp8",
    ".qscale_act": "fp8",
    ".absmax": "bitsandbytes",
    ".quant_map": "bitsandbytes",
    ".SCB": "bitsandbytes",
    "_blocks": "mxfp4",
}
"""Ends of tensor names, the most telling first."""

ENDINGS = (".qweight", ".g_idx", *SUFFIXES)


def quantisation_of(dtypes: Mapping[str, str]) -> tuple[str, str] | None:
    """The method that a checkpoint's tensors tell of.

    Args:
        dtypes: dtype code of every tensor, by name.

    Returns:
        (method, a tensor that shows it); None for a checkpoint that is not quantised.
    """
    suspects = [name for name, dtype in dtypes.items() if name.endswith(ENDINGS) or dtype.startswith("F8_")]
    if not suspects:
        return None
    integers = next((name for name in suspects if name.endswith(".qweight")), None)
    if integers is not None:
        # Only GPTQ keeps the order in which columns were quantised.
        return ("GPTQ" if any(name.endswith(".g_idx") for name in suspects) else "AWQ"), integers
    for suffix, method in SUFFIXES.items():
        if name := next((name for name in suspects if name.endswith(suffix)), None):
            return method, name
    return "fp8", suspects[0]

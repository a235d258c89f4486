"""Forms of an operation as tests' parameters: the compiled ones serve some dtypes, and are not built everywhere."""

import pytest
import torch

from minirksc.kernels.kv.placement import HeadNorms, Placement
from minirksc.kernels.native.ops import DTYPES, has_bf16_products, native, why_not

needs_native = pytest.mark.skipif(native is None, reason=f"nothing is compiled: {why_not(torch.float32, [])}")
needs_bf16 = pytest.mark.skipif(not has_bf16_products, reason="this processor does not multiply bfloat16 numbers")


def store(form, qkv, rope, query_growth, cache, slots, **norms):
    """Calls a form of `kv_store` with what its two values are made of."""
    form(qkv, HeadNorms(**norms), Placement(rope, query_growth, cache, slots))


def is_compiled(form):
    return form.__name__.endswith("_native")


def parameters(forms):
    """For `parametrize("form", ...)`."""
    return [
        pytest.param(form, marks=[needs_native] if is_compiled(form) else [], id=form.__name__.strip("_"))
        for form in forms
    ]


def with_dtypes(forms, dtypes):
    """For `parametrize(("form", "dtype"), ...)`: what each form serves."""
    return [
        pytest.param(*one.values, dtype, marks=one.marks, id=f"{one.id}-{str(dtype).removeprefix('torch.')}")
        for one in parameters(forms)
        for dtype in dtypes
        if not is_compiled(one.values[0]) or dtype in DTYPES
    ]

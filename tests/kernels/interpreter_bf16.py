"""Products of bfloat16 numbers in Triton's interpreter, which by itself multiplies their bit patterns.

It keeps such numbers as 16-bit integers (Triton 3.4 to 3.9); here they are widened first, as tensor cores do.
"""

import numpy as np
import pytest
import triton.language as tl
import triton.runtime.interpreter as interpreter

BUILDER = type(interpreter.interpreter_builder)
_create_dot = BUILDER.create_dot


def _widened(handle):
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    words = np.ascontiguousarray(handle.data).astype(np.uint32) << 16
    return interpreter.TensorHandle(words.view(np.float32), tl.float32)


def create_dot(self, a, b, d, *options):
    return _create_dot(self, _widened(a), _widened(b), d, *options)


@pytest.fixture(scope="module", autouse=True)
def bf16_products():
    """For a module of tests that imports it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BUILDER, "create_dot", create_dot)
        yield

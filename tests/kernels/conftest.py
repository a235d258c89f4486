"""Forms of an operation are tests' parameters; the compiled ones serve some dtypes, and are not built everywhere."""

import pytest
import torch
from minirksc.kernels.native_ops import why_not


@pytest.fixture(autouse=True)
def only_what_native_serves(request):
    params = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    form = params.get("form")
    if getattr(form, "__name__", "").endswith("_native"):
        reason = why_not(params.get("dtype", torch.float32), {params.get("head_dim", 8)})
        if reason is not None:
            pytest.skip(reason)

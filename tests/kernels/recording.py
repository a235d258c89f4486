"""Writes down what would be launched on a GPU, Triton's kernels and torch's operations, without one."""

from contextlib import contextmanager
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import KernelInterface

COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd
ALLOCATES = ("aten::empty", "aten::new_empty", "aten::resize")  # prefixes


class _TorchLaunches(TorchDispatchMode):
    """Names of the operations that compute or copy; views and allocations launch nothing."""

    def __init__(self, names):
        super().__init__()
        self.names = names
        self.in_kernel = False

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.in_kernel:  # the interpreter moves data with torch
            return operation(*args, **kwargs)
        if operation.has_kernel_for_dispatch_key(COMPOSITE):  # such as linear: made of others
            with self:
                result = operation.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        if not is_view(operation) and not operation.name().startswith(ALLOCATES):
            self.names.append(operation.name())
        return operation(*args, **kwargs)


def is_view(operation):
    """Whether what it returns is its argument's memory, unwritten."""
    returned = [value.alias_info for value in operation._schema.returns]
    return bool(returned) and all(alias is not None and not alias.is_write for alias in returned)


@contextmanager
def recorded_launches(run=True):
    """The names, in order, of all that is launched while it is open.

    Everything runs as usual, kernels in Triton's interpreter; run=False leaves the kernels out, for meta tensors.
    """
    names = []
    torch_launches = _TorchLaunches(names)
    launcher = KernelInterface.__getitem__

    def getitem(kernel, grid):
        def launch(*args, **kwargs):
            names.append(kernel.__name__)
            if not run:
                return
            torch_launches.in_kernel = True
            try:
                launcher(kernel, grid)(*args, **kwargs)
            finally:
                torch_launches.in_kernel = False

        return launch

    with mock.patch.object(KernelInterface, "__getitem__", getitem), torch_launches:
        yield names

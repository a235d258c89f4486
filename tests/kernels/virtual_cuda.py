"""A CUDA device that does not exist: tensors say that they are on "cuda:0", and compute on the CPU.

It shows what only a GPU would: an operation on tensors of two devices is an error, and so is whatever waits for the
device while a graph is recorded. Kernels run in Triton's interpreter, and are given tensors of the device alone.
"""

import contextlib
import importlib
import inspect
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton.runtime.interpreter as interpreter
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

sys.path.append(str(Path(__file__).parent))  # in importlib mode pytest does not add it
interpreter_bf16 = importlib.import_module("interpreter_bf16")

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "is_nonzero")
CROSSES = ("copy_", "_to_copy")
INDEXES = ("index", "index_put_", "_index_put_impl_")  # torch moves an index of the CPU itself
_torch_tensor, _torch_to, _launch = torch.tensor, torch.Tensor.to, interpreter.GridExecutor.__call__


class CudaTensor(torch.Tensor):
    """What `host` holds, on the device."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, host):
        layout = {"strides": host.stride(), "storage_offset": host.storage_offset(), "dtype": host.dtype}
        with torch.inference_mode(False):
            made = torch.Tensor._make_wrapper_subclass(cls, host.size(), **layout, device="meta")
        made.host = host
        return made

    def __init__(self, host):
        pass

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return Device.current.dispatch(function, args, kwargs or {})

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = is_meta = property(lambda self: False)

    def __getitem__(self, index):
        return torch.Tensor.__getitem__(self, _with_tensors(index))

    def __setitem__(self, index, value):
        torch.Tensor.__setitem__(self, _with_tensors(index), value)

    def tolist(self):
        Device.current.wait("tolist")
        return self.host.tolist()

    def untyped_storage(self):
        return self.host.untyped_storage()

    def data_ptr(self):
        return self.host.data_ptr()

    def __repr__(self):
        return f"CudaTensor({self.host!r})"


def _with_tensors(index):
    """Lists in it become tensors of the CPU, as torch makes them."""
    if isinstance(index, tuple):
        return tuple(map(_with_tensors, index))
    return _torch_tensor(index) if isinstance(index, list) else index


def _host(x):
    return x.host if isinstance(x, CudaTensor) else x


def _is_cuda(device):
    return device is not None and torch.device(device).type == "cuda"


class Device(TorchDispatchMode):
    """The device while it is there.

    Attributes:
        num_launches: of kernels.
        is_recording: nothing may wait for it.
    """

    current = None

    def __init__(self):
        super().__init__()
        self.num_launches = 0
        self.is_recording = False

    def wait(self, what):
        if self.is_recording:
            raise RuntimeError(f"{what} while a graph is recorded")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return self.dispatch(function, args, kwargs or {})

    def dispatch(self, function, args, kwargs):
        name = function._schema.name.removeprefix("aten::")
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        is_cuda = any(isinstance(x, CudaTensor) for x in tensors)
        others = [x for x in tensors if not isinstance(x, CudaTensor) and x.dim() > 0]
        if is_cuda and others and name not in CROSSES:
            if name not in INDEXES or any(x is others[0] for x in (args[0], args[2] if len(args) > 2 else None)):
                raise RuntimeError(f"{name} of tensors on cuda:0 and cpu")
            self.wait(f"an index of the CPU in {name}")
        if is_cuda and name in WAITS:
            self.wait(name)
        if name == "copy_":
            is_cuda = isinstance(args[0], CudaTensor)
            if is_cuda != isinstance(args[1], CudaTensor):
                self.wait("a copy from or to the CPU")
        elif kwargs.get("device") is not None:
            is_cuda = _is_cuda(kwargs["device"])
            kwargs = {**kwargs, "device": CPU}
        out = function(*tree_map(_host, args), **tree_map(_host, kwargs))
        known = {id(_host(x)): x for x in tensors}  # what an operation gives back is what it was given

        def wrapped(x):
            if not isinstance(x, torch.Tensor):
                return x
            return known.get(id(x)) if id(x) in known else CudaTensor(x) if is_cuda else x

        return tree_map(wrapped, out)

    def tensor(self, data, *, dtype=None, device=None, **options):
        made = _torch_tensor(data, dtype=dtype, **options)
        if not _is_cuda(device):
            return made
        self.wait("torch.tensor")
        return CudaTensor(made)

    def to(self, x, *args, **options):
        bound = {**options}
        for one in args:
            kind = "device" if isinstance(one, torch.device | str) else "dtype"
            bound |= {"device": one.device, "dtype": one.dtype} if isinstance(one, torch.Tensor) else {kind: one}
        dtype = bound.get("dtype")
        is_there = isinstance(x, CudaTensor)
        if bound.get("device") is None or _is_cuda(bound["device"]) == is_there:
            return x if dtype is None else _torch_to(x, dtype)
        self.wait("a copy from or to the CPU")
        moved = _host(x).clone() if dtype is None else _torch_to(_host(x), dtype)
        return moved if is_there else CudaTensor(moved)

    def launch(self, executor, *args, **kwargs):
        given = inspect.getcallargs(executor.fn, *args, **{k: v for k, v in kwargs.items() if k in _names(executor.fn)})
        strangers = [k for k, x in given.items() if isinstance(x, torch.Tensor) and not isinstance(x, CudaTensor)]
        if strangers:
            raise RuntimeError(f"{executor.fn.__name__} is given {strangers} on the CPU")
        self.num_launches += 1
        with _disable_current_modes():
            return _launch(executor, *map(_host, args), **{k: _host(v) for k, v in kwargs.items()})


def _names(function):
    spec = inspect.getfullargspec(function)
    return {*spec.args, *spec.kwonlyargs}


class Recorder:
    """Runs twice as `CudaRecorder` does, and what is recorded a third time and on."""

    def __init__(self, device):
        pass

    def record(self, run):
        run()
        Device.current.is_recording = True
        try:
            out = run()
        finally:
            Device.current.is_recording = False
        return lambda: out.copy_(run()), out


@pytest.fixture
def cuda(monkeypatch):
    """The device, for one test."""
    device = Device()
    monkeypatch.setattr(Device, "current", device)
    monkeypatch.setattr(torch, "tensor", device.tensor)
    monkeypatch.setattr(torch.Tensor, "to", lambda x, *args, **options: device.to(x, *args, **options))
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x: device.to(x, "cpu"))
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", lambda e, *a, **k: device.launch(e, *a, **k))
    monkeypatch.setattr(interpreter_bf16.BUILDER, "create_dot", interpreter_bf16.create_dot)
    monkeypatch.setattr("minirksc.engine.loading.CudaRecorder", Recorder)
    properties = SimpleNamespace(multi_processor_count=132)
    for name, value in {
        "_lazy_init": None,
        "is_available": True,
        "device": contextlib.nullcontext(),
        "mem_get_info": (100 << 30, 140 << 30),
        "get_device_capability": (9, 0),
        "get_device_properties": properties,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    with device:
        yield device

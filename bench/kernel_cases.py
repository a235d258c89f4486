"""Which launches are compiled ahead of time: the engine's own launchers, called with sizes of real models.

A case calls a launcher with tensors of the "meta" device, which have shapes, types and alignment but no memory.
Instead of running, each launch is written down, and Triton then binds its arguments as it would on a GPU. So what is
compiled is what the engine launches: same constants, same warps, same divisibility by 16.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import KernelInterface, create_function_from_signature

from minirksc.kernels.attention import launch_table
from minirksc.kernels.attention.batch import AttentionBatch
from minirksc.kernels.attention.block_mass import attend_with_mass
from minirksc.kernels.attention.paged_attention import paged_attention_triton
from minirksc.kernels.confidence import confidence_triton
from minirksc.kernels.gated_act import ACTIVATIONS, gated_act_triton
from minirksc.kernels.kv.kv_copy import copy_blocks_triton, copy_rotated_triton
from minirksc.kernels.kv.kv_store import kv_store_triton
from minirksc.kernels.kv.layer_cache import LayerCache
from minirksc.kernels.kv.placement import HeadNorms, Placement
from minirksc.kernels.rms_norm import add_rms_norm_triton, rms_norm_triton

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
HEADS = {32: (4, 2), 64: (9, 3), 80: (32, 32), 96: (32, 32), 128: (32, 8), 256: (16, 8), 512: (8, 1)}
"""head_dim -> (heads, KV heads) of a model that has it, or of a tiny one."""
TOKENS = 24  # divisible by 8 and not by 16: a number of tokens must decide nothing
NUM_LAYERS, NUM_BLOCKS = 32, 65536  # a cache of more than 2 GiB


@dataclass(frozen=True)
class Launch:
    """One `kernel[grid](*args, **kwargs)` that was written down."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def source(self, target: str) -> tuple[Any, Any]:
        """What Triton's JIT would compile for this launch on the target: (source, options)."""
        backend = make_backend(gpu_target(target))
        bind = create_function_from_signature(self.kernel.signature, self.kernel.params, backend)
        bound, specialization, options = bind(*self.args, **self.kwargs)
        options, signature, constants, attributes = self.kernel._pack_args(
            backend, self.kwargs, bound, specialization, options
        )
        return ASTSource(self.kernel, signature, constants, attributes), options

    def arguments(self) -> Mapping[str, Any]:
        """Arguments by name; options such as num_warps are left out."""
        names = self.kernel.signature.parameters
        known = {name: value for name, value in self.kwargs.items() if name in names}
        return self.kernel.signature.bind(*self.args, **known).arguments


@dataclass(frozen=True)
class Case:
    """One call of a launcher.

    Attributes:
        name: op, sizes and dtype.
        call: function that calls the launcher.
        subset: whether it belongs to the few that the tests compile.
        loop_bytes: function: arguments of a launch -> HBM bytes that a program moves in one iteration of its main loop.
        rival: name of other engines' figures that it is set beside, "decode d128" for example.
    """

    name: str
    call: Callable[[], object]
    subset: bool = False
    loop_bytes: Callable[[Mapping[str, Any]], int] | None = None
    rival: str | None = None

    def launches(self, architecture: str) -> list[Launch]:
        """The launches of the call on a GPU of that architecture, a name of `launch_table.ARCHITECTURES`.

        Raises:
            ConfigError: the launcher refuses the call.
        """
        with recorded(architecture) as launches:
            self.call()
        return launches


@contextmanager
def recorded(architecture: str) -> Iterator[list[Launch]]:
    """While it is open no kernel is launched, every launch is written down, and every device has the architecture."""
    launches: list[Launch] = []

    def getitem(kernel: Any, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **kwargs: launches.append(Launch(kernel, grid, args, kwargs))

    with (
        mock.patch.object(KernelInterface, "__getitem__", getitem),
        mock.patch.object(launch_table, "architecture", lambda device: architecture),
    ):
        yield launches


def gpu_target(target: str) -> GPUTarget:
    """Names such as "cuda:90" and "hip:gfx942", as Triton has them."""
    backend, arch = target.split(":")
    return GPUTarget(backend, int(arch) if arch.isdigit() else arch, 64 if backend == "hip" else 32)


def all_cases() -> list[Case]:
    """Every kernel at every entry of its launch table, for sizes of models from 135M to 27B parameters."""
    return [*norm_cases(), *activation_cases(), *row_cases(), *store_cases(), *copy_cases(), *attention_cases()]


def norm_cases() -> Iterator[Case]:
    for size, (label, dtype) in product((576, 2048, 4096, 5376, 8192, 16384), DTYPES.items()):
        x, weight = _meta(TOKENS, size, dtype=dtype), _meta(size, dtype=dtype)
        subset = size == 4096 and label == "bf16"
        yield Case(f"rms_norm {size} {label}", lambda x=x, w=weight: rms_norm_triton(x, w, 1e-6), subset)
        yield Case(
            f"add_rms_norm {size} {label}",
            lambda x=x, w=weight: add_rms_norm_triton(x, torch.empty_like(x), None, w, 1e-6),
            subset,
        )
    x, offset_weight = _meta(TOKENS, 5376, dtype=torch.bfloat16), _meta(5376, dtype=torch.float32)
    yield Case(
        "add_rms_norm 5376 bf16, update normed, fp32 weights",
        lambda: add_rms_norm_triton(x, torch.empty_like(x), offset_weight, offset_weight, 1e-6),
    )


def activation_cases() -> Iterator[Case]:
    for size, (label, dtype), activation in product((1536, 14336, 21504), DTYPES.items(), ACTIVATIONS):
        gate_up = _meta(TOKENS, 2 * size, dtype=dtype)
        yield Case(
            f"gated_act {activation} {size} {label}",
            lambda x=gate_up, act=activation: gated_act_triton(x, act),
            subset=size == 14336 and label == "bf16" and activation == "silu",
        )


def row_cases() -> Iterator[Case]:
    """Whole rows: confidence of logits."""
    for vocab, (label, dtype) in product((49152, 151936, 262144), DTYPES.items()):
        logits = _meta(TOKENS, vocab, dtype=dtype)
        subset = vocab == 151936 and label == "fp32"
        yield Case(f"confidence {vocab} {label}", lambda x=logits: confidence_triton(x), subset)


def store_cases() -> Iterator[Case]:
    for head_dim, (label, dtype), norm, int8 in product(HEADS, DTYPES.items(), (False, True), (False, True)):
        notes = ", qk norm" * norm + ", int8 cache" * int8
        yield Case(
            f"kv_store d{head_dim} {label}{notes}",
            lambda d=head_dim, t=dtype, n=norm, i=int8: _store(d, t, norm=n, int8=i),
            subset=head_dim == 128 and label == "bf16" and norm == int8,
        )
    bf16 = torch.bfloat16
    yield Case("kv_store d128 bf16, queries only", lambda: _store(128, bf16, norm=True, int8=False, cached=False))
    yield Case("kv_store d80 bf16, partial rope", lambda: _store(80, bf16, norm=False, int8=False, rotary_dim=32))
    yield Case("kv_store d128 bf16, no rope, growth", lambda: _store(128, bf16, norm=False, int8=False, rotary_dim=0))


def copy_cases() -> Iterator[Case]:
    copies = [(block, block + 8) for block in range(8)]
    for head_dim, block_size, int8 in product((64, 128, 256), (16, 64), (False, True)):
        layer = _layer_cache(head_dim, block_size, torch.int8 if int8 else torch.bfloat16)
        label, subset = "int8" if int8 else "bf16", head_dim == 128 and block_size == 16
        for name, one in zip(("kv", "scales"), layer, strict=True):
            if one is not None:
                whole = one.expand(NUM_LAYERS, *one.shape).new_empty((NUM_LAYERS, *one.shape))
                yield Case(
                    f"copy_blocks {name} d{head_dim} b{block_size} {label}",
                    lambda cache=whole: copy_blocks_triton(cache, copies),
                    subset,
                )
        slots = _meta(TOKENS, dtype=torch.int64)
        table = _meta(TOKENS, 1, head_dim, dtype=torch.float32)
        yield Case(
            f"copy_rotated d{head_dim} b{block_size} {label}",
            lambda layer=layer, slots=slots, table=table: copy_rotated_triton(layer, slots, slots, (table, table)),
            subset,
        )
        yield Case(
            f"copy_rotated d{head_dim} b{block_size} {label}, no rope",
            lambda layer=layer, slots=slots: copy_rotated_triton(layer, slots, slots, None),
        )


def attention_cases() -> Iterator[Case]:
    """Decode (16 rows), few new tokens or shared prefixes (32 and 64 rows), prefill; and the merge of partials."""
    shapes = [*product((64, 80, 128, 256), (16, 64)), *product((128,), (8, 32, 128)), *product((32, 96, 512), (16,))]
    for (head_dim, block_size), rows, int8 in product(shapes, (*launch_table.SHORT_ROWS, None), (False, True)):
        subset = block_size == 16 and (head_dim == 128 or (head_dim == 256 and not int8)) and rows in (16, None)
        yield _attention_case(head_dim, block_size, rows, "bf16", int8=int8, subset=subset)
    for head_dim, label, rows in product((64, 128, 256), ("fp16", "fp32"), (16, None)):
        yield _attention_case(head_dim, 16, rows, label)
        yield _attention_case(head_dim, 16, rows, label, int8=True)
    for rows in (16, None):
        yield _attention_case(128, 16, rows, "bf16", window=1024, softcap=50.0)
    for rows, int8 in product(launch_table.SHORT_ROWS, (False, True)):  # what a decode step may launch
        yield _attention_case(128, 16, rows, "bf16", int8=int8, subset=rows == 16 and not int8, with_mass=True)
    yield _attention_case(64, 16, 16, "bf16", with_mass=True)
    yield _attention_case(256, 64, 16, "bf16", with_mass=True, window=1024, softcap=50.0)


def _attention_case(
    head_dim: int,
    block_size: int,
    rows: int | None,
    label: str,
    *,
    int8: bool = False,
    subset: bool = False,
    **how: Any,
) -> Case:
    dtype = DTYPES[label]
    kv_dtype = torch.int8 if int8 else dtype
    what = "prefill" if rows is None else "decode" if rows == launch_table.SHORT_ROWS[0] else f"decode, {rows} rows,"
    notes = "".join(f", {name.removeprefix('with_')}" for name in how)
    is_decode = rows == launch_table.SHORT_ROWS[0]

    def loop_bytes(arguments: Mapping[str, Any]) -> int:
        scales = 2 * 4 if int8 else 0
        return int(arguments["TILE"]) * (2 * head_dim * kv_dtype.itemsize + scales)

    return Case(
        f"{what} d{head_dim} b{block_size} {label}{', int8 cache' * int8}{notes}",
        lambda: _attend(head_dim, block_size, rows, dtype, kv_dtype, **how),
        subset,
        loop_bytes if is_decode else None,
        rival=f"d{head_dim}" if is_decode and block_size == 16 and label == "bf16" and not int8 and not how else None,
    )


def _attend(
    head_dim: int,
    block_size: int,
    rows: int | None,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    window: int | None = None,
    softcap: float | None = None,
    with_mass: bool = False,
) -> None:
    num_heads, num_kv_heads = HEADS[head_dim]
    group = num_heads // num_kv_heads
    num_queries = 512 if rows is None else max(1, rows // group) if rows > launch_table.SHORT_ROWS[0] else 1
    num_sequences, context_len = 3, 4096
    num_tokens, blocks = num_sequences * num_queries, context_len // block_size
    tables = [range(1 + i * blocks, 1 + (i + 1) * blocks) for i in range(num_sequences)]
    batch = AttentionBatch(
        cu_seqlens_q=range(0, num_tokens + 1, num_queries),
        context_lens=[context_len] * num_sequences,
        block_tables=tables,
        kv_tables=tables,
        slots=_meta(num_tokens, dtype=torch.int64),
        block_size=block_size,
        device=torch.device("meta"),
        window=window,
    )
    qkv = _meta(num_tokens, num_heads + 2 * num_kv_heads, head_dim, dtype=dtype)
    layer = _layer_cache(head_dim, block_size, kv_dtype)
    attend = attend_with_mass if with_mass else partial(paged_attention_triton, kv=qkv)
    attend(q=qkv[:, :num_heads], layer_cache=layer, batch=batch, scale=head_dim**-0.5, softcap=softcap)


def _store(
    head_dim: int, dtype: torch.dtype, *, norm: bool, int8: bool, cached: bool = True, rotary_dim: int | None = None
) -> None:
    num_heads, num_kv_heads = HEADS[head_dim]
    rotary_dim = head_dim if rotary_dim is None else rotary_dim
    table = _meta(TOKENS, 1, rotary_dim, dtype=dtype)
    weight = _meta(head_dim, dtype=dtype) if norm else None
    placement = Placement(
        rope=(table, table) if rotary_dim else None,
        query_growth=None if rotary_dim else _meta(TOKENS, 1, 1, dtype=torch.float32),
        cache=_layer_cache(head_dim, 16, torch.int8 if int8 else dtype) if cached else None,
        slots=_meta(TOKENS, dtype=torch.int64),
    )
    qkv = _meta(TOKENS, num_heads + 2 * num_kv_heads * cached, head_dim, dtype=dtype)
    kv_store_triton(qkv, HeadNorms(num_heads, weight, weight, False, 1e-6), placement)


def _layer_cache(head_dim: int, block_size: int, dtype: torch.dtype) -> LayerCache:
    """A layer of a cache so large that 32-bit offsets into it would not do."""
    shape = (NUM_LAYERS, NUM_BLOCKS, block_size, 2, HEADS[head_dim][1])
    scales = _meta(*shape, dtype=torch.float32)[1] if dtype == torch.int8 else None
    return LayerCache(_meta(*shape, head_dim, dtype=dtype)[1], scales)


def _meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")

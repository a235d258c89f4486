"""The backend: which form of each op the engine runs on, chosen once at construction."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Literal, TypeVar

import torch
from torch import Tensor

from minirksc.errors import ConfigError
from minirksc.kernels import rms_norm as norms
from minirksc.kernels.attention.batch import AttentionBatch
from minirksc.kernels.attention.block_mass import paged_attention_mass_reference, paged_attention_mass_triton
from minirksc.kernels.attention.block_mass_native import paged_attention_mass_native
from minirksc.kernels.attention.block_mass_torch import paged_attention_mass_torch
from minirksc.kernels.attention.paged_attention import paged_attention_reference, paged_attention_triton
from minirksc.kernels.attention.paged_attention_native import block_shape_native, paged_attention_native
from minirksc.kernels.attention.paged_attention_torch import paged_attention_torch
from minirksc.kernels.confidence import Confidence, confidence_reference, confidence_torch, confidence_triton
from minirksc.kernels.draw import Draw, draw_native, draw_torch
from minirksc.kernels.gated_act import gated_act_reference, gated_act_torch, gated_act_triton
from minirksc.kernels.jit import triton
from minirksc.kernels.kv import kv_copy
from minirksc.kernels.kv.kv_store import kv_store_reference, kv_store_torch, kv_store_triton
from minirksc.kernels.kv.layer_cache import LayerCache, plain_block_shape
from minirksc.kernels.kv.placement import HeadNorms, Placement
from minirksc.kernels.native import ops
from minirksc.kernels.rope import RopeTables
from minirksc.kernels.weights.linear import NativePacker, Pack, PlainWeight, pack_torch

Result = TypeVar("Result")
Attention = Callable[[Tensor, Tensor, LayerCache, AttentionBatch, float, float | None], Result]
"""A form of the attention, called with (q, kv, layer_cache, batch, scale, softcap)."""


@dataclass(frozen=True, kw_only=True)
class Backend:
    """One form of every op. The signatures are those of the references, which specify them and are the defaults.

    Attributes:
        name: name in the options.
        device_type: type of the devices on which it runs; None: any.
        block_sizes: numbers of tokens a KV block that its kernels can have; None: any.
        packer: function that is called for each model and gives what makes the form of its weights.
        recording: how a decode step can be recorded, unless it has `paged_attention_mass`: as a CUDA "graph", since
            nothing is read back from the device; as a "tape" of compiled operations; None: not at all.
        splits_keys: whether it heeds `AttentionBatch.key_chunk`.
        block_shape: shape of a block of a layer's KV cache, see `plain_block_shape` and `LayerCache`.
    """

    name: str
    device_type: str | None = None
    block_sizes: tuple[int, ...] | None = None
    packer: Callable[[], Pack] = lambda: PlainWeight
    recording: Literal["graph", "tape"] | None = None
    splits_keys: bool = False
    block_shape: Callable[[int, int, int, int, torch.dtype], tuple[int, ...]] = plain_block_shape
    rms_norm: Callable[[Tensor, Tensor | None, float], Tensor] = norms.rms_norm_reference
    add_rms_norm: Callable[[Tensor, Tensor, Tensor | None, Tensor | None, float], Tensor] = norms.add_rms_norm_reference
    gated_act: Callable[[Tensor, str], Tensor] = gated_act_reference
    kv_store: Callable[[Tensor, HeadNorms, Placement], None] = kv_store_reference
    copy_blocks: Callable[[Tensor, Sequence[tuple[int, int]]], None] = kv_copy.copy_blocks_reference
    copy_rotated: Callable[[LayerCache, Tensor, Tensor, RopeTables | None], None] = kv_copy.copy_rotated_reference
    paged_attention: Attention[Tensor] = paged_attention_reference
    paged_attention_mass: Attention[tuple[Tensor, Tensor]] = paged_attention_mass_reference
    confidence: Callable[[Tensor], Confidence] = confidence_reference
    draw: Callable[[Tensor, Sequence[Draw]], Tensor] = draw_torch

    def check_block_size(self, block_size: int) -> None:
        """Refuses what the kernels cannot have.

        Raises:
            ConfigError: it is none of `block_sizes`.
        """
        if self.block_sizes is not None and block_size not in self.block_sizes:
            sizes = ", ".join(map(str, self.block_sizes))
            raise ConfigError(f"block_size {block_size} does not go with the {self.name} backend; use one of {sizes}")


TRITON = Backend(
    name="triton",
    device_type="cuda",
    block_sizes=(8, 16, 32, 64, 128),
    recording="graph",
    splits_keys=True,
    rms_norm=norms.rms_norm_triton,
    add_rms_norm=norms.add_rms_norm_triton,
    gated_act=gated_act_triton,
    kv_store=kv_store_triton,
    copy_blocks=kv_copy.copy_blocks_triton,
    copy_rotated=kv_copy.copy_rotated_triton,
    paged_attention=paged_attention_triton,
    paged_attention_mass=paged_attention_mass_triton,
    confidence=confidence_triton,
)

TORCH = Backend(
    name="torch",
    device_type="cpu",
    packer=lambda: pack_torch,
    rms_norm=norms.rms_norm_torch,
    add_rms_norm=norms.add_rms_norm_torch,
    gated_act=gated_act_torch,
    kv_store=kv_store_torch,
    copy_blocks=kv_copy.copy_blocks_torch,
    copy_rotated=kv_copy.copy_rotated_torch,
    paged_attention=paged_attention_torch,
    paged_attention_mass=paged_attention_mass_torch,
    confidence=confidence_torch,
)

NATIVE = replace(
    TORCH,  # which moves blocks and tokens as fast
    name="native",
    packer=NativePacker,
    recording="tape",
    block_shape=block_shape_native,
    rms_norm=ops.rms_norm_native,
    add_rms_norm=ops.add_rms_norm_native,
    gated_act=ops.gated_act_native,
    kv_store=ops.kv_store_native,
    paged_attention=paged_attention_native,
    paged_attention_mass=paged_attention_mass_native,
    confidence=ops.confidence_native,
    draw=draw_native,
)

BACKENDS = {backend.name: backend for backend in (TRITON, TORCH, NATIVE, Backend(name="reference"))}


def choose_backend(name: str, device: torch.device, dtype: torch.dtype, head_dims: Iterable[int]) -> Backend:
    """The backend of that name; "auto" is triton on a GPU, on a CPU native where it can serve, else torch.

    Triton's interpreter, which tests use, runs anywhere.

    Args:
        name: name in the options.
        device: device of the model.
        dtype: type of its activations.
        head_dims: sizes of the heads of its layers.

    Raises:
        ConfigError: the name is unknown, the backend does not run on the device, cannot serve the model, or is not
            installed.
    """
    reason = ops.why_not(dtype, head_dims)
    if name == "auto":
        name = "triton" if device.type != "cpu" else "native" if reason is None else "torch"
    if name not in BACKENDS:
        raise ConfigError(f"backend {name!r} is unknown; choose one of auto, {', '.join(BACKENDS)}")
    if name == "native" and device.type == "cpu" and reason is not None:
        raise ConfigError(f"backend 'native' cannot serve this model: {reason}; use backend='auto'")
    if name == "triton" and not isinstance(triton, ModuleType):
        remedy = "use backend='auto'" if device.type == "cpu" else "pip install 'minirksc[gpu]', or use device='cpu'"
        raise ConfigError(f"backend 'triton' for {device}: Triton is not installed; {remedy}")
    backend = BACKENDS[name]
    is_interpreted = name == "triton" and triton.knobs.runtime.interpret
    if backend.device_type not in (None, device.type) and not is_interpreted:
        raise ConfigError(
            f"backend {name!r} runs on {backend.device_type}, not on {device}; use backend='auto', the device's own"
        )
    return backend

"""The backend: which form of each op the engine runs on, chosen once at construction."""

from collections.abc import Callable
from dataclasses import dataclass

from minirksc.kernels.attention_batch import AttentionBatch
from minirksc.kernels.confidence import Confidence, confidence, confidence_reference
from minirksc.kernels.gated_act import gated_act, gated_act_reference
from minirksc.kernels.kv_store import kv_store, kv_store_reference
from minirksc.kernels.paged_attention import paged_attention_reference
from minirksc.kernels.paged_attention_torch import paged_attention_torch
from minirksc.kernels.rms_norm import rms_norm, rms_norm_reference
from minirksc.kernels.rope import rope, rope_reference
from torch import Tensor

from minirksc.errors import ConfigError


@dataclass(frozen=True)
class Backend:
    """One form of every op. The signatures are those of the references, which specify them."""

    name: str
    rms_norm: Callable[[Tensor, Tensor | None, float], Tensor]
    rope: Callable[[Tensor, Tensor, Tensor], None]
    gated_act: Callable[[Tensor, str], Tensor]
    kv_store: Callable[[Tensor, Tensor, Tensor], None]
    paged_attention: Callable[[Tensor, Tensor, Tensor, AttentionBatch, float, float | None], Tensor]
    confidence: Callable[[Tensor], Confidence]
    prepack: bool


BACKENDS = {
    "torch": Backend("torch", rms_norm, rope, gated_act, kv_store, paged_attention_torch, confidence, prepack=True),
    "reference": Backend(
        "reference",
        rms_norm_reference,
        rope_reference,
        gated_act_reference,
        kv_store_reference,
        paged_attention_reference,
        confidence_reference,
        prepack=False,
    ),
}


def choose_backend(name: str) -> Backend:
    """The backend of that name; "auto" is the fast one.

    Raises:
        ConfigError: the name is unknown.
    """
    if name == "auto":
        name = "torch"
    if name not in BACKENDS:
        raise ConfigError(f"backend {name!r} is unknown; choose one of auto, {', '.join(BACKENDS)}")
    return BACKENDS[name]

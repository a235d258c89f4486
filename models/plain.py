"""The plainest decoder, read from config.json, and changes that several families make to it."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from minirksc.models.fields import Fields
from minirksc.models.rope_config import read_rope
from minirksc.models.spec import ArchSpec, LayerSpec, RopeSpec

from minirksc.errors import CheckpointError

MAX_LAYERS = 10_000
"""Less than any other size: a spec and its weight rules have entries for every layer."""

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu": "gelu",
}
SLIDING, FULL = "sliding_attention", "full_attention"


def plain(
    f: Fields, *, layer_type: str | None = None, is_partial: bool = False, others: tuple[str, ...] = (), **changes: Any
) -> ArchSpec:
    """A Llama of the file's sizes, with the family's values in place of its own.

    Args:
        f: the file.
        layer_type: see `read_rope`, as for the next two.
        is_partial: see there.
        others: see there.
        changes: fields of `ArchSpec`.
    """
    f.default(hidden_act="silu", rms_norm_eps=1e-6, rope_theta=1e4, max_position_embeddings=2048)
    num_heads, hidden_size = f.size("num_attention_heads"), f.size("hidden_size")
    head_dim = _head_dim(f, hidden_size, num_heads)
    layer = LayerSpec(
        num_kv_heads=f.size("num_key_value_heads", num_heads),
        head_dim=head_dim,
        intermediate_size=f.size("intermediate_size"),
        rope=read_rope(f, head_dim, layer_type, is_partial=is_partial, others=others),
    )
    values: dict[str, Any] = {
        "model_type": f.get("model_type"),
        "vocab_size": f.size("vocab_size"),
        "hidden_size": hidden_size,
        "num_heads": num_heads,
        "layers": (layer,) * f.size("num_hidden_layers", limit=MAX_LAYERS),
        "max_position_embeddings": _max_len(f.size("max_position_embeddings"), layer.rope),
        "norm_eps": f.number("rms_norm_eps"),
        "tie_word_embeddings": f.flag("tie_word_embeddings"),
        "eos_token_ids": f.token_ids("eos_token_id"),
        "bos_token_id": next(iter(f.token_ids("bos_token_id")), None),
        "query_scale": head_dim**-0.5,
        **changes,
    }
    if "activation" not in values:
        values["activation"] = f.choice("hidden_act", ACTIVATIONS)
    return ArchSpec(**values)


def _max_len(of_file: int, rope: RopeSpec | None) -> int:
    """Longest sequence: two kinds of rotation reach beyond the length that the file gives."""
    if rope is None or rope.kind not in ("dynamic", "yarn"):
        return of_file
    return max(of_file, int(rope.number("factor") * rope.number("original_max_position_embeddings")))


def default_rope(f: Fields, **parameters: Any) -> None:
    """What the rotation is where the file says nothing of it."""
    if not (f.get("rope_parameters") or f.get("rope_scaling")):
        f.default(rope_parameters=parameters)


def _head_dim(f: Fields, hidden_size: int, num_heads: int) -> int:
    if f.get("head_dim") is None and hidden_size % num_heads:
        raise CheckpointError(
            f"{f.where}: hidden_size {hidden_size} is no multiple of num_attention_heads {num_heads}, and there is "
            "no head_dim"
        )
    return f.size("head_dim", hidden_size // num_heads)


def with_windows(f: Fields, spec: ArchSpec, kinds: Sequence[str], is_on: bool = True) -> ArchSpec:
    """Gives a window to the layers that slide: those that the file's layer_types name, else those of `kinds`."""
    window = None if f.get("sliding_window") is None or not is_on else f.size("sliding_window")
    kinds = f.per_layer("layer_types", spec.num_layers, (FULL, SLIDING)) or kinds
    layers = [
        replace(layer, window=window if kind == SLIDING else None)
        for layer, kind in zip(spec.layers, kinds, strict=True)
    ]
    return replace(spec, layers=tuple(layers))


def with_ropes(spec: ArchSpec, ropes: Sequence[RopeSpec | None]) -> ArchSpec:
    """Gives each layer its own rotation."""
    layers = [replace(layer, rope=rope) for layer, rope in zip(spec.layers, ropes, strict=True)]
    return replace(spec, layers=tuple(layers))

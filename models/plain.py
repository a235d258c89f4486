"""The plainest decoder, read from config.json, and changes that several families make to it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from minirksc.errors import CheckpointError, UnsupportedModelError
from minirksc.models.config.fields import MAX_SIZE, Fields
from minirksc.models.config.rope import read_rope
from minirksc.models.spec import ArchSpec, LayerSpec, RopeSpec

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
CHUNK_FIELDS = {
    *("chunk_size", "local_size", "original_max_position_embeddings"),
    *("sparse_attention_config", "sparse_attention_enabled", "sparse_attention_threshold"),
}
"""Fields of dual chunk attention; the last ones leave out keys of long sequences."""


def plain(
    f: Fields, *, layer_type: str | None = None, is_partial: bool = False, others: tuple[str, ...] = (), **changes: Any
) -> ArchSpec:
    """A Llama of the file's sizes, with the family's values in place of its own.

    Args:
        f: fields of the file.
        layer_type: argument of `read_rope`, as the next two.
        is_partial: argument of it.
        others: argument of it.
        changes: fields of `ArchSpec` and their values.
    """
    f.default(hidden_act="silu", rms_norm_eps=1e-6, rope_theta=1e4, max_position_embeddings=2048)
    num_heads, hidden_size = f.size("num_attention_heads"), f.size("hidden_size")
    head_dim = _head_dim(f, hidden_size, num_heads)
    layer = LayerSpec(
        num_kv_heads=num_heads if _is_null(f, "num_key_value_heads") else f.size("num_key_value_heads", num_heads),
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
    length = rope.number("factor") * rope.number("original_max_position_embeddings")
    if length > MAX_SIZE:
        raise CheckpointError(f"{rope.kind} rope reaches to position {length:.3g}, more than {MAX_SIZE}")
    return max(of_file, int(length))


def default_rope(f: Fields, **parameters: Any) -> None:
    """What the rotation is where the file says nothing of it.

    Raises:
        CheckpointError: it says that there are no parameters at all, which is not what such a model was made for.
    """
    given = f.get("rope_parameters")
    if given == {}:
        raise CheckpointError(
            f"{f.where}: rope_parameters {{}} is empty, and model_type {f.get('model_type')!r} needs some; leave the "
            "field out for those that its models have"
        )
    if given is None and not f.get("rope_scaling"):
        f.default(rope_parameters=parameters)


def _head_dim(f: Fields, hidden_size: int, num_heads: int) -> int:
    if f.get("head_dim") is None and hidden_size % num_heads:
        raise CheckpointError(
            f"{f.where}: hidden_size {hidden_size} is no multiple of num_attention_heads {num_heads}, and there is "
            "no head_dim"
        )
    return hidden_size // num_heads if _is_null(f, "head_dim") else f.size("head_dim", hidden_size // num_heads)


def _is_null(f: Fields, name: str) -> bool:
    """Whether a field is there and null: of a size that follows from others, not from the family."""
    return name in f and f.get(name) is None


def with_biases(f: Fields) -> ArchSpec:
    """A Llama with a switch for the biases of attention and one for those of the MLP."""
    return plain(f, qkv_bias=f.flag("attention_bias"), o_bias=f.flag("attention_bias"), mlp_bias=f.flag("mlp_bias"))


def either(f: Fields, name: str, other: str) -> bool:
    """A switch with two names.

    Raises:
        CheckpointError: both are there and contradict each other.
    """
    if name in f and other in f and f.flag(name) != f.flag(other):
        raise CheckpointError(f"{f.where}: {name} {f.flag(name)} and {other} {f.flag(other)} contradict each other")
    return f.flag(name) or f.flag(other)


def with_windows(
    f: Fields, spec: ArchSpec, is_full: Callable[[int], bool] = lambda index: False, is_on: bool = True
) -> ArchSpec:
    """Gives a window to the layers that slide: those that the file's layer_types name, else all that are not full.

    Args:
        f: fields of the file.
        spec: architecture without windows.
        is_full: whether a layer, by its index, sees all keys.
        is_on: whether there are windows at all.

    Raises:
        CheckpointError: layer_types names some, and the file has no window for them.
    """
    window = None if f.get("sliding_window") is None or not is_on else f.size("sliding_window")
    named = f.per_layer("layer_types", spec.num_layers, (FULL, SLIDING))
    if window is None and named is not None and SLIDING in named:
        why = "sliding_window is null" if is_on else "use_sliding_window is off"
        raise CheckpointError(f"{f.where}: layer_types names {SLIDING} layers, but {why}; keep the right one")
    kinds = named or [FULL if is_full(index) else SLIDING for index in range(spec.num_layers)]
    return with_each(spec, "window", [window if kind == SLIDING else None for kind in kinds])


def without_windows(f: Fields, spec: ArchSpec) -> ArchSpec:
    """For families in which no layer has a window, though newer files list the layers all the same.

    Raises:
        CheckpointError: the list is another one.
    """
    f.per_layer("layer_types", spec.num_layers, (FULL,))
    return spec


def within_one_chunk(f: Fields, spec: ArchSpec) -> ArchSpec:
    """Ends the longest sequence where dual chunk attention would begin to differ from plain attention.

    It counts positions anew in every chunk, and makes scores sharper beyond the original length: within the first
    chunk and that length it is plain attention, and what it leaves out of long sequences approximates that.

    Raises:
        CheckpointError: the chunk has no size.
        UnsupportedModelError: there is more to it.
    """
    given = f.get("dual_chunk_attention_config")
    if given is None:
        return spec
    if not isinstance(given, Mapping) or given.keys() - CHUNK_FIELDS:
        raise UnsupportedModelError(f"{f.where}: dual_chunk_attention_config {given!r:.200} is not supported")
    chunk = Fields(given, f"{f.where}: dual_chunk_attention_config")
    length = chunk.size("chunk_size") - chunk.size("local_size", minimum=0)
    length = min(length, chunk.size("original_max_position_embeddings", length), spec.max_position_embeddings)
    if length < 1:
        raise CheckpointError(f"{chunk.where}: chunk_size must be more than local_size")
    return replace(spec, max_position_embeddings=length)


def with_each(spec: ArchSpec, field: str, values: Sequence[Any]) -> ArchSpec:
    """Gives each layer its own value of one field of `LayerSpec`."""
    layers = [replace(layer, **{field: value}) for layer, value in zip(spec.layers, values, strict=True)]
    return replace(spec, layers=tuple(layers))

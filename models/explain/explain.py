"""One model explained as plain data: what departs from the plainest Llama, kinds of layers, parameters and bytes.

Everything follows from the `ArchSpec` and, where there are weights, from the headers of their files; no tensor is
loaded. `page.py` makes text of it.
"""

import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from minirksc.kernels.weights.linear import auto_dtype
from minirksc.models.config.fields import stored_dtype
from minirksc.models.explain.reasons import ROPE_KINDS, WHY, Reason
from minirksc.models.families import FAMILIES, WRAPPERS, load_config, spec_from_config
from minirksc.models.spec import ArchSpec, LayerSpec, RopeSpec, WeightLayout
from minirksc.models.weights.rules import checkpoint_report, weight_rules
from minirksc.models.weights.safetensors_file import DTYPES, read_entries

Values = tuple[Any, ...]
"""Of one field: one value, or one a layer. None in a field of RoPE: the layer does not rotate."""

FACTS = ("model_type", "max_position_embeddings", "eos_token_ids", "bos_token_id")
"""Fields that every model has its own of, besides the sizes."""

KV_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

PARTS = {
    "embed.weight": "embedding",
    "lm_head.weight": "head",
    "qkv": "attention",
    "o": "attention",
    "gate_up": "mlp",
    "down": "mlp",
    "scale": "layer scales",
}
"""Decoder parameters, without their suffixes in layers, by the part that they count for; all others are norms."""


@dataclass(frozen=True)
class Difference:
    """A field that has another value than in something else.

    Attributes:
        field: name of the field, a key of `reasons.WHY`.
        values: values here.
        others: values there.
        reasons: purposes of the field; one for each RoPE kind that is not the plain one.
    """

    field: str
    values: Values
    others: Values
    reasons: tuple[Reason, ...]


@dataclass(frozen=True)
class LayerKind:
    """Layers that are alike.

    Attributes:
        layers: indices of the layers.
        layer: one of them; where they read the cache of others, which others may differ.
        kv_numbers: keys and values that one token leaves in the cache of each.
    """

    layers: tuple[int, ...]
    layer: LayerSpec
    kv_numbers: int


@dataclass(frozen=True)
class Weights:
    """What the files of a checkpoint hold.

    Attributes:
        num_tensors: number of tensors that are used.
        num_bytes: bytes of these, as stored.
        stored: number of tensors by dtype, skipped ones included.
        skipped: names of tensors without use.
        has_own_head: whether there is a head unlike the embedding, though config.json ties the two.
        run_dtype: dtype that is computed in where no other is asked for.
        run_bytes: bytes of the parameters in it.
        packed_head_bytes: bytes of the head's own copy of a tied embedding, packed for the processor; 0 for none.
    """

    num_tensors: int
    num_bytes: int
    stored: Mapping[str, int]
    skipped: tuple[str, ...]
    has_own_head: bool
    run_dtype: str
    run_bytes: int
    packed_head_bytes: int


@dataclass(frozen=True)
class KvBytes:
    """What keys and values of one sequence take, in one dtype; blocks round it up.

    A window frees memory only where other layers have none: else all layers keep all tokens, and count as full.

    Attributes:
        token_full: bytes of a token, in all layers that keep every token.
        token_window: bytes of a token in view, in all layers that keep a window.
        window_limit: most bytes that the latter ever take.
        longest: bytes of a sequence of the model's longest length.
    """

    token_full: int
    token_window: int
    window_limit: int
    longest: int


@dataclass(frozen=True)
class Explanation:
    """All about one model.

    Attributes:
        name: name that it was asked for by.
        spec: its architecture.
        departures: fields in which it departs from the plainest Llama of the same sizes.
        layer_kinds: kinds of layers, in the order of their first layers.
        parameters: number of parameters by part.
        kv_bytes: size of the cache by dtype.
        weights: what its files hold; None where there are none.
    """

    name: str
    spec: ArchSpec
    departures: tuple[Difference, ...]
    layer_kinds: tuple[LayerKind, ...]
    parameters: Mapping[str, int]
    kv_bytes: Mapping[str, KvBytes]
    weights: Weights | None


def explain_folder(name: str, folder: Path, ignored: Collection[str] = ()) -> Explanation:
    """A checkpoint folder, which may be a config.json alone; `ignored` as of `spec_from_config`.

    Raises:
        CheckpointError, UnsupportedModelError: a file cannot be read, or describes what is not implemented.
    """
    config = load_config(folder)
    spec = spec_from_config(config, ignored)
    has_weights = any(folder.glob("*.safetensors")) or any(folder.glob("*.safetensors.index.json"))
    weights = _weights(folder, spec, auto_dtype(stored_dtype(config), _device())) if has_weights else None
    return explain(name, spec, weights)


def explain(name: str, spec: ArchSpec, weights: Weights | None = None) -> Explanation:
    """A spec."""
    return Explanation(
        name=name,
        spec=spec,
        departures=departures(spec),
        layer_kinds=layer_kinds(spec),
        parameters=parameter_counts(spec, weights is not None and weights.has_own_head),
        kv_bytes={name: kv_bytes(spec, dtype) for name, dtype in KV_DTYPES.items()},
        weights=weights,
    )


def departures(spec: ArchSpec) -> tuple[Difference, ...]:
    """Every field that is not as in the plainest Llama of the same sizes."""
    here, plain = flatten(spec), flatten(plainest_llama(spec))
    plain |= {name: here[name] for name in FACTS}
    # These follow from head_dim: a model that has another one there does not depart here once more.
    plain["query_scale"] = (spec.layers[0].head_dim ** -0.5,)
    plain["rope.rotary_dim"] = here["head_dim"]
    return differences(here, plain)


def plainest_llama(spec: ArchSpec) -> ArchSpec:
    """Llama 1 with the sizes of a spec: as many KV heads as query heads, and a head of its own."""
    per_head = spec.hidden_size / spec.num_heads
    # Where the width does not divide there is no plain value.
    head_dim = int(per_head) if per_head % 2 == 0 else spec.layers[0].head_dim
    return spec_from_config({"model_type": "llama", **sizes_of(spec), "head_dim": head_dim})


def sizes_of(spec: ArchSpec) -> dict[str, int]:
    """The sizes that every config.json has."""
    return {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.layers[0].intermediate_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
    }


def flatten(spec: ArchSpec) -> dict[str, Values]:
    """Every field of a spec, and of the specs in it, by its name in `reasons.WHY`."""
    flat: dict[str, Values] = {"num_layers": (spec.num_layers,)}
    flat |= {f.name: (getattr(spec, f.name),) for f in fields(ArchSpec) if f.name not in ("layers", "layout")}
    flat |= {f"layout.{f.name}": (getattr(spec.layout, f.name),) for f in fields(WeightLayout)}
    flat |= {f.name: tuple(getattr(layer, f.name) for layer in spec.layers) for f in fields(LayerSpec)}
    ropes = flat["rope"]
    flat["rope"] = tuple(rope is not None for rope in ropes)
    flat |= {f"rope.{f.name}": tuple(getattr(rope, f.name, None) for rope in ropes) for f in fields(RopeSpec)}
    return {name: flat[name] for name in WHY}


def differences(here: Mapping[str, Values], there: Mapping[str, Values]) -> tuple[Difference, ...]:
    """Fields of two flat specs that differ; models with other numbers of layers are alike where all layers are."""
    found = []
    for name, values in here.items():
        ours, theirs = _rotating(name, values, there[name]), _rotating(name, there[name], values)
        if ours != theirs and (len({*ours}) != 1 or {*ours} != {*theirs}):
            found.append(Difference(name, values, there[name], reasons_of(name, (*values, *there[name]))))
    return tuple(found)


def _rotating(name: str, values: Values, others: Values) -> Values:
    """Values of the layers that rotate in both: that a layer does not is a difference of its own."""
    if not name.startswith("rope."):
        return values
    if len(values) != len(others):
        return tuple(value for value in values if value is not None)
    return tuple(value for value, other in zip(values, others, strict=True) if None not in (value, other))


def reasons_of(field: str, values: Values) -> tuple[Reason, ...]:
    """What a field with such values is good for."""
    kinds = dict.fromkeys(value for value in values if field == "rope.kind" and value not in (None, "default"))
    return tuple(ROPE_KINDS[kind] for kind in kinds) or (WHY[field],)


def layer_kinds(spec: ArchSpec) -> tuple[LayerKind, ...]:
    """Layers by what they are: those that read the cache of others are alike whichever these are."""
    groups: dict[tuple[LayerSpec, bool], list[int]] = {}
    for index, layer in enumerate(spec.layers):
        groups.setdefault((replace(layer, kv_layer=None), layer.kv_layer is None), []).append(index)
    return tuple(
        LayerKind(tuple(indices), spec.layers[indices[0]], _kv_numbers(spec.layers[indices[0]]))
        for indices in groups.values()
    )


def _kv_numbers(layer: LayerSpec) -> int:
    return 2 * layer.num_kv_heads * layer.head_dim if layer.kv_layer is None else 0


def kv_bytes(spec: ArchSpec, dtype: torch.dtype) -> KvBytes:
    """What the cache takes.

    Args:
        spec: architecture of the model.
        dtype: dtype of keys and values.
    """
    window = spec.retained_window
    total = sum(map(_kv_numbers, spec.layers)) * dtype.itemsize
    full = sum(_kv_numbers(layer) for layer in spec.layers if None in (window, layer.window)) * dtype.itemsize
    windowed = total - full
    length = spec.max_position_embeddings
    longest = full * length + windowed * min(window or 0, length)
    return KvBytes(full, windowed, windowed * (window or 0), longest)


def parameter_counts(spec: ArchSpec, has_own_head: bool = False) -> dict[str, int]:
    """Part -> number of parameters; a tied head is not counted again.

    Args:
        spec: architecture of the model.
        has_own_head: whether the checkpoint has a head although its config ties it.
    """
    counts: Counter[str] = Counter()
    for rule in weight_rules(spec, has_own_head):
        name = rule.parameter
        key = name.split(".")[2] if name.startswith("layers.") else name
        counts[PARTS.get(key, "norms")] += math.prod(rule.shape)
    order = dict.fromkeys([*PARTS.values(), "norms"])
    return {part: counts[part] for part in order if counts[part]}


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _weights(folder: Path, spec: ArchSpec, dtype: torch.dtype) -> Weights:
    report = checkpoint_report(folder, spec)
    has_own_head = report.num_parameters != sum(parameter_counts(spec).values())
    shares_embedding = spec.tie_word_embeddings and not has_own_head
    is_packed = _device().type == "cpu" and bool(torch._C._has_mkldnn)
    packed = spec.vocab_size * spec.hidden_size * dtype.itemsize
    entries = read_entries(folder, spec.layout.fp8 is not None)
    names = {code: _name(known) for code, known in DTYPES.items()}  # those that hold no weights go by their codes
    return Weights(
        num_tensors=report.num_tensors,
        num_bytes=report.num_bytes,
        stored=dict(Counter(names.get(entry.dtype, entry.dtype) for entry in entries.values())),
        skipped=report.skipped,
        has_own_head=has_own_head,
        run_dtype=_name(dtype),
        run_bytes=report.num_parameters * dtype.itemsize,
        packed_head_bytes=packed if shares_embedding and is_packed else 0,
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def family_of(model_type: str) -> tuple[str, str]:
    """(models of a type, what is special about them in words), as the type's function tells."""
    function = FAMILIES.get(WRAPPERS.get(model_type, model_type))
    line = (getattr(function, "__doc__", None) or f"{model_type}: ").splitlines()[0]
    names, _, words = line.partition(": ")
    return names, words

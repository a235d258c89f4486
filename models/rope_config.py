"""Rotary embeddings as config.json spells them, old and new, to `RopeSpec`.

New: `rope_parameters`, one object or one a layer type. Old: `rope_theta` beside `rope_scaling`, whose kind is
called `type` or `rope_type`. Where both spellings are there they must agree.
"""

import math
from collections.abc import Mapping
from typing import Any

from minirksc.models.fields import Fields, positive
from minirksc.models.rope import KINDS
from minirksc.models.spec import RopeSpec

from minirksc.errors import CheckpointError, UnsupportedModelError

ALIASES = {"su": "longrope"}
NEEDED = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "truncate"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
    "proportional": ("factor", "partial_rotary_factor"),
}
"""Parameters of each kind."""

LISTS = ("short_factor", "long_factor")
"""Parameters that are lists, with a number a pair."""

OF_ATTENTION_FACTOR = {
    "yarn": ("attention_factor", "mscale", "mscale_all_dim"),
    "longrope": ("factor", "attention_factor"),
}
"""What the attention factor follows from."""

DEFAULTS = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True, "factor": 1.0, "partial_rotary_factor": 1.0}


def read_rope(
    fields: Fields,
    head_dim: int,
    layer_type: str | None = None,
    *,
    is_partial: bool = False,
    others: tuple[str, ...] = (),
) -> RopeSpec:
    """The rotation of a layer.

    Args:
        fields: of config.json; `rope_theta` and, if the family has one, `rope_parameters` have defaults.
        head_dim: of the layer.
        layer_type: entry of a `rope_parameters` that has one a layer type.
        is_partial: the family honours `partial_rotary_factor`.
        others: names inside rope_parameters that the family reads itself.

    Raises:
        CheckpointError, UnsupportedModelError: it is impossible, or not implemented.
    """
    spellings = [fields.get(name) for name in ("rope_parameters", "rope_scaling")]
    found = [_of_layer(fields, raw, layer_type) for raw in spellings if raw] or [{}]
    ropes = [_read(fields, raw, head_dim, is_partial, others) for raw in found]
    if ropes[0] != ropes[-1]:
        raise CheckpointError(
            f"{fields.where}: rope_parameters {found[0]!r:.200} and rope_scaling {found[-1]!r:.200} contradict each "
            "other; keep the right one"
        )
    return ropes[0]


def _of_layer(fields: Fields, raw: Any, layer_type: str | None) -> Mapping[str, Any]:
    if isinstance(raw, Mapping) and layer_type is not None and layer_type in raw:
        raw = raw[layer_type] or {}
    if not isinstance(raw, Mapping):
        raise CheckpointError(f"{fields.where}: rope parameters {raw!r:.80} must be an object")
    return raw


def _read(fields: Fields, raw: Mapping[str, Any], head_dim: int, is_partial: bool, others: tuple[str, ...]) -> RopeSpec:
    given = {name: value for name, value in raw.items() if value is not None}
    kind = given.pop("rope_type", None) or given.pop("type", None) or "default"
    given.pop("type", None)
    kind = ALIASES.get(kind, kind) if isinstance(kind, str) else kind
    if kind == "yarn" and "short_factor" in given:  # as the first files with a factor a pair called it
        kind = "longrope"
    if not isinstance(kind, str) or kind not in KINDS:
        raise UnsupportedModelError(f"rope type {kind!r:.80} is not supported; known: {', '.join(KINDS)}")
    where = f"{fields.where}: {kind} rope:"
    theta = positive(given.pop("rope_theta", fields.get("rope_theta")), f"{where} rope_theta")
    max_len = fields.size("max_position_embeddings")
    original = positive(
        fields.get("original_max_position_embeddings") or given.pop("original_max_position_embeddings", max_len),
        f"{where} original_max_position_embeddings",
    )
    given.pop("original_max_position_embeddings", None)
    rotary_dim = head_dim
    if is_partial:
        share = positive(
            given.pop("partial_rotary_factor", fields.get("partial_rotary_factor", 1.0)), f"{where} partial"
        )
        rotary_dim = int(head_dim * share)
    defaults = {**DEFAULTS, "original_max_position_embeddings": original}
    if kind == "yarn":
        defaults["factor"] = max_len / original
    elif kind != "proportional":
        del defaults["factor"]
    parameters = {name: given.get(name, defaults.get(name)) for name in NEEDED[kind]}
    if kind == "dynamic":  # which knows no other length than the model's own
        parameters["original_max_position_embeddings"] = max_len
    known = {*parameters, *OF_ATTENTION_FACTOR.get(kind, ()), *others}
    if unread := sorted(given.keys() - known):
        raise UnsupportedModelError(f"rope type {kind!r} has parameters that nothing reads: {unread}")
    checked = {name: _parameter(value, f"{where} {name}", name in LISTS) for name, value in parameters.items()}
    factor = _attention_factor(kind, given, where, max_len / original, original)
    return RopeSpec(kind, theta, rotary_dim, tuple(checked.items()), factor)


def _parameter(value: Any, what: str, is_list: bool) -> float | tuple[float, ...]:
    if value is None:
        raise CheckpointError(f"{what.replace('rope: ', 'rope lacks ')}")
    if is_list:
        if not isinstance(value, list):
            raise CheckpointError(f"{what} {value!r:.80} must be a list of numbers")
        return tuple(positive(item, what) for item in value)
    if isinstance(value, bool):
        return float(value)
    return positive(value, what)


def _attention_factor(kind: str, given: Mapping[str, Any], where: str, ratio: float, original: float) -> float:
    """What cosines and sines are multiplied by."""
    if "attention_factor" in given and kind in OF_ATTENTION_FACTOR:
        return positive(given["attention_factor"], f"{where} attention_factor")
    factor = positive(given.get("factor", ratio), f"{where} factor")
    if kind == "yarn":
        mscale, all_dim = given.get("mscale"), given.get("mscale_all_dim")
        if mscale and all_dim:
            return _mscale(factor, positive(mscale, f"{where} mscale")) / _mscale(
                factor, positive(all_dim, f"{where} mscale_all_dim")
            )
        return _mscale(factor, 1.0)
    if kind == "longrope" and factor > 1:
        if original <= 1:
            raise CheckpointError(f"{where} original_max_position_embeddings {original} must be more than 1")
        return math.sqrt(1 + math.log(factor) / math.log(original))
    return 1.0


def _mscale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

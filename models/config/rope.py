"""Rotary embeddings as config.json spells them, old and new, to `RopeSpec`.

New: `rope_parameters`, one object or one a layer type. Old: `rope_theta` beside `rope_scaling`, whose kind is
called `type` or `rope_type`. Where both spellings are there they must agree.
"""

import math
from collections.abc import Mapping
from typing import Any

from minirksc.errors import CheckpointError, UnsupportedModelError, listing
from minirksc.models.config.fields import Fields, positive
from minirksc.models.rope import KINDS
from minirksc.models.spec import RopeSpec

ALIASES = {"su": "longrope", "mrope": "default"}
NEEDED = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "truncate"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
    "proportional": ("factor", "partial_rotary_factor"),
}
"""Names of the parameters of each kind."""

LISTS = ("short_factor", "long_factor")
"""Parameters that are lists, with a number a pair."""

BESIDE = {
    "yarn": ("attention_factor", "attn_factor", "mscale", "mscale_all_dim", "finetuned"),
    "longrope": ("factor", "attention_factor"),
}
"""What the attention factor follows from, and how YaRN's numbers were found, which is no part of them."""

NEUTRAL = ("factor", "attention_factor", "attn_factor", "extrapolation_factor", "partial_rotary_factor")
"""Factors that are not of a kind, and that some files have all the same: 1 changes nothing."""

OF_IMAGES = ("mrope_section", "mrope_interleaved")
"""Which pairs turn with which coordinate of an image: those of text are all alike, so that text has plain positions."""

DEFAULTS = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True, "partial_rotary_factor": 1.0}


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
        fields: fields of config.json; `rope_theta` and, if the family has one, `rope_parameters` have defaults.
        head_dim: width of the layer's heads.
        layer_type: entry of a `rope_parameters` that has one a layer type.
        is_partial: whether the family honours `partial_rotary_factor`.
        others: names inside rope_parameters that the family reads itself.

    Raises:
        CheckpointError, UnsupportedModelError: it is impossible, or not implemented.
    """
    spellings = [fields.given(name) for name in ("rope_parameters", "rope_scaling")]
    # Empty as well as absent is plain RoPE: what a family has instead by default is for absent ones alone.
    found = [given for raw in spellings if raw is not None and (given := _of_layer(fields, raw, layer_type))] or [{}]
    ropes = [_read(fields, raw, head_dim, is_partial, others) for raw in found]
    if ropes[0] != ropes[-1]:
        raise CheckpointError(
            f"{fields.where}: rope_parameters {found[0]!r:.200} and rope_scaling {found[-1]!r:.200} contradict each "
            "other; keep the right one"
        )
    return ropes[0]


def _of_layer(fields: Fields, raw: Any, layer_type: str | None) -> Mapping[str, Any]:
    if isinstance(raw, Mapping) and layer_type is not None and layer_type in raw:
        raw = {} if raw[layer_type] is None else raw[layer_type]
    if not isinstance(raw, Mapping):
        raise CheckpointError(f"{fields.where}: rope parameters {raw!r:.80} must be an object")
    return raw


def _read(fields: Fields, raw: Mapping[str, Any], head_dim: int, is_partial: bool, others: tuple[str, ...]) -> RopeSpec:
    given = {name: value for name, value in raw.items() if value is not None}
    kind = _kind([given.pop(name) for name in ("rope_type", "type") if name in given], "short_factor" in given)
    where = f"{fields.where}: {kind} rope:"
    theta = positive(given.pop("rope_theta", fields.given("rope_theta")), f"{where} rope_theta")
    max_len = fields.size("max_position_embeddings")
    inner = given.pop("original_max_position_embeddings", max_len)
    outer = fields.get("original_max_position_embeddings")
    original = positive(inner if outer is None else outer, f"{where} original_max_position_embeddings")
    rotary_dim = head_dim
    if is_partial:
        share = given.pop("partial_rotary_factor", fields.given("partial_rotary_factor"))
        rotary_dim = int(head_dim * _number(1.0 if share is None else share, where, "partial_rotary_factor"))
    factor = {"yarn": max_len / original, "proportional": 1.0}.get(kind)
    own = max_len if kind == "dynamic" else original  # dynamic knows no other length than the model's own
    defaults = {**DEFAULTS, "original_max_position_embeddings": own, "factor": factor}
    parameters = {name: given.get(name, defaults.get(name)) for name in NEEDED[kind]}
    if "truncate" in parameters and not isinstance(raw.get("truncate", True), bool):  # null is not the default
        raise CheckpointError(f"{where} truncate {raw['truncate']!r:.80} must be true or false")
    neutral = [name for name in NEUTRAL if given.get(name) == 1 and given[name] is not True]
    known = {*parameters, *BESIDE.get(kind, ()), *OF_IMAGES, *neutral, *others}
    if unread := fields.pass_over(given.keys() - known):
        raise UnsupportedModelError(
            f"rope type {kind!r} has parameters that nothing reads: {listing([repr(name) for name in unread], ', ')}; "
            f"if you know that they change nothing, pass them over: --ignore-config-key {unread[0]:.200}"
        )
    checked = {name: _parameter(value, where, name) for name, value in parameters.items()}
    attention_factor = _attention_factor(kind, given, where, max_len / original, original)
    return RopeSpec(kind, theta, rotary_dim, tuple(checked.items()), attention_factor)


def _kind(names: list[Any], has_factors: bool) -> str:
    """The kind by the first of the names that it was given; `has_factors`: there is a factor a pair."""
    kind = names[0] if names else "default"
    if kind == "yarn" and has_factors:  # as the first files with a factor a pair called it
        kind = "longrope"
    kind = ALIASES.get(kind, kind) if isinstance(kind, str) else kind
    if not isinstance(kind, str) or kind not in KINDS:
        raise UnsupportedModelError(f"rope type {kind!r:.80} is not supported; known: {', '.join(KINDS)}")
    return kind


def _parameter(value: Any, where: str, name: str) -> float | tuple[float, ...]:
    if value is None:
        raise CheckpointError(f"{where.removesuffix(':')} lacks {name}")
    if name in LISTS:
        if not isinstance(value, list):
            raise CheckpointError(f"{where} {name} {value!r:.80} must be a list of numbers")
        return tuple(_number(item, where, name) for item in value)
    return float(value) if name == "truncate" else _number(value, where, name)


def _number(value: Any, where: str, name: str) -> float:
    number = positive(value, f"{where} {name}")
    if name == "partial_rotary_factor" and number > 1:
        raise CheckpointError(f"{where} {name} {number} must be at most 1")
    return number


def _attention_factor(kind: str, given: Mapping[str, Any], where: str, ratio: float, original: float) -> float:
    """What cosines and sines are multiplied by."""
    if kind not in BESIDE:
        return 1.0

    def number(name: str, default: float = 1.0) -> float:
        return positive(given[name], f"{where} {name}") if name in given else default

    # YaRN's own code multiplies its attn_factor in; transformers, which calls something else so, passes it over.
    absolute, own, factor = number("attention_factor"), number("attn_factor"), number("factor", ratio)
    if "attention_factor" in given:
        if own != 1.0:
            raise CheckpointError(f"{where} attention_factor and attn_factor contradict each other; keep the right one")
        return absolute
    if kind == "yarn":
        if given.get("mscale") and given.get("mscale_all_dim"):
            return own * _mscale(factor, number("mscale")) / _mscale(factor, number("mscale_all_dim"))
        return own * _mscale(factor, 1.0)
    if factor <= 1:
        return 1.0
    if original <= 1:
        raise CheckpointError(f"{where} original_max_position_embeddings {original} must be more than 1")
    return math.sqrt(1 + math.log(factor) / math.log(original))


def _mscale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

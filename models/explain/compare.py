"""Models side by side: the table of supported types, and what differs between two."""

from dataclasses import dataclass, replace

from minirksc.models.explain.explain import Difference, departures, differences, family_of, flatten, sizes_of
from minirksc.models.families import FAMILIES, REASONS, WRAPPERS, spec_from_config
from minirksc.models.spec import ArchSpec

SAMPLE_SIZES = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 12,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
}
"""A Llama as plain as can be; whatever else a family has comes from its defaults."""

REAL_WEIGHTS = {
    "llama": "SmolLM2-135M-Instruct",
    "qwen2": "Qwen2.5-Coder-0.5B-Instruct",
    "gemma3_text": "Gemma 3 270M",
}
"""Models whose own weights were compared with transformers too, by type."""

TESTED_WRAPPERS = ("gemma3", "gemma4", "mistral3")
"""Multimodal types with whole checkpoints among the tests; of others the text model is tested alone."""


@dataclass(frozen=True)
class TypeRow:
    """A supported model_type.

    Attributes:
        model_type: name of the type in config.json.
        models: models that say so.
        words: sentence that its family function says of it.
        text_type: type of the text model, where the type is a multimodal one; None for others.
        changes: fields in which it departs from the plainest Llama by its defaults.
        tested: kinds of tests that it has, in a word or two.
        real_weights: model with weights of its own that were compared; None for none.
    """

    model_type: str
    models: str
    words: str
    text_type: str | None
    changes: tuple[Difference, ...]
    tested: str
    real_weights: str | None


def type_rows() -> list[TypeRow]:
    """One row a type that `families.py` knows."""
    rows = []
    for model_type in FAMILIES:
        changes, real = departures(type_spec(model_type)), REAL_WEIGHTS.get(model_type)
        tested = "random, real" if real else "random"
        rows.append(TypeRow(model_type, *family_of(model_type), None, changes, tested, real))
    for model_type, text_type in WRAPPERS.items():
        tested = "random" if model_type in TESTED_WRAPPERS else "text alone"
        rows.append(TypeRow(model_type, "multimodal ones", family_of(model_type)[1], text_type, (), tested, None))
    return rows


def refused_types() -> dict[str, list[str]]:
    """Reason -> types that are refused for it."""
    return {reason: types.split() for reason, types in REASONS.items()}


def type_spec(model_type: str, like: ArchSpec | None = None) -> ArchSpec:
    """A type by its defaults.

    Args:
        model_type: name of the type in config.json.
        like: model that has the sizes; None for sample sizes.

    Raises:
        UnsupportedModelError: the type is not implemented.
        CheckpointError: the type cannot have these sizes.
    """
    sizes = SAMPLE_SIZES
    if like is not None:
        sizes = {
            **sizes_of(like),
            "num_key_value_heads": like.layers[0].num_kv_heads,
            "max_position_embeddings": like.max_position_embeddings,
            "rms_norm_eps": like.norm_eps,
        }
    text_type = WRAPPERS.get(model_type, model_type)
    config = {"model_type": text_type, **sizes}
    spec = spec_from_config(config if text_type == model_type else {"model_type": model_type, "text_config": config})
    if like is None:
        return spec
    return replace(spec, eos_token_ids=like.eos_token_ids, bos_token_id=like.bos_token_id)


def compare(a: ArchSpec, b: ArchSpec) -> tuple[Difference, ...]:
    """What differs between two models; `values` are a's and `others` b's."""
    followers = _followers(a) & _followers(b)
    return tuple(found for found in differences(flatten(a), flatten(b)) if found.field not in followers)


def _followers(spec: ArchSpec) -> set[str]:
    """Fields that say what head_dim says already."""
    flat, ropes = flatten(spec), [layer.rope for layer in spec.layers]
    scales = {head_dim**-0.5 for head_dim in flat["head_dim"]}
    found = {"query_scale"} if scales == {*flat["query_scale"]} else set()
    if all(rope is None or rope.rotary_dim == layer.head_dim for rope, layer in zip(ropes, spec.layers, strict=True)):
        found.add("rope.rotary_dim")
    return found

"""What tools put before the names of a model's tensors, taken off again.

A model may have been saved inside another module (DDP's `module.`, torch.compile's `_orig_mod.`, a multimodal
model's `language_model.`), or from inside (`AutoModel` saves without `model.`). One beginning is found, by where the
embedding lies, and holds for the whole checkpoint: a tensor without it is not the model's.
"""

from collections.abc import Mapping

from minirksc.errors import CheckpointError
from minirksc.models.weights.entry import TensorEntry

ANCHORS = ("embed_tokens.weight", "layers.0.input_layernorm.weight")
"""Tensors that a text model has once; the second is for one whose embedding is missing."""

HEAD = "lm_head."
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Modules that hold another one and nothing else."""

INNER = "language_model"
"""Where a multimodal model has its text model."""

PARTS = ("model", INNER, *WRAPPERS)
"""Modules that a beginning is made of."""

Entries = dict[str, TensorEntry]


def renamed(entries: Mapping[str, TensorEntry], is_wrapped: bool) -> tuple[Entries, Entries]:
    """The tensors of the text model by the names that it has alone (`model.layers.0...`, `lm_head.weight`).

    Args:
        entries: places of tensors, by the names in the files.
        is_wrapped: whether the text model must be inside a multimodal one.

    Returns:
        (its tensors by their new names, all others by their own).

    Raises:
        CheckpointError: there are two text models or two heads, or the text model is alone and should not be.
    """
    body = _beginning(entries)
    if body is None:
        body = "model."
    elif is_wrapped and INNER not in body.split("."):
        raise CheckpointError(
            f"config.json is of a multimodal model, and {body}{ANCHORS[0]} is in a text model alone; put the "
            "content of its text_config in the place of config.json"
        )
    head = _beginning_of_head(entries, body)
    own: Entries = {}
    others: Entries = {}
    for name, entry in entries.items():
        if head is not None and name.startswith(head + HEAD):
            own[name.removeprefix(head)] = entry
        elif name.startswith(body):
            own[f"model.{name.removeprefix(body)}"] = entry
        else:
            others[name] = entry
    return own, others


def _beginning(entries: Mapping[str, TensorEntry]) -> str | None:
    for anchor in ANCHORS:
        found = sorted({name.removesuffix(anchor) for name in entries if _is_known(name, anchor)})
        if len(found) > 1:
            raise CheckpointError(
                f"there is more than one text model in {next(iter(entries.values())).file.parent}: "
                f"{', '.join(f'{begin}{anchor}' for begin in found[:4])}; leave one of them in its files"
            )
        if found:
            return found[0]
    return None


def _beginning_of_head(entries: Mapping[str, TensorEntry], body: str) -> str | None:
    """The head lies beside the body or above it, inside the same wrappers."""
    parts = body.split(".")[:-1]
    outer = next((i for i, part in enumerate(parts) if part not in WRAPPERS), len(parts))
    begins = ["".join(f"{part}." for part in parts[:i]) for i in range(outer, len(parts) + 1)]
    found = [begin for begin in begins if any(name.startswith(begin + HEAD) for name in entries)]
    if len(found) > 1:
        raise CheckpointError(f"there is more than one head: {', '.join(f'{begin}{HEAD}*' for begin in found)}")
    return found[0] if found else None


def _is_known(name: str, anchor: str) -> bool:
    begin = name.removesuffix(anchor)
    return begin != name and (not begin or begin.endswith(".")) and all(part in PARTS for part in begin.split(".")[:-1])

"""Checkpoints by their id on the Hugging Face hub: OWNER/NAME, or OWNER/NAME@REVISION.

The optional package `huggingface_hub` downloads and caches; here is decided what: weights as safetensors, configs,
tokenizers and chat templates, never pickles and never code. Without a network, what it has cached is used.
"""

import errno
import glob
import re
from collections.abc import Iterable
from pathlib import Path

from minirksc.errors import CheckpointError

ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[A-Za-z0-9][\w./-]*)?", re.ASCII)
LISTING_TIMEOUT_S = 10.0

SMALL_FILES = (
    *("config.json", "generation_config.json", "params.json"),
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json"),
    *("added_tokens.json", "tekken.json", "chat_template.jinja", "chat_template.json"),
)
TEMPLATES = re.compile(r"additional_chat_templates/[^/]+\.jinja")
WEIGHTS = re.compile(r"(?!\.|adapter_|optimizer)[^/]+\.safetensors(\.index\.json)?")
"""Without what systems (`._model.safetensors`), adapters and training leave beside them."""

REFUSALS = {
    "GatedRepoError": (
        "{repository} asks for consent to its licence: give it on its page on the hub and type: hf auth login; "
        "{instead}"
    ),
    "RevisionNotFoundError": "{repository} has no revision {revision!r} on the hub; leave it out for the newest",
    "RepositoryNotFoundError": (
        "there is neither a folder {model!r} nor a repository of that name on the hub; if it is private, type: "
        "hf auth login"
    ),
}
"""What an error of huggingface_hub means, by the name of its class."""


def is_hub_id(model: str) -> bool:
    """Whether a name looks like an id of the hub."""
    return ID.fullmatch(model) is not None and ".." not in model


def is_weights(name: str) -> bool:
    """Whether a file of a checkpoint folder holds weights, or tells which do."""
    return WEIGHTS.fullmatch(name) is not None


def fetch(model: str) -> Path:
    """The folder of a checkpoint on the hub, downloaded on first use.

    Args:
        model: id, OWNER/NAME or OWNER/NAME@REVISION.

    Raises:
        CheckpointError: the package is not installed; there is no such repository or revision, or it asks for a
            login; it has no safetensors; or it cannot be reached and is not cached.
    """
    repository, _, revision = model.partition("@")
    instead = f"or fetch it elsewhere (hf download {repository} --local-dir my-model) and give that folder"
    try:
        import huggingface_hub
    except ImportError as error:
        raise CheckpointError(
            f"there is no folder {model!r}. To download it by its id on the Hugging Face hub, type: "
            f"pip install 'minirksc[hub]'; {instead}"
        ) from error
    try:
        info = huggingface_hub.HfApi().model_info(repository, revision=revision or None, timeout=LISTING_TIMEOUT_S)
    except Exception as error:
        refusal = REFUSALS.get(type(error).__name__)
        if refusal is None:  # whatever the network or its absence raises
            return _cached(repository, revision, f"{error!s:.300}", instead)
        raise CheckpointError(
            refusal.format(model=model, repository=repository, revision=revision, instead=instead)
        ) from error
    wanted = wanted_files([file.rfilename for file in info.siblings or ()])
    if not any(is_weights(name) for name in wanted):
        raise CheckpointError(
            f"{repository} on the hub has no safetensors, and nothing else is read; choose another one"
        )
    try:
        patterns = [glob.escape(name) for name in wanted]
        return Path(huggingface_hub.snapshot_download(repository, revision=revision or None, allow_patterns=patterns))
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", None)):
            where = f" ({error.filename})" if error.filename else ""
            raise CheckpointError(
                f"the disk is full: the download of {repository} broke off{where}; make room, or name another folder "
                f"for all downloads in HF_HOME; what is complete is kept, {instead}"
            ) from error
        raise CheckpointError(
            f"the download of {repository} broke off: {error!s:.300}; try again, what is complete is kept, {instead}"
        ) from error


def wanted_files(names: Iterable[str]) -> list[str]:
    """Those files of a repository that are read; of weights in two layouts, only Hugging Face's.

    Args:
        names: names of all of its files, with their folders.
    """
    names = sorted(names)
    weights = [name for name in names if is_weights(name)]
    whole = [name for name in weights if not name.startswith("consolidated")]
    small = [name for name in names if name in SMALL_FILES or TEMPLATES.fullmatch(name)]
    return [*small, *(whole or weights)]


def _cached(repository: str, revision: str, reason: str, instead: str) -> Path:
    """What earlier downloads have left; never touches the network."""
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(repository, revision=revision or None, local_files_only=True))
    except Exception as error:
        raise CheckpointError(
            f"there is no folder {repository!r}, and the hub cannot be reached ({reason}), where nothing of that name "
            f"is cached. Connect and try again, {instead}"
        ) from error

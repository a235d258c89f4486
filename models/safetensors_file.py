"""Safetensors files of a checkpoint folder: which there are, what is in them, and reading one tensor.

Reads safetensors only. A header is checked whole before a byte of data is read; nothing is mapped, so that peak
memory is what the caller allocates.

Format: https://huggingface.co/docs/safetensors (8 bytes of header length, a JSON header, the data).
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minirksc.errors import CheckpointError

MAX_HEADER_BYTES = 100 << 20
"""Of a file's header, and of an index."""

MAX_DIMENSIONS = 16
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
    "U16": 2, "U32": 4, "U64": 8, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
}  # fmt: skip


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: file, dtype code, shape, and absolute byte range."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_entries(folder: Path) -> dict[str, TensorEntry]:
    """All tensors of a checkpoint folder, from the headers of its safetensors files.

    Raises:
        CheckpointError: no safetensors, a missing shard, a damaged header, or a tensor in two files.
    """
    entries: dict[str, TensorEntry] = {}
    for file in _files(folder):
        for name, entry in _read_header(file).items():
            if name in entries:
                raise CheckpointError(f"tensor {name} is in both {entries[name].file.name} and {file.name}")
            entries[name] = entry
    return entries


def _files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    if index.is_file():
        return _indexed_files(folder, index)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder")
    files = sorted(folder.glob("*.safetensors"))
    if files:
        return files
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth"))
    if pickles:
        raise CheckpointError(
            f"{folder} has only pickle files ({', '.join(pickles[:3])}), which can run any code when they are "
            "loaded; they are never read. Convert the checkpoint to safetensors"
        )
    raise CheckpointError(f"{folder} has no .safetensors file")


def _indexed_files(folder: Path, index: Path) -> list[Path]:
    if index.stat().st_size > MAX_HEADER_BYTES:
        raise CheckpointError(f"{index} has {index.stat().st_size} bytes, more than {MAX_HEADER_BYTES}")
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError, OSError) as error:
        raise CheckpointError(f"{index} is not a readable index: {error!r}") from error
    if not names:
        raise CheckpointError(f"{index} names no file")
    files = []
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{index} names {name!r}, which is not a file of its own folder")
        if not (folder / name).is_file():
            raise CheckpointError(f"{index.name} names the shard {name}, which is not in {folder}")
        files.append(folder / name)
    return files


def _read_header(file: Path) -> dict[str, TensorEntry]:
    """Parses and checks one file's header: its byte ranges fill the file, without overlap and without a gap."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(
                    f"{file} is not a safetensors file or is truncated: its header claims {length} bytes, "
                    f"the file has {size}"
                )
            raw = stream.read(length)
    except OSError as error:  # for example a link whose target is gone
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    try:
        header = json.loads(raw, object_pairs_hook=_unique_names)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: the header is not valid JSON: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: the header is not a JSON object")
    start = 8 + length
    entries = {name: _entry(file, name, value, start, size) for name, value in header.items() if name != "__metadata__"}
    end = start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin < end:
            raise CheckpointError(f"{file}: tensor {name} overlaps the data of another one")
        if entry.begin > end:
            raise CheckpointError(f"{file}: {entry.begin - end} bytes before tensor {name} belong to no tensor")
        end = entry.end
    if end != size:
        raise CheckpointError(f"{file}: the last {size - end} bytes belong to no tensor")
    return entries


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    named: dict[str, Any] = {}
    for name, value in pairs:
        if name in named:
            raise ValueError(f"{name!r:.200} is there twice")
        named[name] = value
    return named


def _entry(file: Path, name: str, value: Any, start: int, size: int) -> TensorEntry:
    try:
        dtype, shape, (begin, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
        numbers = (*shape, begin, end)
        if not all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 2**63 for n in numbers):
            raise ValueError("its numbers must be integers from 0 to 2**63 - 1")
        if dtype not in ITEM_BYTES:
            raise ValueError(f"dtype {dtype!r:.80} is unknown")
        if len(shape) > MAX_DIMENSIONS:
            raise ValueError(f"{len(shape)} dimensions, more than {MAX_DIMENSIONS}")
        num_bytes = math.prod(shape) * ITEM_BYTES[dtype]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file}: the entry of tensor {name} is malformed: {error!r}") from error
    if end - begin != num_bytes:
        raise CheckpointError(
            f"{file}: tensor {name} of {dtype} {list(shape)} needs {num_bytes} bytes, its offsets give {end - begin}"
        )
    if start + end > size:
        raise CheckpointError(f"{file} is truncated: tensor {name} ends at byte {start + end}, the file has {size}")
    return TensorEntry(file, dtype, shape, start + begin, start + end)


def read_into(entry: TensorEntry, out: Tensor) -> None:
    """Reads one tensor into place; where dtypes differ, in pieces, so that the copy stays small."""
    source = DTYPES[entry.dtype]
    flat = out.view(-1)
    step = flat.numel() if source == out.dtype else min(flat.numel(), 1 << 22)
    try:
        with entry.file.open("rb") as stream:
            stream.seek(entry.begin)
            for begin in range(0, flat.numel(), step or 1):
                part = flat[begin : begin + step]
                target = part if source == out.dtype else torch.empty(part.shape, dtype=source)
                buffer = target.view(torch.uint8).numpy().data
                if stream.readinto(buffer) != buffer.nbytes:
                    raise CheckpointError(f"{entry.file} was truncated while it was read")
                if target is not part:
                    part.copy_(target)
    except OSError as error:
        raise CheckpointError(f"{entry.file} cannot be read: {error}") from error

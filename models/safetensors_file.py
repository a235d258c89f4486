"""Safetensors files of a checkpoint folder: which there are, what is in them, and reading one tensor.

Layouts: model.safetensors; an index with shards, or shards without one; Mistral's consolidated.safetensors, read
only where there is none of the others. Links are followed, as the hub's cache is made of them. A header is checked
whole before a byte of data is read; nothing is mapped, so that peak memory is what the caller allocates.

Format: https://huggingface.co/docs/safetensors (8 bytes of header length, a JSON header, the data).
"""

import json
import math
import stat
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from minirksc.models.consolidated import hf_name, read_params
from minirksc.models.quantised import quantisation_of
from torch import Tensor

from minirksc.errors import CheckpointError, UnsupportedModelError

MAX_HEADER_BYTES = 16 << 20
"""Of a file's header, and of an index: over 100 000 tensors, read in seconds and less than 1 GB of memory."""

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
    """Where one tensor lies.

    Attributes:
        file: that holds it.
        dtype: its code in the header.
        shape: its dimensions.
        begin, end: absolute byte range.
        interleaved_heads: how many heads the rows belong to, where the rows of each have rotary pairs side by side
            and are put halves apart by `read_into`; None for all other tensors.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int
    interleaved_heads: int | None = None


def read_entries(folder: Path) -> dict[str, TensorEntry]:
    """All tensors of a checkpoint folder by their Hugging Face names, from the headers of its safetensors files.

    Raises:
        CheckpointError: no safetensors, a missing shard, a damaged header, or a tensor in two files.
        UnsupportedModelError: the tensors are quantised.
    """
    entries: dict[str, TensorEntry] = {}
    files = _files(folder)
    for file in files:
        for name, entry in _read_header(file).items():
            if name in entries:
                raise CheckpointError(f"tensor {name} is in both {entries[name].file.name} and {file.name}")
            entries[name] = entry
    if quantised := quantisation_of({name: entry.dtype for name, entry in entries.items()}):
        method, name = quantised
        raise UnsupportedModelError(
            f"{entries[name].file} is quantised ({method}: tensor {name} of {entries[name].dtype}); only float32, "
            "float16 and bfloat16 weights are read: use the checkpoint that it was made from"
        )
    return _from_consolidated(entries, folder) if _is_consolidated(files[0]) else entries


def _from_consolidated(entries: dict[str, TensorEntry], folder: Path) -> dict[str, TensorEntry]:
    params = read_params(folder)
    named: dict[str, TensorEntry] = {}
    for name, entry in entries.items():
        translated, heads = hf_name(name, params)
        if heads is not None and (not isinstance(heads, int) or heads < 1 or entry.shape[0] % (2 * heads)):
            raise CheckpointError(
                f"{entry.file}: {name} has {entry.shape[0]} rows, which {heads!r:.20} heads of params.json cannot share"
            )
        named[translated] = replace(entry, interleaved_heads=heads)
    return named


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder")
    others = sorted(file for file in folder.glob("*.safetensors") if not _is_consolidated(file))
    for prefix, unindexed in (("model", others), ("consolidated", sorted(folder.glob("consolidated*.safetensors")))):
        single, index = folder / f"{prefix}.safetensors", folder / f"{prefix}.safetensors.index.json"
        if single.is_file():
            return [single]
        if index.is_symlink() and not index.exists():
            raise CheckpointError(f"{index} is a link to a file that does not exist, or to itself")
        if index.is_file():
            return _indexed_files(folder, index)
        if unindexed:
            return unindexed
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth"))
    if pickles:
        raise CheckpointError(
            f"{folder} has only pickle files ({', '.join(pickles[:3])}), which can run any code when they are "
            "loaded; they are never read. Convert the checkpoint to safetensors"
        )
    raise CheckpointError(f"{folder} has no .safetensors file")


def _is_consolidated(file: Path) -> bool:
    return file.name.startswith("consolidated")


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
        if not isinstance(name, str) or Path(name).name != name or "\\" in name:
            raise CheckpointError(f"{index} names {name!r:.200}, which is not a file of its own folder")
        file = folder / name
        if file.is_symlink() and not file.exists():
            raise CheckpointError(
                f"{file}, which {index.name} names, is a link to a file that does not exist, or to itself"
            )
        if not file.is_file():
            raise CheckpointError(f"{index.name} names the shard {name}, which is not in {folder}; fetch it again")
        files.append(file)
    return files


def _read_header(file: Path) -> dict[str, TensorEntry]:
    """Parses and checks one file's header: its byte ranges fill the file, without overlap and without a gap."""
    try:
        status = file.stat()
        size = status.st_size
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
            raise CheckpointError(f"{file} is not a regular file")
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or not 2 <= length <= size - 8:
                raise CheckpointError(
                    f"{file} is not a safetensors file or is truncated: its header claims {length} bytes, "
                    f"the file has {size}"
                )
            if length > MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{file} has a header of {length} bytes, more than {MAX_HEADER_BYTES}; no supported model needs as "
                    "much. Save it again without metadata, or in more shards"
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
    """Reads one tensor into place, halves of each head apart.

    Args:
        entry: the tensor.
        out: contiguous, of its shape, and of any floating-point dtype.

    Raises:
        CheckpointError: the file has changed since its header was read.
    """
    heads = entry.interleaved_heads
    if heads is None:
        _read_flat(entry, out.view(-1))
        return
    rows = torch.empty(entry.shape, dtype=out.dtype)
    _read_flat(entry, rows.view(-1))
    pairs = rows.view(heads, -1, 2, *entry.shape[1:])  # [heads, head_dim / 2, 2, ...]
    out.view(heads, 2, -1, *entry.shape[1:]).copy_(pairs.transpose(1, 2))


def _read_flat(entry: TensorEntry, flat: Tensor) -> None:
    """Reads the numbers as they lie; where dtypes differ, in pieces, so that the copy stays small."""
    source = DTYPES[entry.dtype]
    step = flat.numel() if source == flat.dtype else min(flat.numel(), 1 << 22)
    try:
        with entry.file.open("rb") as stream:
            stream.seek(entry.begin)
            for begin in range(0, flat.numel(), step or 1):
                part = flat[begin : begin + step]
                target = part if source == flat.dtype else torch.empty(part.shape, dtype=source)
                buffer = target.view(torch.uint8).numpy().data
                if stream.readinto(buffer) != buffer.nbytes:
                    raise CheckpointError(f"{entry.file} was truncated while it was read")
                if target is not part:
                    part.copy_(target)
    except OSError as error:
        raise CheckpointError(f"{entry.file} cannot be read: {error}") from error

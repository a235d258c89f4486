"""Safetensors files of a checkpoint folder: which there are, what is in them, and reading one tensor.

Layouts: model.safetensors; an index with shards, or shards without one; Mistral's consolidated.safetensors, read
only where there is none of the others. Links are followed, as the hub's cache is made of them. The safetensors library
checks each header whole before a byte of data is read: its byte ranges fill the file, without overlap and without a
gap. Data is read in order and never mapped, so that peak memory is what the caller allocates.
"""

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minirksc.errors import CheckpointError
from minirksc.json_file import open_regular, read_json_object
from minirksc.models.config.consolidated import hf_name, read_params
from minirksc.models.config.quantised import quantisation_of, refusal, shown
from minirksc.models.weights.entry import Scale, TensorEntry

MAX_HEADER_BYTES = 16 << 20
"""Bytes of all headers of a folder, and of an index: over 100 000 tensors, read in seconds and under 1 GB of memory."""

CONSOLIDATED = "consolidated"
"""How the names of files in Mistral's own layout begin."""

BESIDE = (CONSOLIDATED, ".", "optimizer")
"""How names begin of files beside the weights: of that layout, of a system (`._model.safetensors`), of a training."""

MAX_DIMENSIONS = 16
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
FP8_DTYPES = {"F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu}
"""Dtypes of FP8 weights, and of what may scale them."""

OTHER_DTYPES = ("I64", "I32", "I16", "I8", "U8", "BOOL", "U16", "U32", "U64", "F8_E5M2")
"""Dtypes that tensors may have which are skipped, or tell of a quantised checkpoint."""

PIECE_NUMBERS = 1 << 18
"""Numbers that are converted at a time: what lies between the two dtypes stays in the processor's cache."""


def read_entries(folder: Path, is_fp8: bool = False) -> dict[str, TensorEntry]:
    """All tensors of a checkpoint folder by their Hugging Face names, from the headers of its safetensors files.

    Args:
        folder: folder of the checkpoint.
        is_fp8: whether config.json says so; tensors that tell of FP8 are refused without.

    Raises:
        CheckpointError: no safetensors, a missing shard, a damaged header, or a tensor in two files.
        UnsupportedModelError: the tensors are quantised.
    """
    entries: dict[str, TensorEntry] = {}
    files = _files(folder)
    room = MAX_HEADER_BYTES
    for file in files:
        found, length = _read_header(file, room)
        room -= length
        if twice := [name for name in found if name in entries]:
            first = entries[twice[0]].file.name
            raise CheckpointError(f"tensor {shown(twice[0])} is in both {first} and {file.name}")
        entries |= found
    quantised = quantisation_of({name: entry.dtype for name, entry in entries.items()})
    if quantised and not (is_fp8 and quantised[0].startswith("fp8")):
        method, name = quantised
        unsaid = "; config.json has no quantization_config that says how" if method == "fp8" else ""
        raise refusal(str(entries[name].file), f"{method}: tensor {shown(name)} of {entries[name].dtype}{unsaid}")
    return _from_consolidated(entries, folder) if files[0].name.startswith(CONSOLIDATED) else entries


def _from_consolidated(entries: dict[str, TensorEntry], folder: Path) -> dict[str, TensorEntry]:
    params = read_params(folder)
    named: dict[str, TensorEntry] = {}
    for name, entry in entries.items():
        translated, heads = hf_name(name, params)
        rows = entry.shape[0] if entry.shape else 0
        if heads is not None and (not isinstance(heads, int) or heads < 1 or not rows or rows % (2 * heads)):
            raise CheckpointError(
                f"{entry.file}: {name} has {rows} rows, which {heads!r:.20} heads of params.json cannot share"
            )
        if translated in named:
            raise CheckpointError(f"{entry.file}: {shown(name)} is a second tensor {shown(translated)}")
        named[translated] = replace(entry, interleaved_heads=heads)
    return named


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder")
    all_files = sorted(folder.glob("*.safetensors"))
    others = [file for file in all_files if not file.name.startswith(BESIDE)]
    own = [file for file in all_files if file.name.startswith(CONSOLIDATED)]
    for prefix, unindexed in (("model", others), (CONSOLIDATED, own)):
        single, index = folder / f"{prefix}.safetensors", folder / f"{prefix}.safetensors.index.json"
        if single.is_file():
            return [single]
        if os.path.lexists(index):
            _check_link(index)
            return _indexed_files(folder, index)
        if unindexed:
            return unindexed
    raise CheckpointError(f"{folder} has no .safetensors file")


def _indexed_files(folder: Path, index: Path) -> list[Path]:
    weight_map = read_json_object(index, max_bytes=MAX_HEADER_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index} is not a readable index: weight_map must give each tensor its file")
    if not weight_map:
        raise CheckpointError(f"{index} names no file")
    files = []
    for name in sorted(set(weight_map.values())):
        if not name or Path(name).name != name or "\\" in name:
            raise CheckpointError(f"{index} names {name!r:.200}, which is not a file of its own folder")
        file = folder / name
        _check_link(file)
        if not os.path.isfile(file):
            what = "is not a regular file" if os.path.exists(file) else f"is not in {folder}; fetch it again"
            raise CheckpointError(f"{index.name} names the shard {shown(name)}, which {what}")
        files.append(file)
    return files


def _check_link(file: Path) -> None:
    if os.path.islink(file) and not os.path.exists(file):
        raise CheckpointError(f"{file} is a link to a file that does not exist, or to itself; fetch it again")


def _read_header(file: Path, room: int) -> tuple[dict[str, TensorEntry], int]:
    """Reads one file's header.

    Args:
        file: file to read.
        room: bytes that the header may have.

    Returns:
        (the tensors, bytes of the header).
    """
    try:
        with open_regular(file) as stream:
            if stream is None:
                raise CheckpointError(f"{file} is not a regular file")
            begin, size = stream.read(8), os.fstat(stream.fileno()).st_size
            length = int.from_bytes(begin, "little")
            if room < length <= size:  # a length beyond the end is told below: the file is none, or damaged
                left = f", what the files before it leave of {MAX_HEADER_BYTES}" if room < MAX_HEADER_BYTES else ""
                raise CheckpointError(
                    f"{file} has a header of {length} bytes, more than {room}{left}; no supported model needs as much. "
                    "Save it again without metadata"
                )
            with safe_open(file, framework="numpy"):  # maps the file, checks the header, and touches no data
                header = json.loads(stream.read(length), object_pairs_hook=_unique_names)
    except OSError as error:  # for example a link whose target is gone
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(
            f"{file} is truncated, damaged or not a safetensors file: {shown(str(error))}; it has {size} bytes and "
            f"gives {length} of them to its header. Fetch or save it again"
        ) from error
    header.pop("__metadata__", None)
    return {name: _entry(file, name, value, 8 + length) for name, value in header.items()}, length


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    named: dict[str, Any] = {}
    for name, value in pairs:
        if name in named:
            raise ValueError(f"{name!r:.200} is there twice")
        named[name] = value
    return named


def _entry(file: Path, name: str, value: Any, start: int) -> TensorEntry:
    """What a header that has been checked says of one tensor; `start` is the first byte of data in the file."""
    dtype, shape, (begin, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
    if dtype not in DTYPES and dtype not in FP8_DTYPES and dtype not in OTHER_DTYPES:
        raise CheckpointError(f"{file}: tensor {shown(name)}: dtype {dtype!r:.80} is unknown; save it in another one")
    if len(shape) > MAX_DIMENSIONS:
        raise CheckpointError(f"{file}: tensor {shown(name)} has {len(shape)} dimensions, more than {MAX_DIMENSIONS}")
    return TensorEntry(file, name, dtype, shape, start + begin, start + end)


def read_into(entry: TensorEntry, out: Tensor) -> None:
    """Reads one tensor into place: FP8 weights times their scales, halves of each head apart.

    Args:
        entry: place of the tensor.
        out: tensor to fill: contiguous, of the entry's shape, and of any floating-point dtype.

    Raises:
        CheckpointError: the file has changed since its header was read, or an FP8 weight or scale is no number.
    """
    heads = entry.interleaved_heads
    rows = out if heads is None else torch.empty(entry.shape, dtype=out.dtype)
    _read(entry, rows)
    if heads is not None:
        out.view(heads, 2, -1, *entry.shape[1:]).copy_(halves_apart(rows, heads))


def halves_apart(rows: Tensor, num_heads: int) -> Tensor:
    """Rows of each head from (x0, y0, x1, y1, ...) to (x0, x1, ..., y0, y1, ...): `[heads, 2, head_dim / 2, ...]`."""
    return rows.view(num_heads, -1, 2, *rows.shape[1:]).transpose(1, 2)


def _read(entry: TensorEntry, out: Tensor) -> None:
    """Reads the numbers as they lie; where they are converted, in pieces, so that the copy stays small."""
    source = (DTYPES | FP8_DTYPES)[entry.dtype]
    scales = None if entry.scale is None else _scales(entry.scale)
    flat, columns = out.view(-1), 1 if scales is None else max(entry.shape[1], 1)
    step = flat.numel() if source == flat.dtype else max(PIECE_NUMBERS // columns, 1) * columns
    try:
        with entry.file.open("rb") as stream:
            stream.seek(entry.begin)
            for begin in range(0, flat.numel(), step or 1):
                part = flat[begin : begin + step]
                target = part if source == flat.dtype else torch.empty(part.shape, dtype=source)
                buffer = target.view(torch.uint8).numpy().data
                if stream.readinto(buffer) != buffer.nbytes:
                    raise CheckpointError(f"{entry.file} was truncated while {shown(entry.name)} was read")
                if entry.scale is not None and scales is not None:
                    row = entry.scale.first_row + begin // columns
                    part.copy_(widened(target.view(-1, columns), scales, entry.scale.extent, row).view(-1))
                    if not all(map(math.isfinite, torch.aminmax(part))):
                        raise CheckpointError(
                            f"{entry.file}: {shown(entry.name)} has a NaN, or numbers too large for {part.dtype}"
                        )
                elif target is not part:
                    part.copy_(target)
    except OSError as error:
        raise CheckpointError(f"{entry.file} cannot be read: {error}") from error


def _scales(scale: Scale) -> Tensor:
    """The scales of a weight, checked: `[row blocks, column blocks]` float32."""
    entry = scale.entry
    scales = torch.empty(entry.shape, dtype=torch.float32)
    _read(entry, scales)
    if not ((scales > 0) & scales.isfinite()).all():
        raise CheckpointError(
            f"{entry.file}: {shown(entry.name)} holds a scale that is not positive and finite; it is damaged"
        )
    return scales.view(-1, entry.shape[1] if len(entry.shape) > 1 else 1)


def widened(values: Tensor, scales: Tensor, extent: tuple[int, int], first_row: int) -> Tensor:
    """Products of numbers and their scales.

    Args:
        values: `[rows, columns]` e4m3, some rows of a weight.
        scales: `[row blocks, column blocks]` float32, scales of the whole weight.
        extent: rows and columns that share one.
        first_row: index in the weight of the first of these rows.

    Returns:
        `[rows, columns]` float32.
    """
    rows, columns = values.shape
    # A table of all 256 is several times as fast as torch's conversion.
    numbers = torch.arange(256, dtype=torch.uint8).view(values.dtype).to(torch.float32)
    wide = numbers.index_select(0, values.view(torch.uint8).flatten().to(torch.int32)).view(rows, columns)
    of_rows = scales[torch.arange(first_row, first_row + rows) // extent[0]]  # [rows, column blocks]
    if of_rows.shape[1] > 1:
        of_rows = of_rows.repeat_interleave(extent[1], dim=1)[:, :columns]
    return wide.mul_(of_rows)

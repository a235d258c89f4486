"""Checkpoint tensors to decoder parameters, by rules that follow from the spec.

Reads safetensors only: a header is checked whole before a byte of data is read, so that everything missing,
unexpected or mis-shaped is told at once and costs no memory. Then parameters stream in layer order, each read
straight into its place in a merged tensor; nothing is mapped, so that peak memory is the weights themselves.

Format: https://huggingface.co/docs/safetensors (8 bytes of header length, a JSON header, the data).
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from minirksc.models.spec import ArchSpec
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
SKIPPED_SUFFIXES = (".rotary_emb.inv_freq",)
"""Tensors that old checkpoints carry and that follow from the config."""


@dataclass(frozen=True)
class WeightRule:
    """One parameter and the checkpoint tensors that it is made of, concatenated along dimension 0.

    Attributes:
        parameter: the decoder's name for it.
        sources: (checkpoint name, shape) of each part.
    """

    parameter: str
    sources: tuple[tuple[str, tuple[int, ...]], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the parameter."""
        return (sum(shape[0] for _, shape in self.sources), *self.sources[0][1][1:])


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: file, dtype code, shape, and absolute byte range."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class CheckpointReport:
    """What a checkpoint holds.

    Attributes:
        num_tensors: that the decoder uses.
        num_parameters: numbers in them.
        num_bytes: of them, as stored.
        skipped: names that are known to be of no use.
    """

    num_tensors: int
    num_parameters: int
    num_bytes: int
    skipped: tuple[str, ...]


def weight_rules(spec: ArchSpec) -> list[WeightRule]:
    """The rules of a spec, in the order in which the decoder takes its parameters."""
    hidden = spec.hidden_size
    embed = (spec.vocab_size, hidden)
    rules = [WeightRule("embed.weight", (("model.embed_tokens.weight", embed),))]
    for layer in range(spec.num_layers):
        rules += _layer_rules(spec, f"layers.{layer}.", f"model.layers.{layer}.")
    rules.append(WeightRule("norm.weight", (("model.norm.weight", (hidden,)),)))
    if not spec.tie_word_embeddings:
        rules.append(WeightRule("lm_head.weight", (("lm_head.weight", embed),)))
    return rules


def _layer_rules(spec: ArchSpec, to: str, source: str) -> list[WeightRule]:
    hidden, inner = spec.hidden_size, spec.intermediate_size
    # parameter: (has a bias, parts of (checkpoint name, rows), columns)
    linears: list[tuple[str, bool, list[tuple[str, int]], int]] = [
        (
            "qkv",
            spec.qkv_bias,
            [
                ("self_attn.q_proj", spec.q_size),
                ("self_attn.k_proj", spec.kv_size),
                ("self_attn.v_proj", spec.kv_size),
            ],
            hidden,
        ),
        ("o", spec.o_bias, [("self_attn.o_proj", hidden)], spec.q_size),
        ("gate_up", spec.mlp_bias, [("mlp.gate_proj", inner), ("mlp.up_proj", inner)], hidden),
        ("down", spec.mlp_bias, [("mlp.down_proj", hidden)], inner),
    ]
    rules = [
        WeightRule(f"{to}attn_norm.weight", ((f"{source}input_layernorm.weight", (hidden,)),)),
        WeightRule(f"{to}mlp_norm.weight", ((f"{source}post_attention_layernorm.weight", (hidden,)),)),
    ]
    for name, has_bias, parts, columns in linears:
        weight = tuple((f"{source}{part}.weight", (rows, columns)) for part, rows in parts)
        rules.append(WeightRule(f"{to}{name}.weight", weight))
        if has_bias:
            bias = tuple((f"{source}{part}.bias", (rows,)) for part, rows in parts)
            rules.append(WeightRule(f"{to}{name}.bias", bias))
    return rules


def iter_weights(folder: Path, spec: ArchSpec, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Streams (parameter name, tensor) in layer order, cast to dtype.

    Raises:
        CheckpointError: files are damaged or absent, or tensors do not fit the spec; lists all of them.
    """
    entries = read_entries(folder)
    rules = weight_rules(spec)
    _check(entries, rules, spec)
    return _stream(entries, rules, dtype)


def checkpoint_report(folder: Path, spec: ArchSpec) -> CheckpointReport:
    """What the decoder would use and skip; reads headers only.

    Raises:
        CheckpointError: as `iter_weights`.
    """
    entries = read_entries(folder)
    rules = weight_rules(spec)
    skipped = _check(entries, rules, spec)
    used = [entries[name] for rule in rules for name, _ in rule.sources]
    return CheckpointReport(
        num_tensors=len(used),
        num_parameters=sum(math.prod(entry.shape) for entry in used),
        num_bytes=sum(entry.end - entry.begin for entry in used),
        skipped=tuple(skipped),
    )


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


def _check(entries: dict[str, TensorEntry], rules: list[WeightRule], spec: ArchSpec) -> list[str]:
    """Raises one error with everything that does not fit; returns the names that are skipped by rule."""
    expected = {name: shape for rule in rules for name, shape in rule.sources}
    problems = [f"missing {name} {list(shape)}" for name, shape in expected.items() if name not in entries]
    skipped = []
    for name, entry in entries.items():
        where = f"{name} in {entry.file.name}"
        if name in expected:
            if entry.shape != expected[name]:
                problems.append(f"mis-shaped {where}: {list(entry.shape)}, the config asks for {list(expected[name])}")
            if entry.dtype not in DTYPES:
                problems.append(f"unsupported dtype {entry.dtype} of {where}; known: {', '.join(DTYPES)}")
        elif name.endswith(SKIPPED_SUFFIXES) or (spec.tie_word_embeddings and name == "lm_head.weight"):
            skipped.append(name)
        else:
            problems.append(f"unexpected {where}")
    if problems:
        files = ", ".join(sorted({str(entry.file) for entry in entries.values()}))
        listed = "\n  ".join(problems)
        raise CheckpointError(f"the tensors of {files} do not fit config.json ({len(problems)} problems):\n  {listed}")
    return skipped


def _stream(
    entries: dict[str, TensorEntry], rules: list[WeightRule], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    for rule in rules:
        merged = torch.empty(rule.shape, dtype=dtype)
        row = 0
        for name, shape in rule.sources:
            _read_into(entries[name], merged[row : row + shape[0]])
            row += shape[0]
        yield rule.parameter, merged


def _read_into(entry: TensorEntry, out: Tensor) -> None:
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

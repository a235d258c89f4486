"""Checkpoint tensors to decoder parameters, by rules that follow from the spec.

Everything missing, unexpected or mis-shaped is told at once, before a byte of data is read. Then parameters stream
in layer order, each read straight into its place in a merged tensor.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from minirksc.errors import CheckpointError
from minirksc.models.config.quantised import shown
from minirksc.models.spec import ArchSpec, LayerSpec
from minirksc.models.weights.entry import TensorEntry
from minirksc.models.weights.fp8 import with_scales
from minirksc.models.weights.names import renamed
from minirksc.models.weights.safetensors_file import DTYPES, PIECE_NUMBERS, read_entries, read_into

HEAD = "lm_head.weight"
MAX_FILES = 4
SKIPPED_SUFFIXES = (".rotary_emb.inv_freq",)
"""Tensors that old checkpoints carry and that follow from the config."""

MAX_LISTED = 20
"""Lines about what does not fit: what is wrong in one layer is wrong in all of them."""


@dataclass(frozen=True)
class WeightRule:
    """One parameter and the checkpoint tensors that it is made of, concatenated along dimension 0.

    Attributes:
        parameter: name that it has in the decoder.
        sources: (checkpoint name, shape) of each part.
    """

    parameter: str
    sources: tuple[tuple[str, tuple[int, ...]], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter."""
        return (sum(shape[0] for _, shape in self.sources), *self.sources[0][1][1:])


@dataclass(frozen=True)
class CheckpointReport:
    """What a checkpoint holds.

    Attributes:
        num_tensors: number of tensors that the decoder uses.
        num_parameters: numbers in them.
        num_bytes: bytes of them, as stored.
        skipped: names of tensors that are known to be of no use.
    """

    num_tensors: int
    num_parameters: int
    num_bytes: int
    skipped: tuple[str, ...]


def weight_rules(spec: ArchSpec, has_own_head: bool = False) -> list[WeightRule]:
    """The rules of a spec, in the order in which the decoder takes its parameters.

    Args:
        spec: architecture of the model.
        has_own_head: whether the checkpoint has a head although its config ties it to the embedding.
    """
    embed = (spec.vocab_size, spec.hidden_size)
    rules = [_rule("embed.weight", ("model.embed_tokens.weight", embed))]
    if spec.layer_input_size is not None:
        total = spec.num_layers * spec.layer_input_size
        rules += [
            _rule("layer_inputs.embed.weight", ("model.embed_tokens_per_layer.weight", (spec.vocab_size, total))),
            _rule("layer_inputs.project.weight", ("model.per_layer_model_projection.weight", (total, embed[1]))),
            _rule("layer_inputs.norm.weight", ("model.per_layer_projection_norm.weight", (spec.layer_input_size,))),
        ]
    for index, layer in enumerate(spec.layers):
        rules += _layer_rules(spec, layer, f"layers.{index}.", f"model.layers.{index}.")
    rules.append(_rule("norm.weight", ("model.norm.weight", (spec.hidden_size,))))
    if has_own_head or not spec.tie_word_embeddings:
        rules.append(_rule("lm_head.weight", (HEAD, embed)))
    return rules


def _rule(parameter: str, *sources: tuple[str, tuple[int, ...]]) -> WeightRule:
    return WeightRule(parameter, sources)


def _layer_rules(spec: ArchSpec, layer: LayerSpec, to: str, source: str) -> list[WeightRule]:
    """The rules of a layer, of which the parameters' names begin with `to` and the checkpoint's with `source`."""
    norms = _norms(spec, layer)
    rules = [_rule(f"{to}{name}.weight", (f"{source}{of}.weight", (size,))) for name, (of, size) in norms.items()]
    if spec.layer_scale:
        rules.append(_rule(f"{to}scale", (f"{source}layer_scalar", (1,))))
    for name, (parts, columns, has_bias) in _linears(spec, layer).items():
        kinds = {"weight": (columns,), "bias": ()} if has_bias else {"weight": (columns,)}
        for kind, rest in kinds.items():
            sources = [(f"{source}{part}.{kind}", (rows, *rest)) for part, rows in parts]
            rules.append(_rule(f"{to}{name}.{kind}", *sources))
    return rules


def _norms(spec: ArchSpec, layer: LayerSpec) -> dict[str, tuple[str, int]]:
    """Name of each norm of a layer -> (name in the checkpoint, size)."""
    hidden = spec.hidden_size
    norms = {"attn_norm": ("input_layernorm", hidden), "mlp_norm": (spec.layout.mlp_norm, hidden)}
    if spec.sandwich_norms:
        norms["attn_post_norm"] = ("post_attention_layernorm", hidden)
        norms["mlp_post_norm"] = ("post_feedforward_layernorm", hidden)
    if spec.qk_norm:
        norms["q_norm"] = ("self_attn.q_norm", layer.head_dim)
        if layer.kv_layer is None:
            norms["k_norm"] = ("self_attn.k_norm", layer.head_dim)
    if spec.layer_input_size is not None:
        norms["input_norm"] = ("post_per_layer_input_norm", hidden)
    return norms


def _linears(spec: ArchSpec, layer: LayerSpec) -> dict[str, tuple[list[tuple[str, int]], int, bool]]:
    """Name of each projection of a layer -> (parts of it as (name in the checkpoint, rows), columns, has a bias)."""
    hidden, inner, layout = spec.hidden_size, layer.intermediate_size, spec.layout
    q_size, kv_size = spec.num_heads * layer.head_dim, layer.num_kv_heads * layer.head_dim
    qkv = [("self_attn.q_proj", q_size)]
    if layer.kv_layer is None:
        qkv.append(("self_attn.k_proj", kv_size))
        if not layer.value_is_key:
            qkv.append(("self_attn.v_proj", kv_size))
    if layout.fused_qkv:
        qkv = [("self_attn.qkv_proj", sum(rows for _, rows in qkv))]
    gate_up = [("mlp.gate_up_proj", 2 * inner)]
    if not layout.fused_gate_up:
        gate_up = [("mlp.gate_proj", inner), ("mlp.up_proj", inner)]
    linears = {
        "qkv": (qkv, hidden, spec.qkv_bias),
        "o": ([("self_attn.o_proj", hidden)], q_size, spec.o_bias),
        "gate_up": (gate_up, hidden, spec.mlp_bias),
        "down": ([("mlp.down_proj", hidden)], inner, spec.mlp_bias),
    }
    if spec.layer_input_size is not None:
        linears["input_gate"] = ([("per_layer_input_gate", spec.layer_input_size)], hidden, False)
        linears["input_project"] = ([("per_layer_projection", hidden)], spec.layer_input_size, False)
    return linears


def iter_weights(
    folder: Path, spec: ArchSpec, dtype: torch.dtype, max_numbers: int | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Streams (parameter name, tensor) in layer order, cast to dtype; FP8 weights are widened to it one by one.

    Args:
        folder: folder of the checkpoint.
        spec: architecture of the model.
        dtype: dtype of the parameters.
        max_numbers: most numbers that there is room for; None for any.

    Raises:
        CheckpointError: files are damaged or absent, tensors do not fit the spec (lists them), or there are more
            numbers than allowed.
    """
    entries, _ = _tensors(folder, spec)
    count = sum(math.prod(rule.shape) for rule in weight_rules(spec))  # before a head of its own is looked for
    if max_numbers is not None and count > max_numbers:
        raise CheckpointError(
            f"the weights of {folder} are {count} numbers, and all memory has room for {max_numbers} in "
            f"{str(dtype).removeprefix('torch.')}; take a smaller model"
        )
    return _stream(entries, weight_rules(spec, _has_own_head(entries, spec)), dtype)


def checkpoint_report(folder: Path, spec: ArchSpec) -> CheckpointReport:
    """What the decoder would use and skip; reads headers, and both heads where there are two.

    Raises:
        CheckpointError: as `iter_weights`.
    """
    entries, skipped = _tensors(folder, spec)
    has_own_head = _has_own_head(entries, spec)
    copy = [HEAD] if spec.tie_word_embeddings and HEAD in entries and not has_own_head else []
    used = [entries[name] for rule in weight_rules(spec, has_own_head) for name, _ in rule.sources]
    stored = [*used, *(entry.scale.entry for entry in used if entry.scale is not None)]
    return CheckpointReport(
        num_tensors=len(used),
        num_parameters=sum(math.prod(entry.shape) for entry in used),
        num_bytes=sum(entry.end - entry.begin for entry in stored),
        skipped=(*skipped, *copy),
    )


def _tensors(folder: Path, spec: ArchSpec) -> tuple[dict[str, TensorEntry], list[str]]:
    """(tensors by the names that they have in a model of text alone, names of those without use).

    Raises:
        CheckpointError: one with everything that does not fit the spec.
    """
    layout = spec.layout
    entries, foreign = renamed(read_entries(folder, layout.fp8 is not None), layout.is_wrapped)
    files = sorted({str(entry.file) for entry in (*entries.values(), *foreign.values())})
    skipped: list[str] = []
    problems: list[str] = []
    if layout.fp8 is not None:
        entries, skipped, problems = with_scales(entries, layout.fp8)
    expected = {name: shape for rule in weight_rules(spec) for name, shape in rule.sources}
    may_be_there = expected | ({HEAD: (spec.vocab_size, spec.hidden_size)} if spec.tie_word_embeddings else {})
    unused = _unused(spec)
    missing = [f"missing {name} {list(shape)}" for name, shape in expected.items() if name not in entries]
    unexpected: list[str] = []
    for name, entry in entries.items():
        where = f"{shown(entry.name)} in {entry.file.name}"
        if name in may_be_there:
            shape = may_be_there[name]
            if entry.shape != shape:
                problems.append(f"mis-shaped {where}: {list(entry.shape)}, the config asks for {list(shape)}")
            if entry.dtype not in DTYPES and entry.scale is None:
                problems.append(f"unsupported dtype {entry.dtype} of {where}; known: {', '.join(DTYPES)}")
        elif name.endswith(SKIPPED_SUFFIXES) or name in unused:
            skipped.append(name)
        else:
            unexpected.append(f"unexpected {where}")
    if layout.is_wrapped:
        skipped += foreign
    else:
        unexpected += [f"unexpected {shown(name)} in {entry.file.name}" for name, entry in foreign.items()]
    if missing or problems or unexpected:
        raise _misfit(files, [group for group in (missing, problems, unexpected) if group])
    return entries, skipped


def _misfit(files: list[str], groups: list[list[str]]) -> CheckpointError:
    """The error that says in which ways some files do not fit, as many of each as there is room for."""
    count = sum(map(len, groups))
    share = count if count <= MAX_LISTED else MAX_LISTED // len(groups)
    listed = "".join(f"\n  {line}" for group in groups for line in _at_most(group, share))
    held = ", ".join(_at_most(files, MAX_FILES))
    return CheckpointError(f"the tensors of {held} do not fit config.json ({count} problems):{listed}")


def _at_most(lines: list[str], count: int) -> list[str]:
    """All of them, or the first and how many more there are."""
    return lines if len(lines) <= count else [*lines[: count - 1], f"and {len(lines) - count + 1} more"]


def _has_own_head(entries: dict[str, TensorEntry], spec: ArchSpec) -> bool:
    """Whether a checkpoint that ties its head by its config has another one all the same.

    Some files keep a copy of the embedding under the head's name; where the two differ the config is wrong.
    """
    head, embed = entries.get(HEAD), entries["model.embed_tokens.weight"]
    if not spec.tie_word_embeddings or head is None:
        return False
    rows = max(1, PIECE_NUMBERS // spec.hidden_size)
    return any(
        not torch.equal(_rows(head, begin, rows), _rows(embed, begin, rows))
        for begin in range(0, spec.vocab_size, rows)
    )


def _rows(entry: TensorEntry, begin: int, num_rows: int) -> Tensor:
    """`[at most num_rows, columns]` of a matrix, as stored; of FP8, widened to float32."""
    columns = entry.shape[1]
    end = min(begin + num_rows, entry.shape[0])
    row_bytes = (entry.end - entry.begin) // entry.shape[0]
    part = replace(
        entry,
        shape=(end - begin, columns),
        begin=entry.begin + begin * row_bytes,
        end=entry.begin + end * row_bytes,
        scale=entry.scale and replace(entry.scale, first_row=begin),
    )
    out = torch.empty(part.shape, dtype=DTYPES.get(entry.dtype, torch.float32))
    read_into(part, out)
    return out


def _unused(spec: ArchSpec) -> set[str]:
    """Tensors that some checkpoints carry and the spec has no use for."""
    names = ("k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias", "k_norm.weight")
    readers = [index for index, layer in enumerate(spec.layers) if layer.kv_layer is not None]
    return {f"model.layers.{index}.self_attn.{name}" for index in readers for name in names}


def _stream(
    entries: dict[str, TensorEntry], rules: list[WeightRule], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    for rule in rules:
        try:
            merged = torch.empty(rule.shape, dtype=dtype)
        except RuntimeError as error:
            raise CheckpointError(f"no room for {rule.parameter} {list(rule.shape)}: {error!s:.200}") from error
        row = 0
        for name, shape in rule.sources:
            read_into(entries[name], merged[row : row + shape[0]])
            row += shape[0]
        yield rule.parameter, merged

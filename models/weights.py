"""Checkpoint tensors to decoder parameters, by rules that follow from the spec.

Everything missing, unexpected or mis-shaped is told at once, before a byte of data is read. Then parameters stream
in layer order, each read straight into its place in a merged tensor.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from minirksc.models.safetensors_file import DTYPES, TensorEntry, read_entries, read_into
from minirksc.models.spec import ArchSpec
from torch import Tensor

from minirksc.errors import CheckpointError

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
            read_into(entries[name], merged[row : row + shape[0]])
            row += shape[0]
        yield rule.parameter, merged

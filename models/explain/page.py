"""Explanations as text for a terminal: no colours, no line longer than the given width."""

import itertools
import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from minirksc.models.explain.compare import SAMPLE_SIZES, TypeRow
from minirksc.models.explain.explain import Difference, Explanation, LayerKind, Values, Weights, family_of
from minirksc.models.explain.reasons import WHY
from minirksc.models.rope import KINDS
from minirksc.models.spec import ArchSpec, LayerSpec

WIDTH = 100
MIN_WIDTH = 84
"""What the narrowest table needs."""

INDENT = "    "

PLAINEST = (
    "The plainest Llama: an embedding; layers, each of attention and a gated SiLU MLP, both on a copy of the stream "
    "that an RMSNorm has scaled, both added to it; every query head with a key and value head of its own, turned by "
    "RoPE with theta 10,000; a last norm; a head that is not the embedding; no biases."
)
TESTED = (
    "tested: random = small checkpoints with random weights, written by transformers, give the logits and the greedy "
    "tokens that transformers gives; text alone = so does its text model, but no checkpoint with the whole; real = "
    "real weights, imported from GGUF files, were compared as well: "
)
PARTS = {"mlp": "MLP"}
"""Parts of the parameters that a page calls otherwise than JSON does."""

UNLISTED = {"rope.parameters", "rope.attention_factor", "layout.mlp_norm"}
"""Fields too fine for the table; each comes with another one that is in it."""

MAX_RANGES = 8
MAX_NAMES = 3
MAX_LISTED = 8

# The three pages


def types_page(rows: Sequence[TypeRow], refused: Mapping[str, Sequence[str]], width: int = WIDTH) -> str:
    """The table of supported types, and the types that are refused."""
    table = [("model_type", "models", "departs from the plainest Llama by", "tested")]
    for row in rows:
        changes = "; ".join(_phrase(change) for change in row.changes if change.field not in UNLISTED) or "nothing"
        if row.text_type is not None:
            changes = f"as its text model, {row.text_type} if the file names none; other tensors are skipped"
        table.append((row.model_type, row.models, changes, row.tested))
    real = ", ".join(row.real_weights for row in rows if row.real_weights)
    lines = [*_heading("Models that run here"), *_wrap(PLAINEST, width), ""]
    lines += [*_table(table, (19, 20, width - 57, 12)), ""]
    lines += [*_wrap(f"{TESTED}{real}.", width), ""]
    lines += _wrap(
        f"Listed is what a type has by its defaults, in a sample of {SAMPLE_SIZES['num_hidden_layers']} layers; a file "
        f"may ask for more or less, and for any RoPE of these: {', '.join(KINDS)}. A field of config.json that nothing "
        "reads is an error.",
        width,
    )
    lines += ["", "Not supported, and refused with the reason:"]
    for reason, types in refused.items():
        lines += _wrap(f"{reason}: {', '.join(types)}", width, INDENT, INDENT * 2)
    lines += ["", "python -m minirksc.models MODEL           explains a folder, an alias or a type"]
    lines += ["python -m minirksc.models --compare A B   what differs between two of them"]
    return "\n".join(lines)


def model_page(model: Explanation, is_type: bool = False, width: int = WIDTH) -> str:
    """One checkpoint, or a type by its defaults."""
    spec = model.spec
    models, words = family_of(spec.model_type)
    lines = _wrap(model.name, width)
    lines += _wrap(f"model_type {spec.model_type} ({models}): {words}", width)
    if is_type:
        lines += _wrap("By its defaults, with sample sizes: a checkpoint says more.", width)
    lines += ["", *_heading("Sizes"), *_sizes(spec, width)]
    lines += ["", *_heading("What departs from the plainest Llama, and why"), *_wrap(PLAINEST, width, INDENT), ""]
    lines += _departures(model.departures, width)
    lines += ["", *_heading("Layers by kind"), *_kinds(model.layer_kinds, width)]
    if is_type:
        return "\n".join(lines)
    lines += ["", *_heading("Parameters"), *_parameters(model, width)]
    lines += ["", *_heading("Weights"), *_weights(model.weights, width)]
    lines += ["", *_heading("KV cache of one sequence"), *_kv(model, width)]
    return "\n".join(lines)


def compare_page(names: tuple[str, str], differences: Sequence[Difference], width: int = WIDTH) -> str:
    """What differs between two models."""
    if not differences:
        return "\n".join(_wrap(f"Nothing in the architecture differs between {names[0]} and {names[1]}.", width))
    lines = [*_wrap(f"A: {names[0]}", width), *_wrap(f"B: {names[1]}", width)]
    for difference in differences:
        lines += ["", _title(difference)]
        for name, values in (("A", difference.values), ("B", difference.others)):
            lines += _wrap(f"{name}: {show(difference.field, values)}", width, INDENT, INDENT + "   ")
        lines += _reasons(difference, width)
    return "\n".join(lines)


# Sections


def _sizes(spec: ArchSpec, width: int) -> list[str]:
    shared = spec.num_heads // spec.layers[0].num_kv_heads
    sharing = f" ({shared} query heads share one)" if shared > 1 else ""
    rows = [
        ("layers", _number(spec.num_layers)),
        ("hidden size", _number(spec.hidden_size)),
        ("MLP width", show("intermediate_size", tuple(layer.intermediate_size for layer in spec.layers))),
        ("query heads", _number(spec.num_heads)),
        ("KV heads", show("num_kv_heads", tuple(layer.num_kv_heads for layer in spec.layers)) + sharing),
        ("width of a head", show("head_dim", tuple(layer.head_dim for layer in spec.layers))),
        ("vocabulary", _number(spec.vocab_size)),
        ("longest sequence", f"{_number(spec.max_position_embeddings)} tokens"),
        ("begin token", "none" if spec.bos_token_id is None else str(spec.bos_token_id)),
        ("end tokens", ", ".join(map(str, spec.eos_token_ids)) or "none in config.json"),
    ]
    return _rows(rows, width)


def _departures(departures: Sequence[Difference], width: int) -> list[str]:
    if not departures:
        return _wrap("Nothing: this is it.", width, INDENT)
    lines: list[str] = []
    for departure in departures:
        value, plain = show(departure.field, departure.values), show(departure.field, departure.others)
        text = f"{_title(departure)}: {value}" + (f"; plain: {plain}" if plain not in ("no", "none") else "")
        lines += ([""] if lines else []) + _wrap(text, width, INDENT, INDENT * 2) + _reasons(departure, width)
    return lines


def _reasons(difference: Difference, width: int) -> list[str]:
    lines = []
    for reason in difference.reasons:
        begin = f"{reason.title}: " if len(difference.reasons) > 1 else ""
        source = f" [{reason.source}]" if reason.source else ""
        lines += _wrap(f"{begin}{reason.text}{source}", width, INDENT * 2)
    return lines


def _kinds(kinds: Sequence[LayerKind], width: int) -> list[str]:
    lines = []
    for kind in kinds:
        count = f"{len(kind.layers)} layer{'s' if len(kind.layers) > 1 else ''} ({_ranges(kind.layers)})"
        others = [other.layer for other in kinds if other is not kind]
        lines += _wrap(f"{count}: {', '.join(_describe(kind.layer, others))}", width, INDENT, INDENT * 2)
    return lines


def _describe(layer: LayerSpec, others: Sequence[LayerSpec]) -> list[str]:
    """A kind of layers: what it sees, how it rotates, and the sizes in which others differ."""
    parts = ["all keys" if layer.window is None else f"window {_number(layer.window)}"]
    if layer.rope is None:
        parts.append("no positions")
    else:
        kind = "" if layer.rope.kind == "default" else f", {layer.rope.kind} RoPE"
        turning = layer.rope.rotary_dim
        part = "" if turning == layer.head_dim else f", {turning} of {layer.head_dim} elements rotated"
        parts.append(f"theta {_number(layer.rope.theta)}{kind}{part}")
    for name, title in (("num_kv_heads", "KV heads"), ("head_dim", "head_dim"), ("intermediate_size", "MLP width")):
        if any(getattr(other, name) != getattr(layer, name) for other in others):
            parts.append(f"{title} {_number(getattr(layer, name))}")
    if layer.value_is_key:
        parts.append("values are keys")
    if layer.kv_layer is not None:
        parts.append("keys and values of an earlier layer")
    return parts


def _parameters(model: Explanation, width: int) -> list[str]:
    total = sum(model.parameters.values())
    lines = [
        f"{INDENT}{PARTS.get(part, part):<18}{count:>16,}{count / total:>8.1%}"
        for part, count in model.parameters.items()
    ]
    lines.append(f"{INDENT}{'total':<18}{total:>16,}")
    if model.spec.tie_word_embeddings and "head" not in model.parameters:
        lines += _wrap("The head is the embedding and is counted once.", width, INDENT)
    if model.weights is not None and model.weights.has_own_head:
        lines += _wrap(
            "config.json ties the head to the embedding, but the file has another one: the file's is used.",
            width,
            INDENT,
        )
    return lines


def _weights(weights: Weights | None, width: int) -> list[str]:
    if weights is None:
        return _wrap(
            "There is no .safetensors file here: all of this follows from config.json, and no tensor was checked.",
            width,
            INDENT,
        )
    run = f'{_size(weights.run_bytes)}, which is what dtype="auto" runs here'
    if weights.run_dtype == "float32" and "float32" not in weights.stored:
        run += ", or half where float16 holds a matrix exactly"
    if weights.packed_head_bytes:
        run += f", and {_size(weights.packed_head_bytes)} for the tied embedding once more, packed as the head"
    rows = [
        ("as stored", f"{_size(weights.num_bytes)}, {' and '.join(weights.stored)}"),
        (f"as {weights.run_dtype}", run),
        ("tensors used", f"{weights.num_tensors:,}"),
        ("tensors skipped", f"{len(weights.skipped):,}"),
    ]
    lines = _rows(rows, width)
    groups: dict[str, list[str]] = {}
    for name in weights.skipped:
        groups.setdefault(_prefix(name), []).append(name)
    for prefix, names in list(groups.items())[:MAX_LISTED]:
        listed = ", ".join(names[:MAX_NAMES]) + (", ..." if len(names) > MAX_NAMES else "")
        lines += _wrap(f"{len(names):,} in {prefix}: {listed}", width, INDENT * 2, INDENT * 3)
    if len(groups) > MAX_LISTED:
        lines.append(f"{INDENT * 2}and {len(groups) - MAX_LISTED} other groups")
    return lines


def _kv(model: Explanation, width: int) -> list[str]:
    spec, window = model.spec, model.spec.retained_window
    length = _number(spec.max_position_embeddings)
    rows: list[tuple[str, str]] = [("a token, in layers that keep all" if window else "a token", "token_full")]
    if window:
        rows.append((f"a token in view, in layers of window {_number(window)}", "token_window"))
        rows.append((f"the most that these take, {_number(window)} tokens", "window_limit"))
    rows.append((f"the longest sequence, {length} tokens", "longest"))
    lines = [f"{INDENT}{'':<46}" + "".join(f"{name:>16}" for name in model.kv_bytes)]
    for title, field in rows:
        sizes = "".join(f"{_short_size(getattr(kv, field)):>16}" for kv in model.kv_bytes.values())
        lines.append(f"{INDENT}{title:<46}{sizes}")
    notes = ["Blocks round the lengths up."]
    if window:
        kv = model.kv_bytes["float32"]
        all_full = (kv.token_full + kv.token_window) * spec.max_position_embeddings
        notes.append(f"Without windows the longest sequence would take {all_full / kv.longest:.1f} times as much.")
    elif spec.layers[0].window is not None:
        notes.append("Every layer has a window, and then the cache keeps all tokens of all of them.")
    if any(layer.kv_layer is not None for layer in spec.layers):
        notes.append("Layers that read the keys and values of another one keep none.")
    return lines + _wrap(" ".join(notes), width, INDENT)


# Words and numbers


def show(field: str, values: Values) -> str:
    """Values of one field: one, or how many layers have which."""
    given = [value for value in values if not (value is None and field.startswith("rope."))]
    counts = Counter(given)
    if len(counts) <= 1:
        return "".join(_value(field, value) for value in counts) or "none"
    if field == "kv_layer":
        return f"none in {counts[None]} of {len(values)} layers, an earlier one's in {len(values) - counts[None]}"
    (first, count), *rest = counts.most_common()
    parts = [f"{_value(field, first)} in {count} of {len(values)} layers"]
    return ", ".join([*parts, *(f"{_value(field, value)} in {number}" for value, number in rest)])


def _value(field: str, value: Any) -> str:
    if field == "window" and value is None:
        return "all keys"
    if value is None:
        return "none"
    if field == "rope":
        return "RoPE" if value else "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if field == "query_scale" and _is_whole(value**-2):
        return f"{round(value**-2)}^-0.5" if value != 1 else "1"
    if field == "embed_scale" and _is_whole(value**2) and value != 1:
        return f"sqrt({round(value**2):,})"
    if field == "query_growth":
        return f"beta {value[0]:g}, length {_number(value[1])}"
    if field == "rope.parameters":
        return ", ".join(f"{name} {_parameter(number)}" for name, number in value) or "none"
    if field == "eos_token_ids":
        return ", ".join(map(str, value)) or "none"
    if field in ("bos_token_id", "model_type", "layout.fp8") or isinstance(value, str):
        return str(value)
    return _number(value)


def _parameter(value: float | tuple[float, ...]) -> str:
    if isinstance(value, tuple):
        return f"[{len(value)} numbers from {min(value):g} to {max(value):g}]"
    return _number(value)


def _number(value: float) -> str:
    if isinstance(value, int) or (float(value).is_integer() and abs(value) < 1e15):
        return f"{int(value):,}"
    return f"{value:.6g}"


def _is_whole(value: float) -> bool:
    return value >= 1 and abs(value - round(value)) < 1e-6 * value


def _phrase(difference: Difference) -> str:
    """For the table: a title, and the value if that is short or layers differ in it."""
    title, value = _title(difference), show(difference.field, difference.values)
    if difference.field == "rope.kind":
        return " and ".join(reason.title for reason in difference.reasons)
    if " layers" in value:
        return f"{title} ({value})"
    return title if difference.field in ("query_growth", "embed_scale") or value == "yes" else f"{title} {value}"


def _title(difference: Difference) -> str:
    return WHY[difference.field].title


def _size(num_bytes: int) -> str:
    return f"{num_bytes:,} bytes" + (f" ({_short_size(num_bytes)})" if num_bytes >= 1 << 20 else "")


def _short_size(num_bytes: int) -> str:
    for unit, shift in (("GiB", 30), ("MiB", 20)):
        if num_bytes >= 1 << shift:
            return f"{num_bytes / (1 << shift):,.1f} {unit}"
    return f"{num_bytes:,} bytes"


def _ranges(indices: Sequence[int]) -> str:
    """0-4, 6-10, 12; the first few of many."""
    ranges: list[list[int]] = []
    for index in indices:
        if ranges and index == ranges[-1][-1] + 1:
            ranges[-1] = [ranges[-1][0], index]
        else:
            ranges.append([index])
    texts = ["-".join(map(str, ends)) for ends in ranges]
    return ", ".join(texts[:MAX_RANGES]) + (", ..." if len(texts) > MAX_RANGES else "")


def _prefix(name: str) -> str:
    """vision_tower.x.y -> vision_tower; model.layers.3.x -> model.layers."""
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] == "model" else parts[0]


def _rows(rows: Iterable[tuple[str, str]], width: int) -> list[str]:
    return [line for name, text in rows for line in _wrap(f"{name:<18}{text}", width, INDENT, INDENT + " " * 18)]


def _heading(text: str) -> list[str]:
    return [text, "-" * len(text)]


def _wrap(text: str, width: int, indent: str = "", hanging: str | None = None) -> list[str]:
    """Lines of at most `width`; control characters, which a file may hold, are shown as blanks."""
    clean = re.sub(r"[^\S ]|[\x00-\x1f\x7f-\x9f]", " ", text)
    hanging = indent if hanging is None else hanging
    return textwrap.wrap(clean, width, initial_indent=indent, subsequent_indent=hanging, break_on_hyphens=False)


def _table(rows: Iterable[Sequence[str]], widths: Sequence[int]) -> list[str]:
    """Columns two blanks apart, cells wrapped, and a rule below the first row."""
    lines: list[str] = []
    for number, row in enumerate(rows):
        cells = [_wrap(cell, width) for cell, width in zip(row, widths, strict=True)]
        for line in itertools.zip_longest(*cells, fillvalue=""):
            padded = (part.ljust(width) for part, width in zip(line, widths, strict=True))
            lines.append("  ".join(padded).rstrip())
        if number == 0:
            lines.append("  ".join("-" * width for width in widths))
    return lines

"""Explanations as text for a terminal: no colours, no line longer than the given width."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from rich.console import Console, Group, JustifyMethod, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from minirksc.models.explain.compare import SAMPLE_SIZES, TypeRow
from minirksc.models.explain.explain import Difference, Explanation, LayerKind, Values, Weights, family_of
from minirksc.models.explain.reasons import WHY
from minirksc.models.rope import KINDS
from minirksc.models.spec import ArchSpec, LayerSpec

WIDTH = 100
MIN_WIDTH = 84
"""What the narrowest table needs to show names of types whole."""

INDENT = 4

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
    titles = ("model_type", "models", "departs from the plainest Llama by", "tested")
    table = [titles, tuple("-" * len(title.split()[0]) for title in titles)]
    for row in rows:
        changes = "; ".join(_phrase(change) for change in row.changes if change.field not in UNLISTED) or "nothing"
        if row.text_type is not None:
            changes = f"as its text model, {row.text_type} if the file names none; other tensors are skipped"
        table.append((row.model_type, row.models, changes, row.tested))
    real = ", ".join(row.real_weights for row in rows if row.real_weights)
    listed = (
        f"Listed is what a type has by its defaults, in a sample of {SAMPLE_SIZES['num_hidden_layers']} layers; a file "
        f"may ask for more or less, and for any RoPE of these: {', '.join(KINDS)}. A field of config.json that nothing "
        "reads is an error."
    )
    parts = [*_heading("Models that run here"), _text(PLAINEST), _text(), _grid(table), _text()]
    parts += [_text(f"{TESTED}{real}."), _text(), _text(listed)]
    parts += [_text(), _text("Not supported, and refused with the reason:")]
    for reason, types in refused.items():
        parts += [_text(f"{reason}:", 1), _text(", ".join(types), 2)]
    parts += [_text(), _text("python -m minirksc.models MODEL           explains a folder, an alias or a type")]
    parts += [_text("python -m minirksc.models --compare A B   what differs between two of them")]
    return _page(parts, width)


def model_page(model: Explanation, is_type: bool = False, width: int = WIDTH) -> str:
    """One checkpoint, or a type by its defaults."""
    spec = model.spec
    models, words = family_of(spec.model_type)
    parts = [_text(model.name), _text(f"model_type {spec.model_type} ({models}): {words}")]
    if is_type:
        parts.append(_text("By its defaults, with sample sizes: a checkpoint says more."))
    parts += [_text(), *_heading("Sizes"), _sizes(spec), _text()]
    parts += [*_heading("What departs from the plainest Llama, and why"), _text(PLAINEST, 1), _text()]
    parts += _departures(model.departures)
    parts += [_text(), *_heading("Layers by kind"), *_kinds(model.layer_kinds)]
    if not is_type:
        parts += [_text(), *_heading("Parameters"), *_parameters(model)]
        parts += [_text(), *_heading("Weights"), *_weights(model.weights)]
        parts += [_text(), *_heading("KV cache of one sequence"), *_kv(model)]
    return _page(parts, width)


def compare_page(names: tuple[str, str], differences: Sequence[Difference], width: int = WIDTH) -> str:
    """What differs between two models."""
    if not differences:
        return _page([_text(f"Nothing in the architecture differs between {names[0]} and {names[1]}.")], width)
    parts = [_text(f"A: {names[0]}"), _text(f"B: {names[1]}")]
    for difference in differences:
        a, b = show(difference.field, difference.values), show(difference.field, difference.others)
        parts += [_text(), _text(_title(difference)), _grid([("A:", a), ("B:", b)], 1), *_reasons(difference)]
    return _page(parts, width)


# Sections


def _sizes(spec: ArchSpec) -> RenderableType:
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
    return _grid(rows, 1)


def _departures(departures: Sequence[Difference]) -> Iterator[RenderableType]:
    if not departures:
        yield _text("Nothing: this is it.", 1)
    for number, departure in enumerate(departures):
        if number:
            yield _text()
        value, plain = show(departure.field, departure.values), show(departure.field, departure.others)
        text = f"{_title(departure)}: {value}" + (f"; plain: {plain}" if plain not in ("no", "none") else "")
        yield _text(text, 1)
        yield from _reasons(departure)


def _reasons(difference: Difference) -> Iterator[RenderableType]:
    for reason in difference.reasons:
        begin = f"{reason.title}: " if len(difference.reasons) > 1 else ""
        source = f" [{reason.source}]" if reason.source else ""
        yield _text(f"{begin}{reason.text}{source}", 2)


def _kinds(kinds: Sequence[LayerKind]) -> Iterator[RenderableType]:
    for kind in kinds:
        count = f"{len(kind.layers)} layer{'s' if len(kind.layers) > 1 else ''} ({_ranges(kind.layers)})"
        others = [other.layer for other in kinds if other is not kind]
        yield from (_text(f"{count}:", 1), _text(", ".join(_describe(kind.layer, others)), 2))


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


def _parameters(model: Explanation) -> Iterator[RenderableType]:
    total = sum(model.parameters.values())
    rows = [(PARTS.get(part, part), f"{count:,}", f"{count / total:.1%}") for part, count in model.parameters.items()]
    yield _grid([*rows, ("total", f"{total:,}", "")], 1, "right")
    if model.spec.tie_word_embeddings and "head" not in model.parameters:
        yield _text("The head is the embedding and is counted once.", 1)
    if model.weights is not None and model.weights.has_own_head:
        text = "config.json ties the head to the embedding, but the file has another one: the file's is used."
        yield _text(text, 1)


def _weights(weights: Weights | None) -> Iterator[RenderableType]:
    if weights is None:
        text = "There is no .safetensors file here: all of this follows from config.json, and no tensor was checked."
        yield _text(text, 1)
        return
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
    yield _grid(rows, 1)
    groups: dict[str, list[str]] = {}
    for name in weights.skipped:
        groups.setdefault(_prefix(name), []).append(name)
    for prefix, names in list(groups.items())[:MAX_LISTED]:
        listed = ", ".join(names[:MAX_NAMES]) + (", ..." if len(names) > MAX_NAMES else "")
        yield _text(f"{len(names):,} in {prefix}: {listed}", 2)
    if len(groups) > MAX_LISTED:
        yield _text(f"and {len(groups) - MAX_LISTED} other groups", 2)


def _kv(model: Explanation) -> list[RenderableType]:
    spec, window = model.spec, model.spec.retained_window
    length = _number(spec.max_position_embeddings)
    rows: list[tuple[str, str]] = [("a token, in layers that keep all" if window else "a token", "token_full")]
    if window:
        rows.append((f"a token in view, in layers of window {_number(window)}", "token_window"))
        rows.append((f"the most that these take, {_number(window)} tokens", "window_limit"))
    rows.append((f"the longest sequence, {length} tokens", "longest"))
    table = [("", *model.kv_bytes)]
    for title, field in rows:
        table.append((title, *(_short_size(getattr(kv, field)) for kv in model.kv_bytes.values())))
    notes = ["Blocks round the lengths up."]
    if window:
        kv = model.kv_bytes["float32"]
        all_full = (kv.token_full + kv.token_window) * spec.max_position_embeddings
        notes.append(f"Without windows the longest sequence would take {all_full / kv.longest:.1f} times as much.")
    elif spec.layers[0].window is not None:
        notes.append("Every layer has a window, and then the cache keeps all tokens of all of them.")
    if any(layer.kv_layer is not None for layer in spec.layers):
        notes.append("Layers that read the keys and values of another one keep none.")
    return [_grid(table, 1, "right"), _text(" ".join(notes), 1)]


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
    if value is None:
        return "all keys" if field == "window" else "none"
    if isinstance(value, bool):
        yes, no = ("RoPE", "none") if field == "rope" else ("yes", "no")
        return yes if value else no
    if field == "query_scale" and _is_whole(value**-2):
        return f"{round(value**-2)}^-0.5" if value != 1 else "1"
    if field == "embed_scale" and _is_whole(value**2) and value != 1:
        return f"sqrt({round(value**2):,})"
    if field == "query_growth":
        return f"beta {value[0]:g}, length {_number(value[1])}"
    if field == "rope.parameters":
        return ", ".join(f"{name} {_value(name, parameter)}" for name, parameter in value) or "none"
    if field == "eos_token_ids":
        return ", ".join(map(str, value)) or "none"
    if field in ("bos_token_id", "model_type", "layout.fp8") or isinstance(value, str):
        return str(value)
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
    # Within a range, an index grows as its place does.
    runs = groupby(enumerate(indices), lambda pair: pair[1] - pair[0])
    ranges = [[index for _, index in run] for _, run in runs]
    texts = [f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in ranges]
    return ", ".join(texts[:MAX_RANGES]) + (", ..." if len(texts) > MAX_RANGES else "")


def _prefix(name: str) -> str:
    """vision_tower.x.y -> vision_tower; model.layers.3.x -> model.layers."""
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] == "model" else parts[0]


# Text that is set


def _page(parts: Iterable[RenderableType], width: int) -> str:
    """Lines of at most `width` columns, without colours and without blanks at their ends."""
    console = Console(width=width, color_system=None, force_jupyter=False, legacy_windows=False)
    with console.capture() as capture:
        console.print(Group(*parts))
    return "\n".join(line.rstrip() for line in capture.get().rstrip("\n").split("\n"))


def _heading(text: str) -> list[RenderableType]:
    return [_text(text), Text("-" * len(text), no_wrap=True, overflow="crop")]


def _text(text: str = "", level: int = 0) -> RenderableType:
    return Padding(_clean(text), (0, 0, 0, level * INDENT))


def _grid(rows: Sequence[Sequence[str]], level: int = 0, justify: JustifyMethod = "left") -> RenderableType:
    """Columns two blanks apart with wrapped cells; `justify` holds for all but the first."""
    grid = Table.grid(padding=(0, 2))
    for number in range(len(rows[0])):
        grid.add_column(overflow="fold", justify=justify if number else "left")
    for row in rows:
        grid.add_row(*map(_clean, row))
    return Padding(grid, (0, 0, 0, level * INDENT))


def _clean(text: str) -> Text:
    """Text in which control characters, which a file may hold, are blanks."""
    return Text(re.sub(r"[^\S ]|[\x00-\x1f\x7f-\x9f]", " ", text))

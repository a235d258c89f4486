"""Mutation check: every field of `ArchSpec` and of what is nested in it matters to some row of the zoo.

A mutant is a spec with one field changed. It is killed when a row that runs with it fails: the checkpoint no longer
loads, or the logits leave those of transformers, or what the field is for is no longer seen (`OWN_CHECKS`). A mutant
that survives is a field that nothing reads or that no test would miss.

`python tests/models/mutation.py` prints what killed each.
"""

import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import torch
import transformers
import zoo
from zoo_rows import ORIGINAL, ROWS

from minirksc import LLM, SamplingParams
from minirksc.models.families import load_config, spec_from_config
from minirksc.models.layers import norm_weight
from minirksc.models.spec import ArchSpec, LayerSpec, RopeSpec
from minirksc.models.weights.fp8 import WHOLE, Fp8

TOLERANCE = 2e-4
PROMPTS = [zoo.make_prompt(length) for length in (zoo.SHORT, ORIGINAL + 8, zoo.LONG)]

NOT_SEEN = {
    "model_type": "for messages only",
    "bos_token_id": "read by nothing; prompts begin as the tokenizer's own files say",
}
"""Fields that no result can depend on."""

WHEN_NONE: dict[str, Any] = {
    "query_growth": (0.3, 8.0),
    "attn_softcap": 2.0,
    "final_softcap": 0.3,
    "layer_input_size": 8,
    "window": 8,
    "kv_layer": 0,
    "fp8": Fp8((WHOLE,)),
}
"""What takes the place of None."""


@dataclass(frozen=True)
class Mutant:
    """A changed spec.

    Attributes:
        group: the family, or the kind of rotation where the field is one of its parameters.
        path: of the field; layers are told apart by whether they have a window.
        change: from what to what.
        spec: makes the changed spec; it may refuse.
    """

    group: str
    path: str
    change: str
    spec: Callable[[], ArchSpec]

    @property
    def key(self) -> tuple[str, str, str]:
        """Mutants of equal keys are one: it is enough that one row kills it."""
        return self.group, self.path, self.change


def mutants(model_type: str, spec: ArchSpec) -> Iterator[Mutant]:
    """All mutants of a spec."""
    for name, change, value in _changes(spec, skip={"layers", "layout", *NOT_SEEN}):
        yield Mutant(model_type, name, change, lambda name=name, value=value: replace(spec, **{name: value}))
    for name, change, value in _changes(spec.layout, skip=set()):
        layout = {name: value}
        yield Mutant(
            model_type,
            f"layout.{name}",
            change,
            lambda layout=layout: replace(spec, layout=replace(spec.layout, **layout)),
        )
    for index, layer in enumerate(spec.layers):
        if layer not in spec.layers[:index]:
            yield from _layer_mutants(model_type, spec, index, layer)


def _layer_mutants(model_type: str, spec: ArchSpec, index: int, layer: LayerSpec) -> Iterator[Mutant]:
    def with_layer(make: Callable[[], LayerSpec]) -> Callable[[], ArchSpec]:
        return lambda: replace(spec, layers=(*spec.layers[:index], make(), *spec.layers[index + 1 :]))

    where = "layer" if layer.window is None else "windowed layer"
    for name, change, value in _changes(layer, skip={"rope"}):
        if name == "kv_layer" and layer.kv_layer is None and index == 0:
            continue  # there is no earlier layer
        yield Mutant(
            model_type,
            f"{where}.{name}",
            change,
            with_layer(lambda name=name, value=value: replace(layer, **{name: value})),
        )
    rope = layer.rope
    if rope is None:
        default = RopeSpec("default", 1e4, layer.head_dim)
        yield Mutant(model_type, f"{where}.rope", "None -> default", with_layer(lambda: replace(layer, rope=default)))
        return
    yield Mutant(model_type, f"{where}.rope", "-> None", with_layer(lambda: replace(layer, rope=None)))
    for path, change, make in _rope_changes(rope):
        group = f"{rope.kind} rope" if "parameters" in path else model_type
        yield Mutant(
            group,
            f"{where}.rope.{path}" if group == model_type else path,
            change,
            with_layer(lambda make=make: replace(layer, rope=make())),
        )


def _rope_changes(rope: RopeSpec) -> Iterator[tuple[str, str, Callable[[], RopeSpec]]]:
    if rope.kind == "default":
        yield "kind", "-> linear", lambda: replace(rope, kind="linear", parameters=(("factor", 2.0),))
    else:
        yield "kind", "-> default", lambda: replace(rope, kind="default", parameters=())
    yield "theta", "* 1.5", lambda: replace(rope, theta=rope.theta * 1.5)
    yield "rotary_dim", "- 2", lambda: replace(rope, rotary_dim=rope.rotary_dim - 2)
    yield "attention_factor", "* 1.05", lambda: replace(rope, attention_factor=rope.attention_factor * 1.05)
    for name, value in rope.parameters:
        if name == "truncate":
            changed: Any = 1.0 - value
        else:
            changed = tuple(1.5 * v for v in value) if isinstance(value, tuple) else 1.5 * value
        parameters = tuple((n, changed if n == name else v) for n, v in rope.parameters)
        yield f"parameters.{name}", "changed", lambda parameters=parameters: replace(rope, parameters=parameters)


def _changes(spec: Any, skip: set[str]) -> Iterator[tuple[str, str, Any]]:
    """(field, change, changed value) of the plain fields of a dataclass."""
    for field in fields(spec):
        if field.name not in skip:
            for change, value in _changed(field.name, getattr(spec, field.name)):
                yield field.name, change, value


def _changed(name: str, value: Any) -> list[tuple[str, Any]]:
    if name == "tie_word_embeddings":
        # The other way round nothing changes: a head of its own wins, see the row llama-own-head-called-tied.
        return [("True -> False", False)] if value else []
    if value is None:
        return [("None -> value", WHEN_NONE[name])]
    if isinstance(value, bool):
        return [(f"{value} -> {not value}", not value)]
    if name == "activation":
        return [(f"{value} -> {other}", other) for other in ("silu", "gelu_tanh", "gelu") if other != value]
    if isinstance(value, str):
        return [("other name", f"{value}_")]
    if name == "window":
        return [("+ 1", value + 1), ("- 1", value - 1 or 2), ("-> None", None)]
    if name == "kv_layer":
        return [("-> None", None)]
    if name == "eos_token_ids":
        return [("-> ()", ())]
    if isinstance(value, tuple):
        return [(f"[{i}] * 1.5", (*value[:i], 1.5 * value[i], *value[i + 1 :])) for i in range(len(value))]
    if name in ("num_heads", "num_kv_heads"):
        return [("* 2", 2 * value)]
    if isinstance(value, int):
        return [("+ 1", value + 1)]
    if name == "norm_eps":
        return [("* 1000", 1000 * value)]
    changes = [("* 1.05", 1.05 * value)] if value else [("0 -> 1", 1.0)]
    return [*changes, ("-> None", None)] if name in WHEN_NONE else changes


class Trial:
    """One row of the zoo, and what is true of it.

    Args:
        row: the row.
        folder: its checkpoint.
    """

    def __init__(self, row: zoo.Row, folder: Path) -> None:
        self.row, self.folder = row, folder
        self.spec = spec_from_config(load_config(folder))
        model = zoo.load_oracle(row, folder)
        self.logits = [zoo.oracle_logits(row, model, prompt) for prompt in PROMPTS]
        text = model.config.get_text_config()
        self.max_len = text.max_position_embeddings
        if text.rope_parameters.get("rope_type") == "dynamic":  # made for more by its factor
            self.max_len = int(self.max_len * text.rope_parameters["factor"])
        eos = getattr(model.config, "eos_token_id", None) or text.eos_token_id
        self.eos_token_ids = eos if isinstance(eos, list) else [eos]

    def failure(self, spec: ArchSpec, field: str) -> str | None:
        """How the row fails with a spec; None when it does not."""
        try:
            with _open(self.folder, spec) as llm:
                for prompt, expected in zip(PROMPTS, self.logits, strict=True):
                    error = (llm.logits(prompt) - expected).abs().max().item()
                    if not error <= TOLERANCE * min(1.0, 2 * expected.std().item()):  # NaN is more than that, too
                        return f"logits differ by {error:.1g}"
            check = OWN_CHECKS.get(field)
            return None if check is None else check(self, spec)
        except Exception as error:  # of any kind: the row fails
            return f"{type(error).__name__}: {str(error).splitlines()[0]:.60}"


def _open(folder: Path, spec: ArchSpec, **options: Any) -> LLM:
    with mock.patch("minirksc.engine.loading.spec_from_config", lambda config: spec):
        return LLM(folder, **{"dtype": "float32", "kv_cache_bytes": "8MiB", **options})


def _max_len_seen(trial: Trial, spec: ArchSpec) -> str | None:
    with _open(trial.folder, spec) as llm:
        found = llm.config.max_model_len
    return None if found == trial.max_len else f"max_model_len is {found}"


def _ends_seen(trial: Trial, spec: ArchSpec) -> str | None:
    """Every end token ends a generation, also where generation_config.json does not name it."""
    with TemporaryDirectory() as parent:
        folder = Path(shutil.copytree(trial.folder, Path(parent) / "model"))
        (folder / "generation_config.json").unlink(missing_ok=True)
        with _open(folder, spec) as llm:
            for token_id in (i for i in trial.eos_token_ids if i < spec.vocab_size):
                params = SamplingParams(temperature=0, max_tokens=2, logit_bias={token_id: 100.0}, detokenize=False)
                output = llm.generate({"prompt_token_ids": PROMPTS[0]}, params)[0].outputs[0]
                if output.finish_reason != "stop":
                    return f"token {token_id} does not end it"
    return None


def _norm_seen(trial: Trial, spec: ArchSpec) -> str | None:
    """In bfloat16 the cast is where transformers has it: before or after the weight."""
    model = zoo.load_oracle(trial.row, trial.folder, dtype=torch.bfloat16)
    name = "layers.0.input_layernorm"
    norm = next(m for n, m in model.named_modules() if n.endswith(name) and "vision" not in n)
    hidden = torch.randn(64, spec.hidden_size, generator=torch.Generator().manual_seed(0)).bfloat16()
    with _open(trial.folder, spec, dtype="bfloat16", backend="reference") as llm, torch.no_grad():
        ours = llm.engine.runner.model.backend.rms_norm(hidden, norm_weight(spec, norm.weight.data), spec.norm_eps)
        differing = (ours != norm(hidden)).sum().item()
    return f"{differing} of {hidden.numel()} normed values differ" if differing else None


OWN_CHECKS: dict[str, Callable[[Trial, ArchSpec], str | None]] = {
    "max_position_embeddings": _max_len_seen,
    "eos_token_ids": _ends_seen,
    "norm_in_float32": _norm_seen,
}
"""Of fields that need not change a float32 logit."""


def run(zoo_dir: Path) -> dict[tuple[str, str, str], str | None]:
    """What killed each mutant; None for those that survive every row.

    Raises:
        AssertionError: a row fails as it is, and so would prove nothing.
    """
    fate: dict[tuple[str, str, str], str | None] = {}
    for row in ROWS:
        trial = Trial(row, zoo.build(row, zoo_dir / row.id))
        for field in ("", *OWN_CHECKS):
            failure = trial.failure(trial.spec, field)
            assert failure is None, f"{row.id} unchanged: {failure}"
        for mutant in mutants(row.model_type, trial.spec):
            if fate.get(mutant.key) is None:
                fate[mutant.key] = _fate(trial, mutant)
    return fate


def _fate(trial: Trial, mutant: Mutant) -> str | None:
    try:
        spec = mutant.spec()
    except Exception as error:  # a spec that contradicts itself is refused
        return f"refused: {error!s:.60}"
    failure = trial.failure(spec, mutant.path)
    return None if failure is None else f"{trial.row.id}: {failure}"


if __name__ == "__main__":
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with TemporaryDirectory() as directory:
        table = run(Path(directory))
    for key, killer in sorted(table.items()):
        print("{:20} {:36} {:20}".format(*key), killer or "SURVIVED")
    survivors = sum(killer is None for killer in table.values())
    print(f"{len(table)} mutants, {survivors} survive; not seen by design: {', '.join(NOT_SEEN)}")
    sys.exit(1 if survivors else 0)

"""Which gate tells a paraphrase from a problem that only looks alike, how early, and what the guard does for it.

    python -m bench.asks_gates --data test.jsonl --calibration train.jsonl --model smollm2-135m -o results

For every phrasing of `bench.phrasings`, measure of `bench.similarity_measures` and number of layers of the probe: the
similarity to the first phrasing. From these: AUROC of each level of paraphrases against each kind of adversarial
phrasings, and how many of either are accepted at two thresholds, which come from the calibration file while the figures
come from the other one:
- safe: the lowest that accepts at most 1% of the adversarial phrasings, with an upper bound of at most 2%
  (Clopper-Pearson, two-sided 95%);
- loose: what 95% of the minor paraphrases reach. It shows what a gate is worth that is not to cost anything.

States are those of transformers, in float32, from the first token on that differs, as the engine's probe sees them;
the last one (of all layers) is taken after the final norm. What it does not show: the cost of a probe, phrasings
that people write, and adversarial ones by somebody who knows the guard.
"""

import argparse
import math
import sys
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.harness import Row, groups_of, make_parser, parse_with_quick, positive, run_or_exit
from bench.intervals import clopper_pearson
from bench.peer_transformers import load_transformers
from bench.phrasings import KINDS, LEVELS, Phrasing, phrasings
from bench.report import Page, write_run
from bench.similarity_measures import MEASURES
from bench.word_problems import read_problems
from minirksc.checkpoints.sources import resolve_model
from minirksc.rksc.asks import num_probe_layers
from minirksc.rksc.guard import refusal
from minirksc.rksc.similarity import PrefixStates
from minirksc.text.tokenizer import Tokenizer

MAX_ACCEPTED, MAX_BOUND = 0.01, 0.02


def probes_of(num_layers: int, deepest: int) -> list[int]:
    """How many layers the probes go through, up to the deepest one; the default, `num_probe_layers`, is among them."""
    wanted = {1, 2, num_probe_layers(num_layers), num_layers // 4, num_layers // 2, num_layers}
    return sorted(num_probed for num_probed in wanted if 0 < num_probed <= max(deepest, num_probe_layers(num_layers)))


@torch.inference_mode()
def measure(
    model: Any, tokenizer: Tokenizer, pairs: Sequence[Phrasing], name: str, split: str, probes: Sequence[int]
) -> Iterator[Row]:
    """Similarities of all pairs at all probes; the pairs of a problem follow one another.

    Yields:
        A row a phrasing: model that the states are of; split, "calibration" or "test"; problem, kind and rule of the
        `Phrasing`; guard: why the content guard refuses it, None if it does not; num_tokens: length of this phrasing;
        similarities: gate -> layers of the probe -> similarity.
    """
    # One layer more than the deepest probe, since the last state that transformers gives went through the final norm.
    model.model.layers = model.model.layers[: max(probes) + 1]
    model.config.num_hidden_layers = len(model.model.layers)
    root_text, root_states = "", {}
    for number, pair in enumerate(pairs):
        if pair.root != root_text:
            root_text, root_states = pair.root, _states(model, tokenizer, pair.root)
        states = _states(model, tokenizer, pair.text)
        first = _num_common(root_states["token_ids"], states["token_ids"])
        similarities: dict[str, dict[int, float]] = {}
        for gate in MEASURES.values():
            similarities[gate.name] = {}
            for num_probed in probes:
                ours, theirs = (_pick(some, gate.layers(num_probed), first) for some in (root_states, states))
                similarities[gate.name][num_probed] = gate.similarity(ours, theirs)
        yield {
            "model": name,
            "split": split,
            "problem": pair.problem,
            "kind": pair.kind,
            "rule": pair.rule,
            "guard": refusal(pair.root, pair.text),
            "num_tokens": len(states["token_ids"]),
            "similarities": similarities,
        }
        if number % 100 == 0:
            print(f"{name} {split}: {number}/{len(pairs)}", file=sys.stderr, flush=True)


def _states(model: Any, tokenizer: Tokenizer, text: str) -> dict[str, Any]:
    token_ids = tokenizer.encode(text)
    hidden = model.model(input_ids=torch.tensor([token_ids]), output_hidden_states=True, use_cache=False).hidden_states
    return {"token_ids": token_ids, "hidden": [one[0].float() for one in hidden[1:]]}


def _num_common(root: Sequence[int], branch: Sequence[int]) -> int:
    """Tokens that both begin with: the engine shares them exactly, and a probe does not see them. One is left over."""
    shorter = min(len(root), len(branch)) - 1
    return next((i for i in range(shorter) if root[i] != branch[i]), shorter)


def _pick(states: dict[str, Any], layers: Sequence[int], first: int) -> PrefixStates:
    return PrefixStates(states["token_ids"][first:], {layer: states["hidden"][layer][first:] for layer in layers})


# ---- figures ---------------------------------------------------------------------------------------------------------


def auroc(alike: Sequence[float], other: Sequence[float]) -> float:
    """Probability that one of `alike` is above one of `other`, ties counting half; NaN where one is empty."""
    if not alike or not other:
        return math.nan
    ordered = sorted(other)
    below = sum(bisect_left(ordered, value) + bisect_right(ordered, value) for value in alike)
    return below / (2 * len(alike) * len(other))


def threshold(similarities: Sequence[float], total: int) -> float:
    """The lowest that accepts few enough of adversarial phrasings.

    Args:
        similarities: similarities of those that nothing else refuses.
        total: number of all of them, refused ones included.

    Returns:
        A similarity to be reached; -inf where nothing needs to be refused, inf where nothing may be accepted.
    """
    allowed = -1
    while allowed + 1 <= MAX_ACCEPTED * total and clopper_pearson(allowed + 1, total).high <= MAX_BOUND:
        allowed += 1
    descending = sorted(similarities, reverse=True)
    if allowed < 0:
        return math.inf
    return -math.inf if len(descending) <= allowed else math.nextafter(descending[allowed], math.inf)


def summarise(rows: Sequence[Row], gate: str, num_probed: int, has_guard: bool, policy: str = "safe") -> Row:
    """One gate at one number of layers: threshold of the calibration rows, figures of the test rows.

    Args:
        rows: rows of one model.
        gate: name of the gate; "none" leaves the guard alone.
        num_probed: number of layers that the probe went through.
        has_guard: whether the content guard refuses first.
        policy: way to choose the threshold, "safe" or "loose".
    """

    def value(row: Row) -> float:
        return 1.0 if gate == "none" else float(row["similarities"][gate][num_probed])

    def passes(row: Row) -> bool:
        return not has_guard or row["guard"] is None

    calibration = [row for row in rows if row["split"] == "calibration"]
    adversarial = [row for row in calibration if row["kind"] in KINDS]
    at_least = -math.inf
    if gate != "none" and policy == "safe":
        at_least = threshold([value(row) for row in adversarial if passes(row)], len(adversarial))
    elif gate != "none":
        at_least = float(np.quantile([value(row) for row in calibration if row["kind"] == "minor"], 0.05))
    tests = groups_of((row for row in rows if row["split"] == "test"), "kind")
    test = {kind: tests.get((kind,), []) for kind in (*LEVELS, *KINDS)}
    accepted = {kind: sum(passes(r) and value(r) >= at_least for r in some) for kind, some in test.items()}
    wrong, total = sum(accepted[kind] for kind in KINDS), sum(len(test[kind]) for kind in KINDS)
    values = {kind: [value(r) for r in some] for kind, some in test.items()}
    others = [one for kind in KINDS for one in values[kind]]
    interval = clopper_pearson(wrong, total)
    return {
        "gate": gate,
        "depth": num_probed,
        "guard": has_guard,
        "policy": policy,
        "threshold": at_least,
        "accepted": {kind: [count, len(test[kind])] for kind, count in accepted.items()},
        "adversarial": [wrong, total, interval.low, interval.high],
        "auroc": {level: auroc(values[level], others) for level in LEVELS},
        "auroc_minor": {kind: auroc(values["minor"], values[kind]) for kind in KINDS},
    }


def add_model(page: Page, name: str, num_layers: int, summaries: Sequence[Row]) -> None:
    """The part of one model."""
    num_probed = num_probe_layers(num_layers)
    page.heading(f"{name}: {num_layers} layers, probe of {num_probed}")
    table = []
    for one in summaries:
        if one["depth"] in (0, num_probed):
            count, total, low, high = one["adversarial"]
            shares = [f"{a / max(n, 1):.0%}" for a, n in (one["accepted"][level] for level in LEVELS)]
            wrong = [f"{a}/{n}" for a, n in (one["accepted"][kind] for kind in KINDS)]
            cells = [one["gate"], "yes" if one["guard"] else "no", one["policy"], f"{one['threshold']:.4f}"]
            accepted = f"{count}/{total} = {count / max(total, 1):.1%} ({low:.1%} .. {high:.1%})"
            table.append([*cells, accepted, *shares, *wrong])
    page.table(["gate", "guard", "policy", "threshold", "adversarial accepted (95%)", *LEVELS, *KINDS], table)
    page.text("AUROC without guard; minor paraphrases against each kind, the other levels against all kinds:")
    table = []
    for one in summaries:
        if not one["guard"] and one["policy"] == "safe":
            levels = [one["auroc"][level] for level in LEVELS[1:]]
            figures = [one["auroc"]["minor"], *one["auroc_minor"].values(), *levels]
            table.append([one["gate"], one["depth"], *(f"{x:.3f}" for x in figures)])
    page.table(["gate", "layers", "all", *KINDS, *LEVELS[1:]], table)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = make_parser("bench.asks_gates", __doc__, "threads quick output", threads=1)
    parser.add_argument("--data", type=Path, required=True, help="JSONL with question and answer: what is reported")
    parser.add_argument("--calibration", type=Path, required=True, help="the same, for the thresholds")
    parser.add_argument("--model", action="append", help="alias or checkpoint folder; may be repeated (smollm2-135m)")
    count_help = "to report on (%(default)s); a third as many calibrate"
    parser.add_argument("--problems", type=positive, default=165, help=count_help)
    parser.add_argument("--deepest", type=int, help="layers of the deepest probe; fewer take less time (all)")
    parser.add_argument("--seed", type=int, default=0, help="another one chooses other phrasings (%(default)s)")
    return parse_with_quick(parser, arguments, problems=12)


def run(options: argparse.Namespace) -> None:
    """Runs the study; writes JSONL and a page."""
    torch.set_num_threads(options.threads)
    splits = {
        "calibration": (options.calibration, options.problems // 3),
        "test": (options.data, options.problems),
    }
    pairs = {split: phrasings(read_problems(file)[:some], options.seed) for split, (file, some) in splits.items()}
    page = Page("Which gate tells a paraphrase from a problem that only looks alike")
    lines: list[Row] = []
    for name in options.model or ["smollm2-135m"]:
        folder = resolve_model(name)
        model, tokenizer = load_transformers(folder, "float32"), Tokenizer.from_folder(folder)
        short = Path(name).name
        num_layers = model.config.num_hidden_layers
        probes = probes_of(num_layers, options.deepest or num_layers)
        rows: list[Row] = []
        for split, some in pairs.items():
            rows += measure(model, tokenizer, some, short, split, probes)
        summaries = [summarise(rows, "none", 0, True)]
        for policy, has_guard in (("safe", False), ("safe", True), ("loose", False), ("loose", True)):
            summaries += [summarise(rows, g, d, has_guard, policy) for g in MEASURES for d in probes]
        lines += rows + [{"model": short, **one} for one in summaries]
        add_model(page, short, num_layers, summaries)
    write_run("asks-gates", options, lines, page)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark."""
    options = parse(arguments)
    run_or_exit(lambda: run(options))


if __name__ == "__main__":
    main()

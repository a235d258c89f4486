"""Whether calibrated gates keep their promise on problems that they have not seen, and what they save.

    python -m minirksc.calibrate --data problems.jsonl -o gates.json       # collects gates.json.evidence.jsonl
    python -m bench.cgee_risk gates.json.evidence.jsonl --answer-parser number -o results

No model runs: evidence is replayed. The problems are divided at random again and again; two thirds calibrate, the rest
is the test. For each budget, and for each gate alone and all together: in how many divisions the rate of changed
decisions in the test is within the budget, how often nobody is asked, layers of the question, rows (tokens times
layers) saved of the question, of decoding and of both, and right answers before and after where they are known.

A rate in a test is itself drawn: gates that just keep to a budget are above it in half of the tests, those with room to
spare seldom. So there are two figures: within the budget, and within what a rate equal to the budget gives in 95% of
tests.

What it does not show: time, and problems of another kind than those in the file.
"""

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from bench.harness import environment
from minirksc.calibrate.binomial import errors_allowed, tail, upper_bound
from minirksc.calibrate.calibration import KINDS, calibrate, fit_correction
from minirksc.calibrate.evidence import Evidence
from minirksc.calibrate.replay import Replay
from minirksc.calibrate.trials import Tally, Trials
from minirksc.cli.evidence_file import read_evidence
from minirksc.rksc.cgee import DEFAULT_GATES, EXACT_GATES, PAPER_GATES, Gates

Row = dict[str, Any]

ARMS: dict[str, tuple[str, ...]] = {
    "layer exit": ("layer_exit",),
    "skip": ("skip",),
    "decode exit": ("decode_exit",),
    "together": KINDS,
}
BUDGETS = (0.005, 0.01, 0.02, 0.05, 0.1)
SHARE = 2 / 3
"""Of the problems, those that calibrate."""
FIT_SHARE = 0.1
"""Of the problems, the first, those that fit what layer exits read; they are in no division."""


class Risk:
    """The study of one set of problems.

    Args:
        evidence: of the problems.
        options: of the command line.
    """

    def __init__(self, evidence: Sequence[Evidence], options: argparse.Namespace) -> None:
        self._options = options
        num_fit = round(FIT_SHARE * len(evidence))
        # Lines a layer are fitted once, on problems that no division has: else each would replay everything anew.
        self._correction = fit_correction(evidence[:num_fit])
        self._evidence = evidence[num_fit:]
        self.trials = self._trials(options.decode_exit)
        self._right: dict[Gates, np.ndarray] = {}
        self.is_known = all(one.reference is not None for one in self._evidence)

    def split(self, number: int, budget: float) -> list[Row]:
        """One row an arm for one division; less where the problems are too few."""
        indices = list(range(len(self._evidence)))
        random.Random(number).shuffle(indices)
        size = round(SHARE * len(indices))
        among, test = indices[:size], indices[size:]
        rows = []
        for arm, kinds in ARMS.items():
            if kinds == ("decode_exit",) and self._options.decode_exit == "off":
                continue
            kinds = tuple(kind for kind in kinds if kind != "decode_exit" or self._options.decode_exit != "off")
            found = calibrate(
                self.trials,
                budget,
                self._options.confidence,
                among=among,
                seed=number,
                kinds=kinds,
                correction=self._correction,
            )
            step = found.certified
            row: Row = {"split": number, "budget": budget, "arm": arm, "certified": step is not None}
            row |= {"num_calibration": size, "num_ordering": found.num_ordering, "num_test": len(test)}
            if step is not None:
                row |= {"gates": asdict(step.gates), "bound": step.bound, "steps": len(found.steps)}
                row |= self._figures(step.gates, self.trials.tally(step.gates, test), test)
                row["within"] = row["rate"] <= budget
                row["within_chance"] = not _is_above(row["changed"], len(test), budget)
            rows.append(row)
        return rows

    def fixed(self) -> list[Row]:
        """Gates that nobody calibrated, over all problems: the rate of changed decisions and its bound."""
        rows = []
        for name, gates, mode in (
            ("exact gates", EXACT_GATES, "off"),
            ("default thresholds", DEFAULT_GATES, "keep_leader"),
            ("the paper's, without its layer exit", replace(PAPER_GATES, layer_exit=None), "stop_all"),
        ):
            trials = self.trials if mode == self._options.decode_exit else self._trials(mode)
            result = trials.tally(gates)
            row = {"fixed": name, "decode_exit": mode, **self._figures(gates, result, None, trials)}
            row["bound"] = upper_bound(result.num_changed, result.num_problems, self._options.confidence)
            rows.append(row)
        return rows

    def _figures(self, gates: Gates, result: Tally, among: Sequence[int] | None, trials: Trials | None = None) -> Row:
        total = max(result.num_problems, 1)
        nobody = sum(result.reasons.get(name, 0) for name in ("agreement", "consensus", "skip", "decode_exit"))
        figures: Row = {
            "changed": result.num_changed,
            "rate": result.num_changed / total,
            "nobody_asked": nobody / total,
            "skipped": result.reasons.get("skip", 0) / total,
            "decoding_ended": result.reasons.get("decode_exit", 0) / total,
            "mean_exit_layer": result.mean_exit_layer,
            "saved_question": result.saved_question,
            "saved_decoding": result.saved_decoding,
            "saved": result.saved,
        }
        if self.is_known:
            indices = slice(None) if among is None else np.asarray(among, dtype=int)
            replays = (trials or self.trials).replays
            before = np.array([bool(one.is_correct(one.reference)) for one in replays])[indices]
            figures |= {"right_before": float(before.mean())}
            figures |= {"right_after": float(self._correct(gates, trials)[indices].mean())}
        return figures

    def _correct(self, gates: Gates, trials: Trials | None) -> np.ndarray:
        """[problems] bool"""
        if trials is not None and trials is not self.trials:
            return np.array([bool(one.is_correct(one.outcome(gates))) for one in trials.replays])
        if gates not in self._right:
            self._right[gates] = np.array([bool(one.is_correct(one.outcome(gates))) for one in self.trials.replays])
        return self._right[gates]

    def _trials(self, mode: str) -> Trials:
        rules: dict[str, Any] = {"select": self._options.select, "answer_parser": self._options.answer_parser}
        return Trials([Replay(one, decode_mode=mode, **rules) for one in self._evidence])


def _is_above(num_changed: int, total: int, budget: float) -> bool:
    """Whether a rate equal to the budget gives so many in less than 5% of tests."""
    return num_changed > 0 and 1 - tail(num_changed - 1, total, budget) < 0.05


# ---- report ----------------------------------------------------------------------------------------------------------


def summarise(rows: Sequence[Row]) -> list[Row]:
    """One line an arm and budget: means over divisions."""
    found = []
    for arm in ARMS:
        for budget in dict.fromkeys(row["budget"] for row in rows):
            mine = [row for row in rows if row["arm"] == arm and row["budget"] == budget]
            good = [row for row in mine if row["certified"]]
            if not mine:
                continue
            line: Row = {"arm": arm, "budget": budget, "splits": len(mine), "certified": len(good)}
            for name in good[0] if good else ():
                values = [row[name] for row in good if isinstance(row[name], int | float)]
                if name not in ("split", "budget", "arm", "certified") and values:
                    line[name] = sum(values) / len(values)
            found.append(line)
    return found


def page(summary: Sequence[Row], fixed: Sequence[Row], facts: Row) -> str:
    """One page of Markdown."""
    lines = [
        f"# {__doc__.splitlines()[0]}",
        "",
        f"{facts['num_problems']} problems, {facts['num_branches']} branches of up to {facts['max_tokens']} tokens, "
        f"select {facts['select']}; {facts['splits']} divisions, confidence {facts['confidence']:g}. Means over them.",
        "",
        "| gates | budget | within budget | within chance | rate in the test | bound | nobody asked | decoding ended "
        "| layers asked | saved: question | decoding | both | right before | after |",
        "|" + "---|" * 14,
    ]
    for one in summary:
        head = f"| {one['arm']} | {one['budget']:.1%} | "
        if not one["certified"]:
            needs = f"needs more problems than {facts['num_calibration']}"
            lines.append(head + needs + " |" + " |" * 11)
            continue
        lines.append(head + " | ".join(_cells(one, f"{one['within']:.1%}", f"{one['within_chance']:.1%}")) + " |")
    lines += ["", "Thresholds that nobody calibrated, over all problems:", ""]
    lines += [
        "| gates | rate | bound | nobody asked | decoding ended | layers asked | saved: question | decoding | both "
        "| right before | after |",
        "|" + "---|" * 11,
    ]
    lines += [f"| {one['fixed']} | " + " | ".join(_cells(one)) + " |" for one in fixed]
    lines += [
        "",
        "`within budget`: divisions whose test rate is at most the budget. `within chance`: at most what a true rate "
        "equal to the budget gives in 95% of tests. `bound`: of the rate of changed decisions, by the problems that "
        "were counted. All but the paper's have the exact gates on.",
    ]
    return "\n".join(lines) + "\n"


def _cells(one: Row, *before: str) -> list[str]:
    layers = one.get("mean_exit_layer")
    shares = [f"{one[name]:.1%}" for name in ("nobody_asked", "decoding_ended")]
    saved = [f"{one[name]:.1%}" for name in ("saved_question", "saved_decoding", "saved")]
    right = [f"{one[name]:.1%}" if name in one else "-" for name in ("right_before", "right_after")]
    return [
        *before,
        f"{one['rate']:.2%}",
        f"{one['bound']:.2%}",
        *shares,
        f"{layers:.1f}" if layers else "-",
        *saved,
        *right,
    ]


def draw(file: Path, rows: Sequence[Row], summary: Sequence[Row]) -> None:
    """Rates in the test against the budget, and what is saved."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.5))
    for place, arm in enumerate(ARMS):
        mine = [one for one in summary if one["arm"] == arm and one["certified"]]
        budgets = [one["budget"] for one in mine]
        if not mine:
            continue
        rates = [[r["rate"] for r in rows if r["arm"] == arm and r["budget"] == b and r["certified"]] for b in budgets]
        middle = [float(np.median(some)) for some in rates]
        spread = [
            [m - np.quantile(some, 0.05), np.quantile(some, 0.95) - m] for m, some in zip(middle, rates, strict=True)
        ]
        shifted = [budget * (0.91 + 0.06 * place) for budget in budgets]
        left.errorbar(shifted, middle, yerr=np.array(spread).T, fmt="o", capsize=3, label=arm)
        right.plot(budgets, [one["saved"] for one in mine], marker="o", label=arm)
    line = np.geomspace(BUDGETS[0] * 0.8, BUDGETS[-1] * 1.2)
    left.plot(line, line, color="black", linewidth=1, label="budget")
    left.set(xscale="log", xlabel="budget", ylabel="changed decisions in the test: median, 5% to 95%")
    right.set(xscale="log", xlabel="budget", ylabel="rows saved, of decoding and question", ylim=(0, None))
    left.legend()
    right.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def main() -> None:
    """Runs the study; writes JSONL, a PNG and a page of Markdown."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m bench.cgee_risk", description=__doc__, formatter_class=formatter)
    parser.add_argument("evidence", type=Path, nargs="+", help="of minirksc.calibrate, made with the same settings")
    parser.add_argument("--select", default="score", choices=("score", "vote", "weighted_vote"))
    parser.add_argument("--answer-parser", default="auto", choices=("auto", "number", "choice", "boolean", "text"))
    parser.add_argument("--decode-exit", default="keep_leader", choices=("keep_leader", "stop_all", "off"))
    parser.add_argument("--splits", type=int, default=200, help="random divisions (%(default)s)")
    parser.add_argument("--confidence", type=float, default=0.95)
    parser.add_argument("--quick", action="store_true", help="10 divisions, two budgets: to see that it runs")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the results")
    options = parser.parse_args()
    read = [read_evidence(file) for file in options.evidence]
    if any(
        header["settings"] != read[0][0]["settings"] or header["model"] != read[0][0]["model"] for header, _ in read
    ):
        parser.error("the files were made with different settings or models")
    evidence = [one for _, some in read for one in some]
    num_splits = 10 if options.quick else options.splits
    size = round(SHARE * len(evidence))
    budgets = [b for b in BUDGETS if errors_allowed(size, b, options.confidence) >= 0]
    budgets = budgets[-2:] if options.quick else list(BUDGETS)
    facts: Row = {
        "num_problems": len(evidence),
        "num_calibration": size,
        "num_branches": max(len(one.branches) for one in evidence),
        "max_tokens": max(len(branch.token_ids) for one in evidence for branch in one.branches),
        "select": options.select,
        "answer_parser": options.answer_parser,
        "decode_exit": options.decode_exit,
        "splits": num_splits,
        "confidence": options.confidence,
    }
    study = Risk(evidence, options)
    rows: list[Row] = []
    options.output.mkdir(parents=True, exist_ok=True)
    with (options.output / "cgee_risk.jsonl").open("w", encoding="utf-8") as stream:
        stream.write(json.dumps({"environment": environment(1), **facts, "header": read[0][0]}) + "\n")
        for budget in tqdm(budgets, unit="budget"):
            for number in tqdm(range(num_splits), unit="split", leave=False):
                some = study.split(number, budget)
                rows += some
                stream.writelines(json.dumps(row) + "\n" for row in some)
                if not some[0]["certified"] and all(not row["certified"] for row in some):
                    break  # no division has more problems than this one
        fixed = study.fixed()
        summary = summarise(rows)
        stream.writelines(json.dumps(row) + "\n" for row in [*fixed, *summary])
    text = page(summary, fixed, facts)
    (options.output / "cgee_risk.md").write_text(text, encoding="utf-8")
    draw(options.output / "cgee_risk.png", rows, summary)
    print(text)


if __name__ == "__main__":
    main()

"""Whether calibrated gates keep their promise on problems that they have not seen, and what they save.

    python -m minirksc.calibrate --data problems.jsonl -o gates.json       # collects gates.json.evidence.jsonl
    python -m bench.cgee_risk gates.json.evidence.jsonl --answer-parser number -o results

No model runs: evidence is replayed. The problems are divided at random again and again; two thirds calibrate, the rest
is the test. For each budget, and for each gate alone and all together: in how many divisions the rate of changed
decisions in the test is within the budget, how often nobody is asked, layers of the question, rows (tokens times
layers) saved of the question, of decoding and of both, and right answers before and after where they are known.

A rate in a test is itself drawn: gates that just keep to a budget are above it in half of the tests.

What it does not show: time, and problems of another kind than those in the file.
"""

import argparse
import random
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from tqdm import tqdm

from bench.harness import Row, groups_of, make_parser, parse_with_quick, positive, run_or_exit
from bench.report import Page, write_run
from minirksc.calibrate.binomial import errors_allowed, upper_bound
from minirksc.calibrate.calibration import KINDS, calibrate, fit_correction
from minirksc.calibrate.evidence import Evidence
from minirksc.calibrate.replay import Replay
from minirksc.calibrate.trials import Tally, Trials
from minirksc.cli.evidence_file import read_evidence
from minirksc.errors import ConfigError
from minirksc.rksc.answers import ANSWER_KINDS, SELECT_RULES
from minirksc.rksc.cgee import DEFAULT_GATES, EXACT_GATES, PAPER_GATES, Gates

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
        evidence: evidence of the problems.
        options: command line.
    """

    def __init__(self, evidence: Sequence[Evidence], options: argparse.Namespace) -> None:
        self._options = options
        num_fit = round(FIT_SHARE * len(evidence))
        # Lines a layer are fitted once, on problems that no division has: else each would replay everything anew.
        self._correction = fit_correction(evidence[:num_fit])
        self._evidence = evidence[num_fit:]
        self.trials = self._trials(options.decode_exit)
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
            rows.append(row)
        return rows

    def fixed(self) -> list[Row]:
        """Gates that no calibration tested, over all problems: the rate of changed decisions and its bound."""
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
            trials = trials or self.trials
            some = trials.replays if among is None else [trials.replays[index] for index in among]
            figures["right_before"] = sum(bool(one.is_correct(one.reference)) for one in some) / len(some)
            figures["right_after"] = sum(bool(one.is_correct(one.outcome(gates))) for one in some) / len(some)
        return figures

    def _trials(self, mode: str) -> Trials:
        select, parser = self._options.select, self._options.answer_parser
        return Trials([Replay(one, decode_mode=mode, select=select, answer_parser=parser) for one in self._evidence])


def summarise(rows: Sequence[Row]) -> list[Row]:
    """One line an arm and budget: means over divisions."""
    found = []
    groups = groups_of(rows, "arm", "budget")
    for arm, budget in sorted(groups, key=lambda group: list(ARMS).index(group[0])):
        mine = groups[arm, budget]
        good = [row for row in mine if row["certified"]]
        line: Row = {"arm": arm, "budget": budget, "splits": len(mine), "certified": len(good)}
        for name in good[0] if good else ():
            values = [row[name] for row in good if isinstance(row[name], int | float)]
            if name not in line and name != "split" and values:
                line[name] = sum(values) / len(values)
        found.append(line)
    return found


def make_page(summary: Sequence[Row], fixed: Sequence[Row], facts: Row) -> Page:
    """The page."""
    page = Page("Whether calibrated gates keep their promise, and what they save")
    page.text(
        f"{facts['num_problems']} problems, {facts['num_branches']} branches of up to {facts['max_tokens']} tokens, "
        f"select {facts['select']}; {facts['splits']} divisions, confidence {facts['confidence']:g}. Means over them."
    )
    headings = {
        "rate": lambda one: f"{one['rate']:.2%}",
        "bound": lambda one: f"{one['bound']:.2%}",
        "nobody asked": lambda one: f"{one['nobody_asked']:.1%}",
        "decoding ended": lambda one: f"{one['decoding_ended']:.1%}",
        "layers asked": lambda one: f"{one['mean_exit_layer']:.1f}" if one.get("mean_exit_layer") else "-",
        "saved: question": lambda one: f"{one['saved_question']:.1%}",
        "decoding": lambda one: f"{one['saved_decoding']:.1%}",
        "both": lambda one: f"{one['saved']:.1%}",
        "right before": lambda one: f"{one['right_before']:.1%}" if "right_before" in one else "-",
        "after": lambda one: f"{one['right_after']:.1%}" if "right_after" in one else "-",
    }
    budgets = {
        "gates": lambda one: one["arm"],
        "budget": lambda one: f"{one['budget']:.1%}",
        "within budget": lambda one: f"{one['within']:.1%}",
    }
    page.columns([one for one in summary if one["certified"]], budgets | headings)
    missing = [f"{one['arm']}, {one['budget']:.1%}" for one in summary if not one["certified"]]
    page.items([f"{name} needs more problems than {facts['num_calibration']}" for name in missing])
    page.text("Thresholds that no calibration tested, over all problems:")
    page.columns(fixed, {"gates": lambda one: one["fixed"], **headings})
    page.text(
        "Rate: changed decisions, in the test where there is one. Within budget: divisions whose rate is at most the "
        "budget. Bound: of the rate, by the problems that were counted. All but the paper's have the exact gates on."
    )
    return page


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = make_parser("bench.cgee_risk", __doc__, "quick output")
    parser.add_argument("evidence", type=Path, nargs="+", help="files of minirksc.calibrate, made with one setting")
    parser.add_argument("--select", default="score", choices=SELECT_RULES)
    parser.add_argument("--answer-parser", default="auto", choices=ANSWER_KINDS)
    parser.add_argument("--decode-exit", default="keep_leader", choices=("keep_leader", "stop_all", "off"))
    parser.add_argument("--splits", type=positive, default=200, help="random divisions (%(default)s)")
    parser.add_argument("--confidence", type=float, default=0.95, help="of the calibration (%(default)s)")
    return parse_with_quick(parser, arguments, splits=10)


def run(options: argparse.Namespace) -> None:
    """Runs the study; writes JSONL and a page."""
    read = [read_evidence(file) for file in options.evidence]
    first = read[0][0]
    if any((header["settings"], header["model"]) != (first["settings"], first["model"]) for header, _ in read):
        raise ConfigError("the files of evidence were made with different settings or models")
    evidence = [one for _, some in read for one in some]
    size = round(SHARE * len(evidence))
    possible = [budget for budget in BUDGETS if errors_allowed(size, budget, options.confidence) >= 0]
    facts: Row = {
        **vars(options),
        "num_problems": len(evidence),
        "num_calibration": size,
        "num_branches": max(len(one.branches) for one in evidence),
        "max_tokens": max(len(branch.token_ids) for one in evidence for branch in one.branches),
    }
    study = Risk(evidence, options)
    rows: list[Row] = []
    for budget in tqdm(possible[-2:] if options.quick else BUDGETS, unit="budget"):
        for number in tqdm(range(options.splits), unit="split", leave=False):
            some = study.split(number, budget)
            rows += some
            if not any(row["certified"] for row in some):
                break  # no division has more problems than this one
    fixed, summary = study.fixed(), summarise(rows)
    rows += [{"header": first, **facts}, *fixed, *summary]
    write_run("cgee-risk", options, rows, make_page(summary, fixed, facts), threads=1)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark."""
    options = parse(arguments)
    run_or_exit(lambda: run(options))


if __name__ == "__main__":
    main()

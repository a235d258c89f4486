"""Command line: `python -m minirksc.calibrate --data FILE.jsonl --output gates.json`.

Solves the problems of a file without gates, notes what gates look at (beside the output, in OUTPUT.evidence.jsonl),
and chooses thresholds so that the rate of changed decisions is below a budget, with the confidence asked for; see
`minirksc.calibrate.calibration`. The result is a file for --gates and `SolverConfig(gates=...)`. Solving takes
long and can be interrupted: the same command goes on where it was.

The table goes to stdout, everything else to stderr. Exit codes: 0, 1 when something failed or the problems are too few
for the budget, 2 for a wrong command line, 130 when interrupted.
"""

import argparse
import hashlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minirksc.calibrate.binomial import problems_needed, smallest_budget
from minirksc.calibrate.calibration import KINDS, Calibration, calibrate
from minirksc.calibrate.collect import BRANCHES_AT_ONCE, Collector
from minirksc.calibrate.evidence import Evidence, Failed
from minirksc.calibrate.replay import Replay
from minirksc.calibrate.trials import Trials
from minirksc.cli.command import UsageError, run_command
from minirksc.cli.evidence_file import EvidenceFile
from minirksc.cli.files import read_jsonl
from minirksc.cli.generate import DEFAULT_TOKENS_PER_STEP, DEFAULTS, ENGINE, SAMPLING, open_llm
from minirksc.cli.output import check_writable, print_json, print_page
from minirksc.cli.parser import Parser, add_options, given
from minirksc.cli.resumable import GrowingFile
from minirksc.cli.strict_json import strict_json
from minirksc.cli.terminal import is_terminal, note
from minirksc.engine.signals import SIGNALS
from minirksc.errors import ConfigError, MinirkscError
from minirksc.options import EngineConfig, SamplingParams
from minirksc.rksc.cgee import Gates
from minirksc.rksc.exits import MarginRule
from minirksc.rksc.gates_file import GatesFile, fingerprint, settings_of, write_gates
from minirksc.rksc.solver import DEFAULT_SAMPLING, SolverConfig
from minirksc.version import __version__

if TYPE_CHECKING:
    from minirksc.llm import LLM

TEXT_FIELDS = ("question", "problem", "prompt")
MAX_DATA_BYTES = 1 << 30
MAX_BUDGET = 0.5
RULES = ("select", "answer_parser", "decode_exit")
"""Settings that evidence does not depend on: they can be changed without solving anew."""

SOLVER = ("branches", "tokens_per_step", "verify_style", "select", "answer_parser", "decode_exit")
STEP_SAMPLING = tuple(name for name in SAMPLING if name not in ("max_tokens", "n", "logprobs", "ignore_eos"))


def build_parser(prog: str = "python -m minirksc.calibrate") -> Parser:
    """All options; those that were not given are None."""
    parser = Parser(
        prog=prog,
        usage="%(prog)s --data FILE.jsonl --output gates.json [options]",
        description="Chooses the thresholds of confident early exit so that they change few decisions.",
        epilog=__doc__.partition("\n\n")[2],
    )
    add = parser.add_argument
    add_options(parser, EngineConfig, ["model"], DEFAULTS)
    add("--data", metavar="FILE.jsonl", help=f"problems, one a line: {' or '.join(TEXT_FIELDS)}, and perhaps answer")
    add("--output", "-o", metavar="FILE.json", help="what was found; evidence is kept in FILE.json.evidence.jsonl")
    add("--chat", action=argparse.BooleanOptionalAction, help="use the chat template (default: if there is one)")
    add("--json", action="store_true", default=None, help="print the result as one JSON object")

    add = parser.add_argument_group("calibration").add_argument
    budget_help = "most decisions that may change, as a share of problems (default: 0.01)"
    add("--budget", type=float, metavar="X", help=budget_help)
    add("--confidence", type=float, metavar="X", help="confidence that the result keeps to the budget (default: 0.95)")
    signal_help = "signal that a lead is measured on (default: auto, by part of the data)"
    add("--signal", choices=("auto", *SIGNALS), help=signal_help)
    add("--split-seed", type=int, metavar="N", help="seed of the random division of the problems (default: 0)")
    add("--limit", type=int, metavar="N", help="use the first N problems only")

    defaults, choices = {**DEFAULTS, "decode_exit": "keep_leader"}, {"decode_exit": ("keep_leader", "stop_all", "off")}
    add_options(parser.add_argument_group("solver"), SolverConfig, SOLVER, defaults, choices)
    add_options(parser.add_argument_group("engine"), EngineConfig, ENGINE)
    group = parser.add_argument_group("sampling (default: temperature 0.8, top-p 0.95)")
    add_options(group, SamplingParams, STEP_SAMPLING, {"seed": "a fixed one"})
    return parser


def main(
    arguments: Sequence[str] | None = None,
    make_llm: Callable[..., "LLM"] | None = None,
    prog: str = "python -m minirksc.calibrate",
) -> int:
    """Runs a command line; returns the exit code.

    Args:
        arguments: words of the command line; None for the process's own.
        make_llm: function of the engine's options; None for `LLM`.
        prog: name by which it was called, for messages.
    """
    return run_command(lambda: partial(Job(build_parser(prog).parse(arguments)).run, make_llm or open_llm))


class Job:
    """A checked command line.

    Args:
        options: options as `build_parser` gives them.

    Raises:
        UsageError, ConfigError: Options contradict each other, are out of range, or name files that cannot be used.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self.budget: float = 0.01 if options.budget is None else options.budget
        self.confidence: float = 0.95 if options.confidence is None else options.confidence
        if not 0 < self.budget <= MAX_BUDGET:
            raise UsageError(f"--budget {self.budget} must be above 0 and at most {MAX_BUDGET}")
        if not 0.5 < self.confidence < 1:
            raise UsageError(f"--confidence {self.confidence} must be above 0.5 and below 1")
        for name in ("data", "output"):
            if getattr(options, name) is None:
                raise UsageError(f"--{name} is missing")
        if options.limit is not None and options.limit < 1:
            raise UsageError(f"--limit {options.limit} must be at least 1")
        self.config = self._solver_config()
        self.seed = self.config.step_sampling.seed or 0  # each problem has one derived from it
        self.engine_options = given(options, ("model", *ENGINE))
        self.output = Path(options.output)
        self.evidence_path = self.output.with_name(self.output.name + ".evidence.jsonl")
        for path in (self.output, self.evidence_path):
            check_writable(path, "--output")
        problems, self.data = read_problems(Path(options.data))
        self.todo = problems[: options.limit]

    def run(self, make_llm: Callable[..., "LLM"]) -> int:
        """Collects, calibrates, writes; returns the exit code."""
        needed = problems_needed(self.budget, self.confidence)
        note(f"a budget of {self.budget:g} at {self.confidence:g} needs {needed} problems if no decision changes")
        self._check_count(len(self.todo), "")
        with GrowingFile(self.evidence_path, "evidence") as stream, make_llm(**self.engine_options) as llm:
            settings = settings_of(self.config, llm)
            model = fingerprint(llm.model_path)
            found = self._collect(llm, stream, EvidenceFile(stream, self._header(settings, model)))
        failed = [one for one in found if isinstance(one, Failed)]
        if failed:
            note(f"{len(failed)} of {len(found)} problems failed and do not count; the first: {failed[0].error}")
        self._check_count(len(found) - len(failed), " without an error")
        select, parser, mode = self.config.select, self.config.answer_parser, self.config.decode_exit_mode
        solved = [one for one in found if isinstance(one, Evidence)]
        trials = Trials([Replay(one, select=select, answer_parser=parser, decode_mode=mode) for one in solved])
        return self._finish(trials, self._calibrate(trials), settings, model)

    def _collect(self, llm: "LLM", stream: GrowingFile, file: EvidenceFile) -> list[Evidence | Failed]:
        """Solves the problems that the file does not have yet; returns what all of them gave."""
        from minirksc.engine.sampling import derived_seed

        collector = Collector(llm, self.config)

        def add_results(indices: Sequence[int]) -> Iterator[None]:
            seeds = [derived_seed(self.seed, index) for index in indices]
            found = collector.collect([self.todo[index] for index in indices], seeds)
            for index, one in zip(indices, found, strict=True):
                file.add(index, one)
                yield

        num_problems = len(self.todo)
        missing = [index for index in range(num_problems) if index not in file.found]
        chunk = max(1, BRANCHES_AT_ONCE // self.config.branches)
        stream.fill(missing, num_problems, add_results, chunk=chunk, unit="problem", state="problems are in")
        return [file.found[index] for index in range(num_problems)]

    def _calibrate(self, trials: Trials) -> Calibration:
        from tqdm import tqdm

        signal = self._options.signal or "auto"
        signals = tuple(SIGNALS) if signal == "auto" else (signal,)
        kinds = [kind for kind in KINDS if kind != "decode_exit" or self.config.decode_exit_mode != "off"]
        with tqdm(desc="ordering", unit="variant", disable=not is_terminal(sys.stderr)) as bar:
            return calibrate(
                trials,
                self.budget,
                self.confidence,
                seed=self._options.split_seed or 0,
                signals=signals,
                kinds=kinds,
                on_variant=bar.update,
            )

    def _finish(self, trials: Trials, found: Calibration, settings: dict[str, Any], model: dict[str, str]) -> int:
        certified = found.certified
        if certified is None:
            changed = found.steps[0].tally.num_changed
            raise MinirkscError(
                f"the exact gates alone changed {changed} of {found.num_test} decisions: branches are tied in their "
                "scores; nothing can be certified at this budget, use a larger one"
            )
        accuracy = _accuracy(trials.replays, certified.gates)
        counts = {
            "problems": len(trials.replays),
            "ordering": found.num_ordering,
            "test": found.num_test,
            "decisions": certified.tally.num_problems,
            "changed": certified.tally.num_changed,
            "bound": certified.bound,
            "steps": [step.to_dict() for step in found.steps],
            "accuracy": accuracy,
            "saved_all_problems": trials.tally(certified.gates).saved,
        }
        promise = (self.budget, self.confidence)
        write_gates(self.output, GatesFile(certified.gates, *promise, counts, self.data, settings, model, __version__))
        note(f"wrote {self.output}")
        if self._options.json:
            print_json({"output": str(self.output), "budget": self.budget, "confidence": self.confidence, **counts})
        else:
            print_table(found, accuracy)
        return 0

    def _solver_config(self) -> SolverConfig:
        options = self._options
        tokens = options.tokens_per_step or DEFAULT_TOKENS_PER_STEP
        sampling = replace(DEFAULT_SAMPLING, max_tokens=tokens, **given(options, STEP_SAMPLING))
        values = given(options, SOLVER) | {"tokens_per_step": tokens, "chat": options.chat is not False}
        return SolverConfig(sampling=sampling, **{"decode_exit": "keep_leader", **values})

    def _header(self, settings: dict[str, Any], model: dict[str, str]) -> dict[str, Any]:
        import torch

        return {
            "minirksc_version": __version__,
            "torch_version": torch.__version__,
            "data": {"sha256": self.data["sha256"]},
            "seed": self.seed,
            "settings": {name: value for name, value in settings.items() if name not in RULES},
            "model": model,
        }

    def _check_count(self, count: int, what: str) -> None:
        needed = problems_needed(self.budget, self.confidence)
        if count < needed:
            least = smallest_budget(count, self.confidence)
            shown = f"{least + 0.00005:.4f}"  # rounded up, so that it can be asked for
            remedy = f"; {count} could certify a budget of {shown} at best" if least <= MAX_BUDGET else ""
            raise MinirkscError(
                f"{count} problems{what} are too few: a budget of {self.budget:g} at confidence {self.confidence:g} "
                f"needs {needed}, if no decision changes{remedy}"
            )


def read_problems(path: Path) -> tuple[list[tuple[str, str | None]], dict[str, Any]]:
    """Problems of a JSONL file: text and, where it is given, the right answer; and what tells one file from another.

    Raises:
        ConfigError: It cannot be read, is empty, or a line is no problem.
    """
    raw, lines = read_jsonl(path, MAX_DATA_BYTES, "--data")
    items = [_problem(path, number, line) for number, line in lines]
    if not items:
        raise ConfigError(f"--data {path} is empty; give one problem a line")
    return items, {"name": path.name, "sha256": hashlib.sha256(raw).hexdigest(), "problems": len(items)}


def print_table(found: Calibration, accuracy: dict[str, float] | None) -> None:
    """What was tested, and what came of it."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("skip", "layer exit", "decode exit", "changed", "bound", "question", "decoding", "all", ""):
        table.add_column(name, justify="left" if not name else "right", no_wrap=True)
    certified = found.certified
    for step in found.steps:
        gates, result = step.gates, step.tally
        exit_rule = gates.layer_exit
        table.add_row(
            f"{gates.skip[0].gap:g}" if gates.skip else "off",
            _shown_exit(exit_rule) if isinstance(exit_rule, MarginRule) else "off",
            f"{gates.decode_exit[0].gap:g}" if gates.decode_exit else "off",
            f"{result.num_changed}/{result.num_problems}",
            f"{step.bound:.2%}",
            f"{result.saved_question:.1%}",
            f"{result.saved_decoding:.1%}",
            f"{result.saved:.1%}",
            "certified" if step is certified else "" if step.passed else "not certified",
            style="bold" if step is certified else None,
        )
    lines = [
        f"signal {found.variant.signal}; {found.num_ordering} problems made the sequence, {found.num_test} tested it.\n"
        "question, decoding, all: rows (tokens x layers) that need not be computed, of those without gates",
    ]
    if accuracy is not None:
        lines.append(f"right answers: {accuracy['before']:.1%} without gates, {accuracy['after']:.1%} with them")
    if certified is found.steps[0]:
        lines.append("Only the exact gates were certified; more problems or a larger budget may allow more.")
    print_page(table, *lines)


def _shown_exit(rule: MarginRule) -> str:
    start = "" if rule.start is None else f" from {rule.start}"
    return f"{rule.margin:g} x {rule.patience}{start}"


def _accuracy(replays: Sequence[Replay], gates: Gates) -> dict[str, float] | None:
    """Share of right answers before and after, over problems whose answer is known."""
    known = [replay for replay in replays if replay.evidence.reference is not None]
    if not known:
        return None
    before = sum(bool(replay.is_correct(replay.reference)) for replay in known)
    after = sum(bool(replay.is_correct(replay.outcome(gates))) for replay in known)
    return {"problems": len(known), "before": before / len(known), "after": after / len(known)}


def _problem(path: Path, number: int, line: bytes) -> tuple[str, str | None]:
    try:
        values = strict_json(line)
    except ValueError as error:
        raise ConfigError(f"--data {path}: line {number} is not JSON: {error}") from error
    given = [name for name in TEXT_FIELDS if name in values] if isinstance(values, dict) else []
    if len(given) != 1 or not isinstance(values[given[0]], str) or not values[given[0]].strip():
        raise ConfigError(f"--data {path}: line {number} must be an object with one text as {', '.join(TEXT_FIELDS)}")
    answer = values.get("answer")
    if answer is not None and not isinstance(answer, str | int | float):
        raise ConfigError(f"--data {path}: line {number} has the answer {answer!r}; give a text or a number")
    return values[given[0]], None if answer is None else str(answer)

"""The one way to measure: arms that take turns, medians and spreads, ratios within a repetition, and their options.

An arm is one way to do the same work. All arms take turns, in another order in every repetition, so that a machine that
slows down slows all of them. A ratio is taken within a repetition, and its spread is that of the repetitions.
"""

import argparse
import importlib.metadata
import platform
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

# Nothing here imports torch or minirksc before it is called: bench.gpu looks for a GPU first.
ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "transformers", "minirksc")
OURS = "minirksc"
"""Name that the arms of this engine begin with."""

Row = dict[str, Any]
"""One measurement: plain data that JSON can hold."""


@dataclass(frozen=True)
class Summary:
    """Median and spread of repetitions."""

    median: float
    p10: float
    p90: float

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.p10:.3g} .. {self.p90:.3g})"


def summarise(values: Sequence[float]) -> Summary:
    """Median, 10th and 90th percentile; of one value, that value."""
    if len(values) == 1:
        return Summary(values[0], values[0], values[0])
    tenths = quantiles(values, n=10, method="inclusive")
    return Summary(median(values), tenths[0], tenths[-1])


def seconds_of(work: Callable[[], object]) -> float:
    """Runs something once, by the clock on the wall."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def take_turns(
    arms: Mapping[str, Callable[[int], Row]], indices: Iterable[int], warmup: int = 0, is_quiet: bool = False
) -> Iterator[Row]:
    """Runs all arms for each index, in another order each time.

    Args:
        arms: name -> what is run, called with the index of a repetition or of a problem.
        indices: numbers of repetitions or problems.
        warmup: runs of each arm before, with the first index, that are not reported.
        is_quiet: True does not tell each run, where there are hundreds.

    Yields:
        A row an index and arm, those of an index in the order of `arms`, with "arm" and "repeat" (the index) in each.
    """
    for number, index in enumerate(indices):
        order = list(arms)
        random.Random(f"0 {index}").shuffle(order)
        for _ in range(warmup if number == 0 else 0):
            for name in order:
                arms[name](index)
        rows = {}
        for name in order:
            begin = time.perf_counter()
            rows[name] = {"arm": name, "repeat": index, **arms[name](index)}
            if not is_quiet:
                print(f"{index}: {name}: {time.perf_counter() - begin:.2f} s", file=sys.stderr, flush=True)
        yield from (rows[name] for name in arms)


def names(rows: Sequence[Row]) -> list[str]:
    """Arms, in order."""
    return list(dict.fromkeys(row["arm"] for row in rows))


def values(rows: Sequence[Row], arm: str, metric: str) -> list[float]:
    """One metric of an arm, by repetition."""
    return [row[metric] for row in rows if row["arm"] == arm]


def ratios(rows: Sequence[Row], arm: str, base: str, metric: str = "total_s") -> list[float]:
    """How many times as fast as `base` an arm is, within each repetition; rows are of one group."""
    own = {row["repeat"]: row[metric] for row in rows if row["arm"] == arm}
    theirs = {row["repeat"]: row[metric] for row in rows if row["arm"] == base}
    return [theirs[repeat] / own[repeat] for repeat in own if repeat in theirs]


def check_same_work(arm: str, lengths: Sequence[int], num_sequences: int, num_tokens: int) -> None:
    """A comparison of unequal work is none.

    Raises:
        RuntimeError: The sequences of an arm have fewer or more tokens than they should.
    """
    if list(lengths) != [num_tokens] * num_sequences:
        raise RuntimeError(f"{arm} generated {list(lengths)} tokens, not {num_sequences} x {num_tokens}")


def groups_of(rows: Iterable[Row], *keys: str) -> dict[tuple[Any, ...], list[Row]]:
    """Rows by some of their values."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


def environment(threads: int) -> dict[str, Any]:
    """Versions and machine."""
    import torch

    return {
        "versions": {name: version_of(name) for name in PACKAGES},
        "commit": _commit(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": _cpu(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": threads,
    }


def version_of(package: str) -> str | None:
    """Version of a package; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Commit of the working tree, with "-dirty" when it has changes; None outside a repository."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.machine())


# Options


def positive(text: str) -> int:
    """A whole number from 1 on."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} must be at least 1")
    return value


def pattern(text: str) -> str:
    """A regular expression."""
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from error
    return text


def some_of(kind: Callable[[str], Any] | Sequence[str], least: int = 1) -> Callable[[str], list[Any]]:
    """Values with commas between them.

    Args:
        kind: type of each, or all that there are.
        least: fewest that may be given.
    """

    def one(text: str) -> Any:
        if not callable(kind) and text not in kind:
            raise argparse.ArgumentTypeError(f"unknown {text}; there are {', '.join(kind)}")
        return kind(text) if callable(kind) else text

    def parse(text: str) -> list[Any]:
        values = [one(part) for part in text.split(",") if part]
        if len(values) < least:
            raise argparse.ArgumentTypeError("give at least one, with commas between them")
        return values

    return parse


OPTIONS: dict[str, dict[str, Any]] = {
    "model": dict(default="smollm2-135m", help="alias or checkpoint folder (%(default)s)"),
    "dtype": dict(default="auto", help="numbers to compute in (%(default)s)"),
    "dtypes": dict(type=some_of(str), default=["auto"], help="numbers to compute in, with commas (auto)"),
    "threads": dict(type=positive, default=2, help="threads of the CPU (%(default)s)"),
    "kv-cache-bytes": dict(default="2GiB", help="size of each engine's KV cache (%(default)s)"),
    "branches": dict(type=positive, default=8, help="branches of each problem (%(default)s)"),
    "prefix-tokens": dict(type=positive, default=1024, help="length of each prompt (%(default)s)"),
    "hint-tokens": dict(type=positive, default=20, help="length of each hint (%(default)s)"),
    "gates": dict(type=Path, help="file of minirksc.calibrate (thresholds that no calibration tested)"),
    "data": dict(type=Path, help="JSONL with question and answer"),
    "repeats": dict(type=positive, default=5, help="measured runs of each arm (%(default)s)"),
    "warmup": dict(type=int, default=1, help="runs of each arm before those (%(default)s)"),
    "only": dict(type=pattern, default="", help="regular expression: these arms only"),
    "quick": dict(action="store_true", help="less work and fewer repetitions: minutes"),
    "output": dict(type=Path, default=ROOT / "bench" / "results", help="folder of the results (bench/results)"),
}
"""Options that several benchmarks have, under the same names everywhere."""


def make_parser(module: str, description: str | None, options: str, **defaults: Any) -> argparse.ArgumentParser:
    """A command line.

    Args:
        module: name after `python -m`.
        description: text above the options.
        options: names out of `OPTIONS`, with spaces between them.
        defaults: other defaults.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in options.split():
        flags = ["-o", "--output"] if name == "output" else [f"--{name}"]
        parser.add_argument(*flags, **OPTIONS[name])
    parser.set_defaults(**defaults)
    return parser


def parse_with_quick(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None, **quick: Any
) -> argparse.Namespace:
    """Parses; with --quick, options that are not given have these values."""
    options = parser.parse_args(arguments)
    if options.quick:
        parser.set_defaults(**quick)
        options = parser.parse_args(arguments)
    return options


def keep_only(names: Iterable[str], pattern: str) -> list[str]:
    """Names that the pattern is found in.

    Raises:
        SystemExit: None is left.
    """
    known = list(names)
    kept = [name for name in known if re.search(pattern, name)]
    if not kept:
        sys.exit(f"--only {pattern!r} leaves no arm; there are: {', '.join(known)}")
    return kept


def run_or_exit(run: Callable[[], object]) -> None:
    """Runs a benchmark; what the engine or a file refuses is told in one line."""
    from minirksc.errors import MinirkscError

    try:
        run()
    except MinirkscError as error:
        sys.exit(f"error: {error}")

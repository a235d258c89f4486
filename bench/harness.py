"""What the benchmarks share: arms, interleaved repetitions, summaries, results on disk.

An arm is one way to do the same work: an engine, a dtype and a setting. All arms of a run live in one
process and take turns, in another order in every repetition, so that a machine that slows down slows all of
them. A ratio is taken within a repetition, and its spread is that of the repetitions.
"""

import argparse
import importlib
import importlib.metadata
import json
import platform
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "transformers", "minirksc")

Measured = dict[str, Any]
"""What one run of an arm gives: seconds and rates by name, and `token_ids`, the work it did."""


@dataclass
class Arm:
    """One way to do the work.

    Attributes:
        engine: "minirksc" or "transformers".
        dtype: what the engine computes in, not what was asked for.
        setting: what is special about it.
        run: does the work once, from cold caches.
        measured: one entry a repetition.
    """

    engine: str
    dtype: str
    setting: str
    run: Callable[[], Measured]
    measured: list[Measured] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Engine, dtype and setting."""
        return f"{self.engine} {self.dtype} {self.setting}"

    def values(self, metric: str) -> list[float]:
        """One metric, by repetition."""
        return [one[metric] for one in self.measured]


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


def measure(arms: Sequence[Arm], repeats: int, warmup: int, seed: int = 0) -> None:
    """Runs every arm `warmup + repeats` times, interleaved; fills `Arm.measured` with the repeats."""
    order = random.Random(seed)
    for round_ in range(warmup + repeats):
        for arm in order.sample(arms, len(arms)):
            begin = time.perf_counter()
            measured = arm.run()
            took = time.perf_counter() - begin
            label = f"repeat {round_ - warmup + 1}/{repeats}" if round_ >= warmup else "warm-up"
            print(f"{label}: {arm.name}: {took:.1f} s", file=sys.stderr, flush=True)
            if round_ >= warmup:
                arm.measured.append(measured)


def ratio(arm: Arm, other: Arm, metric: str) -> Summary:
    """How many times as fast as `other` an arm is, repetition by repetition; the metric is in seconds."""
    pairs = zip(arm.values(metric), other.values(metric), strict=True)
    return summarise([theirs / ours for ours, theirs in pairs])


def rivals(arms: Sequence[Arm], setting: str, metric: str) -> dict[str, Arm]:
    """The transformers arms of one setting that a ratio is given against: its fastest dtype, and bfloat16."""
    candidates = [arm for arm in arms if arm.engine == "transformers" and arm.setting == setting]
    if not candidates:
        return {}
    fastest = min(candidates, key=lambda arm: median(arm.values(metric)))
    chosen = {f"transformers {setting}, its fastest dtype here ({fastest.dtype})": fastest}
    for arm in candidates:
        if arm.dtype == "bfloat16":
            chosen[f"transformers {setting}, bfloat16"] = arm
    return chosen


def agreement(arm: Arm, reference: Arm) -> str:
    """How many sequences of the last repetition have the very tokens that `reference` gave."""
    ours, theirs = arm.measured[-1]["token_ids"], reference.measured[-1]["token_ids"]
    return f"{sum(a == b for a, b in zip(ours, theirs, strict=True))}/{len(theirs)}"


def check_work(arms: Sequence[Arm], num_sequences: int, num_tokens: int) -> None:
    """A comparison of unequal work is none.

    Raises:
        RuntimeError: an arm generated fewer or more tokens than it should.
    """
    for arm in arms:
        for one in arm.measured:
            lengths = [len(ids) for ids in one["token_ids"]]
            if lengths != [num_tokens] * num_sequences:
                raise RuntimeError(f"{arm.name} generated {lengths} tokens, not {num_sequences} x {num_tokens}")


def environment(threads: int) -> dict[str, Any]:
    """Versions and machine."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "versions": versions,
        "commit": _commit(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": _cpu(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": threads,
    }


def write_results(folder: Path, name: str, arms: Sequence[Arm], options: argparse.Namespace) -> Path:
    """One JSONL line an arm and repetition, each complete in itself; returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}.jsonl"
    common = {
        "bench": name,
        "options": {key: str(v) if isinstance(v, Path) else v for key, v in vars(options).items()},
        "environment": environment(options.threads),
    }
    with file.open("w", encoding="utf-8") as stream:
        for arm in arms:
            for repeat, measured in enumerate(arm.measured):
                where = {"engine": arm.engine, "dtype": arm.dtype, "setting": arm.setting, "repeat": repeat}
                stream.write(json.dumps({**common, **where, **measured}) + "\n")
    return file


def print_arms(title: str, arms: Sequence[Arm], metrics: dict[str, str], reference: Arm) -> None:
    """A table of medians and spreads.

    Args:
        title: above the table.
        arms: its rows.
        metrics: metric -> heading of its column.
        reference: whose tokens the others' are compared with.
    """
    table = Table(title=f"{title}: median (p10 .. p90) of {len(reference.measured)}")
    for heading in ("engine", "dtype", "setting", *metrics.values(), "same tokens"):
        table.add_column(heading, no_wrap=True)
    for arm in arms:
        cells = [_cell(arm, metric) for metric in metrics]
        table.add_row(arm.engine, arm.dtype, arm.setting, *cells, agreement(arm, reference))
    _print(table)


def print_ratios(title: str, rows: Sequence[tuple[Arm, str, Summary]]) -> None:
    """A table of ratios: (arm, what it is compared with, how many times as fast it is)."""
    table = Table(title=f"{title}: ratio of seconds, median (p10 .. p90); above 1: the arm is faster")
    for heading in ("arm", "against", "ratio"):
        table.add_column(heading, no_wrap=True)
    for arm, against, value in rows:
        table.add_row(arm.name, against, str(value))
    _print(table)


def print_environment(threads: int) -> None:
    """What the numbers below were taken on."""
    facts = environment(threads)
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    print(f"{versions}; {threads} threads; {facts['cpu']} ({facts['cpu_capability']}); {facts['system']}")


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """Options that every benchmark has."""
    parser.add_argument("--model", default="smollm2-135m", help="alias or checkpoint folder (%(default)s)")
    parser.add_argument("--threads", type=_positive, default=2, help="of the CPU (%(default)s)")
    parser.add_argument("--kv-cache-bytes", default="2GiB", help="of each minirksc engine (%(default)s)")
    parser.add_argument("--repeats", type=_positive, default=5, help="measured runs of each arm (%(default)s)")
    parser.add_argument("--warmup", type=int, default=1, help="runs before those (%(default)s)")
    parser.add_argument("--dtypes", type=_names, default=["auto"], help="of minirksc, with commas (auto)")
    parser.add_argument(
        "--rival-dtypes",
        type=_names,
        default=["bfloat16", "float32"],
        help="of transformers, with commas; '' leaves it out (bfloat16,float32)",
    )
    parser.add_argument("--only", default="", help="regular expression: run these arms only")
    parser.add_argument(
        "--output",
        type=Path,
        default=ROOT / "bench" / "results",
        help="folder of the results (bench/results)",
    )


def keep_only(arms: list[Arm], pattern: str) -> list[Arm]:
    """Arms whose name the pattern is found in.

    Raises:
        SystemExit: none is left, or the pattern is no regular expression.
    """
    try:
        kept = [arm for arm in arms if re.search(pattern, arm.name)]
    except re.error as error:
        sys.exit(f"--only {pattern!r} is no regular expression: {error}")
    if not kept:
        sys.exit("--only leaves no arm; there are:\n" + "\n".join(arm.name for arm in arms))
    return kept


def load_transformers(folder: Path, dtype: str) -> Any:
    """The rival on the same folder: AutoModelForCausalLM with sdpa attention, never stopping at EOS.

    Raises:
        SystemExit: transformers is not installed.
    """
    # transformers looks for a package named `kernels`; the repository's folder must not be taken for it.
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
    try:
        transformers: Any = importlib.import_module("transformers")
    except ImportError:
        sys.exit("transformers is not installed: pip install -e '.[bench]', or leave it out: --rival-dtypes ''")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation="sdpa"
    ).eval()
    # As ignore_eos does here: no token ends a generation, and none is forbidden.
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def generate_transformers(model: Any, input_ids: torch.Tensor, num_tokens: int, **options: Any) -> Any:
    """Greedy generation of exactly `num_tokens` a row.

    Args:
        model: from `load_transformers`.
        input_ids: `[batch, tokens]` int64, no padding.
        num_tokens: new ones.
        options: for `generate`, such as past_key_values.
    """
    with torch.inference_mode():
        return model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            do_sample=False,
            min_new_tokens=num_tokens,
            max_new_tokens=num_tokens,
            return_dict_in_generate=True,
            **options,
        )


def _cell(arm: Arm, metric: str) -> str:
    return str(summarise(arm.values(metric))) if metric in arm.measured[0] else "-"


def _print(table: Table) -> None:
    # As wide as it needs to be, also in a file.
    console = Console(width=max(Console().width, 180))
    console.print(table)


def _commit() -> str | None:
    """Of the working tree, with "-dirty" when it has changes; None outside a repository."""
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


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} must be at least 1")
    return value


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]

"""What the benchmarks of the solver share: one solve with all it cost, arms that take turns, options."""

import argparse
import random
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.harness import ROOT
from minirksc import LLM, Solver, SolverConfig
from minirksc.errors import MinirkscError
from minirksc.rksc.cgee import DEFAULT_GATES, Gates
from minirksc.rksc.gates_file import read_gates_file, settings_of

Row = dict[str, Any]
"""One measurement: plain data that JSON can hold."""

PHASES = {"prefill_s": "prompt", "decode_s": "decoding", "verify_s": "verification", "other_s": "the rest"}
COUNTERS = ("num_prefilled_tokens", "num_decoded_tokens", "num_layer_rows", "num_saved_layer_rows")
LONE_GATES = {"skip": "skip", "layer exit": "layer_exit", "decode exit": "decode_exit"}
"""Name of an arm -> the field of `Gates` that it leaves on."""

_OFF: dict[str, Any] = {"skip": (), "layer_exit": None, "decode_exit": ()}
_NOT_FIRED = ("ask", "goes on")


def solve(llm: LLM, config: SolverConfig, problem: str | Sequence[int]) -> Row:
    """Solves one problem from an empty prefix cache.

    Returns:
        total_s and the seconds of `PHASES`; `COUNTERS`; num_asked branches; exit_layers of those whose question left
        early; fired: names of gates that decided something; gates: where their thresholds come from; parsed: the
        answer; answers and num_tokens of all branches; token_ids.
    """
    llm.reset_prefix_cache()
    begin = time.perf_counter()
    result = Solver(llm, config).solve(problem)
    total_s = time.perf_counter() - begin
    stats, branches = result.stats, result.branches
    seconds = {name: stats[name] for name in PHASES if name in stats}
    return {
        "total_s": total_s,
        **seconds,
        "other_s": total_s - sum(seconds.values()),
        **{name: stats[name] for name in COUNTERS},
        "num_asked": sum(branch.verification is not None for branch in branches),
        "exit_layers": [branch.exit_layer for branch in branches if branch.exit_layer is not None],
        "fired": fired(result.trace["gates"]),
        "gates": result.gates,
        "parsed": result.parsed,
        "answers": [branch.parsed for branch in branches],
        "num_tokens": [len(branch.token_ids) for branch in branches],
        "token_ids": [branch.token_ids for branch in branches],
    }


def seeded(config: SolverConfig, index: int) -> SolverConfig:
    """The same with random numbers of its own for each problem: with one seed all problems would share their luck."""
    sampling = config.step_sampling
    return replace(config, sampling=replace(sampling, seed=(sampling.seed or 0) + index))


def fired(notes: Iterable[Mapping[str, Any]]) -> list[str]:
    """Names of the gates that decided something, of `Tree.gates`: a skip that asks after all has not."""
    return sorted({note["gate"] for note in notes if note["decision"] not in _NOT_FIRED})


def take_turns(
    arms: Mapping[str, Callable[[int], Row]], indices: Iterable[int], warmup: int = 0, seed: int = 0
) -> Iterator[list[Row]]:
    """Runs all arms for each index, in another order each time.

    Args:
        arms: name -> what is run, called with the index of a repetition or of a problem.
        indices: of those.
        warmup: runs of each arm before, with the first index, that are not reported.
        seed: of the orders.

    Yields:
        The rows of one index, in the order of `arms`, with "arm" and "repeat" (the index) in each.
    """
    for number, index in enumerate(indices):
        order = list(arms)
        random.Random(f"{seed} {index}").shuffle(order)
        for _ in range(warmup if number == 0 else 0):
            for name in order:
                arms[name](index)
        rows = {}
        for name in order:
            begin = time.perf_counter()
            rows[name] = {"arm": name, "repeat": index, **arms[name](index)}
            print(f"{index}: {name}: {time.perf_counter() - begin:.2f} s", file=sys.stderr, flush=True)
        yield [rows[name] for name in arms]


def load_gates(file: Path | None, llm: LLM, config: SolverConfig) -> Gates:
    """The gates of a file, or those of no calibration.

    Args:
        file: of `minirksc.calibrate`; None: `DEFAULT_GATES`.
        llm: the model.
        config: they will be used under: settings other than the file's make them "uncalibrated", and are told.

    Raises:
        ConfigError: as `read_gates_file`.
    """
    if file is None:
        return DEFAULT_GATES
    content = read_gates_file(file, llm.model_path)
    different = content.differences(settings_of(config, llm))
    for sentence in different:
        print(f"{file}: {sentence}", file=sys.stderr)
    return replace(content.gates, source="uncalibrated") if different else content.gates


def lone_gate(gates: Gates, kept: str) -> Gates | None:
    """The same thresholds with every gate off but one of `LONE_GATES`; None: that one has no threshold."""
    if not getattr(gates, kept):
        return None
    return replace(gates, exact=False, **{name: off for name, off in _OFF.items() if name != kept})


def load(options: argparse.Namespace, dtype: str, **more: Any) -> LLM:
    """An engine as the options ask for it."""
    return LLM(options.model, dtype=dtype, threads=options.threads, kv_cache_bytes=options.kv_cache_bytes, **more)


def keep_only(names: Iterable[str], pattern: str) -> list[str]:
    """Names that the pattern is found in.

    Raises:
        SystemExit: none is left.
    """
    known = list(names)
    kept = [name for name in known if re.search(pattern, name)]
    if not kept:
        sys.exit(f"--only {pattern!r} leaves no arm; there are: {', '.join(known)}")
    return kept


def make_parser(module: str, description: str | None) -> argparse.ArgumentParser:
    """A command line with what all have."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m", help="alias or checkpoint folder (%(default)s)")
    parser.add_argument("--dtypes", type=some_of(str), default=["auto"], help="with commas (auto)")
    parser.add_argument("--threads", type=positive, default=2, help="of the CPU (%(default)s)")
    parser.add_argument("--kv-cache-bytes", default="2GiB", help="of each engine (%(default)s)")
    parser.add_argument("--branches", type=positive, default=8, help="of each problem (%(default)s)")
    parser.add_argument("--gates", type=Path, help="file of minirksc.calibrate (gates that nobody calibrated)")
    parser.add_argument("--only", type=pattern, default="", help="regular expression: these arms only")
    parser.add_argument("--quick", action="store_true", help="few problems and repetitions: minutes")
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results", help="folder (bench/results)")
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


def run_or_exit(run: Callable[[], None]) -> None:
    """Runs a benchmark; what the engine or a file refuses is told in one line."""
    try:
        run()
    except MinirkscError as error:
        sys.exit(f"error: {error}")


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


def some_of(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """Values with commas between them, at least one."""

    def parse(text: str) -> list[Any]:
        values = [kind(part) for part in text.split(",") if part]
        if not values:
            raise argparse.ArgumentTypeError("give at least one, with commas between them")
        return values

    return parse

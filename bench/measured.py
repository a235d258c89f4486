"""What the benchmarks of the solver share: an engine as the options ask for it, one solve with all it cost, gates."""

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.harness import Row, keep_only
from bench.problem_sets import ProblemSet
from minirksc import LLM, SamplingParams, Solver, SolverConfig
from minirksc.engine.gates import LayerGate, Seat
from minirksc.rksc.cgee import DEFAULT_GATES, Gates
from minirksc.rksc.gates_file import read_gates_file, settings_of

PHASES = {"prefill_s": "prompt", "decode_s": "decoding", "verify_s": "verification", "other_s": "the rest"}
COUNTERS = ("num_prefilled_tokens", "num_decoded_tokens", "num_layer_rows", "num_saved_layer_rows")
LONE_GATES = {"skip": "skip", "layer exit": "layer_exit", "decode exit": "decode_exit"}
"""Name of an arm -> the field of `Gates` that it leaves on."""

_NOT_FIRED = ("ask", "goes on")


def load(options: argparse.Namespace, dtype: str, **more: Any) -> LLM:
    """An engine as the options ask for it."""
    return LLM(options.model, dtype=dtype, threads=options.threads, kv_cache_bytes=options.kv_cache_bytes, **more)


def solve(llm: LLM, config: SolverConfig, problem: str | Sequence[int]) -> Row:
    """Solves one problem from an empty prefix cache.

    Returns:
        total_s and the seconds of `PHASES`; `COUNTERS`; num_asked branches; exit_layers of those whose question left
        early; fired: names of gates that decided something; gates: where their thresholds come from; parsed: the
        answer; answers, p_yes, num_tokens and token_ids of all branches.
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
        "p_yes": [branch.verification for branch in branches],
        "num_tokens": [len(branch.token_ids) for branch in branches],
        "token_ids": [branch.token_ids for branch in branches],
    }


def begin_decoding(
    llm: LLM, prompt: list[int], count: int, params: SamplingParams, gate: LayerGate | None = None
) -> Callable[[], None]:
    """Begins sequences of the prompt and one more token of their own; each has its first new token then.

    Args:
        llm: engine.
        prompt: token ids that the sequences share.
        count: number of sequences.
        params: sampling, with nothing left open.
        gate: layer gate at which each has a seat.

    Returns:
        What decodes all the others.
    """
    engine, requests = llm.engine, []
    for row in range(count):
        sequence = engine.new_sequence([*prompt, prompt[row - count]])
        seat = None if gate is None else Seat(gate, row)
        requests.append(engine.add_request(sequence, params, seed=row, seat=seat))
    while not all(request.output_token_ids for request in requests):
        engine.step()

    def steps() -> None:
        while engine.has_work:
            engine.step()

    return steps


def solving(
    llm: LLM,
    configs: Mapping[str, SolverConfig],
    prompts: Sequence[str | Sequence[int]],
    only: str,
    problems: ProblemSet | None = None,
) -> dict[str, Callable[[int], Row]]:
    """Arms for `take_turns` that solve the problem of an index, each with random numbers of its own.

    Args:
        llm: engine of all arms.
        configs: name of an arm -> options of its solves.
        prompts: prompt of each problem.
        only: regular expression of the names that are kept.
        problems: right answers of the problems, to which rows then are held ("reference", "right").
    """

    def arm(config: SolverConfig) -> Callable[[int], Row]:
        def run(index: int) -> Row:
            row = solve(llm, seeded(config, index), prompts[index])
            if problems is not None:
                reference = problems.references[index]
                row |= {"reference": reference, "right": row["parsed"] == reference}
            return row

        return run

    return {name: arm(configs[name]) for name in keep_only(configs, only)}


def seeded(config: SolverConfig, index: int) -> SolverConfig:
    """The same with random numbers of its own for each problem: with one seed all problems would share their luck."""
    sampling = config.step_sampling
    return replace(config, sampling=replace(sampling, seed=(sampling.seed or 0) + index))


def fired(notes: Iterable[Mapping[str, Any]]) -> list[str]:
    """Names of the gates that decided something, of `Tree.gates`: a skip that asks after all has not."""
    return sorted({note["gate"] for note in notes if note["decision"] not in _NOT_FIRED})


def load_gates(file: Path | None, llm: LLM, config: SolverConfig) -> Gates:
    """The gates of a file, or those of no calibration.

    Args:
        file: file of `minirksc.calibrate`; None: `DEFAULT_GATES`.
        llm: model.
        config: options that they will be used under: settings other than the file's make them "uncalibrated", and are
            told.

    Raises:
        ConfigError: As of `read_gates_file`.
    """
    if file is None:
        return DEFAULT_GATES
    content = read_gates_file(file, llm.model_path)
    different = content.differences(settings_of(config, llm))
    for sentence in different:
        print(f"{file}: {sentence}", file=sys.stderr)
    return replace(content.gates, source="uncalibrated") if different else content.gates


def lone_gates(gates: Gates) -> dict[str, Gates]:
    """The same thresholds with all gates off but one of `LONE_GATES`, by its name; not one without a threshold."""
    off = replace(gates, exact=False, skip=(), layer_exit=None, decode_exit=())
    kept = {name: {field: value} for name, field in LONE_GATES.items() if (value := getattr(gates, field))}
    return {name: replace(off, **value) for name, value in kept.items()}

"""The conditions of the paper (Sekar 2026, arXiv 2606.09937) on this engine, and its own figures beside ours.

    python -m bench.paper_tables --data math.jsonl choices.jsonl --gates gates.json
    python -m bench.paper_tables --data math.jsonl --quick

For each file of problems: --branches branches behind a prompt of --prefix-tokens, made of one problem and worked
examples from the end of the same file; --tokens decoded tokens a branch (8, as published); default sampling, with
another seed for each problem. Conditions:
- no KV: every branch computes the prompt, and again for its question.
- prefix KV: computed once, as any engine with a prefix cache does ("vLLM-equivalent" in the paper).
- prefix KV, append: the same, but the question follows the branch's own KV.
- RKSC as published: prefix KV with policy="paper": every published rule and constant.
- RKSC: prefix KV, append, with the gates of --gates.

An "error" is what the paper calls one: full verification is right and the gated answer wrong. RKSC is held to "prefix
KV, append", RKSC as published to "prefix KV", since each differs from that one in its gates alone.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from bench import harness
from bench.harness import Row, groups_of, names, positive, ratios, values
from bench.intervals import bootstrap, clopper_pearson
from bench.measured import load, load_gates, solving
from bench.problem_sets import STOP, ProblemSet, read_problem_set
from bench.report import Page, share, spread, write_run
from minirksc import LLM, SolverConfig
from minirksc.rksc.cgee import Gates
from minirksc.rksc.solver_config import DEFAULT_SAMPLING

NO_KV, PREFIX, APPEND, PUBLISHED, RKSC = "no KV", "prefix KV", "prefix KV, append", "RKSC as published", "RKSC"
FULL = {PUBLISHED: PREFIX, RKSC: APPEND}
"""What the answers of a gated condition are held to."""

NUM_SHOTS = 40
"""Rows at the end of each file that are worked examples, never problems."""

PAPER = (
    (NO_KV, "1301", "1.000", "-", "-", "-"),
    (PREFIX, "719", "1.808 (1.78 .. 1.83 over 20 pairs of model and data)", "-", "-", "-"),
    (
        "RKSC",
        "452",
        "3.008 (7-8B models: 2.57 .. 3.17; best pair 3.990)",
        "6/1616: 0.37% [0.14%, 0.81%]",
        "42% on GPQA, 60 .. 92% on ARC and MMLU",
        "fires always, mean 18.4 of 28 (Qwen2.5-7B)",
    ),
)
"""Condition, ms, times as fast as no KV, errors, skips, layer exit; as published."""

PAPER_SETUP = (
    "As published: one A100 80 GB, bfloat16, Qwen2.5-7B, Mistral-7B, Falcon3-7B and 10B, Llama-3-8B; GPQA-D, "
    "MMLU-STEM, ARC-C, GSM8K; 8 branches, prompts filled up to about 1024 tokens, 50 problems a data set, 8 decoded "
    "tokens. The interval of 6/1616 is ours."
)

COMPARABLE = (
    "Comparable: how the conditions are defined, branches, prompt length, decoded tokens, the published rules and "
    "constants, and what is called an error. All conditions run the same code here.",
    "Not comparable: milliseconds. Models here are smaller and the machine is another one; where prefill costs more "
    "relative to a decode step, as on a CPU, the ratio to no KV is larger for every condition that shares.",
    "Not comparable: accuracy, skips and exits. They depend on model and data; these data sets have the form of the "
    "paper's (numbers, multiple choice), not their content. Prompts are filled with worked examples here.",
    '8 tokens hold an answer only where it is short, and hardly ever after a beginning such as "Approach #1:" '
    "(--hints approach). Few right answers mean few chances for an error: read the interval.",
)


def make_arms(base: SolverConfig, gates: Gates) -> dict[str, SolverConfig]:
    """Every condition.

    Args:
        base: options of all conditions: branches, tokens, hints, sampling, parser.
        gates: gates of RKSC.
    """
    full = replace(base, verify="always", verify_style="standalone")
    return {
        NO_KV: replace(full, sharing="none"),
        PREFIX: full,
        APPEND: replace(full, verify_style="append"),
        PUBLISHED: replace(base, verify="auto", policy="paper", verify_style="standalone"),
        RKSC: replace(base, verify="auto", gates=gates),
    }


def measure_set(llm: LLM, problems: ProblemSet, tokens: int, options: argparse.Namespace) -> list[Row]:
    """All conditions on all problems of one file."""
    tokenizer = llm.need_tokenizer("bench.paper_tables")
    prompts = [problems.prompt_ids(tokenizer, i, options.prefix_tokens) for i in range(len(problems.questions))]
    base = SolverConfig(
        branches=options.branches,
        tokens_per_step=tokens,
        hints=[()] * options.branches if options.hints == "none" else None,
        sampling=replace(DEFAULT_SAMPLING, stop=STOP),
        answer_parser=problems.kind,
    )
    configs = make_arms(base, load_gates(options.gates, llm, replace(base, verify="auto")))
    arms = solving(llm, configs, prompts, options.only, problems)
    common = {"data": problems.name, "dtype": llm.stats()["dtype"], "tokens": tokens, "num_layers": llm.spec.num_layers}
    return [{**common, **row} for row in harness.take_turns(arms, range(len(prompts)), options.warmup)]


def errors(rows: Sequence[Row], arm: str) -> tuple[int, int, int] | None:
    """(errors, problems, problems that full verification has right); None where there is nothing to hold it to."""
    full = {_problem(row): row["right"] for row in rows if row["arm"] == FULL.get(arm)}
    own = [row for row in rows if row["arm"] == arm and _problem(row) in full]
    if not own:
        return None
    return sum(full[_problem(row)] and not row["right"] for row in own), len(own), sum(full.values())


def condition_table(page: Page, rows: Sequence[Row]) -> None:
    """One line a condition."""

    def share_of(gate: str) -> Callable[[list[Row]], str]:
        return lambda own: share(sum(gate in row["fired"] for row in own), len(own))

    def exits(own: list[Row]) -> list[int]:
        return [layer for row in own for layer in row["exit_layers"]]

    def relative(own: list[Row]) -> str:
        found = ratios(rows, own[0]["arm"], NO_KV)
        return bootstrap(found, median).show() if found else "-"

    columns = {
        "condition": lambda own: own[0]["arm"],
        "ms a problem": lambda own: spread([row["total_s"] for row in own], 1000),
        f"x {NO_KV} [95%]": relative,
        "right": lambda own: share(sum(row["right"] for row in own), len(own)),
        "errors [95%]": lambda own: _show_errors(errors(rows, own[0]["arm"])),
        "skipped": share_of("skip"),
        "stopped decoding": share_of("decode_exit"),
        "left early": lambda own: share(len(exits(own)), sum(row["num_asked"] for row in own)),
        "layers then": lambda own: f"{spread(exits(own))} of {own[0]['num_layers']}" if exits(own) else "-",
        "thresholds": lambda own: ", ".join(sorted({row["gates"] for row in own})),
    }
    page.columns(groups_of(rows, "arm").values(), columns)


def pooled_table(page: Page, rows: Sequence[Row], sets: Sequence[Sequence[Row]]) -> None:
    """All data sets together: problems are pooled for errors, data sets averaged for the ratio, as published."""
    table = []
    for arm in names(rows):
        relative = [median(found) for one in sets if (found := ratios(one, arm, NO_KV))]
        mean = f"{sum(relative) / len(relative):.3g} ({min(relative):.3g} .. {max(relative):.3g})" if relative else "-"
        right = values(rows, arm, "right")
        table.append([arm, mean, share(int(sum(right)), len(right)), _show_errors(errors(rows, arm))])
    page.table(["condition", f"x {NO_KV}: mean of data sets (least .. most)", "right", "errors [95%]"], table)


def make_page(rows: Sequence[Row], options: argparse.Namespace) -> Page:
    """The page."""
    page = Page("The paper's conditions on this engine")
    gates = "of no calibration" if options.gates is None else options.gates.name
    page.text(
        f"{options.branches} branches, prompts of {options.prefix_tokens} tokens, model {options.model}, "
        f"{'no hints' if options.hints == 'none' else 'a hint a branch'}; gates {gates}. Conditions took turns problem "
        "by problem, the prefix cache was emptied before each. ms: median (p10 .. p90). Ratios: median over problems, "
        "each on the same problem, with the bootstrap's interval. Errors: of all problems, exact interval; in brackets "
        "how many full verification had right. Left early: of the questions that were asked."
    )
    for (tokens, dtype), some in groups_of(rows, "tokens", "dtype").items():
        sets = groups_of(some, "data")
        for (data,), own in sets.items():
            page.heading(f"{data}, {tokens} tokens a branch, {dtype}: {len({row['repeat'] for row in own})} problems")
            condition_table(page, own)
        if len(sets) > 1:
            page.heading(f"All data, {tokens} tokens a branch, {dtype}")
            pooled_table(page, some, list(sets.values()))
    page.heading("As published: other hardware, other models")
    page.table(["condition", "ms a problem", f"x {NO_KV}", "errors", "skipped", "layer exit"], PAPER)
    page.text(PAPER_SETUP)
    page.heading("What can be compared")
    page.items(COMPARABLE)
    return page


def _problem(row: Row) -> tuple[Any, ...]:
    return row["data"], row["tokens"], row["dtype"], row["repeat"]


def _show_errors(counted: tuple[int, int, int] | None) -> str:
    if counted is None:
        return "-"
    count, total, num_right = counted
    found = clopper_pearson(count, total)
    return f"{count}/{total}: {found.estimate:.2%} [{found.low:.2%}, {found.high:.2%}] ({num_right} right)"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    common = "model dtypes threads kv-cache-bytes branches prefix-tokens gates warmup only quick output"
    parser = harness.make_parser("bench.paper_tables", __doc__, common)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="JSONL with question and answer")
    parser.add_argument("--problems", type=positive, default=50, help="problems of each file (%(default)s)")
    parser.add_argument("--tokens", type=harness.some_of(positive), default=[8], help="of a branch, with commas (8)")
    hints_help = "how branches begin (%(default)s)"
    parser.add_argument("--hints", choices=("approach", "none"), default="none", help=hints_help)
    return harness.parse_with_quick(parser, arguments, problems=4)


def run(options: argparse.Namespace) -> None:
    """Measures, and writes JSONL and page."""
    rows: list[Row] = []
    for dtype in options.dtypes:
        with load(options, dtype) as llm:
            for file in options.data:
                problems = read_problem_set(file, options.problems, NUM_SHOTS)
                for tokens in options.tokens:
                    rows += measure_set(llm, problems, tokens, options)
    write_run("paper-tables", options, rows, make_page(rows, options))


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark."""
    options = parse(arguments)
    harness.run_or_exit(lambda: run(options))


if __name__ == "__main__":
    main()

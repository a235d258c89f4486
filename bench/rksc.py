"""W1 taken apart: what sharing, the appended question and each gate save, one thing changed at a time.

    python -m bench.rksc --data problems.jsonl --gates gates.json
    python -m bench.rksc --quick
    python -m bench.rksc --micro

Two parts, for each of --tokens:
- cost: one long prompt, a hint a branch, greedy, end tokens ignored: all arms do the same work, as in bench.solve,
  but for what gates spare. Gates see greedy text here: how often they fire is no result of this part. Its "forced" arms
  show what a gate saves where it fires.
- problems (with --data): long prompts that end with real problems, default sampling, natural ends. Here it is reported
  how often each gate fired, and the time when it did and when it did not. "none" is left out.

Arms: "none" (every branch computes the prompt), "exact" (it is computed once); "standalone" (a new prompt is asked) and
"append" (the question follows the branch). "exact append" with everybody asked is the strongest plain baseline; each
"+ gate" adds one gate to it, "rksc" all of them. "paper" has every published rule, on exact sharing. A gate without a
threshold, such as the layer exit where no --gates are given, is no arm. --micro measures what gates cost and save
within one step instead, see bench.rksc_micro.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from bench import rksc_micro
from bench.harness import environment
from bench.measured import (
    LONE_GATES,
    PHASES,
    Row,
    keep_only,
    load,
    load_gates,
    lone_gate,
    make_parser,
    parse_with_quick,
    positive,
    run_or_exit,
    seeded,
    solve,
    some_of,
    take_turns,
)
from bench.problem_sets import STOP, read_problem_set
from bench.prompts import EXAMPLES, few_shot_ids, opening_ids
from bench.report import (
    Page,
    draw_phases,
    names,
    new_stem,
    plain_options,
    ratios,
    share,
    spread,
    values,
    write_jsonl,
    write_page,
)
from minirksc import LLM, SamplingParams, SolverConfig
from minirksc.rksc.cgee import EXACT_GATES, Gates, Lead
from minirksc.rksc.exits import MarginRule
from minirksc.rksc.solver_config import DEFAULT_SAMPLING

BASELINES = ("none standalone", "exact standalone", "exact append")
STRONGEST = BASELINES[-1]
NUM_SHOTS = 40
"""Rows at the end of --data that are worked examples, never problems."""


def make_arms(base: SolverConfig, gates: Gates) -> dict[str, SolverConfig]:
    """Every arm.

    Args:
        base: prompts, tokens, sampling: what all have in common.
        gates: thresholds.
    """
    plain = replace(base, verify="always")
    gated = replace(base, verify="auto", decode_exit="off")
    arms = {
        "none standalone": replace(plain, sharing="none", verify_style="standalone"),
        "exact standalone": replace(plain, verify_style="standalone"),
        "exact append": plain,
        "+ bound": replace(gated, gates=EXACT_GATES),
    }
    for name, kept in LONE_GATES.items():
        alone = lone_gate(gates, kept)
        if alone is not None:
            mode = "keep_leader" if kept == "decode_exit" else "off"
            arms[f"+ {name}"] = replace(gated, gates=alone, decode_exit=mode)
    arms["rksc"] = replace(gated, gates=gates, decode_exit="keep_leader")
    arms["paper"] = replace(base, verify="auto", policy="paper", verify_style="standalone")
    return arms


def forced_arms(base: SolverConfig) -> dict[str, SolverConfig]:
    """Each gate alone, with thresholds under which it always fires: what it saves where it does."""
    always = Gates(exact=False, source="uncalibrated")
    gates = {
        "skip": replace(always, skip=(Lead(),)),
        "layer exit": replace(always, layer_exit=MarginRule(margin=0.0, patience=1)),
        "decode exit": replace(always, decode_exit=(Lead(),)),
    }
    forced = replace(base, verify="auto", decode_exit="off")
    arms = {f"{name} forced": replace(forced, gates=one) for name, one in gates.items()}
    arms["decode exit forced"] = replace(arms["decode exit forced"], decode_exit="keep_leader")
    return arms


def measure_part(
    llm: LLM,
    part: str,
    base: SolverConfig,
    prompts: Sequence[list[int]],
    options: argparse.Namespace,
) -> list[Row]:
    """All arms of one part.

    Args:
        llm: the engine.
        part: "cost" or "problems".
        base: see `make_arms`.
        prompts: token ids, one prompt a repetition.
        options: of the command line.
    """
    gates = load_gates(options.gates, llm, replace(base, verify="auto"))
    configs = make_arms(base, gates)
    if part == "cost":
        configs |= forced_arms(base)
    else:
        del configs[BASELINES[0]]  # what it takes depends on no data, and it takes longer than all others together
    arms: dict[str, Callable[[int], Row]] = {}
    for name in keep_only(configs, options.only):

        def one(index: int, config: SolverConfig = configs[name]) -> Row:
            return solve(llm, seeded(config, index), prompts[index])

        arms[name] = one
    common = {"part": part, "dtype": llm.stats()["dtype"], "tokens": base.tokens_per_step}
    turns = take_turns(arms, range(len(prompts)), options.warmup)
    rows = [{**common, **row} for turn in turns for row in turn]
    if part == "cost":
        check_same_work(rows, options.branches, base.tokens_per_step)
    return rows


def check_same_work(rows: Sequence[Row], branches: int, tokens: int) -> None:
    """A comparison of unequal work is none.

    Raises:
        RuntimeError: a branch that no gate stopped has fewer or more tokens than it should.
    """
    for row in rows:
        if "decode_exit" not in row["fired"] and row["num_tokens"] != [tokens] * branches:
            raise RuntimeError(f"{row['arm']} decoded {row['num_tokens']} tokens, not {branches} x {tokens}")


def measure_all(options: argparse.Namespace) -> list[Row]:
    """Both parts, for every dtype and number of tokens."""
    rows = []
    for dtype in options.dtypes:
        with load(options, dtype) as llm:
            tokenizer = llm.need_tokenizer("bench.rksc")
            hints = opening_ids(tokenizer, options.branches, options.hint_tokens)
            prompt = few_shot_ids(tokenizer, EXAMPLES, options.prefix_tokens)
            data = None if options.data is None else read_problem_set(options.data, options.problems, NUM_SHOTS)
            for tokens in options.tokens:
                base = SolverConfig(branches=options.branches, tokens_per_step=tokens, hints=hints)
                greedy = SamplingParams(temperature=0, ignore_eos=True)
                cost = replace(base, sampling=greedy, answer_parser="text")
                rows += measure_part(llm, "cost", cost, [prompt] * options.repeats, options)
                if data is not None:
                    asked = [data.prompt_ids(tokenizer, i, options.prefix_tokens) for i in range(len(data.questions))]
                    sampled = replace(DEFAULT_SAMPLING, stop=STOP)
                    natural = replace(base, sampling=sampled, answer_parser=data.kind)
                    rows += measure_part(llm, "problems", natural, asked, options)
    return rows


def groups_of(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows that are compared with each other, by what they have in common."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(f"{row['part']}, {row['tokens']} tokens a branch, {row['dtype']}", []).append(row)
    return groups


def cost_table(page: Page, rows: Sequence[Row]) -> None:
    """Seconds, ratios and what was computed."""
    bases = [name for name in BASELINES if name in names(rows)]
    headings = ["arm", *(f"{label} s" for label in PHASES.values()), "total s", *(f"x {base}" for base in bases)]
    headings += ["layer rows, k", "tokens computed", f"answer as {STRONGEST}", "thresholds"]
    table = []
    expected = {row["repeat"]: row["parsed"] for row in rows if row["arm"] == STRONGEST}
    for arm in names(rows):
        own = [row for row in rows if row["arm"] == arm]
        computed = [row["num_prefilled_tokens"] + row["num_decoded_tokens"] for row in own]
        same = sum(row["parsed"] == expected.get(row["repeat"]) for row in own)
        table.append(
            [
                arm,
                *(f"{median(values(rows, arm, phase)):.3f}" for phase in PHASES),
                spread(values(rows, arm, "total_s")),
                *("1" if arm == base else spread(ratios(rows, arm, base)) for base in bases),
                f"{median(values(rows, arm, 'num_layer_rows')) / 1000:.1f}",
                f"{median(computed):.0f}",
                share(same, len(own)) if expected else "-",
                ", ".join(sorted({row["gates"] for row in own})),
            ]
        )
    page.table(headings, table)


def gate_table(page: Page, rows: Sequence[Row]) -> None:
    """How often each gate fired, and the time when it did and when it did not."""
    table = []
    for arm in names(rows):
        own = [row for row in rows if row["arm"] == arm]
        for gate in sorted({gate for row in own for gate in row["fired"]}):
            cells: list[Any] = []
            for did in (True, False):
                some = [row for row in own if (gate in row["fired"]) == did]
                repeats = {row["repeat"] for row in some}
                there = [row for row in rows if row["repeat"] in repeats]
                cells += [spread([row["total_s"] for row in some]), spread(ratios(there, arm, STRONGEST))]
            table.append([arm, gate, share(sum(gate in row["fired"] for row in own), len(own)), *cells])
    if table:
        base = f"x {STRONGEST}"
        page.table(["arm", "gate", "fired", "s when it did", base, "s when it did not", base], table)
    else:
        page.text("No gate fired.")


def losses(rows: Sequence[Row]) -> list[str]:
    """Arms that are not faster than the strongest plain baseline by the median."""
    found = []
    for arm in names(rows):
        own = [] if arm in BASELINES else ratios(rows, arm, STRONGEST)
        if own and median(own) <= 1:
            found.append(f"{arm}: {spread(own)} times as fast as {STRONGEST}")
    return found


def make_page(rows: Sequence[Row], options: argparse.Namespace) -> Page:
    """The page."""
    page = Page("What RKSC saves, part by part (W1)")
    thresholds = "thresholds that nobody calibrated" if options.gates is None else f"thresholds of {options.gates.name}"
    page.text(
        f"{options.branches} branches, prompts of {options.prefix_tokens} tokens, hints of {options.hint_tokens}; "
        f"{thresholds}. Arms took turns in one process, the prefix cache was emptied before each. Seconds of phases "
        "are medians; else median (p10 .. p90). Ratios are within a repetition or problem; above 1: the arm is faster."
    )
    for title, group in groups_of(rows).items():
        page.heading(title)
        count = len({row["repeat"] for row in group})
        if title.startswith("cost"):
            page.text(
                f"{count} repetitions of one greedy prompt, end tokens ignored. Which gates fire depends on this one "
                "text; those that are forced fire always, and their answers are worth nothing."
            )
        else:
            page.text(f"{count} problems, default sampling with another seed for each, natural ends.")
        cost_table(page, group)
        gate_table(page, group)
        slower = losses(group)
        if slower:
            page.text(f"No gain over {STRONGEST}, by the median:")
            page.items(slower)
    return page


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = make_parser("bench.rksc", __doc__)
    parser.add_argument("--tokens", type=some_of(positive), default=[32, 128], help="of a branch (32,128)")
    parser.add_argument("--prefix-tokens", type=positive, default=1024, help="of each prompt (%(default)s)")
    parser.add_argument("--hint-tokens", type=positive, default=20, help="of each hint (%(default)s)")
    parser.add_argument("--data", type=Path, help="JSONL with question and answer: part problems")
    parser.add_argument("--problems", type=positive, default=50, help="of --data (%(default)s)")
    parser.add_argument("--repeats", type=positive, default=7, help="of part cost (%(default)s)")
    parser.add_argument("--warmup", type=int, default=1, help="runs of each arm before a part (%(default)s)")
    parser.add_argument("--micro", action="store_true", help="single steps instead of solves")
    parser.add_argument("--micro-repeats", type=positive, default=40, help="of --micro (%(default)s)")
    return parse_with_quick(parser, arguments, repeats=2, problems=4, tokens=[32], micro_repeats=10)


def run(options: argparse.Namespace) -> None:
    """Measures, and writes JSONL, picture and page."""
    rows = rksc_micro.measure_all(options) if options.micro else measure_all(options)
    name = "rksc-micro" if options.micro else "rksc"
    stem = new_stem(options.output, name)
    common = {"bench": name, "options": plain_options(options), "environment": environment(options.threads)}
    write_jsonl(stem.with_suffix(".jsonl"), rows, common)
    if options.micro:
        files = write_page(stem, rksc_micro.make_page(rows, options), options.threads)
    else:
        groups = groups_of(rows)
        files = write_page(stem, make_page(rows, options), options.threads, lambda figure: draw_phases(figure, groups))
    for file in (stem.with_suffix(".jsonl"), *files):
        print(f"results: {file}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark."""
    options = parse(arguments)
    run_or_exit(lambda: run(options))


if __name__ == "__main__":
    main()

"""W1 taken apart: what sharing, the appended question and each gate save, one thing changed at a time.

    python -m bench.rksc --gates gates.json
    python -m bench.rksc --quick
    python -m bench.rksc --micro

One long prompt, a hint a branch, greedy, end tokens ignored, for each of --tokens: all arms do the same work, but for
what gates spare. Gates see greedy text here: how often they fire is no result. "Forced" arms show what a gate saves
where it fires.

Arms: "none" (every branch computes the prompt), "exact" (it is computed once); "standalone" (a new prompt is asked) and
"append" (the question follows the branch). "exact append" with all asked about is the strongest plain baseline; each
"+ gate" adds one gate to it, "rksc" all of them. "paper" has every published rule, on exact sharing. A gate without a
threshold, such as the layer exit where no --gates are given, is no arm. --micro measures what gates cost and save
within one step instead, see bench.rksc_micro.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median

from bench import harness, rksc_micro
from bench.harness import Row, groups_of, names, positive, ratios
from bench.measured import PHASES, load, load_gates, lone_gates, solving
from bench.prompts import EXAMPLES, few_shot_ids, opening_ids
from bench.report import Page, share, spread, write_run
from minirksc import SamplingParams, SolverConfig
from minirksc.rksc.cgee import EXACT_GATES, Gates, Lead
from minirksc.rksc.exits import MarginRule

BASELINES = ("none standalone", "exact standalone", "exact append")
STRONGEST = BASELINES[-1]


def make_arms(base: SolverConfig, gates: Gates) -> dict[str, SolverConfig]:
    """Every arm.

    Args:
        base: options that all arms have in common: prompts, tokens, sampling.
        gates: gates with their thresholds.
    """
    plain = replace(base, verify="always")
    gated = replace(base, verify="auto", decode_exit="off")
    arms = {
        "none standalone": replace(plain, sharing="none", verify_style="standalone"),
        "exact standalone": replace(plain, verify_style="standalone"),
        "exact append": plain,
        "+ bound": replace(gated, gates=EXACT_GATES),
    }
    arms |= {f"+ {name}": one for name, one in _lone_arms(base, gates).items()}
    arms["rksc"] = replace(gated, gates=gates, decode_exit="keep_leader")
    arms["paper"] = replace(base, verify="auto", policy="paper", verify_style="standalone")
    return arms


def forced_arms(base: SolverConfig) -> dict[str, SolverConfig]:
    """Each gate alone, with thresholds under which it always fires: what it saves where it does."""
    rule = MarginRule(margin=0.0, patience=1)
    always = Gates(skip=(Lead(),), layer_exit=rule, decode_exit=(Lead(),), source="uncalibrated")
    return {f"{name} forced": one for name, one in _lone_arms(base, always).items()}


def _lone_arms(base: SolverConfig, gates: Gates) -> dict[str, SolverConfig]:
    modes = {"decode exit": "keep_leader"}
    return {
        name: replace(base, verify="auto", gates=alone, decode_exit=modes.get(name, "off"))
        for name, alone in lone_gates(gates).items()
    }


def measure_all(options: argparse.Namespace) -> list[Row]:
    """All arms, for every dtype and number of tokens.

    Raises:
        RuntimeError: A branch that no gate stopped has fewer or more tokens than it should.
    """
    rows = []
    for dtype in options.dtypes:
        with load(options, dtype) as llm:
            tokenizer = llm.need_tokenizer("bench.rksc")
            hints = opening_ids(tokenizer, options.branches, options.hint_tokens)
            prompts = [few_shot_ids(tokenizer, EXAMPLES, options.prefix_tokens)] * options.repeats
            greedy = SamplingParams(temperature=0, ignore_eos=True)
            base = SolverConfig(branches=options.branches, hints=hints, sampling=greedy, answer_parser="text")
            for tokens in options.tokens:
                base = replace(base, tokens_per_step=tokens)
                gates = load_gates(options.gates, llm, replace(base, verify="auto"))
                arms = solving(llm, make_arms(base, gates) | forced_arms(base), prompts, options.only)
                common = {"dtype": llm.stats()["dtype"], "tokens": tokens}
                rows += [{**common, **row} for row in harness.take_turns(arms, range(options.repeats), options.warmup)]
    for row in rows:
        if "decode_exit" not in row["fired"]:
            harness.check_same_work(row["arm"], row["num_tokens"], options.branches, row["tokens"])
    return rows


def cost_table(page: Page, rows: Sequence[Row]) -> None:
    """Seconds, ratios and what was computed."""
    expected = {row["repeat"]: row["parsed"] for row in rows if row["arm"] == STRONGEST}

    def against(base: str) -> Callable[[list[Row]], str]:
        return lambda own: "1" if own[0]["arm"] == base else spread(ratios(rows, own[0]["arm"], base))

    def seconds(phase: str) -> Callable[[list[Row]], str]:
        return lambda own: f"{median(row[phase] for row in own):.3f}"

    def same(own: list[Row]) -> str:
        return share(sum(row["parsed"] == expected.get(row["repeat"]) for row in own), len(own)) if expected else "-"

    columns = {
        "arm": lambda own: own[0]["arm"],
        **{f"{label} s": seconds(phase) for phase, label in PHASES.items()},
        "total s": lambda own: spread([row["total_s"] for row in own]),
        **{f"x {base}": against(base) for base in BASELINES if base in names(rows)},
        "layer rows, k": lambda own: f"{median(row['num_layer_rows'] for row in own) / 1000:.1f}",
        "tokens": lambda own: f"{median(row['num_prefilled_tokens'] + row['num_decoded_tokens'] for row in own):.0f}",
        f"answer as {STRONGEST}": same,
        "thresholds": lambda own: ", ".join(sorted({row["gates"] for row in own})),
    }
    page.columns(groups_of(rows, "arm").values(), columns)


def make_page(rows: Sequence[Row], options: argparse.Namespace) -> Page:
    """The page."""
    page = Page("What RKSC saves, part by part (W1)")
    thresholds = (
        "thresholds that no calibration tested" if options.gates is None else f"thresholds of {options.gates.name}"
    )
    page.text(
        f"{options.branches} branches, prompts of {options.prefix_tokens} tokens, hints of {options.hint_tokens}; "
        f"{thresholds}. Arms took turns in one process, the prefix cache was emptied before each. Seconds of phases "
        "are medians; else median (p10 .. p90). Ratios are within a repetition; above 1: the arm is faster. Which "
        "gates fire depends on this one text; those that are forced fire always, and their answers are worth nothing."
    )
    for (tokens, dtype), group in groups_of(rows, "tokens", "dtype").items():
        count = len({row["repeat"] for row in group})
        page.heading(f"{tokens} tokens a branch, {dtype}, {count} repetitions")
        cost_table(page, group)
    return page


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    common = "model dtypes threads kv-cache-bytes branches prefix-tokens hint-tokens gates repeats warmup only"
    parser = harness.make_parser("bench.rksc", __doc__, f"{common} quick output", repeats=7)
    parser.add_argument("--tokens", type=harness.some_of(positive), default=[32, 128], help="most of a branch (32,128)")
    parser.add_argument("--micro", action="store_true", help="single steps instead of solves")
    parser.add_argument("--micro-repeats", type=positive, default=40, help="repetitions of --micro (%(default)s)")
    return harness.parse_with_quick(parser, arguments, repeats=2, tokens=[32], micro_repeats=10)


def run(options: argparse.Namespace) -> None:
    """Measures, and writes JSONL and page."""
    if options.micro:
        rows = rksc_micro.measure_all(options)
        write_run("rksc-micro", options, rows, rksc_micro.make_page(rows, options))
        return
    rows = measure_all(options)
    write_run("rksc", options, rows, make_page(rows, options))


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark."""
    options = parse(arguments)
    harness.run_or_exit(lambda: run(options))


if __name__ == "__main__":
    main()

"""W1 taken apart: what sharing, the appended question and each gate save, one thing changed at a time.

    python -m bench.rksc --gates gates.json
    python -m bench.rksc --quick
    python -m bench.rksc --micro

One long prompt, a hint a branch, greedy, end tokens ignored, for each of --tokens: all arms do the same work, but for
what gates spare. Gates see greedy text here: how often they fire is no result. "Forced" arms show what a gate saves
where it fires.

Arms: "none" (every branch computes the prompt), "exact" (it is computed once); "standalone" (a new prompt is asked) and
"append" (the question follows the branch). "exact append" with everybody asked is the strongest plain baseline; each
"+ gate" adds one gate to it, "rksc" all of them. "paper" has every published rule, on exact sharing. A gate without a
threshold, such as the layer exit where no --gates are given, is no arm. --micro measures what gates cost and save
within one step instead, see bench.rksc_micro.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from statistics import median

from bench import harness, rksc_micro
from bench.harness import Row, groups_of, names, positive, ratios, values
from bench.measured import LONE_GATES, PHASES, load, load_gates, lone_gate, solving
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
                turns = harness.take_turns(arms, range(options.repeats), options.warmup)
                rows += [{**common, **row} for turn in turns for row in turn]
    for row in rows:
        if "decode_exit" not in row["fired"]:
            harness.check_same_work(row["arm"], row["num_tokens"], options.branches, row["tokens"])
    return rows


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


def make_page(rows: Sequence[Row], options: argparse.Namespace) -> Page:
    """The page."""
    page = Page("What RKSC saves, part by part (W1)")
    thresholds = "thresholds that nobody calibrated" if options.gates is None else f"thresholds of {options.gates.name}"
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

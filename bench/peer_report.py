"""The page of bench.peers: plain rows in, tables out."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

from bench.harness import OURS, Row, groups_of, names, ratios, values
from bench.report import Page, spread

METRICS = {
    "solve": {"generate_s": "prompt + branches s", "verify_s": "verification s", "total_s": "total s"},
    "decode": {"decode_tokens_per_s": "tokens/s", "first_s": "first token s"},
    "prefill": {"first_s": "first token s"},
}
"""Columns by the first word of a workload."""

COMPARED = {"solve": "total_s", "decode": "decode_s", "prefill": "first_s"}
"""Seconds that ratios are of."""

BEST = "exact append"


def make_page(
    rows: Sequence[Row], facts: Mapping[str, Mapping[str, Any]], missing: Sequence[str], options: argparse.Namespace
) -> Page:
    """The page.

    Args:
        rows: rows of all workloads; those with "failed" have no numbers.
        facts: facts of each peer.
        missing: lines about peers that are left out.
        options: command line.
    """
    page = Page("minirksc beside other engines")
    page.text(
        f"{options.threads} threads each, {options.repeats} repetitions after {options.warmup} of warm-up. Every "
        "engine is a process of its own; one computes at a time, in another order in each repetition. Greedy, token "
        "ids in and out, end tokens ignored, cold caches. Median (p10 .. p90). Ratios are within a repetition: above "
        "1, minirksc is that many times as fast. Same tokens: sequences equal to those of minirksc in float32; in 16 "
        "bits, other tokens are rounding, not errors."
    )
    page.items(missing)
    for (workload,), group in groups_of(rows, "workload").items():
        page.heading(title_of(workload, options))
        if done := [row for row in group if "failed" not in row]:
            workload_table(page, workload, done)
        page.items(failures(group))
    page.heading("Engines")
    peers_table(page, facts)
    return page


def title_of(workload: str, options: argparse.Namespace) -> str:
    """What was to be done."""
    kind, _, size = workload.partition(" ")
    if kind == "solve":
        return (
            f"Solve: {options.branches} branches of {options.hint_tokens} + {options.branch_tokens} tokens "
            f"from a {options.prefix_tokens}-token prompt"
        )
    if kind == "decode":
        return f"Decode: {size} x {options.prompt_tokens}-token prompts, {options.tokens} tokens each"
    return f"Prefill: {size} tokens"


def workload_table(page: Page, workload: str, rows: Sequence[Row]) -> None:
    """Numbers of one workload, fastest first."""
    kind = workload.split(" ")[0]
    metrics, compared = METRICS[kind], COMPARED[kind]
    ours = next((row["peer"] for row in rows if row["peer"].startswith(OURS)), None)
    bases: dict[str, Callable[[str], str]] = {}
    if ours is not None and kind == "solve":
        bases[f"{ours} {BEST}: times as fast"] = lambda _: f"{ours} {BEST}"
        bases["same setting: times as fast"] = lambda setting: f"{ours} {setting}"
    elif ours is not None:
        bases[f"{ours}: times as fast"] = lambda _: str(ours)
    headings = ["arm", *metrics.values(), *bases, "same tokens", "equal from the start"]
    headings += ["p(YES) differs by", "tokens computed"] if kind == "solve" else []
    table = []
    for arm in sorted(names(rows), key=lambda arm: median(values(rows, arm, compared))):
        last = [row for row in rows if row["arm"] == arm][-1]
        cells = [spread(values(rows, arm, metric)) for metric in metrics]
        for base_of in bases.values():
            base = base_of(last["setting"])
            cells.append("1" if arm == base else spread(ratios(rows, base, arm, compared)))
        cells += agreement(last)
        if kind == "solve":
            error = last.get("p_yes_error")
            cells.append("-" if error is None else f"{error:.3f}")
            cells.append(str(last.get("num_computed_tokens", "-")))
        table.append([arm, *cells])
    page.table(headings, table)
    gated = {row["arm"]: row["gates"] for row in rows if "gates" in row}
    page.items([f"{arm}: {source} thresholds; what its gates spare is not computed" for arm, source in gated.items()])


def agreement(row: Row) -> list[str]:
    """Sequences equal to the reference's, and tokens equal from the start, of all."""
    if "same_tokens" not in row:
        return ["-", "-"]
    num_tokens = max(len(ids) for ids in row["token_ids"])
    return [f"{row['same_tokens']}/{len(row['token_ids'])}", f"{row['agreeing_tokens']:.1f}/{num_tokens}"]


def failures(rows: Sequence[Row]) -> list[str]:
    """Arms that gave no result, with the first reason."""
    failed = groups_of([row for row in rows if "failed" in row], "arm")
    return [f"{arm}: no result in {len(some)} repetitions: {some[0]['failed']}" for (arm,), some in failed.items()]


def peers_table(page: Page, facts: Mapping[str, Mapping[str, Any]]) -> None:
    """Versions and settings."""

    def pairs(one: Mapping[str, Any], joint: str) -> str:
        return ", ".join(f"{key}{joint}{value}" for key, value in one.items())

    columns = {
        "engine": lambda peer: peer[0],
        "computes in": lambda peer: peer[1]["dtype"],
        "versions": lambda peer: pairs(peer[1]["versions"], " "),
        "start-up s": lambda peer: f"{peer[1]['load_s']:.1f}",
        "settings": lambda peer: "; ".join([pairs(peer[1]["settings"], "="), *filter(None, [peer[1].get("note")])]),
    }
    page.columns(facts.items(), columns)

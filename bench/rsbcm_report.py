"""Tables, picture and page of what `bench.rsbcm_eviction` counted and timed."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.harness import Arm, agreement, summarise

Row = dict[str, Any]
ENOUGH_TOKENS = 100
"""Of fewer a ratio says nothing."""


def relative(rows: Sequence[Row], kind: str, share: float, policy: str) -> str:
    """Recomputed tokens of one cell: median over seeds, and the change against lru seed by seed."""
    own = _cell(rows, kind, share, policy)
    if not own or any("failed" in row for row in own):
        return "too small" if own else "-"
    tokens = [row["num_recomputed_tokens"] for row in own]
    text = f"{median(tokens):.0f}"
    base = _cell(rows, kind, share, "lru")
    if policy == "lru" or not base or any("failed" in row for row in base):
        return text
    pairs = [(mine, row["num_recomputed_tokens"]) for mine, row in zip(tokens, base, strict=True)]
    changes = [mine / theirs - 1 for mine, theirs in pairs if theirs >= ENOUGH_TOKENS]
    if len(changes) < len(pairs):
        return text
    spread = f" ({min(changes):+.0%} .. {max(changes):+.0%})" if len(changes) > 1 else ""
    return f"{text}, {median(changes):+.0%}{spread}"


def print_counts(rows: Sequence[Row]) -> None:
    """One table a kind of search."""
    console = Console(width=max(Console().width, 180))
    for kind in dict.fromkeys(row["kind"] for row in rows):
        policies, shares = _axes(rows, kind)
        table = Table(title=f"W5 {kind}: tokens computed again, and against lru")
        for heading in ("pool", *policies):
            table.add_column(heading, no_wrap=True)
        for share in shares:
            table.add_row(f"{share:.0%}", *(relative(rows, kind, share, policy) for policy in policies))
        console.print(table)


def write_report(
    folder: Path, rows: Sequence[Row], arms: Sequence[Arm], options: dict[str, Any], facts: dict[str, Any]
) -> list[Path]:
    """Writes JSONL, picture and page; returns the files.

    Args:
        folder: of the results.
        rows: of part counts.
        arms: of part times.
        options: of the command line.
        facts: versions and machine.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"rsbcm-eviction-{time.strftime('%Y%m%d-%H%M%S')}"
    plain = {key: str(value) if isinstance(value, Path) else value for key, value in options.items()}
    common = {"bench": "rsbcm_eviction", "options": plain, "environment": facts}
    jsonl, page = stem.with_suffix(".jsonl"), stem.with_suffix(".md")
    timed = [
        {"part": "times", "engine": arm.engine, "dtype": arm.dtype, "setting": arm.setting, "repeat": repeat, **one}
        for arm in arms
        for repeat, one in enumerate(arm.measured)
    ]
    with jsonl.open("w", encoding="utf-8") as stream:
        for row in (*rows, *timed):
            stream.write(json.dumps({**common, **row}) + "\n")
    files = [jsonl, page]
    picture = stem.with_suffix(".png")
    if rows and draw(rows, picture):
        files.append(picture)
    page.write_text(markdown(rows, arms, plain, facts, picture.name if picture in files else None), encoding="utf-8")
    return files


def markdown(
    rows: Sequence[Row], arms: Sequence[Arm], options: dict[str, Any], facts: dict[str, Any], picture: str | None
) -> str:
    """The page."""
    lines = ["# Eviction in tree searches (W5)", ""]
    lines.append(
        f"{options['problems']} problems, {options['concurrency']} under way at a time, behind "
        f"{options['prefix_tokens']} common tokens. Each search expands the best {options['beam']} nodes a round to "
        f"{options['branches']} children of {options['tokens']} tokens, down to depth {options['depth']}. In a *beam* "
        "search what is not expanded is pruned and never comes back; in *best-first* up to "
        f"{options['open']} nodes stay open as kept branches and a round may go back to them; in *regret* they are "
        "pruned, and going back means to begin them anew. Scores are drawn from a seed. The pool is a share of the "
        "working set: all blocks that an unlimited pool would hold in the end."
    )
    if rows:
        lines += ["", "## Tokens computed again", ""]
        lines.append(
            f"Median of {options['seeds']} seeds; against lru, seed by seed, median (least .. most), where lru "
            f"computes {ENOUGH_TOKENS} tokens or more again. Counted without a model: attention is not measured, "
            "`rksc` ranks by depth. `belady` knows the order of requests in an ample cache; it is no strict bound."
        )
    for kind in dict.fromkeys(row["kind"] for row in rows):
        policies, shares = _axes(rows, kind)
        first = next(row for row in rows if row["kind"] == kind)
        lines += ["", f"### {kind}", ""]
        lines.append(
            f"Working set {first['working_set_blocks']} blocks, {first['peak_held_blocks']} held at once, "
            f"{first['num_prefilled_tokens_ample']} tokens prefilled where nothing is evicted (first seed)."
        )
        lines += ["", f"| pool | {' | '.join(policies)} |", "| --- |" + " --- |" * len(policies)]
        for share in shares:
            cells = (relative(rows, kind, share, policy) for policy in policies)
            lines.append(f"| {share:.0%} | {' | '.join(cells)} |")
    if picture:
        lines += ["", f"![Tokens computed again by pool and policy]({picture})"]
    if arms:
        lines += [
            "",
            "## Seconds on the model",
            "",
            "Median (p10 .. p90), arms interleaved. Same tokens: as with the largest pool.",
            "",
        ]
        lines += ["| search, pool, policy | total s | prefilled tokens | same tokens |", "| --- | --- | --- | --- |"]
        for arm in arms:
            reference = next(a for a in arms if a.setting.split()[0] == arm.setting.split()[0])
            prefilled = f"{median(arm.values('num_prefilled_tokens')):.0f}"
            seconds = summarise(arm.values("total_s"))
            lines.append(f"| {arm.setting} | {seconds} | {prefilled} | {agreement(arm, reference)} |")
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    lines += ["", f"Commit {facts['commit']}; {versions}; {facts['cpu']}, {facts['threads']} threads."]
    return "\n".join(lines) + "\n"


def draw(rows: Sequence[Row], file: Path) -> bool:
    """A panel a kind of search, bars as a share of lru's; False where nothing can be drawn."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    kinds = [kind for kind in dict.fromkeys(row["kind"] for row in rows) if _compared(rows, kind)]
    if not kinds:
        return False
    figure = Figure(figsize=(4.2 * len(kinds), 3.6), layout="constrained")
    for index, kind in enumerate(kinds):
        axes = figure.add_subplot(1, len(kinds), index + 1)
        policies, _ = _axes(rows, kind)
        bases = _compared(rows, kind)
        for rank, policy in enumerate(policies):
            heights = [100 * _median(rows, kind, share, policy) / base for share, base in bases.items()]
            places = [place + (rank - (len(policies) - 1) / 2) * 0.8 / len(policies) for place in range(len(bases))]
            axes.bar(places, heights, 0.8 / len(policies), label=policy, hatch="//" if policy == "belady" else None)
        labels = [f"pool {share:.0%}\nlru: {base:.0f} tokens" for share, base in bases.items()]
        axes.set_xticks(range(len(bases)), labels, fontsize=8)
        axes.set(title=kind)
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
        if index == 0:
            axes.set_ylabel("tokens computed again, % of lru's (median)")
            figure.legend(*axes.get_legend_handles_labels(), fontsize=8, loc="outside right upper")
    figure.savefig(file, dpi=110)
    return True


def _compared(rows: Sequence[Row], kind: str) -> dict[float, float]:
    """Shares of which lru's tokens are enough to compare with, and those; "failed" nowhere."""
    _, shares = _axes(rows, kind)
    fit = [share for share in shares if _cell(rows, kind, share, "lru")]
    fit = [s for s in fit if not any("failed" in row for row in rows if (row["kind"], row["share"]) == (kind, s))]
    bases = {share: _median(rows, kind, share, "lru") for share in fit}
    return {share: base for share, base in bases.items() if base >= ENOUGH_TOKENS}


def _median(rows: Sequence[Row], kind: str, share: float, policy: str) -> float:
    return median(row["num_recomputed_tokens"] for row in _cell(rows, kind, share, policy))


def _axes(rows: Sequence[Row], kind: str) -> tuple[list[str], list[float]]:
    own = [row for row in rows if row["kind"] == kind]
    return list(dict.fromkeys(row["policy"] for row in own)), list(dict.fromkeys(row["share"] for row in own))


def _cell(rows: Sequence[Row], kind: str, share: float, policy: str) -> list[Row]:
    return [row for row in rows if (row["kind"], row["share"], row["policy"]) == (kind, share, policy)]

"""The page of what `bench.rsbcm_eviction` counted and timed."""

import argparse
from collections.abc import Sequence
from statistics import median

from bench.harness import Row, groups_of, names, values
from bench.report import Page, spread

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
    extremes = f" ({min(changes):+.0%} .. {max(changes):+.0%})" if len(changes) > 1 else ""
    return f"{text}, {median(changes):+.0%}{extremes}"


def make_page(rows: Sequence[Row], options: argparse.Namespace) -> Page:
    """The page: tokens computed again, search by search, and seconds on a model where they were measured."""
    page = Page("Eviction in tree searches (W5)")
    page.text(
        f"{options.problems} problems, {options.concurrency} under way at a time, behind {options.prefix_tokens} "
        f"common tokens. Each search expands the best {options.beam} nodes a round to {options.branches} children of "
        f"{options.tokens} tokens, down to depth {options.depth}. In a *beam* search what is not expanded is pruned "
        f"and never comes back; in *best-first* up to {options.open} nodes stay open as kept branches and a round may "
        "go back to them; in *regret* they are pruned, and going back means to begin them anew. Scores are drawn from "
        "a seed. The pool is a share of the working set: all blocks that an unlimited pool would hold in the end."
    )
    counted = [row for row in rows if "policy" in row]
    if counted:
        page.text(
            f"Tokens computed again: median of {options.seeds} seeds; against lru, seed by seed, median (least .. "
            f"most), where lru computes {ENOUGH_TOKENS} tokens or more again. Counted without a model: attention is "
            "not measured, `rksc` ranks by depth. `belady` knows the order of requests in an ample cache; it is no "
            "strict bound."
        )
    for (kind,), own in groups_of(counted, "kind").items():
        page.heading(f"{kind}: tokens computed again")
        first = own[0]
        page.text(
            f"Working set {first['working_set_blocks']} blocks, {first['peak_held_blocks']} held at once, "
            f"{first['num_prefilled_tokens_ample']} tokens prefilled where nothing is evicted (first seed)."
        )
        policies, shares = list(groups_of(own, "policy")), list(groups_of(own, "share"))
        table = [
            [f"{share:.0%}", *(relative(rows, kind, share, policy) for (policy,) in policies)] for (share,) in shares
        ]
        page.table(["pool", *(policy for (policy,) in policies)], table)
    timed = [row for row in rows if "arm" in row]
    if timed:
        page.heading("Seconds on the model")
        page.text("Median (p10 .. p90), arms interleaved. Same tokens: as with the largest pool.")
        table = []
        for own in groups_of(timed, "kind").values():
            reference = [row for row in own if row["arm"] == own[0]["arm"]][-1]["token_ids"]
            for arm in names(own):
                last = [row for row in own if row["arm"] == arm][-1]["token_ids"]
                same = sum(ours == theirs for ours, theirs in zip(last, reference, strict=True))
                metrics = ("total_s", "prefill_s", "num_prefilled_tokens")
                spreads = [spread(values(own, arm, metric)) for metric in metrics]
                table.append([arm, *spreads, f"{same}/{len(reference)}"])
        columns = ["total s", "steps with a prefill s", "prefilled tokens", "same tokens"]
        page.table(["search, pool, policy", *columns], table)
    return page


def _cell(rows: Sequence[Row], kind: str, share: float, policy: str) -> list[Row]:
    return groups_of([row for row in rows if "policy" in row], "kind", "share", "policy").get((kind, share, policy), [])

"""What semantic sharing saves and what it changes, in the engine: W4 phrasings of the same problems.

    python -m bench.asks_sharing --data problems.jsonl --model smollm2-135m --quick

For each problem, its first phrasing is computed, and then another phrasing of it four times, in turns: without semantic
sharing; with a probe that rejects it; accepted and substituted; accepted and aligned. Two workloads:
- short: the phrasings of `bench.phrasings` alone, minor and other templates;
- long: an instruction in other words, then a long text that all have in common (worked examples), then the problem.
  Exact sharing finds nothing here, since the difference comes first.

The same phrasings then run unshared in another dtype ("rounding"): a yardstick, since a greedy text of many near ties
changes with anything that is not bit for bit the same.

Reported: seconds of the phrasing's prefill against unshared, tokens by layers that the engine counted as saved, and
whether the greedy answer is that of the unshared run of the same phrasing. The guard and the gate decide as they do in
the solver; what they refuse is counted and left out of the rest. Where aligned mode finds too little to borrow, the
phrasing is computed: its row leaves such pairs out, and says how many are left.
"""

import itertools
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.harness import Row, groups_of, make_parser, parse_with_quick, summarise
from bench.intervals import clopper_pearson
from bench.phrasings import phrasings
from bench.prompts import EXAMPLES
from bench.report import Page, write_run
from bench.word_problems import read_problems
from minirksc import LLM, SamplingParams, SolverConfig
from minirksc.engine.gates import Seat
from minirksc.rksc.answers import parse_answer
from minirksc.rksc.asks import make_probe
from minirksc.rksc.guard import refusal

REJECT, ACCEPT = 2.0, -10.0
INSTRUCTIONS = (
    (
        "Solve the last of these problems step by step.",
        "Please solve the last of these problems, step by step. Thank you.",
    ),
    ("Answer the last question.", "Please answer the last question. Thanks!"),
    (
        "Here are problems with their solutions. Work out the last one in the same way.",
        "Here are problems and their solutions. Please work out the last one in that same way.",
    ),
    ("Think carefully and finish the last solution.", "Please think carefully, and then finish the last solution."),
    (
        "Read these exercises, then solve the last one.",
        "Please read these exercises and then solve the last one. Thank you!",
    ),
)
"""Pairs that ask for the same, and that the guard lets pass."""


def short_pairs(file: Path, limit: int) -> list[tuple[str, str, str]]:
    """(kind, first phrasing, other phrasing) of paraphrases."""
    problems = read_problems(file)[:limit]
    return [(one.kind, one.root, one.text) for one in phrasings(problems) if one.kind in ("minor", "template")]


def long_pairs(file: Path, limit: int) -> list[tuple[str, str, str]]:
    """The same with a differently worded beginning, and worked examples between it and the problem."""
    examples = "\n\n".join(f"Problem: {question}\nSolution: {answer}" for question, answer in EXAMPLES)
    pairs = []
    for problem, lines in zip(read_problems(file)[:limit], itertools.cycle(INSTRUCTIONS), strict=False):
        first, other = (f"{line}\n\n{examples}\n\nProblem: {problem.question}\nSolution:" for line in lines)
        pairs.append(("long", first, other))
    return pairs


def run_pair(llm: LLM, texts: Sequence[str], tokens: int, mode: str, tau: float | None = None) -> Row:
    """The second phrasing after the first one, from an empty prefix cache.

    Args:
        llm: engine.
        texts: phrasing that is computed before, and the one that may run on it.
        tokens: number of tokens decoded greedily.
        mode: one of `MODES`; "unshared" has no probe.
        tau: threshold of the gate; None: the default.
    """
    llm.reset_prefix_cache()
    ids = [llm.need_tokenizer("text").encode(text) for text in texts]
    probe = None
    if mode != "unshared":
        sharing_mode = "aligned" if mode == "aligned" else "substitute"
        config = SolverConfig(sharing="semantic", sharing_mode=sharing_mode, tau=tau, uncalibrated=True)
        probe = make_probe(llm.spec, config, can_move_kv=llm.engine.runner.model.can_move_kv)
    seats: list[Seat | None] = [None, None]
    if probe is not None:
        seats = [Seat(probe, row, sees_all=row == 0) for row in (0, 1)]
        for row, token_ids in enumerate(ids):
            probe.watch(row, token_ids)
    (root,) = llm.branches(ids[:1], seats=seats[:1])
    if probe is not None:
        probe.root = root
    begin = time.perf_counter()
    (branch,) = llm.branches(ids[1:], seats=seats[1:])
    seconds = time.perf_counter() - begin
    goes_on = root if branch.exit_layer is not None else branch
    llm.extend([goes_on], SamplingParams(temperature=0, max_tokens=tokens))
    result = {
        "mode": mode,
        "prefill_s": seconds,
        "saved_tokens": branch.num_saved_layer_rows / llm.spec.num_layers,
        "accepted": probe is not None and 1 in probe.accepted,
        "similarity": None if probe is None else probe.similarities.get(1),
        "answer": parse_answer(goes_on.text, "number"),
        "token_ids": goes_on.output_token_ids,
    }
    for one in (root, branch):
        one.prune()
    return result


MODES = ("unshared", "rejected", "substitute", "aligned")
ROUNDING = "rounding"


def measure(llm: LLM, pairs: Sequence[tuple[str, str, str]], tokens: int) -> list[Row]:
    """One row a pair."""
    rows = []
    for index, (kind, first, other) in enumerate(pairs):
        texts, reason = (first, other), refusal(first, other)
        natural = None if reason else run_pair(llm, texts, tokens, "substitute")
        row: Row = {"kind": kind, "num_tokens": len(llm.need_tokenizer("text").encode(other)), "refusal": reason}
        row["similarity"] = None if natural is None else natural["similarity"]
        row["accepted"] = natural is not None and natural["accepted"]
        if row["accepted"]:
            # Another order each time, so that no mode always runs on caches that another has warmed.
            for mode in (*MODES[index % 4 :], *MODES[: index % 4]):
                row[mode] = run_pair(llm, texts, tokens, mode, REJECT if mode == "rejected" else ACCEPT)
        rows.append(row)
        outcome = "accepted" if row["accepted"] else reason or "not alike"
        print(f"{index + 1}/{len(pairs)} {kind}: {outcome}", flush=True)
    return rows


def add_rounding(llm: LLM, rows: Sequence[Row], pairs: Sequence[tuple[str, str, str]], tokens: int) -> None:
    """The unshared runs of accepted pairs, on the same model in another dtype."""
    for row, (_, first, other) in zip(rows, pairs, strict=True):
        if row["accepted"]:
            row[ROUNDING] = run_pair(llm, (first, other), tokens, "unshared")


def page_of(model: str, rows: Sequence[Row]) -> Page:
    """One page."""
    page = Page(f"Semantic sharing in the engine: {model}")
    for (kind,), own in groups_of(rows, "kind").items():
        accepted = [row for row in own if row["accepted"]]
        page.heading(kind)
        refused, lengths = sum(row["refusal"] is not None for row in own), summarise([row["num_tokens"] for row in own])
        page.text(f"{len(own)} pairs of {lengths} tokens; the guard refuses {refused}, {len(accepted)} are accepted.")
        if not accepted:
            continue
        table = []
        for mode in (*MODES, ROUNDING):
            some = [row for row in accepted if mode != "aligned" or row[mode]["accepted"]]
            if not some:
                continue
            ratios = summarise([row[mode]["prefill_s"] / row["unshared"]["prefill_s"] for row in some])
            saved = summarise([row[mode]["saved_tokens"] / row["num_tokens"] for row in some])
            same = sum(row[mode]["answer"] == row["unshared"]["answer"] for row in some)
            tokens = sum(row[mode]["token_ids"] == row["unshared"]["token_ids"] for row in some)
            interval = clopper_pearson(same, len(some))
            answers = f"{same}/{len(some)} ({interval.low:.0%} .. {interval.high:.0%})"
            table.append([mode, str(ratios), str(saved), answers, f"{tokens}/{len(some)}"])
        page.table(["", "prefill s / unshared", "saved tokens / tokens", "same answer", "same tokens"], table)
        num_aligned = sum(row["aligned"]["accepted"] for row in accepted)
        page.text(f"Aligned mode finds enough to borrow in {num_aligned} of {len(accepted)}.")
    return page


def main() -> None:
    """Runs the benchmark; prints the page, writes JSONL and markdown."""
    parser = make_parser("bench.asks_sharing", __doc__, "model dtype threads quick output")
    parser.add_argument("--data", type=Path, required=True, help="JSONL with question and answer")
    parser.add_argument("--limit", type=int, default=60, help="problems (%(default)s)")
    parser.add_argument("--long", type=int, help="long pairs (a third of the problems)")
    parser.add_argument("--tokens", type=int, default=48, help="decoded of each (%(default)s)")
    options = parse_with_quick(parser, None, limit=4)
    torch.set_num_threads(options.threads)
    with LLM(options.model, threads=options.threads, dtype=options.dtype, kv_cache_bytes="1GiB") as llm:
        num_long = max(options.limit // 3, 2) if options.long is None else options.long
        pairs = [*short_pairs(options.data, options.limit), *long_pairs(options.data, num_long)]
        rows = measure(llm, pairs, options.tokens)
        dtype = llm.stats()["dtype"]
    other = "bfloat16" if dtype == "float32" else "float32"
    with LLM(options.model, threads=options.threads, dtype=other, kv_cache_bytes="1GiB") as llm:
        add_rounding(llm, rows, pairs, options.tokens)
    write_run("asks_sharing", options, rows, page_of(f"{options.model}, {dtype}, rounding: {other}", rows))


if __name__ == "__main__":
    main()

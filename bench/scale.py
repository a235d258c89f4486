"""How time grows: with the number of branches, with the length of the prompt, and with the size of the cache.

    python -m bench.scale
    python -m bench.scale --quick

- branches: solves of 1 to 64 branches behind one prompt of --prefix-tokens.
- prefix: solves of --branches branches behind prompts of 256 tokens up to the model's length.
- bookkeeping: what the scheduler and the block manager take of a step, without a model (see `bench.fake_engine`): many
  branches with long contexts, shared or not, and a pool of 100,000 blocks that is full, so that every new block evicts.

Greedy, end tokens ignored, everybody asked with an appended question: each point does all of its work. Points take
turns. A slope is that of log seconds over log size, by least squares over the upper half of the sizes: 1 is linear.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import numpy as np

from bench.fake_engine import FakeEngine
from bench.harness import environment, summarise
from bench.measured import PHASES, Row, load, make_parser, parse_with_quick, positive, run_or_exit, solve, take_turns
from bench.prompts import EXAMPLES, few_shot_ids, opening_ids
from bench.report import Page, new_stem, plain_options, put_legend, values, write_jsonl, write_page
from minirksc import LLM, SamplingParams, SolverConfig
from minirksc.cache.rsbcm import BlockManager

BRANCHES = (1, 2, 4, 8, 16, 32, 64)
PREFIXES = (256, 512, 1024, 2048, 4096, 7680)
HINT_TOKENS = 20
ROOM_TOKENS = 200
"""Of a solve beyond the prompt, hint and generated tokens: the question."""

BLOCK_SIZE = 16
NUM_STEPS = 64
FULL_POOL = 100_000


@dataclass(frozen=True)
class Load:
    """Work of the bookkeeping.

    Attributes:
        name: in words.
        num_branches: that decode.
        context: tokens of each.
        shares: they are forks of one prompt; else each has a prompt of its own.
        num_blocks: of the pool; what the branches do not use is filled with cached prompts.
    """

    name: str
    num_branches: int
    context: int
    shares: bool
    num_blocks: int


LOADS = (
    Load("8 branches of 1,024 tokens, shared", 8, 1024, True, 1_000),
    Load("64 branches of 8,192 tokens, shared", 64, 8192, True, 2_000),
    Load("64 branches of 8,192 tokens, each its own", 64, 8192, False, 34_000),
    Load("64 branches of 8,192 tokens, shared, a full pool of 100,000 blocks", 64, 8192, True, FULL_POOL),
)


def prepare(work: Load, policy: str = "rksc") -> FakeEngine:
    """An engine whose branches are about to decode.

    Args:
        work: the load.
        policy: of eviction.
    """
    engine = FakeEngine(BlockManager(work.num_blocks, BLOCK_SIZE, policy), 1 << 20, work.num_branches)
    used = work.num_branches * (NUM_STEPS // BLOCK_SIZE + 2)
    used += work.context // BLOCK_SIZE * (1 if work.shares else work.num_branches)
    for number in range(max(0, work.num_blocks - used) // (work.context // BLOCK_SIZE)):
        cached = engine.new_sequence(_tokens(work.context, number + 1))
        engine.add_request(cached, SamplingParams(), prefill_only=True)
        engine.step()
    prompts = [_tokens(work.context, -1 if work.shares else -1 - row) for row in range(work.num_branches)]
    roots = [engine.new_sequence(prompt) for prompt in (prompts[:1] if work.shares else prompts)]
    for root in roots:
        root.kept = True
        engine.add_request(root, SamplingParams(), prefill_only=True)
    engine.step()
    branches = [engine.fork_sequence(roots[0], row) for row in range(work.num_branches)] if work.shares else roots
    params = SamplingParams(max_tokens=NUM_STEPS + 2, ignore_eos=True)
    for row, branch in enumerate(branches):
        branch.token_ids.append(row)
        engine.add_request(branch, params)
    engine.step()
    return engine


def bookkeeping(engine: FakeEngine) -> list[float]:
    """Seconds that scheduler and block manager take of each of `NUM_STEPS` decode steps."""
    found = []
    for _ in range(NUM_STEPS):
        begin = time.perf_counter()
        step = engine.scheduler.schedule()
        engine.scheduler.commit(step.scheduled)
        found.append(time.perf_counter() - begin)
        for item in step.scheduled:
            item.request.sequence.token_ids.append(7)
    return found


def _tokens(count: int, number: int) -> list[int]:
    """A prompt unlike that of any other number."""
    return [number + 1_000_000, *range(count - 1)]


def measure_solves(llm: LLM, options: Any) -> list[Row]:
    """Rows of both axes; the arm is the axis with the size."""
    tokenizer = llm.need_tokenizer("bench.scale")
    longest = (llm.config.max_model_len or 0) - HINT_TOKENS - options.tokens - ROOM_TOKENS
    prefixes = [size for size in PREFIXES[: 3 if options.quick else None] if size <= longest]
    text = few_shot_ids(tokenizer, EXAMPLES, max([options.prefix_tokens, *prefixes]))
    points = [("branches", size, size, options.prefix_tokens) for size in BRANCHES[: 4 if options.quick else None]]
    points += [("prefix", size, options.branches, size) for size in prefixes]
    arms: dict[str, Callable[[int], Row]] = {}
    for axis, size, branches, prefix in points:
        config = SolverConfig(
            branches=branches,
            tokens_per_step=options.tokens,
            hints=opening_ids(tokenizer, branches, HINT_TOKENS),
            sampling=SamplingParams(temperature=0, ignore_eos=True),
            answer_parser="text",
            verify="always",
        )

        def one(index: int, config: SolverConfig = config, prompt: list[int] = text[:prefix]) -> Row:
            return solve(llm, config, prompt)

        arms[f"{axis} {size}"] = one
    common = {f"{axis} {size}": {"axis": axis, "size": size} for axis, size, *_ in points}
    turns = take_turns(arms, range(options.repeats), options.warmup)
    return [{**common[row["arm"]], **row} for turn in turns for row in turn]


def slope(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """Of log seconds over log size, over the upper half of the sizes, two at least."""
    begin = min(len(sizes) // 2, len(sizes) - 2)
    return float(np.polyfit(np.log(sizes[begin:]), np.log(seconds[begin:]), 1)[0])


def make_page(rows: Sequence[Row], books: dict[str, list[float]], options: Any) -> Page:
    """The page."""
    page = Page("How time grows")
    page.text(
        f"{options.model}, {options.tokens} tokens a branch, {options.threads} threads; "
        f"{options.repeats} repetitions. Medians; slope: of log seconds over log size."
    )
    for axis, fixed in (("branches", f"{options.prefix_tokens} tokens"), ("prefix", f"{options.branches} branches")):
        own = [row for row in rows if row["axis"] == axis]
        sizes = sorted({row["size"] for row in own})
        page.heading(f"{axis}, {fixed}")
        table, phases = [], [*PHASES, "total_s"]
        found = {phase: [median(values(own, f"{axis} {size}", phase)) for size in sizes] for phase in phases}
        for index, size in enumerate(sizes):
            table.append([size, *(f"{found[phase][index]:.3f}" for phase in phases)])
        table.append(["slope", *(f"{slope(sizes, found[phase]):.2f}" for phase in phases)])
        page.table([axis, *(f"{name} s" for name in [*PHASES.values(), "total"])], table)
        costs = [
            (after - before) / (large - small)
            for (small, before), (large, after) in pairwise(zip(sizes, found["total_s"], strict=True))
        ]
        page.text(f"Seconds for one more of {axis}, from size to size: {', '.join(f'{cost:.4f}' for cost in costs)}.")
    page.heading("bookkeeping")
    page.text("What scheduler and block manager take of a decode step, ms (p10 .. p90):")
    page.table(["load", "ms"], [[name, summarise([one * 1e3 for one in seconds])] for name, seconds in books.items()])
    return page


def draw(figure: Any, rows: Sequence[Row]) -> bool:
    """Seconds over size, both logarithmic, a panel an axis."""
    figure.set_size_inches(10, 4)
    for place, axis in enumerate(("branches", "prefix")):
        own = [row for row in rows if row["axis"] == axis]
        sizes = sorted({row["size"] for row in own})
        axes = figure.add_subplot(1, 2, place + 1)
        for phase, label in {**PHASES, "total_s": "total"}.items():
            if phase != "other_s":
                axes.plot(sizes, [median(values(own, f"{axis} {size}", phase)) for size in sizes], "o-", label=label)
        axes.set(xscale="log", yscale="log", xlabel=axis, ylabel="seconds")
        axes.grid(alpha=0.3)
    put_legend(figure)
    return True


def main() -> None:
    """Runs the benchmark; prints the page, writes JSONL, markdown and a picture."""
    parser = make_parser("bench.scale", __doc__)
    parser.add_argument("--tokens", type=positive, default=16, help="of a branch (%(default)s)")
    parser.add_argument("--prefix-tokens", type=positive, default=1024, help="of the axis of branches (%(default)s)")
    parser.add_argument("--repeats", type=positive, default=3, help="of each point (%(default)s)")
    parser.add_argument("--warmup", type=int, default=1, help="runs of each point before (%(default)s)")
    options = parse_with_quick(parser, None, repeats=1, warmup=0)
    books = {work.name: bookkeeping(prepare(work)) for work in LOADS}
    with load(options, options.dtypes[0]) as llm:
        rows = measure_solves(llm, options)
    stem = new_stem(options.output, "scale")
    common = {"bookkeeping_s": books, **plain_options(options), **environment(options.threads)}
    write_jsonl(stem.with_suffix(".jsonl"), rows, common)
    write_page(stem, make_page(rows, books, options), options.threads, lambda figure: draw(figure, rows))


if __name__ == "__main__":
    run_or_exit(main)

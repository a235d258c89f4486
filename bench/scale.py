"""How time grows: with the number of branches, and with the size of the cache.

    python -m bench.scale
    python -m bench.scale --quick

- branches: solves of 1 to 64 branches behind one prompt of --prefix-tokens.
- bookkeeping: what the scheduler and the block manager take of a step, without a model (see `bench.fake_engine`): many
  branches with long contexts, shared or not, and a pool of 100,000 blocks that is full, so that every new block evicts.

Greedy, end tokens ignored, every branch asked about with an appended question: each point does all of its work. Points
take turns. A slope is that of log seconds over log size, by least squares over the upper half of sizes: 1 is linear.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import numpy as np

from bench import harness
from bench.fake_engine import FakeEngine
from bench.harness import Row, names, summarise, take_turns, values
from bench.measured import PHASES, load, solve
from bench.prompts import EXAMPLES, few_shot_ids, opening_ids
from bench.report import Page, write_run
from minirksc import LLM, SamplingParams, SolverConfig
from minirksc.cache.rsbcm import BlockManager

BRANCHES = (1, 2, 4, 8, 16, 32, 64)
HINT_TOKENS = 20

BLOCK_SIZE = 16
NUM_STEPS = 64
FULL_POOL = 100_000


@dataclass(frozen=True)
class Load:
    """Work of the bookkeeping.

    Attributes:
        name: name, in words.
        num_branches: branches that decode.
        context: tokens of each.
        shares: whether they are forks of one prompt; else each has a prompt of its own.
        num_blocks: size of the pool; what the branches do not use is filled with cached prompts.
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


def prepare(work: Load) -> FakeEngine:
    """An engine whose branches are about to decode."""
    engine = FakeEngine(BlockManager(work.num_blocks, BLOCK_SIZE, "rksc"), 1 << 20, work.num_branches)
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
    """One row a number of branches, which is its arm, and repetition."""
    tokenizer = llm.need_tokenizer("bench.scale")
    prompt = few_shot_ids(tokenizer, EXAMPLES, options.prefix_tokens)

    def arm(branches: int) -> Callable[[int], Row]:
        config = SolverConfig(
            branches=branches,
            tokens_per_step=options.tokens,
            hints=opening_ids(tokenizer, branches, HINT_TOKENS),
            sampling=SamplingParams(temperature=0, ignore_eos=True),
            answer_parser="text",
            verify="always",
        )
        return lambda _: solve(llm, config, prompt)

    arms = {str(branches): arm(branches) for branches in BRANCHES[: 4 if options.quick else None]}
    return list(take_turns(arms, range(options.repeats), options.warmup))


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
    page.heading(f"branches, {options.prefix_tokens} tokens")
    sizes, phases = names(rows), [*PHASES, "total_s"]
    found = {phase: [median(values(rows, size, phase)) for size in sizes] for phase in phases}
    table = [[size, *(f"{found[phase][index]:.3f}" for phase in phases)] for index, size in enumerate(sizes)]
    numbers = [int(size) for size in sizes]
    table.append(["slope", *(f"{slope(numbers, found[phase]):.2f}" for phase in phases)])
    page.table(["branches", *(f"{name} s" for name in [*PHASES.values(), "total"])], table)
    points = pairwise(zip(numbers, found["total_s"], strict=True))
    costs = [(after - before) / (large - small) for (small, before), (large, after) in points]
    page.text(f"Seconds for one more branch, from size to size: {', '.join(f'{cost:.4f}' for cost in costs)}.")
    page.heading("bookkeeping")
    page.text("What scheduler and block manager take of a decode step, ms (p10 .. p90):")
    page.table(["load", "ms"], [[name, summarise([one * 1e3 for one in seconds])] for name, seconds in books.items()])
    return page


def main() -> None:
    """Runs the benchmark; prints the page, writes JSONL and markdown."""
    common = "model dtypes threads kv-cache-bytes prefix-tokens repeats warmup quick output"
    parser = harness.make_parser("bench.scale", __doc__, common, repeats=3)
    parser.add_argument("--tokens", type=harness.positive, default=16, help="new ones of a branch (%(default)s)")
    options = harness.parse_with_quick(parser, None, repeats=1, warmup=0)
    books = {work.name: bookkeeping(prepare(work)) for work in LOADS}
    with load(options, options.dtypes[0]) as llm:
        rows = measure_solves(llm, options)
    page = make_page(rows, books, options)
    rows += [{"bookkeeping": name, "seconds": seconds} for name, seconds in books.items()]
    write_run("scale", options, rows, page)


if __name__ == "__main__":
    harness.run_or_exit(main)

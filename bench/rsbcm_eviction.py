"""W5, eviction: how many tokens tree searches compute again in a cache that is too small, policy by policy.

    python -m bench.rsbcm_eviction
    python -m bench.rsbcm_eviction --quick --parts counts
    python -m bench.rsbcm_eviction --parts times --kinds best-first --problems 6 --concurrency 6 --repeats 3

The workload is that of `bench.tree_search`: several problems under way on one cache, behind one prefix of worked
examples, each a search of some depth and beam. The working set is every block that an unlimited pool would hold in the
end; a pool is a share of it.

Part "counts" needs no model: the real scheduler and block manager, and a next token that is a hash (see
`bench.fake_engine`). Tokens computed again are those prefilled beyond what an unlimited pool prefills: evicted blocks,
and the ends of preempted requests that never filled a block. The policies are joined by Belady's rule, which knows the
future. Attention is not measured there, so that `rksc` ranks by depth alone.

Part "times" runs the same searches on a model, all arms in turn from an empty cache, and compares their tokens. With
the defaults one arm takes minutes on a CPU: choose one kind and fewer problems.
"""

import argparse
import re
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from bench import harness
from bench.belady import Belady, Recorder
from bench.fake_engine import VOCAB_SIZE, FakeEngine
from bench.harness import Row, check_same_work, groups_of, take_turns
from bench.prompts import EXAMPLES, few_shot_ids, opening_ids, read_examples
from bench.report import write_run
from bench.rsbcm_report import make_page
from bench.tree_search import KINDS, Hint, Service, Shape
from bench.tree_search import Path as NodePath
from minirksc.cache.eviction import POLICIES
from minirksc.cache.rsbcm import BlockManager
from minirksc.errors import CacheFullError

SHARES = (0.1, 0.25, 0.5, 0.75, 1.0)
TIMED_SHARES = (0.25, 0.5)
AMPLE = 1.25
"""Of the working set, which is counted without the model: its tokens make a few blocks more or fewer."""
HINT_TOKENS = 6
TIMED_STATS = ("prefill_s", "decode_s", "num_prefilled_tokens", "num_evicted_blocks", "num_preemptions")


@dataclass(frozen=True)
class Work:
    """What every run does.

    Attributes:
        shape: Shape of the searches.
        prompts: Token ids, one a problem.
        hint: Beginning of each child.
        block_size: Tokens a block.
        batch_requests: Requests that run at a time; the more, the more of a small pool is taken by what runs.
    """

    shape: Shape
    prompts: Sequence[list[int]]
    hint: Hint
    block_size: int
    batch_requests: int


def questions(options: argparse.Namespace, num_problems: int) -> list[str]:
    """One a problem; where there are fewer, they come again under another number."""
    examples = EXAMPLES if options.data is None else read_examples(options.data)
    return [f"Problem {i + 1}: {examples[i % len(examples)][0]}\nAnswer:" for i in range(num_problems)]


def word_ids(text: str) -> list[int]:
    """Words and marks as token ids: about as many as a tokenizer makes."""
    return [zlib.crc32(word.encode()) % VOCAB_SIZE for word in re.findall(r"\w+|[^\w\s]", text)]


def make_work(shape: Shape, options: argparse.Namespace) -> Work:
    """Work without a tokenizer."""
    prefix = word_ids(" ".join(f"Question: {asked} Answer: {answered}" for asked, answered in EXAMPLES))
    prefix = (prefix * (options.prefix_tokens // len(prefix) + 1))[: options.prefix_tokens]
    prompts = [prefix + word_ids(question) for question in questions(options, shape.num_problems)]

    def hint(problem: int, path: NodePath) -> list[int]:
        return word_ids(f"Approach number {path[-1] + 1} is :")

    return Work(shape, prompts, hint, options.block_size, options.batch_requests)


def count(work: Work, num_blocks: int, policy: str, recorder: Recorder | None = None) -> tuple[FakeEngine, Any]:
    """One run without a model: the engine afterwards, and the tokens of all nodes.

    Args:
        work: Work to do.
        num_blocks: Size of the pool.
        policy: Policy of eviction; "belady" needs the recorder of an earlier run, all others fill one, if there is one.
        recorder: Recorder for or of the policy.

    Raises:
        RuntimeError: the pool cannot hold what one request needs.
    """
    if policy == "belady":
        assert recorder is not None
        oracle = Belady(recorder)
        blocks, on_finish = BlockManager(num_blocks, work.block_size, oracle.belady), oracle.finished
    else:
        blocks = BlockManager(num_blocks, work.block_size, policy)
        on_finish = None if recorder is None else recorder.finished
    engine = FakeEngine(blocks, max_batch_requests=work.batch_requests, on_finish=on_finish)
    tokens = Service(engine, work.prompts, work.shape, work.hint).run()
    return engine, tokens


def ample(work: Work) -> tuple[FakeEngine, Any, Recorder]:
    """The same in a pool that never runs out."""
    recorder = Recorder(work.block_size)
    num_nodes = work.shape.num_problems * (work.shape.depth + 3) * (work.shape.branches + 1)
    longest = max(map(len, work.prompts)) + work.shape.depth * (work.shape.tokens + HINT_TOKENS)
    engine, tokens = count(work, num_nodes * (longest // work.block_size + 1), "lru", recorder)
    return engine, tokens, recorder


def count_all(shapes: Sequence[Shape], options: argparse.Namespace) -> list[Row]:
    """Part "counts": one row a search, seed, pool and policy.

    Raises:
        RuntimeError: the tokens of two runs differ, which would make this a comparison of unequal work.
    """
    rows: list[Row] = []
    for shape in shapes:
        for seed in range(options.seeds):
            work = make_work(replace(shape, seed=seed), options)
            reference, tokens, recorder = ample(work)
            working_set = reference.blocks.num_cached
            print(f"{shape.kind}, seed {seed}: {working_set} blocks", file=sys.stderr, flush=True)
            for share in options.shares:
                for policy in [*options.policies, "belady"]:
                    row: Row = {"part": "counts", **asdict(work.shape), "share": share, "policy": policy}
                    row |= {"working_set_blocks": working_set, "peak_held_blocks": reference.peak_used_blocks}
                    row |= {"num_blocks": max(1, round(share * working_set))}
                    row["num_prefilled_tokens_ample"] = reference.num_prefilled_tokens
                    try:
                        engine, got = count(work, row["num_blocks"], policy, recorder)
                    except (CacheFullError, RuntimeError) as error:
                        rows.append(row | {"failed": str(error.__cause__ or error)})
                        continue
                    if got != tokens:
                        raise RuntimeError(f"{policy} on {row['num_blocks']} blocks: other tokens than an ample pool's")
                    rows.append(row | _counts(engine, reference))
    return rows


def _counts(engine: FakeEngine, reference: FakeEngine) -> Row:
    evictions = engine.blocks.evictions
    return {
        "num_recomputed_tokens": engine.num_prefilled_tokens - reference.num_prefilled_tokens,
        "num_recomputed_block_tokens": engine.blocks.num_recomputed_tokens,
        "num_decoded_tokens": engine.num_decoded_tokens,
        "num_evicted_blocks": engine.blocks.num_evicted_blocks,
        "share_needed_again": sum(e.needed_again for e in evictions) / len(evictions) if evictions else 0.0,
        "num_preemptions": engine.scheduler.num_preemptions,
    }


def time_all(shapes: Sequence[Shape], options: argparse.Namespace) -> list[Row]:
    """Part "times": one row an arm (search, pool and policy) and repetition, all on one model and one cache tensor."""
    from minirksc import LLM

    # Its own cache is not used: all arms share one that is as large as the working set.
    llm = LLM(
        options.model,
        dtype=options.dtype,
        threads=options.threads,
        block_size=options.block_size,
        kv_cache_bytes="64MiB",
        max_batch_requests=options.batch_requests,
    )
    if llm.stats()["num_window_blocks_total"]:
        sys.exit(f"{options.model} has layers with a window; part times is for models without")
    arms: dict[str, Callable[[int], Row]] = {}
    for shape in shapes:
        arms |= timed_arms(llm, shape, options)
    rows = list(take_turns(arms, range(options.repeats), options.warmup))
    for own in groups_of(rows, "kind").values():
        for row in own:
            lengths = [len(ids) for ids in row["token_ids"]]
            check_same_work(row["arm"], lengths, len(own[0]["token_ids"]), options.tokens)
    return rows


def timed_arms(llm: Any, shape: Shape, options: argparse.Namespace) -> dict[str, Callable[[int], Row]]:
    """Arms of one search by name, the largest pool first; those whose pool is too small are left out, and told."""
    from minirksc.engine.engine import Engine
    from minirksc.engine.runner import Runner

    tokenizer, loaded = llm.need_tokenizer("part times"), llm.engine
    prefix = few_shot_ids(tokenizer, EXAMPLES, options.prefix_tokens)
    openings = opening_ids(tokenizer, shape.branches, HINT_TOKENS)
    texts = questions(options, shape.num_problems)
    prompts = [prefix + tokenizer.encode("\n\n" + text, add_special_tokens=False) for text in texts]
    work = Work(shape, prompts, lambda _, path: openings[path[-1]], options.block_size, options.batch_requests)
    working_set = ample(work)[0].blocks.num_cached
    runner = Runner(loaded.runner.model, round(AMPLE * working_set), 0, options.block_size, loaded.runner.cache.dtype)

    def run(num_blocks: int, policy: str) -> Row:
        blocks = BlockManager(num_blocks, work.block_size, policy)
        limits = (llm.config, loaded.block_bytes, frozenset(), tokenizer, {})
        engine = Engine(runner, blocks, *limits)
        begin = time.perf_counter()
        tokens = Service(engine, work.prompts, work.shape, work.hint).run()
        total_s = time.perf_counter() - begin
        stats = engine.stats()
        token_ids = [tokens[node][-work.shape.tokens :] for node in sorted(tokens) if node[1]]
        common = {"part": "times", "kind": shape.kind, "dtype": str(llm.stats()["dtype"]), "total_s": total_s}
        return common | {name: stats[name] for name in TIMED_STATS} | {"token_ids": token_ids}

    arms: dict[str, Callable[[int], Row]] = {}
    for share in (AMPLE, *TIMED_SHARES):
        for policy in options.policies if share < 1 else options.policies[:1]:
            name, num_blocks = f"{shape.kind} {share:.0%} {policy}", round(share * working_set)
            try:
                count(work, num_blocks, policy)
            except (CacheFullError, RuntimeError) as error:
                print(f"left out: {name}: {error.__cause__ or error}", file=sys.stderr)
                continue
            arms[name] = lambda _, num_blocks=num_blocks, policy=policy: run(num_blocks, policy)
    return arms


def make_shapes(options: argparse.Namespace) -> list[Shape]:
    """One a kind of search."""
    same = {name: getattr(options, name) for name in ("branches", "beam", "depth", "tokens", "concurrency")}
    return [Shape(kind=kind, num_open=options.open, num_problems=options.problems, **same) for kind in options.kinds]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    common = "model dtype threads branches prefix-tokens data repeats warmup quick output"
    parser = harness.make_parser("bench.rsbcm_eviction", __doc__, common, prefix_tokens=256, shares=SHARES)
    names = {"parts": ("counts", "times"), "kinds": KINDS, "policies": tuple(POLICIES)}
    for name, known in names.items():
        default = ["counts"] if name == "parts" else list(known)
        text = f"of {','.join(known)} ({','.join(default)})"
        parser.add_argument(f"--{name}", type=harness.some_of(known), default=default, help=text)
    shape = Shape()
    numbers = {
        "beam": (shape.beam, "nodes that a round expands"),
        "depth": (shape.depth, "depth of the deepest node"),
        "tokens": (shape.tokens, "tokens that each node decodes"),
        "open": (shape.num_open, "most nodes that stay open between rounds"),
        "problems": (shape.num_problems, "problems in all"),
        "concurrency": (shape.concurrency, "problems under way at a time"),
        "batch-requests": (16, "requests that run at a time"),
        "seeds": (3, "searches of other scores, of which counts are shown as median and range"),
        "block-size": (16, "tokens a block"),
    }
    for name, (default, text) in numbers.items():
        parser.add_argument(f"--{name}", type=harness.positive, default=default, help=f"{text} (%(default)s)")
    quick = {"problems": 4, "concurrency": 4, "depth": 3, "tokens": 16, "seeds": 1, "repeats": 1, "warmup": 0}
    return harness.parse_with_quick(parser, arguments, **quick)


def run(options: argparse.Namespace) -> None:
    """Counts, times, and writes JSONL and page."""
    shapes = make_shapes(options)
    rows = count_all(shapes, options) if "counts" in options.parts else []
    rows += time_all(shapes, options) if "times" in options.parts else []
    write_run("rsbcm-eviction", options, rows, make_page(rows, options))


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark."""
    options = parse(arguments)
    harness.run_or_exit(lambda: run(options))


if __name__ == "__main__":
    main()

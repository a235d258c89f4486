"""How close a step comes to what this machine can do, and where the rest of the time goes.

    python -m bench.roofline
    python -m bench.roofline --model FOLDER --quick

The machine's own limits are measured with the same threads: bytes a second that summing a large array reads, and
operations a second of a large product in the model's dtype. A step takes no less than its bytes at the one, and than
its operations at the other; its bound is the larger of the two. A share of a larger machine has others each minute, so
that they are measured before each repetition, and each phase is held against those. Counted are
- bytes: the matrices as they are packed, once; keys and values that somebody attends to, each block once;
- operations: two a parameter of a matrix and token (the head's for one token a sequence), and four a number of a key
  and query head that attend to each other.

Phases: the prompt alone; decode steps of one sequence behind it; of all branches that share it. Each is timed by
itself, median of --repeats. Then it runs once more under torch's profiler, which slows it down, while the compiled
operations measure themselves: from that run come the shares of the groups of operators, of all that the operators took;
"between them" is what the timed run took beyond what was seen in operators.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch

from bench.harness import Row, make_parser, parse_with_quick, seconds_of, summarise
from bench.measured import begin_decoding
from bench.prompts import EXAMPLES, few_shot_ids
from bench.report import Page, write_run
from minirksc import LLM, SamplingParams
from minirksc.kernels.huge_pages import empty
from minirksc.kernels.native.ops import native

NUM_STEPS = 16
LIMIT_REPEATS = 3
LIMIT_BYTES = 2**29
"""Of the array that is summed: many times what caches hold."""

LIMIT_SIZE = 2048
"""Rows and columns of the product."""

GROUPS = {
    "products with weights": ("linear", "mkldnn", "aten::addmm", "aten::mm"),
    "attention": ("attention", "aten::bmm", "aten::baddbmm", "aten::lerp", "aten::logaddexp", "aten::sigmoid"),
    "choosing tokens": (
        "confidence",
        "topk",
        "sort",
        "logsumexp",
        "softmax",
        "aten::exp",
        "cumsum",
        "argmax",
        "aten::max",
    ),
}
"""Group -> parts of operators' names; the first that fits counts. What fits none is "other operators"."""


@dataclass(frozen=True)
class Limits:
    """What the machine can do.

    Attributes:
        bytes_per_s: bytes a second read from memory.
        flops_per_s: operations a second in the model's dtype.
    """

    bytes_per_s: float
    flops_per_s: float

    def bound_s(self, num_bytes: float, num_flops: float) -> float:
        """Least seconds of work that reads and computes so much."""
        return max(num_bytes / self.bytes_per_s, num_flops / self.flops_per_s)


@dataclass(frozen=True)
class Work:
    """What a phase needs at least.

    Attributes:
        num_bytes: bytes that are read.
        num_flops: operations that are computed.
    """

    num_bytes: float
    num_flops: float


def measure_limits(dtype: torch.dtype) -> Limits:
    """The best of some attempts at either."""
    array = empty(LIMIT_BYTES // 4, dtype=torch.float32).fill_(1)
    square = torch.randn(LIMIT_SIZE, LIMIT_SIZE).to(dtype)
    sum_s = min(seconds_of(lambda: array.sum()) for _ in range(LIMIT_REPEATS))
    product_s = min(seconds_of(lambda: square @ square) for _ in range(LIMIT_REPEATS))
    return Limits(LIMIT_BYTES / sum_s, 2 * LIMIT_SIZE**3 / product_s)


def work_of(llm: LLM, contexts: Sequence[int], num_distinct: int, num_logits: int) -> Work:
    """Of one pass.

    Args:
        llm: engine with the model.
        contexts: keys that each token attends to, one entry a token.
        num_distinct: number of keys that are read at all, each counted once; a window leaves no more than its own.
        num_logits: rows of logits.
    """
    spec, model = llm.spec, llm.engine.runner.model
    num_flops: float = 2 * num_logits * spec.vocab_size * spec.hidden_size
    num_bytes: float = model.weight_bytes
    for layer in spec.layers:
        heads = 2 * spec.num_heads + 2 * layer.num_kv_heads  # of queries, output, keys and values
        num_numbers = spec.hidden_size * (heads * layer.head_dim + 3 * layer.intermediate_size)
        most = layer.window or max(num_distinct, *contexts)
        num_pairs = sum(min(context, most) for context in contexts)
        num_flops += 2 * len(contexts) * num_numbers + 4 * spec.num_heads * layer.head_dim * num_pairs
        num_bytes += min(num_distinct, most) * 2 * layer.num_kv_heads * layer.head_dim * model.dtype.itemsize
    return Work(num_bytes, num_flops)


def phases_of(llm: LLM, prompt: list[int], num_branches: int) -> dict[str, tuple[Callable[[], float], Work]]:
    """Phase -> (what runs it and gives its seconds, what it needs at least).

    Args:
        llm: engine.
        prompt: token ids of the prompt.
        num_branches: branches of the last phase.
    """
    params = SamplingParams(temperature=0.8, top_p=0.95, ignore_eos=True, max_tokens=NUM_STEPS + 1, seed=0)

    def prefill() -> float:
        llm.reset_prefix_cache()
        return seconds_of(lambda: llm.branch(prompt).prune())

    def decode(num_sequences: int) -> float:
        return seconds_of(begin_decoding(llm, prompt, num_sequences, params.resolved({}))) / NUM_STEPS

    length = len(prompt)
    behind = length + 1 + NUM_STEPS // 2  # on average
    num_distinct = length + num_branches * (NUM_STEPS // 2 + 1)
    branches = work_of(llm, [behind] * num_branches, num_distinct, num_branches)
    return {
        f"prompt of {length}": (prefill, work_of(llm, range(1, length + 1), length, 0)),
        "decode, 1 sequence": (lambda: decode(1), work_of(llm, [behind], behind, 1)),
        f"decode, {num_branches} branches": (lambda: decode(num_branches), branches),
    }


def measure(
    llm: LLM, prompt: list[int], num_branches: int, repeats: int, limits_of: Callable[[torch.dtype], Limits]
) -> list[Row]:
    """One row a phase."""
    rows: list[Row] = []
    phases = phases_of(llm, prompt, num_branches)
    limits: list[Limits] = []
    seconds: list[dict[str, float]] = []
    for _ in range(repeats + 1):
        limits.append(limits_of(llm.engine.runner.model.dtype))
        seconds.append({name: run() for name, (run, _) in phases.items()})
    del limits[0], seconds[0]  # that run warmed up
    for name, (run, work) in phases.items():
        calls = 1 if name.startswith("prompt") else NUM_STEPS
        rows.append(
            {
                "phase": name,
                "seconds": [one[name] for one in seconds],
                "bound_s": [one.bound_s(work.num_bytes, work.num_flops) for one in limits],
                "bytes_per_s": [one.bytes_per_s for one in limits],
                "flops_per_s": [one.flops_per_s for one in limits],
                "num_bytes": work.num_bytes,
                "num_flops": work.num_flops,
                "operator_s": {group: one / calls for group, one in _shares(run).items()},
            }
        )
    return rows


def _shares(run: Callable[[], float]) -> dict[str, float]:
    """Seconds that operators took by themselves, by group."""
    from torch.profiler import ProfilerActivity, profile

    operators: dict[str, float] = {}
    if native is not None:
        native.begin_timing()
    try:
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            run()
    finally:
        if native is not None:
            operators |= native.end_timing()
    operators |= {event.key: event.self_cpu_time_total / 1e6 for event in profiler.key_averages()}
    found = dict.fromkeys([*GROUPS, "other operators"], 0.0)
    for operator, seconds in operators.items():
        group = next((name for name, parts in GROUPS.items() if any(p in operator for p in parts)), "other operators")
        found[group] += seconds
    return found


def make_page(rows: Sequence[Row], options: argparse.Namespace, dtype: str) -> Page:
    """The page."""
    page = Page("How close a step comes to the machine's limits")
    page.text(
        f"{options.model}, {dtype}, {options.threads} threads. Median (p10 .. p90) of {len(rows[0]['seconds'])}. This "
        f"machine reads {summarise([one / 1e9 for one in rows[0]['bytes_per_s']])} GB/s and computes "
        f"{summarise([one / 1e9 for one in rows[0]['flops_per_s']])} GFLOP/s in {dtype}."
    )
    columns = {
        "phase": lambda row: row["phase"],
        "ms": lambda row: summarise([one * 1e3 for one in row["seconds"]]),
        "bound ms": lambda row: summarise([one * 1e3 for one in row["bound_s"]]),
        "times the bound": lambda row: summarise([s / b for s, b in zip(row["seconds"], row["bound_s"], strict=True)]),
        "GB/s": lambda row: f"{row['num_bytes'] / median(row['seconds']) / 1e9:.1f}",
        "GFLOP/s": lambda row: f"{row['num_flops'] / median(row['seconds']) / 1e9:.0f}",
    }
    page.columns(rows, columns)
    names = list(rows[0]["operator_s"])
    table = []
    for row in rows:
        total = median(row["seconds"])
        seen = [row["operator_s"][name] for name in names]
        table.append([row["phase"], *(f"{one * 1e3:.1f}" for one in seen), f"{(total - sum(seen)) * 1e3:.1f}"])
    page.text("Where the time goes, ms a step; operators under the profiler, which slows the small ones down:")
    page.table(["phase", *names, "between them"], table)
    return page


def main() -> None:
    """Runs the benchmark; prints the page, writes JSONL and markdown."""
    common = "model dtype threads branches prefix-tokens repeats quick output"
    options = parse_with_quick(make_parser("bench.roofline", __doc__, common, repeats=7), None, repeats=2)
    with LLM(options.model, dtype=options.dtype, threads=options.threads, kv_cache_bytes="1GiB") as llm:
        prompt = few_shot_ids(llm.need_tokenizer("bench.roofline"), EXAMPLES, options.prefix_tokens)
        rows = measure(llm, prompt, options.branches, options.repeats, measure_limits)
        dtype = llm.stats()["dtype"]
    write_run("roofline", options, [{"dtype": dtype, **row} for row in rows], make_page(rows, options, dtype))


if __name__ == "__main__":
    main()

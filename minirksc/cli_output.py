"""What the command line shows: text, tables, JSON, statistics and progress."""

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.status import Status
from rich.table import Table

from minirksc.config import NEUTRAL, SamplingParams
from minirksc.errors import MinirkscError

if TYPE_CHECKING:
    from minirksc.llm import LLM
    from minirksc.request import RequestOutput
    from minirksc.solver import SolveResult

PLAIN_WIDTH = 120
"""Of tables that go into a file or a pipe."""

PHASES = {"prefill": "computing the prompt", "extend": "decoding", "verify": "verifying", "fork": "forking"}


def generation_as_dict(result: "RequestOutput", stats: dict[str, Any] | None = None) -> dict[str, Any]:
    """One prompt's result as plain data; with several samples, the first and `outputs` with all."""
    samples = [dataclasses.asdict(output) for output in result.outputs]
    first = samples[0]
    record = {
        "text": first["text"],
        "token_ids": first["token_ids"],
        "finish_reason": first["finish_reason"],
        "prompt_token_ids": result.prompt_token_ids,
        "num_cached_tokens": result.num_cached_tokens,
    }
    if first["logprobs"] is not None:
        record["logprobs"] = first["logprobs"]
    if len(samples) > 1:
        record["outputs"] = samples
    if stats is not None:
        record["stats"] = stats
    return record


def solve_as_dict(result: "SolveResult") -> dict[str, Any]:
    """A solve's result as plain data, without its trace."""
    record = result.to_dict()
    del record["trace"]
    return record


def print_json(record: dict[str, Any]) -> None:
    """One line on stdout."""
    print(to_json(record), flush=True)


def to_json(record: dict[str, Any]) -> str:
    """JSON that any reader takes: no NaN, which a branch without tokens has for its confidence."""
    return json.dumps(_finite(record), ensure_ascii=False, allow_nan=False)


def write_json(path: Path, record: dict[str, Any]) -> None:
    """A JSON file.

    Raises:
        MinirkscError: it cannot be written.
    """
    try:
        path.write_text(to_json(record) + "\n", encoding="utf-8")
    except OSError as error:
        raise MinirkscError(f"{path} cannot be written: {error}") from error


def print_samples(result: "RequestOutput") -> None:
    """Several samples of one prompt, each under a heading."""
    for output in result.outputs:
        print(f"--- sample {output.index + 1} ({output.finish_reason}) ---\n{output.text}", flush=True)


def print_solve(result: "SolveResult") -> None:
    """A table of the branches, and the answer."""
    console = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH, highlight=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, expand=True)
    for name in ("#", "score", "P(YES)", "conf", "own", "shared", "end", "answer"):
        table.add_column(name, justify="left" if name in ("end", "answer") else "right", no_wrap=True)
    table.add_column("text", ratio=1, no_wrap=True, overflow="ellipsis")
    for index, branch in enumerate(result.branches):
        table.add_row(
            f"{'>' if index == result.best else ''}{index + 1}",
            f"{branch.score:.3f}",
            "-" if branch.verification is None else f"{branch.verification:.3f}",
            f"{branch.confidence:.3f}",
            str(branch.num_own_tokens),
            str(branch.num_shared_tokens),
            branch.finish_reason or "-",
            _literal(branch.parsed or "-")[:12],
            _literal(" ".join(branch.text.split())),
            style="bold" if index == result.best else None,
        )
    console.print(table)
    stats = result.stats
    console.print(
        f"{len(result.branches)} branches in {stats['total_s']:.2f} s: prompt {stats['prefill_s']:.2f}, "
        f"decoding {stats['decode_s']:.2f}, verifying {stats['verify_s']:.2f}; "
        f"{stats['num_prefilled_tokens']} tokens prefilled, {stats['num_decoded_tokens']} decoded\n"
    )
    print(f"Branch {result.best + 1}: {result.answer.strip()}", flush=True)


def print_defaults(llm: "LLM", params: SamplingParams) -> None:
    """What generation_config.json decided, once."""
    used = {k: v for k, v in llm.sampling_defaults.items() if getattr(params, k) is None}
    neutral = {k: v for k, v in NEUTRAL.items() if getattr(params, k) is None and k not in used}
    for source, values in (("generation_config.json", used), ("neutral", neutral)):
        if values:
            print(f"sampling, {source}: " + ", ".join(f"{k}={v}" for k, v in values.items()), file=sys.stderr)


def print_stats(stats: dict[str, Any]) -> None:
    """Counters, one line a subject."""
    lines = [
        f"model: {stats['dtype']} on {stats['device']}, {stats['threads']} threads, {stats['backend']} backend, "
        f"loaded in {stats['load_s']:.2f} s",
        f"tokens: {stats['num_prefilled_tokens']} prefilled, {stats['num_cached_tokens']} from the cache, "
        f"{stats['num_decoded_tokens']} decoded, in {stats['num_steps']} steps",
        f"time: {stats['prefill_s']:.2f} s in steps with prefill, {stats['decode_s']:.2f} s in steps of decoding alone"
        f" ({stats['decode_tokens_per_s']:.1f} tokens/s)",
        f"cache: {stats['num_blocks_used']} blocks used, {stats['num_blocks_cached']} cached, "
        f"{stats['num_blocks_free']} free, of {stats['block_size']} tokens; {stats['kv_cache_bytes'] / 2**20:.0f} MiB; "
        f"{stats['num_evicted_blocks']} evicted, {stats['num_preemptions']} preemptions",
    ]
    print("\n".join(lines), file=sys.stderr)


class Progress:
    """A line on stderr that says what a solve is doing.

    Args:
        enabled: False shows nothing.
    """

    def __init__(self, enabled: bool) -> None:
        self._status: Status | None = None
        if enabled:
            self._status = Console(stderr=True).status("computing the prompt ...")

    def __enter__(self) -> "Progress":
        if self._status is not None:
            self._status.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._status is not None:
            self._status.stop()

    def on_event(self, event: dict[str, Any]) -> None:
        """For `Solver.solve`."""
        if self._status is not None:
            done = PHASES.get(str(event["event"]), str(event["event"]))
            self._status.update(f"{done}: {event['seconds']:.2f} s; going on ...")


def _literal(text: str) -> str:
    """Text that rich must not read as markup."""
    return text.replace("[", "\\[")


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value

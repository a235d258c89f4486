"""What the command line shows: text, tables, JSON, statistics and progress."""

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from minirksc.cli.files import write_file
from minirksc.cli.terminal import check_stdout, deliver, is_terminal, note, say, show, visible
from minirksc.errors import ConfigError
from minirksc.options import NEUTRAL, SamplingParams
from minirksc.trace.page import trace_page

if TYPE_CHECKING:
    from minirksc.engine.outputs import RequestOutput, StreamChunk
    from minirksc.llm import LLM
    from minirksc.rksc.solver import SolveResult

PLAIN_WIDTH = 120
"""Of tables that go into a file or a pipe."""

PHASES = {"prefill": "computing the prompt", "extend": "decoding", "verify": "verifying", "fork": "forking"}


def check_writable(path: Path, option: str) -> None:
    """That a file can be written later, without touching it now.

    Raises:
        ConfigError: it cannot.
    """
    exists = path.exists()
    if (exists and not path.is_file()) or not os.access(path if exists else path.parent, os.W_OK):
        raise ConfigError(f"{option} {path} cannot be written; choose a file in a folder that exists and is yours")


def check_trace(path: Path, option: str) -> None:
    """That a trace can be written there later, as its ending says.

    Raises:
        ConfigError: it cannot.
    """
    if path.suffix.lower() not in (".json", ".html"):
        raise ConfigError(f"{option} {path} must end in .json (plain data) or .html (a page to read)")
    check_writable(path, option)


def generation_as_dict(result: "RequestOutput", stats: dict[str, Any] | None = None) -> dict[str, Any]:
    """One prompt's result as plain data; with several samples, the first and `outputs` with all."""
    samples = [dataclasses.asdict(output) for output in result.outputs]
    first = samples[0]
    record = {name: first[name] for name in ("text", "token_ids", "finish_reason")}
    record |= {"prompt_token_ids": result.prompt_token_ids, "num_cached_tokens": result.num_cached_tokens}
    if first["logprobs"] is not None:
        record["logprobs"] = first["logprobs"]
    if len(samples) > 1:
        record["outputs"] = samples
    if stats is not None:
        record["stats"] = stats
    return record


def solve_as_dict(result: "SolveResult") -> dict[str, Any]:
    """A solve's result as plain data, without its trace."""
    return {name: value for name, value in result.to_dict().items() if name != "trace"}


def print_json(record: dict[str, Any]) -> None:
    """One line on stdout."""
    check_stdout()
    show(to_json(record, sys.stdout.encoding or "utf-8"))


def to_json(record: dict[str, Any], encoding: str = "utf-8") -> str:
    """JSON that any reader takes: no NaN, which a branch without tokens has for its confidence, and valid UTF-8.

    Nor does it act on a terminal, be it read from a file.

    Args:
        record: plain data.
        encoding: encoding of where it goes; text that this lacks is written in ASCII.
    """
    finite = json.loads(json.dumps(record), parse_constant=lambda _: None)
    text = visible(json.dumps(finite, ensure_ascii=False))
    try:
        text.encode(encoding)
    except UnicodeEncodeError:  # in UTF-8 half of a UTF-16 pair, which JSON may hold
        return visible(json.dumps(finite))
    return text


def write_trace(path: Path, trace: dict[str, Any]) -> None:
    """A trace as JSON, or as a page where the file's name ends in .html.

    Raises:
        MinirkscError: it cannot be written.
    """
    write_file(path, trace_page(trace) if path.suffix.lower() == ".html" else to_json(trace) + "\n")


def print_stream(chunks: "Iterable[StreamChunk]") -> None:
    """Text as it comes, and on stderr that it was cut, if it was."""
    finish_reason, num_tokens = None, 0
    for chunk in chunks:
        show(chunk.text, end="")
        finish_reason, num_tokens = chunk.finish_reason, num_tokens + len(chunk.token_ids)
    show("")
    if finish_reason == "length":
        note(f"cut at {num_tokens} tokens (--max-tokens)")


def print_page(*parts: RenderableType) -> None:
    """Tables and lines: on a terminal as wide as it is, with its styles."""
    is_wide = is_terminal(sys.stdout)
    console = Console(force_terminal=is_wide, width=None if is_wide else PLAIN_WIDTH, highlight=False)
    with console.capture() as page:
        for part in parts:
            console.print(part)
    deliver(page.get())


def print_samples(result: "RequestOutput") -> None:
    """Several samples of one prompt, each under a heading."""
    for output in result.outputs:
        show(f"--- sample {output.index + 1} ({output.finish_reason}) ---\n{output.text}")


def print_solve(result: "SolveResult") -> None:
    """A table of the branches, and the answer; on stderr that it was cut, if it was."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, expand=True)
    for name in ("#", "score", "P(YES)", "conf", "own", "shared", "end", "answer"):
        table.add_column(name, justify="left" if name in ("end", "answer") else "right", no_wrap=True)
    table.add_column("text", ratio=1, no_wrap=True, overflow="ellipsis")
    for index, branch in enumerate(result.branches):
        numbers = branch.score, branch.verification, branch.confidence
        table.add_row(
            f"{'>' if index == result.best else ''}{index + 1}",
            *("-" if number is None else f"{number:.3f}" for number in numbers),
            str(branch.num_own_tokens),
            f"{branch.num_shared_tokens}{'~' if branch.sharing == 'semantic' else ''}",
            branch.finish_reason or "-",
            _one_line(branch.parsed or "-")[:12],
            _one_line(branch.text),
            style="bold" if index == result.best else None,
        )
    stats = result.stats
    summary = (
        f"{len(result.branches)} branches in {stats['total_s']:.2f} s: prompt {stats['prefill_s']:.2f}, "
        f"decoding {stats['decode_s']:.2f}, verifying {stats['verify_s']:.2f}; "
        f"{stats['num_prefilled_tokens']} tokens prefilled, {stats['num_decoded_tokens']} decoded\n"
    )
    print_page(table, summary, *map(_one_line, _what_gates_did(result)))
    show(f"Branch {result.best + 1}: {result.answer.strip()}")
    best = result.branches[result.best]
    if best.finish_reason == "length":
        note(f"the answer was cut at {len(best.token_ids)} tokens (--tokens-per-step)")


def _what_gates_did(result: "SolveResult") -> list[str]:
    """What was not computed, and which of it is an approximation; nothing where all was."""
    gates = [gate for gate in result.trace["gates"] if gate["decision"] != "ask"]
    told = [f"{gate['gate']}: {gate['decision']} ({gate['reason']})" for gate in gates]
    if any(gate["calibrated"] is False for gate in gates):
        told.append(f"{result.gates} thresholds: approximate, not tested on this model; --verify always goes without")
    if any(branch.sharing == "semantic" for branch in result.branches):
        told.append("~ runs on the KV of the first wording: approximate; --sharing exact goes without")
    return [*told, ""] if told else []


def print_defaults(llm: "LLM", params: SamplingParams) -> None:
    """What generation_config.json decided, once."""
    used = {k: v for k, v in llm.sampling_defaults.items() if getattr(params, k) is None}
    neutral = {k: v for k, v in NEUTRAL.items() if getattr(params, k) is None and k not in used}
    for source, values in (("generation_config.json", used), ("neutral", neutral)):
        if values:
            say(f"sampling, {source}: " + ", ".join(f"{k}={v}" for k, v in values.items()))


def print_stats(stats: dict[str, Any], solving: Mapping[str, float] | None = None) -> None:
    """Counters, one line a subject.

    Args:
        stats: statistics of the LLM.
        solving: seconds of the solver, all of its problems together; empty or None: it was not used.
    """
    int8 = "" if stats["quantize"] == "none" else f"{stats['quantize']} (approximate) "
    approximation = " (int8, approximate)" if stats["kv_cache_dtype"] == "int8" else ""
    lines = [
        f"model: {stats['dtype']}, {int8}matrices of {stats['weight_bytes'] / 1e6:.0f} MB, on {stats['device']}, "
        f"{stats['threads']} threads, {stats['backend']} backend, "
        f"loaded in {stats['load_s']:.2f} s ({stats['pack_s']:.2f} s of it packing)",
        *([f"nothing compiled: {stats['backend_note']}"] if stats["backend_note"] else []),
        *([f"passed over in config.json: {', '.join(ignored)}"] if (ignored := stats["ignored_config_keys"]) else []),
        f"tokens: {stats['num_prefilled_tokens']} prefilled, {stats['num_cached_tokens']} from the cache, "
        f"{stats['num_decoded_tokens']} decoded, in {stats['num_steps']} steps",
        f"time: {stats['prefill_s']:.2f} s in steps with prefill, {stats['decode_s']:.2f} s in steps of decoding alone"
        f" ({stats['decode_tokens_per_s']:.1f} tokens/s)",
        f"memory: {_mib(stats['resident_bytes'])} resident, at most {_mib(stats['peak_resident_bytes'])}",
        f"cache: {stats['num_blocks_used']} blocks used, {stats['num_blocks_cached']} cached, "
        f"{stats['num_blocks_free']} free, of {stats['block_size']} tokens; {stats['kv_cache_bytes'] / 2**20:.0f} MiB"
        f"{approximation}; {stats['num_evicted_blocks']} evicted, {stats['num_preemptions']} preemptions",
    ]
    if solving:
        phases = {"prefill_s": "for prompts", "decode_s": "decoding", "verify_s": "verifying"}
        lines.append("solver: " + ", ".join(f"{solving[name]:.2f} s {text}" for name, text in phases.items()))
    if stats["num_window_blocks_total"]:
        lines.append(
            f"windows: {stats['num_window_blocks_used']} blocks used, {stats['num_window_blocks_cached']} cached, "
            f"{stats['num_window_blocks_free']} free; in use {stats['kv_bytes_used_window'] / 2**20:.1f} MiB, beside "
            f"{stats['kv_bytes_used_full'] / 2**20:.1f} MiB of the layers that keep all"
        )
    if stats["num_recorded_steps"] or stats["eager_steps"]:
        eager = "; ".join(f"{count} not ({reason})" for reason, count in stats["eager_steps"].items())
        lines.append(f"recorded steps: {stats['num_recorded_steps']}; others: {eager or 'none'}")
    say("\n".join(lines))


def _mib(num_bytes: int | None) -> str:
    return "unknown" if num_bytes is None else f"{num_bytes / 2**20:.0f} MiB"


@contextmanager
def progress() -> Iterator[Callable[[dict[str, Any]], None]]:
    """A line on stderr that says what a solve is doing; gives what takes its events."""
    with Console(stderr=True).status("computing the prompt ...") as status:

        def show_event(event: dict[str, Any]) -> None:
            done = PHASES.get(str(event["event"]), str(event["event"]))
            status.update(f"{done}: {event['seconds']:.2f} s; going on ...")

        yield show_event


def _one_line(text: str) -> Text:
    """Text for a table's cell: not rich's markup, and nothing that moves the cursor."""
    return Text("".join(c if c.isprintable() else " " for c in " ".join(text.split())))

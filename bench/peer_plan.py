"""What bench.peers runs: the engines with their commands and options, the workloads as token ids, and their arms."""

import argparse
import itertools
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.harness import ROOT
from bench.peer_gguf import converted_gguf
from bench.peer_process import PeerError, python_of
from bench.prompts import EXAMPLES, few_shot_ids, opening_ids, read_examples
from minirksc.rksc.verify import QUESTION
from minirksc.text.tokenizer import Tokenizer

SETTINGS = ("exact append", "exact standalone", "none standalone")
"""Of part solve, for every engine."""

GATED = "rksc"
"""And minirksc's with --gates: exact sharing, questions appended, asked as far as they can matter.

What it spares is the point, so its work is not the others'.
"""

SLACK = 64
"""Tokens of room beyond the longest sequence."""

MEMORY_SHARE = 0.3
"""Of a GPU's memory, what vLLM and SGLang take each: all engines live at the same time."""


@dataclass(frozen=True)
class Peer:
    """An engine with what it computes in.

    Attributes:
        name: name of its arms.
        command: interpreter and arguments of its worker.
        options: options that its worker loads with.
        fallback: options to try on top where that fails; they are told.
        settings: settings of part solve.
    """

    name: str
    command: Sequence[str]
    options: Mapping[str, Any]
    fallback: Mapping[str, Any] = field(default_factory=dict)
    settings: Sequence[str] = SETTINGS


@dataclass(frozen=True)
class Workload:
    """One part of the run.

    Attributes:
        name: name, such as "decode 8".
        request: message to the workers, less the setting.
        shape: sequences and new tokens of each.
    """

    name: str
    request: Mapping[str, Any]
    shape: tuple[int, int]

    def settings(self, peer: Peer) -> Sequence[str]:
        """A peer's ways to do it."""
        return peer.settings if self.name == "solve" else ("",)


def arm_name(peer: Peer, setting: str) -> str:
    """Of one peer in one setting."""
    return f"{peer.name} {setting}".rstrip()


def known_peers(options: argparse.Namespace, folder: Path) -> tuple[list[Peer], list[str]]:
    """Every peer that the options name.

    Args:
        options: command line.
        folder: folder of the checkpoint.

    Returns:
        The peers, and a line for each that is left out.
    """
    max_len = max([options.prefix_tokens + 512, options.prompt_tokens + options.tokens, *options.prefill]) + SLACK
    own = {"folder": str(folder), "threads": options.threads, "device": options.device}
    peers, missing = [], []
    settings = (*SETTINGS, GATED) if options.gates is not None else SETTINGS
    ours = {**own, "kv_cache_bytes": options.kv_cache_bytes}
    ours["gates"] = None if options.gates is None else str(options.gates.resolve())
    for dtype, quantize, mode in itertools.product(options.dtypes, options.quantizations, options.modes):
        load = {**ours, "dtype": dtype, "quantize": quantize, "enforce_eager": mode == "eager"}
        name = f"minirksc {dtype if quantize == 'none' else quantize}{' eager' if mode == 'eager' else ''}"
        peers.append(Peer(name, here("bench.peer_minirksc"), load, settings=settings))
    for dtype in options.transformers_dtypes:
        peers.append(Peer(f"transformers {dtype}", here("bench.peer_transformers"), {**own, "dtype": dtype}))
    if options.sglang is not None:
        load = {"folder": str(folder), "dtype": "bfloat16", "memory_share": MEMORY_SHARE}
        peers.append(Peer("sglang bfloat16", there(options.sglang, "peer_sglang.py"), load, settings=()))
    if options.vllm is None:
        missing.append("vLLM is left out: --vllm names its environment")
    else:
        gib = options.vllm_kv_cache_gib
        load = {**own, "dtype": "bfloat16", "max_len": options.vllm_max_len, "kv_cache_gib": gib}
        load["engine"] = {"gpu_memory_utilization": MEMORY_SHARE} if options.device != "cpu" else {}
        load["engine"] |= options.vllm_arguments
        eager = {"engine": {**load["engine"], "enforce_eager": True}}
        peers.append(Peer("vllm bfloat16", there(options.vllm, "peer_vllm.py"), load, eager))
    if options.llamacpp is None:
        missing.append("llama.cpp is left out: --llamacpp names its environment")
    else:
        load = {"threads": options.threads, "max_len": max_len, "flash_attention": options.flash_attention}
        load["num_sequences"] = max(options.branches, *options.batch_sizes)
        command = there(options.llamacpp, "peer_llamacpp.py")
        if options.gguf is not None:
            peers.append(Peer(f"llama.cpp {options.gguf.stem}", command, {**load, "gguf": str(options.gguf.resolve())}))
        for kind in options.llamacpp_types if options.gguf is None else ():
            try:
                file = str(converted_gguf(options.model, kind))
                peers.append(Peer(f"llama.cpp {kind}", command, {**load, "gguf": file}))
            except PeerError as error:
                missing.append(f"llama.cpp {kind} is left out: {error}")
    return peers, missing


def here(module: str) -> list[str]:
    """Command of a worker in this environment."""
    return [sys.executable, "-m", module]


def there(environment_name: str, file: str) -> list[str]:
    """Command of a worker in another environment, by its path: this package is not there."""
    return [python_of(environment_name), str(ROOT / "bench" / file)]


def make_work(tokenizer: Tokenizer, options: argparse.Namespace) -> dict[str, Any]:
    """What every arm of solve does.

    Returns:
        prompt: token ids of what all branches begin with; hints: one a branch, all of one length, so that no arm pays
        for padding; num_tokens: decoded by each; before, between, question: what verification puts before the
        problem, before the answer and after it; choices: first tokens of YES and NO.
    """

    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    examples = EXAMPLES if options.data is None else read_examples(options.data)
    return {
        "prompt": few_shot_ids(tokenizer, examples, options.prefix_tokens),
        "hints": opening_ids(tokenizer, options.branches, options.hint_tokens),
        "num_tokens": options.branch_tokens,
        # As minirksc.rksc.verify asks it where there is no chat template.
        "before": tokenizer.encode("Problem:\n"),
        "between": ids("\n\nProposed answer:\n"),
        "question": ids(f"\n\n{QUESTION}\nAnswer:"),
        "choices": [ids(choice)[0] for choice in (" YES", " NO")],
    }


def make_prompts(tokenizer: Tokenizer, count: int, num_tokens: int) -> list[list[int]]:
    """Token ids that differ from the first on, so that nothing can be shared: consecutive windows of one long text."""
    text = few_shot_ids(tokenizer, EXAMPLES, count * (num_tokens + 1))
    prompts = [text[i * (num_tokens + 1) :][:num_tokens] for i in range(count)]
    assert len({tuple(prompt) for prompt in prompts}) == count
    return prompts


def make_workloads(tokenizer: Tokenizer, options: argparse.Namespace) -> list[Workload]:
    """All parts, as token ids."""
    work = make_work(tokenizer, options)
    found = [Workload("solve", {"do": "solve", "work": work}, (options.branches, options.branch_tokens))]
    prompts = make_prompts(tokenizer, max(options.batch_sizes), options.prompt_tokens)
    for size in options.batch_sizes:
        request = {"do": "decode", "prompts": prompts[:size], "num_tokens": options.tokens}
        found.append(Workload(f"decode {size}", request, (size, options.tokens + 1)))
    for length in options.prefill:
        prompt = few_shot_ids(tokenizer, EXAMPLES, length)
        found.append(Workload(f"prefill {length}", {"do": "prefill", "prompt": prompt}, (1, 1)))
    return found


def chosen(workloads: Sequence[Workload], peers: Sequence[Peer], only: str) -> dict[str, list[tuple[Peer, str]]]:
    """Peers and settings of each workload whose "workload: arm" the pattern is found in.

    Raises:
        SystemExit: none is left.
    """
    every = {
        workload.name: [(peer, setting) for peer in peers for setting in workload.settings(peer)]
        for workload in workloads
    }
    kept = {
        name: [pair for pair in pairs if re.search(only, f"{name}: {arm_name(*pair)}")] for name, pairs in every.items()
    }
    kept = {name: pairs for name, pairs in kept.items() if pairs}
    if not kept:
        sys.exit(f"--only {only!r} leaves no arm; there are: {json.dumps(list_arms(every))}")
    return kept


def list_arms(pairs: Mapping[str, Sequence[tuple[Peer, str]]]) -> dict[str, list[str]]:
    """Names of the arms, by workload."""
    return {name: [arm_name(*pair) for pair in some] for name, some in pairs.items()}

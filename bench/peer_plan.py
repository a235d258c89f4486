"""What bench.peers runs: the engines with their commands and options, the workloads as token ids, and their arms."""

import argparse
import itertools
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.decode import make_prompts
from bench.harness import ROOT
from bench.peer_gguf import converted_gguf
from bench.peer_process import PeerError, python_of
from bench.prompts import EXAMPLES, few_shot_ids
from bench.solve import make_work
from minirksc.text.tokenizer import Tokenizer

SETTINGS = ("exact append", "exact standalone", "none standalone")
"""Of part solve, for every engine."""

GATED = "rksc"
"""And minirksc's with --gates: what it spares is the point, so its work is not the others'."""

SLACK = 64
"""Tokens of room beyond the longest sequence."""


@dataclass(frozen=True)
class Peer:
    """An engine with what it computes in.

    Attributes:
        name: of its arms.
        command: interpreter and arguments of its worker.
        options: what its worker loads with.
        fallback: further options to try where that fails; they are told.
        settings: of part solve.
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
        name: such as "decode 8".
        request: what the workers are sent, less the setting.
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
        options: of the command line.
        folder: of the checkpoint.

    Returns:
        The peers, and a line for each that is left out.
    """
    max_len = max([options.prefix_tokens + 512, options.prompt_tokens + options.tokens, *options.prefill]) + SLACK
    own = {"folder": str(folder), "threads": options.threads}
    peers, missing = [], []
    settings = (*SETTINGS, GATED) if options.gates is not None else SETTINGS
    gates = None if options.gates is None else str(options.gates.resolve())
    for dtype, quantize in itertools.product(options.dtypes, options.quantizations):
        load = {**own, "dtype": dtype, "quantize": quantize, "kv_cache_bytes": options.kv_cache_bytes, "gates": gates}
        name = f"minirksc {dtype}" if quantize == "none" else f"minirksc {quantize}"
        peers.append(Peer(name, here("bench.peer_minirksc"), load, settings=settings))
    for dtype in options.transformers_dtypes:
        peers.append(Peer(f"transformers {dtype}", here("bench.peer_transformers"), {**own, "dtype": dtype}))
    if options.vllm is None:
        missing.append("vLLM is left out: --vllm names its environment")
    else:
        gib = options.vllm_kv_cache_gib
        load = {**own, "dtype": "bfloat16", "max_len": options.vllm_max_len, "kv_cache_gib": gib}
        load["engine"] = options.vllm_arguments
        eager = {"engine": {**options.vllm_arguments, "enforce_eager": True}}
        peers.append(Peer("vllm bfloat16", there(options.vllm, "peer_vllm.py"), load, eager))
    if options.llamacpp is None:
        missing.append("llama.cpp is left out: --llamacpp names its environment")
    else:
        load = {
            "threads": options.threads,
            "max_len": max_len,
            "num_sequences": max(options.branches, *options.batch_sizes),
        }
        load["flash_attention"] = options.flash_attention
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


def make_workloads(tokenizer: Tokenizer, options: argparse.Namespace) -> list[Workload]:
    """All parts, as token ids."""
    work = make_work(tokenizer, argparse.Namespace(**{**vars(options), "tokens": options.branch_tokens}))
    found = [Workload("solve", {"do": "solve", "work": asdict(work)}, (options.branches, options.branch_tokens))]
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

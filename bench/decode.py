"""W2, decode: how fast tokens come after the prompt, one request and several at a time.

    python -m bench.decode
    python -m bench.decode --batch-sizes 1 --repeats 1 --warmup 0

Rate by one rule for all engines: generate 1 token, then `--tokens` + 1 tokens, from cold caches; the
difference in seconds is what `--tokens` tokens a request take once the prompt is done. Prompts differ from
each other, so that nothing can be shared between the requests of a batch. All decode greedily and ignore end
tokens.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from bench.harness import (
    Arm,
    Measured,
    Summary,
    add_common_options,
    check_work,
    generate_transformers,
    keep_only,
    load_transformers,
    measure,
    print_arms,
    print_environment,
    print_ratios,
    ratio,
    rivals,
    write_results,
)
from bench.prompts import EXAMPLES, few_shot_ids
from minirksc import LLM, SamplingParams
from minirksc.checkpoints.sources import resolve_model
from minirksc.text.tokenizer import Tokenizer

METRICS = {"decode_tokens_per_s": "decode tokens/s", "decode_s": "decode s", "first_s": "first token s"}

Generate = Callable[[int], list[list[int]]]
"""Number of tokens -> generated token ids of each request."""


def make_prompts(tokenizer: Tokenizer, count: int, num_tokens: int) -> list[list[int]]:
    """Token ids that differ from the first on: consecutive windows of one long text."""
    text = few_shot_ids(tokenizer, EXAMPLES, count * (num_tokens + 1))
    prompts = [text[i * (num_tokens + 1) :][:num_tokens] for i in range(count)]
    assert len({tuple(prompt) for prompt in prompts}) == count
    return prompts


def timed(generate: Generate, batch_size: int, num_tokens: int) -> Measured:
    """Seconds to the first token, seconds of the others, and their rate."""
    begin = time.perf_counter()
    generate(1)
    first_s = time.perf_counter() - begin
    begin = time.perf_counter()
    token_ids = generate(num_tokens + 1)
    total_s = time.perf_counter() - begin
    decode_s = total_s - first_s
    if decode_s <= 0:
        raise RuntimeError(f"{num_tokens} more tokens took {decode_s:.3f} s: this machine is too busy to measure")
    return {
        "first_s": first_s,
        "total_s": total_s,
        "decode_s": decode_s,
        "decode_tokens_per_s": batch_size * num_tokens / decode_s,
        "token_ids": token_ids,
    }


def minirksc_arm(llm: LLM, prompts: list[list[int]], num_tokens: int) -> Arm:
    """`LLM.generate`, from an empty prefix cache."""

    def generate(count: int) -> list[list[int]]:
        llm.reset_prefix_cache()
        params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
        outs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params)
        return [out.outputs[0].token_ids for out in outs]

    def run() -> Measured:
        return timed(generate, len(prompts), num_tokens)

    return Arm("minirksc", str(llm.stats()["dtype"]), f"batch {len(prompts)}", run)


def transformers_arm(model: Any, prompts: list[list[int]], num_tokens: int) -> Arm:
    """`generate()` on one batch; no prompt needs padding."""
    input_ids = torch.tensor(prompts)  # [batch, tokens]

    def generate(count: int) -> list[list[int]]:
        out = generate_transformers(model, input_ids, count)
        generated: list[list[int]] = out.sequences[:, input_ids.shape[1] :].tolist()
        return generated

    def run() -> Measured:
        return timed(generate, len(prompts), num_tokens)

    return Arm("transformers", str(model.dtype).removeprefix("torch."), f"batch {len(prompts)}", run)


def compare(arms: Sequence[Arm]) -> list[tuple[Arm, str, Summary]]:
    """Each minirksc arm against transformers with the same batch size."""
    rows = []
    for arm in arms:
        if arm.engine == "minirksc":
            for label, other in rivals(arms, arm.setting, "decode_s").items():
                rows.append((arm, label, ratio(arm, other, "decode_s")))
    return rows


def main() -> None:
    """Runs the benchmark; prints tables, writes JSONL."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.decode",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_common_options(parser)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8], help="requests at a time (1 8)")
    parser.add_argument("--prompt-tokens", type=int, default=128, help="of each request (%(default)s)")
    parser.add_argument("--tokens", type=int, default=128, help="after the first (%(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    folder = resolve_model(options.model)
    prompts = make_prompts(Tokenizer.from_folder(folder), max(options.batch_sizes), options.prompt_tokens)
    llms = [
        LLM(folder, dtype=dtype, threads=options.threads, kv_cache_bytes=options.kv_cache_bytes)
        for dtype in options.dtypes
    ]
    models = [load_transformers(folder, dtype) for dtype in options.rival_dtypes]
    arms: list[Arm] = []
    for size in options.batch_sizes:
        arms += [minirksc_arm(llm, prompts[:size], options.tokens) for llm in llms]
        arms += [transformers_arm(model, prompts[:size], options.tokens) for model in models]
    arms = keep_only(arms, options.only)
    measure(arms, options.repeats, options.warmup)
    print_environment(options.threads)
    for size in options.batch_sizes:
        group = [arm for arm in arms if arm.setting == f"batch {size}"]
        if group:
            check_work(group, size, options.tokens + 1)
            title = f"batch {size}, {options.prompt_tokens}-token prompts, {options.tokens} tokens"
            print_arms(title, group, METRICS, group[0])
    print_ratios("decode", compare(arms))
    print(f"results: {write_results(options.output, 'decode', arms, options)}")


if __name__ == "__main__":
    main()

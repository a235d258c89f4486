"""W1, solve: a long prompt, several branches that each begin with a hint of their own, then verification.

    python -m bench.solve
    python -m bench.solve --repeats 1 --warmup 0 --only 'minirksc|shared'

Settings of minirksc: sharing "none" (every branch computes the prompt) or "exact" (it is computed once), and
verification "append" (the question follows the branch) or "standalone" (a new prompt, problem and answer).

Settings of transformers, on the same folder:
- recompute: generate() on a batch of full prompts; standalone verification is a batch of full prompts.
- shared: the prompt is prefilled once and its cache repeated for the batch (`batch_repeat_interleave`);
  so is the common part of the standalone verification prompt.
- append: the question goes onto the cache that generate() returns.

All decode greedily, `--tokens` tokens a branch whatever they are; prompts and hints have the same length in
all rows, so that no arm pays for padding. minirksc's prefix cache is emptied before each run.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
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
from bench.prompts import EXAMPLES, few_shot_ids, opening_ids, read_examples
from minirksc import LLM, SamplingParams, Solver, SolverConfig
from minirksc.checkpoints.sources import resolve_model
from minirksc.rksc.verify import QUESTION
from minirksc.text.tokenizer import Tokenizer

METRICS = {"generate_s": "prompt + branches s", "verify_s": "verification s", "total_s": "total s"}
SHARING = {"minirksc": ("none", "exact"), "transformers": ("recompute", "shared")}
STYLES = ("append", "standalone")


@dataclass(frozen=True)
class Work:
    """What every arm does, as token ids.

    Attributes:
        prompt: of all branches.
        hints: one a branch, all of one length.
        num_tokens: decoded by each branch.
        before, between, question: of verification: before the problem, before the answer, after the answer.
        choices: first tokens of YES and NO.
    """

    prompt: list[int]
    hints: list[list[int]]
    num_tokens: int
    before: list[int]
    between: list[int]
    question: list[int]
    choices: list[int]


def make_work(tokenizer: Tokenizer, options: argparse.Namespace) -> Work:
    """The same work for all arms, out of built-in text or a file."""

    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    examples = EXAMPLES if options.data is None else read_examples(options.data)
    return Work(
        prompt=few_shot_ids(tokenizer, examples, options.prefix_tokens),
        hints=opening_ids(tokenizer, options.branches, options.hint_tokens),
        num_tokens=options.tokens,
        # As minirksc.rksc.verify asks it where there is no chat template.
        before=tokenizer.encode("Problem:\n"),
        between=ids("\n\nProposed answer:\n"),
        question=ids(f"\n\n{QUESTION}\nAnswer:"),
        choices=[ids(choice)[0] for choice in (" YES", " NO")],
    )


def minirksc_arm(llm: LLM, work: Work, sharing: str, style: str) -> Arm:
    """The solver, from an empty prefix cache."""
    config = SolverConfig(
        branches=len(work.hints),
        tokens_per_step=work.num_tokens,
        hints=work.hints,
        sampling=SamplingParams(temperature=0, ignore_eos=True),
        sharing=sharing,
        verify="always",
        verify_style=style,
        answer_parser="text",
    )

    def run() -> Measured:
        llm.reset_prefix_cache()
        begin = time.perf_counter()
        result = Solver(llm, config).solve(work.prompt)
        total_s = time.perf_counter() - begin
        stats = result.stats
        return {
            "total_s": total_s,
            "generate_s": stats["prefill_s"] + stats["decode_s"],
            "verify_s": stats["verify_s"],
            "prefill_s": stats["prefill_s"],
            "decode_s": stats["decode_s"],
            "num_prefilled_tokens": stats["num_prefilled_tokens"],
            "num_decoded_tokens": stats["num_decoded_tokens"],
            "p_yes": [branch.verification for branch in result.branches],
            "token_ids": [branch.token_ids for branch in result.branches],
        }

    return Arm("minirksc", str(llm.stats()["dtype"]), f"{sharing} {style}", run)


def transformers_arm(model: Any, work: Work, sharing: str, style: str) -> Arm:
    """generate() and one forward pass for verification."""
    rows = [[*work.prompt, *hint] for hint in work.hints]

    def run() -> Measured:
        begin = time.perf_counter()
        cache = _shared_cache(model, work.prompt, len(rows)) if sharing == "shared" else None
        out = generate_transformers(model, torch.tensor(rows), work.num_tokens, past_key_values=cache)
        generated = out.sequences.tolist()
        generated_at = time.perf_counter()
        if style == "append":
            asked = [[*row, *work.question] for row in generated]
            p_yes = _ask(model, asked, work.choices, out.past_key_values)
        else:
            common = [*work.before, *work.prompt, *work.between]
            answers = [row[len(work.prompt) :] for row in generated]
            asked = [[*common, *answer, *work.question] for answer in answers]
            cache = _shared_cache(model, common, len(rows)) if sharing == "shared" else None
            p_yes = _ask(model, asked, work.choices, cache)
        end = time.perf_counter()
        return {
            "total_s": end - begin,
            "generate_s": generated_at - begin,
            "verify_s": end - generated_at,
            "p_yes": p_yes,
            "token_ids": [row[len(rows[0]) :] for row in generated],
        }

    return Arm("transformers", str(model.dtype).removeprefix("torch."), f"{sharing} {style}", run)


@torch.inference_mode()
def _shared_cache(model: Any, token_ids: Sequence[int], count: int) -> Any:
    """The KV of a common beginning, computed once and repeated `count` times."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    model(input_ids=torch.tensor([token_ids]), past_key_values=cache, use_cache=True, logits_to_keep=1)
    cache.batch_repeat_interleave(count)
    return cache


@torch.inference_mode()
def _ask(model: Any, rows: list[list[int]], choices: list[int], cache: Any) -> list[float]:
    """p(YES) of each row, of which a cache may hold the beginning."""
    num_cached = 0 if cache is None else cache.get_seq_length()
    input_ids = torch.tensor(rows)[:, num_cached:]
    out = model(
        input_ids=input_ids,
        attention_mask=torch.ones(len(rows), len(rows[0]), dtype=torch.int64),
        past_key_values=cache,
        use_cache=cache is not None,
        logits_to_keep=1,
    )
    chosen = out.logits[:, -1, choices].float()  # [rows, choices]
    return [float(p) for p in chosen.softmax(-1)[:, 0]]


def compare(arms: Sequence[Arm]) -> list[tuple[Arm, str, Summary]]:
    """Exact sharing against no sharing, and against each setting of transformers."""
    rows = []
    for arm in arms:
        if arm.engine != "minirksc" or not arm.setting.startswith("exact"):
            continue
        own = [a for a in arms if a.engine == arm.engine and a.dtype == arm.dtype]
        against = {f"minirksc {a.dtype} {a.setting}": a for a in own if a.setting.startswith("none")}
        for sharing in SHARING["transformers"]:
            for style in STYLES:
                against |= rivals(arms, f"{sharing} {style}", "total_s")
        rows += [(arm, label, ratio(arm, other, "total_s")) for label, other in against.items()]
    return rows


def main() -> None:
    """Runs the benchmark; prints tables, writes JSONL."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.solve",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_common_options(parser)
    parser.add_argument("--branches", type=int, default=8)
    parser.add_argument("--prefix-tokens", type=int, default=1024, help="length of the prompt (%(default)s)")
    parser.add_argument("--hint-tokens", type=int, default=20, help="length of each hint (%(default)s)")
    parser.add_argument("--tokens", type=int, default=32, help="decoded by each branch (%(default)s)")
    parser.add_argument("--data", type=Path, help="JSONL with question and answer: examples of the prompt")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    folder = resolve_model(options.model)
    work = make_work(Tokenizer.from_folder(folder), options)
    arms: list[Arm] = []
    for dtype in options.dtypes:
        llm = LLM(folder, dtype=dtype, threads=options.threads, kv_cache_bytes=options.kv_cache_bytes)
        arms += [minirksc_arm(llm, work, sharing, s) for sharing in SHARING["minirksc"] for s in STYLES]
    for dtype in options.rival_dtypes:
        model = load_transformers(folder, dtype)
        arms += [transformers_arm(model, work, sharing, s) for sharing in SHARING["transformers"] for s in STYLES]
    arms = keep_only(arms, options.only)
    measure(arms, options.repeats, options.warmup)
    check_work(arms, options.branches, options.tokens)
    file = write_results(options.output, "solve", arms, options)
    print_environment(options.threads)
    title = f"{options.branches} branches x {options.tokens} tokens, {options.prefix_tokens}-token prompt"
    reference = next((arm for arm in arms if arm.setting == "exact append"), arms[0])
    print_arms(title, arms, METRICS, reference)
    print_ratios(title, compare(arms))
    print(f"results: {file}")


if __name__ == "__main__":
    main()

"""The CPU's backends beside each other: how fast each is, and how far its logits are from the plain float32 ones.

    python -m bench.backends
    python -m bench.backends --model FOLDER --quick

Speed: the phases of bench.roofline (a prompt; decode steps of one sequence behind it, and of several branches that
share it), the backends taking turns; median and ratio within a repetition. "native, eager" is native without its tapes,
"native, int8" has its matrices rounded to 8 bits, where the processor multiplies such.

Distance: logits at all positions of one text, against the reference backend in float32 on the same checkpoint: largest
and root mean square difference, how often the likeliest token is the same, and the mean loss of the text's own tokens.
The reference backend in the model's dtype shows what that dtype costs by itself.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from bench.harness import ROOT, environment, summarise
from bench.measured import Row, positive, take_turns
from bench.prompts import EXAMPLES, few_shot_ids
from bench.report import Page, names, new_stem, plain_options, ratios, values, write_jsonl, write_page
from bench.roofline import Phases
from minirksc import LLM
from minirksc.errors import ConfigError

ARMS: dict[str, dict[str, Any]] = {
    "native": {"backend": "native"},
    "native, eager": {"backend": "native", "enforce_eager": True},
    "native, int8": {"backend": "native", "quantize": "int8"},
    "torch": {"backend": "torch"},
}


def open_llm(options: argparse.Namespace, **more: Any) -> LLM:
    """An engine as the options ask for it."""
    return LLM(options.model, threads=options.threads, **({"dtype": options.dtype, "kv_cache_bytes": "512MiB"} | more))


def measure_speed(options: argparse.Namespace, prompt: list[int]) -> list[Row]:
    """One row a phase, arm and repetition, with its seconds as total_s."""
    rows: list[Row] = []
    llms: dict[str, LLM] = {}
    for arm, given in ARMS.items():
        try:
            llms[arm] = open_llm(options, **given)
        except ConfigError as error:
            print(f"{arm} is left out: {error}")
    phases = {arm: Phases(llm, prompt, options.branches).all() for arm, llm in llms.items()}
    for phase in next(iter(phases.values())):
        arms = {arm: lambda _, run=one[phase][0]: {"total_s": run()} for arm, one in phases.items()}
        for turn in take_turns(arms, range(options.repeats), warmup=1):
            rows += [{"phase": phase, **row} for row in turn]
    for llm in llms.values():
        llm.close()
    return rows


def measure_distance(options: argparse.Namespace, text: list[int]) -> list[Row]:
    """One row a backend and dtype."""

    def logits(**given: Any) -> tuple[torch.Tensor, str]:
        with open_llm(options, **given) as llm:
            return llm.logits(text), llm.stats()["dtype"]

    exact, _ = logits(backend="reference", dtype="float32")  # [tokens, vocab]
    following = torch.tensor(text[1:])
    rows = []
    for arm in ("reference, float32", "reference", "torch", "native", "native, int8"):
        try:
            own, dtype = (exact, "float32") if "float32" in arm else logits(**ARMS.get(arm, {"backend": arm}))
        except ConfigError:
            continue  # it is named above
        off = own - exact
        rows.append(
            {
                "backend": arm,
                "dtype": dtype,
                "num_tokens": len(text),
                "largest": float(off.abs().max()),
                "rms": float(off.square().mean().sqrt()),
                "spread": float(exact.std()),
                "same_argmax": float((own.argmax(-1) == exact.argmax(-1)).float().mean()),
                "loss": float(cross_entropy(own[:-1], following)),
            }
        )
    return rows


def make_page(speed: Sequence[Row], distance: Sequence[Row], options: argparse.Namespace) -> Page:
    """The page."""
    page = Page("The CPU's backends")
    dtype = distance[-1]["dtype"]
    page.text(f"{options.model}, {dtype}, {options.threads} threads. Median (p10 .. p90) of {options.repeats}.")
    table = []
    for phase in dict.fromkeys(row["phase"] for row in speed):
        rows = [row for row in speed if row["phase"] == phase]
        for arm in names(rows):
            times = ratios(rows, arm, "torch")
            table.append([phase, arm, summarise([1e3 * one for one in values(rows, arm, "total_s")]), summarise(times)])
    page.table(["phase", "backend", "ms", "times as fast as torch"], table)
    page.text(f"Logits at {distance[0]['num_tokens']} positions against the reference in float32:")
    page.table(
        ["backend", "dtype", "largest difference", "root mean square", "same likeliest token", "loss, nats"],
        [
            [
                row["backend"],
                row["dtype"],
                f"{row['largest']:.3g}",
                f"{row['rms']:.3g}",
                f"{row['same_argmax']:.2%}",
                f"{row['loss']:.4f}",
            ]
            for row in distance
        ],
    )
    page.text(f"The logits themselves have a standard deviation of {distance[0]['spread']:.3g}.")
    return page


def main() -> None:
    """Runs the benchmark; prints the page, writes JSONL and markdown."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.backends", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m", help="alias or checkpoint folder (%(default)s)")
    parser.add_argument("--dtype", default="auto", help="that it computes in (%(default)s)")
    parser.add_argument("--threads", type=positive, default=2, help="of the CPU (%(default)s)")
    parser.add_argument("--branches", type=positive, default=8, help="that share the prompt (%(default)s)")
    parser.add_argument("--prefix-tokens", type=positive, default=1024, help="of the prompt (%(default)s)")
    parser.add_argument("--text-tokens", type=positive, default=600, help="whose logits are compared (%(default)s)")
    parser.add_argument("--repeats", type=positive, default=5, help="of each phase (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="2 repetitions")
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results", help="folder (bench/results)")
    options = parser.parse_args()
    options.repeats = 2 if options.quick else options.repeats
    with open_llm(options) as llm:
        tokenizer = llm.need_tokenizer("bench.backends")
        prompt = few_shot_ids(tokenizer, EXAMPLES, options.prefix_tokens)
        text = few_shot_ids(tokenizer, EXAMPLES, options.text_tokens)
    speed = measure_speed(options, prompt)
    distance = measure_distance(options, text)
    stem = new_stem(options.output, "backends")
    common = plain_options(options) | environment(options.threads)
    write_jsonl(stem.with_suffix(".jsonl"), [*speed, *distance], common)
    write_page(stem, make_page(speed, distance, options), options.threads)


if __name__ == "__main__":
    main()

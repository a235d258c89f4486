"""How far the logits of the CPU's backends are from the plain float32 ones.

    python -m bench.backends
    python -m bench.backends --model FOLDER

Logits at all positions of one text, against the reference backend in float32 on the same checkpoint: largest and root
mean square difference, how often the likeliest token is the same, and the mean loss of the text's own tokens. The
reference backend in the model's dtype shows what that dtype costs by itself; "native, int8" has its matrices rounded to
8 bits, where the processor multiplies such.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from bench.harness import Row, make_parser, positive
from bench.prompts import EXAMPLES, few_shot_ids
from bench.report import Page, write_run
from minirksc import LLM
from minirksc.errors import ConfigError

ARMS: dict[str, dict[str, Any]] = {
    "reference, float32": {"backend": "reference", "dtype": "float32"},
    "reference": {"backend": "reference"},
    "torch": {"backend": "torch"},
    "native": {"backend": "native"},
    "native, int8": {"backend": "native", "quantize": "int8"},
}


def open_llm(options: argparse.Namespace, **more: Any) -> LLM:
    """An engine as the options ask for it."""
    return LLM(options.model, threads=options.threads, **({"dtype": options.dtype, "kv_cache_bytes": "512MiB"} | more))


def measure_distance(options: argparse.Namespace, text: list[int]) -> list[Row]:
    """One row a backend and dtype."""
    following = torch.tensor(text[1:])
    exact: torch.Tensor | None = None  # [tokens, vocab]
    rows = []
    for arm, given in ARMS.items():
        try:
            with open_llm(options, **given) as llm:
                own, dtype = llm.logits(text), llm.stats()["dtype"]
        except ConfigError as error:
            print(f"{arm} is left out: {error}")
            continue
        exact = own if exact is None else exact
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


def make_page(distance: Sequence[Row], options: argparse.Namespace) -> Page:
    """The page."""
    page = Page("How far the CPU's backends are from float32")
    page.text(f"{options.model}, {distance[-1]['dtype']}, {options.threads} threads.")
    page.text(f"Logits at {distance[0]['num_tokens']} positions against the reference in float32:")
    columns = {
        "backend": lambda row: row["backend"],
        "dtype": lambda row: row["dtype"],
        "largest difference": lambda row: f"{row['largest']:.3g}",
        "root mean square": lambda row: f"{row['rms']:.3g}",
        "same likeliest token": lambda row: f"{row['same_argmax']:.2%}",
        "loss, nats": lambda row: f"{row['loss']:.4f}",
    }
    page.columns(distance, columns)
    page.text(f"The logits themselves have a standard deviation of {distance[0]['spread']:.3g}.")
    return page


def main() -> None:
    """Runs the benchmark; prints the page, writes JSONL and markdown."""
    parser = make_parser("bench.backends", __doc__, "model dtype threads output")
    parser.add_argument("--text-tokens", type=positive, default=600, help="whose logits are compared (%(default)s)")
    options = parser.parse_args()
    with open_llm(options) as llm:
        text = few_shot_ids(llm.need_tokenizer("bench.backends"), EXAMPLES, options.text_tokens)
    distance = measure_distance(options, text)
    write_run("backends", options, distance, make_page(distance, options))


if __name__ == "__main__":
    main()

"""Random engines, prompts and parameters: small, alike, and at each other's limits."""

import random
from typing import Any

from minirksc import SamplingParams, SolverConfig

VOCAB = 261
MAX_LEN = 96


def engine_options(rng: random.Random) -> dict[str, Any]:
    """Options of an LLM; kv_cache_bytes is a number of blocks."""
    return {
        "block_size": rng.choice((4, 8, 16)),
        "max_batch_tokens": rng.choice((3, 8, 16, 64)),
        "max_batch_requests": rng.choice((2, 4, 256)),
        "eviction": rng.choice(("rksc", "cost", "lru", "lfu")),
        "prefix_caching": rng.random() < 0.85,
        "backend": rng.choice(("auto", "auto", "torch")),
        "enforce_eager": rng.random() < 0.2,
        "max_model_len": MAX_LEN,
        "seed": rng.randrange(5),
        "kv_cache_bytes": rng.randrange(6, 41),
    }


def prompt(rng: random.Random, base: list[int]) -> list[int]:
    """A beginning of `base` and a few tokens more."""
    return base[: rng.choice((1, 7, 8, 16, 20, 33, 48))] + [rng.randrange(5, VOCAB) for _ in range(rng.randrange(6))]


def params(rng: random.Random, many: bool) -> SamplingParams:
    """Of a prompt, with `many` perhaps of several samples; with a seed where it is sampled."""
    sampled = rng.random() < 0.4
    return SamplingParams(
        temperature=rng.choice((0.7, 1.3)) if sampled else 0,
        top_p=rng.choice((1.0, 0.9)),
        top_k=rng.choice((0, 0, 20)),
        seed=rng.randrange(9) if sampled else None,
        n=rng.choice((1, 2, 3)) if sampled and many else 1,
        max_tokens=rng.choice((1, 2, 4, 8, 8, 17, 17, None)),
        stop=rng.choice(((), (), "a", ("zq", "b"))),
        stop_token_ids=rng.choice(((), (), [rng.randrange(VOCAB) for _ in range(9)])),
        ignore_eos=rng.random() < 0.5,
        logprobs=rng.choice((None, None, 2)) if many else None,
    )


def solver_config(rng: random.Random) -> SolverConfig:
    """Of a solve in which nothing is approximated."""
    branches = rng.choice((2, 3, 4))
    return SolverConfig(
        branches=branches,
        depth=rng.choice((1, 2)),
        beam=rng.choice((1, 2)),
        tokens_per_step=rng.choice((1, 4)),
        verify=rng.choice(("never", "always")),
        sharing=rng.choice(("none", "exact")),
        chat=False,
        hints=[[65 + i] for i in range(branches)],
        select=rng.choice(("score", "vote")),
        sampling=SamplingParams(temperature=0.8, top_p=0.95, seed=rng.randrange(3)),
    )

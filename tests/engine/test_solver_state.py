"""A solve that is left at any line of its own gives every branch back, and the next one is right."""

import random
import sys

import pytest
from integrity import check_integrity

from minirksc import LLM, SamplingParams, Solver, SolverConfig

PROBLEM = "please: a baker bakes 12 loaves on monday and 7 on tuesday, and gives 3 away. how many are left?"
WORDINGS = [PROBLEM, f"{PROBLEM} ", PROBLEM.replace("please: ", "")]
SEEDED = SamplingParams(temperature=1.0, seed=3, ignore_eos=True)
FILES = "problem solver tree node verify judge record results answers guard asks similarity"
OWN = tuple(f"{name}.py" for name in FILES.split())
LINES = 25
"""Of each kind of solve, at which it is left."""
KINDS = {
    "exact": dict(depth=2, verify="always"),
    "none": dict(depth=2, verify="always", sharing="none", verify_style="standalone"),
    "standalone": dict(verify="always", verify_style="standalone"),
    "substitute": dict(verify="always", sharing="semantic", tau=-9.0, uncalibrated=True),
    "aligned": dict(verify="always", sharing="semantic", tau=-9.0, uncalibrated=True, sharing_mode="aligned"),
}


@pytest.fixture(scope="module")
def llm(tiny_llama):
    with LLM(tiny_llama(layers=4, tokenizer=True), block_size=8, kv_cache_bytes="1MiB", threads=1) as llm:
        yield llm


def solve(llm, kind):
    config = SolverConfig(branches=3, tokens_per_step=3, sampling=SEEDED, **KINDS[kind])
    wordings = WORDINGS if "tau" in KINDS[kind] else None
    result = Solver(llm, config).solve(PROBLEM, wordings)
    return [branch.token_ids for branch in result.branches]


def left_at(number, error, call):
    """Calls it, and raises at a line of that number in the files of a solve; returns how many it has, or the error.

    What the error's frames hold stays alive with it.
    """
    count = 0

    def trace(frame, event, arg):
        nonlocal count
        if not frame.f_code.co_filename.endswith(OWN):
            return None
        if event == "line":
            count += 1
            if count == number:
                sys.settrace(None)
                raise error
        return trace

    sys.settrace(trace)
    try:
        call()
    except type(error) as caught:
        assert caught is error
        return caught
    finally:
        sys.settrace(None)
    assert count < number or number == 0  # nobody swallows it
    return count


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_left_of_a_solve_that_is_left_at_any_line(llm, kind):
    expected = solve(llm, kind)
    llm.reset_prefix_cache()
    num_lines = left_at(0, MemoryError(), lambda: solve(llm, kind))
    draws = random.Random(kind)
    for number in draws.sample(range(1, num_lines + 1), LINES):
        llm.reset_prefix_cache()
        caught = left_at(
            number, draws.choice([MemoryError, KeyboardInterrupt, RuntimeError])(), lambda: solve(llm, kind)
        )
        assert isinstance(caught, BaseException) or number > caught
        assert llm.stats()["num_blocks_used"] == 0, number  # while the error and all its frames live
        check_integrity(llm.engine.blocks)
    llm.reset_prefix_cache()
    assert solve(llm, kind) == expected

"""bench.scale: that each load is what it says, and slopes."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# The repository's root is not on the path (see conftest.py), so that the package is loaded from its file.
_spec = importlib.util.spec_from_file_location("bench", ROOT / "bench" / "__init__.py")
sys.modules.setdefault("bench", importlib.util.module_from_spec(_spec))

from bench.scale import BLOCK_SIZE, LOADS, NUM_STEPS, bookkeeping, prepare, slope  # noqa: E402


@pytest.mark.parametrize("work", LOADS, ids=lambda work: work.name)
def test_all_branches_decode_in_every_step_and_a_full_pool_evicts(work):
    is_full = work.num_blocks > 50_000
    context = work.context // 8
    num_blocks = 3_000 if is_full else work.num_blocks // 8 + 10 * work.num_branches
    engine = prepare(replace(work, context=context, num_blocks=num_blocks))
    blocks = engine.blocks
    assert blocks.num_used >= context // BLOCK_SIZE * (1 if work.shares else work.num_branches)
    assert (blocks.num_free < context // BLOCK_SIZE + 10 * work.num_branches) or not is_full
    before = blocks.num_used
    assert len(bookkeeping(engine)) == NUM_STEPS
    assert blocks.num_used == before + work.num_branches * NUM_STEPS // BLOCK_SIZE
    assert engine.scheduler.num_preemptions == 0


def test_a_full_pool_evicts_for_every_new_block():
    work = replace(LOADS[-1], context=1024, num_blocks=64 + 64 * (NUM_STEPS // BLOCK_SIZE + 2) + 10 * 64)
    engine = prepare(work)
    assert engine.blocks.num_cached > 0
    while engine.blocks.num_free:  # what rounding left
        engine.blocks._pool.take(None, 0)
    bookkeeping(engine)
    assert engine.blocks.num_evicted_blocks >= work.num_branches * NUM_STEPS // BLOCK_SIZE


def test_slope():
    sizes = [1, 2, 4, 8, 16]
    assert slope(sizes, [3 * size**2 for size in sizes]) == pytest.approx(2)
    assert slope(sizes, [5, 5, 5, 10, 20]) == pytest.approx(1)
    assert slope([1, 3], [2, 6]) == pytest.approx(1)

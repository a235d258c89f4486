"""Who goes first and why, who is expected back, what is pinned, and what is remembered of it all."""

import math
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from integrity import check_integrity

from minirksc.cache import eviction
from minirksc.cache.eviction import POLICIES, cost, rksc
from minirksc.cache.rsbcm import BlockBytes, BlockManager
from minirksc.engine.request import Request, Sequence
from minirksc.engine.scheduler import Scheduler
from minirksc.errors import CacheFullError


def block(**values):
    plain = {"digest": b"", "depth": 0, "importance": 1.0, "last_use": 5, "num_uses": 1}
    return SimpleNamespace(**plain | {"num_tokens_before": 0, "num_awaited": 0, "cached_at": 0.0} | values)


def filled(blocks, seq_id, tokens, **options):
    blocks.add(seq_id, tokens, **options)
    blocks.reserve(seq_id, len(tokens))
    blocks.commit(seq_id, tokens[blocks.num_tokens(seq_id) :])
    check_integrity(blocks)


def importance(blocks, seq_id):
    return [blocks._pool[block_id].importance for block_id in blocks.block_table(seq_id)]


# Policies


@given(
    n=st.integers(0, 20),
    place=st.integers(0, 10_000),
    importance=st.floats(0, 100),
    age=st.floats(0, 1e6),
)
def test_cost_grows_with_everything_that_makes_a_loss_dear(n, place, importance, age):
    def priority(**more):
        values = {"num_awaited": n, "num_tokens_before": place, "importance": importance, "cached_at": age}
        return cost(block(**values | more))

    assert priority() <= priority(num_awaited=n + 1)
    assert priority() <= priority(num_tokens_before=place + 16)
    assert priority() <= priority(importance=importance + 1)
    assert priority() < priority(cached_at=age + 1)
    assert 0 < priority()[0] - age < 2 * (1 + place / 4096) + 1e-6 * age


def test_rksc_prefers_what_is_shallow_and_attended():
    assert rksc(block(depth=1)) < rksc(block(depth=0))
    assert rksc(block(importance=0.5)) < rksc(block(importance=2.0))
    assert rksc(block(last_use=1)) < rksc(block(last_use=2))


@pytest.mark.parametrize("policy", POLICIES)
def test_all_policies_evict_a_chain_from_its_end(policy):
    blocks = BlockManager(4, 2, policy)
    filled(blocks, 0, list(range(8)))
    blocks.free(0)
    for num_left, seq_id in ((3, 1), (2, 2), (1, 3)):
        filled(blocks, seq_id, [90 + seq_id])
        assert blocks.match([*range(8), 0]) == 2 * num_left


def test_what_is_old_is_overtaken_although_it_was_dear():
    blocks = BlockManager(4, 1, "cost")
    filled(blocks, 0, [1])
    blocks.free(0, returns=True)
    for seq_id in range(1, 200):
        filled(blocks, seq_id, [100 + seq_id])
        blocks.free(seq_id)
        if blocks.match([1, 0]) == 0:
            break
    assert 10 < seq_id < 199


# Importance


def test_a_block_that_was_never_measured_is_an_average_one():
    blocks = BlockManager(8, 2)
    filled(blocks, 0, list(range(8)))
    assert importance(blocks, 0) == [1.0] * 4
    for _ in range(100):
        blocks.observe(0, [0.7, 0.1, 0.1, 0.1])
    assert importance(blocks, 0) == pytest.approx([2.8, 0.4, 0.4, 0.4])
    blocks.observe(0, [0.25] * 4)
    assert importance(blocks, 0)[0] == pytest.approx(2.8 + 0.2 * (1 - 2.8))


@given(masses=st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=3), min_size=1, max_size=30))
def test_importance_stays_between_the_least_and_the_most_that_was_measured(masses):
    blocks = BlockManager(4, 2)
    filled(blocks, 0, [1, 2, 3, 4, 5, 6])
    for mass in masses:
        blocks.observe(0, mass)
    for place, value in enumerate(importance(blocks, 0)):
        seen = [1.0, *(3 * mass[place] for mass in masses)]
        assert min(seen) - 1e-9 <= value <= max(seen) + 1e-9


def test_masses_need_not_fit_the_table_nor_be_finite():
    blocks = BlockManager(8, 2)
    filled(blocks, 0, [1, 2, 3, 4])
    blocks.observe(0, [0.5, 0.5, 0.0, 0.0])  # padded as for a longer table of the same batch
    assert importance(blocks, 0) == pytest.approx([1.0, 1.0])
    blocks.observe(0, [])
    blocks.observe(0, [math.nan, math.inf])
    assert importance(blocks, 0) == pytest.approx([1.0, 1.0])
    blocks.observe(0, [1.0])
    assert importance(blocks, 0) == pytest.approx([1.0, 1.0])


def test_attention_decides_among_blocks_of_one_depth():
    blocks = BlockManager(2, 1, "rksc")
    for seq_id in (0, 1):
        filled(blocks, seq_id, [seq_id])
        blocks.observe(seq_id, [2.0 - seq_id])
        blocks.free(seq_id)
    filled(blocks, 2, [9])
    assert blocks.match([0, 5]) == 1 and blocks.match([1, 5]) == 0


def test_a_block_that_is_computed_again_is_as_shallow_as_it_was():
    blocks = BlockManager(2, 1)
    filled(blocks, 0, [1], depth=0)
    blocks.free(0)
    filled(blocks, 1, [2, 3])
    blocks.free(1)
    filled(blocks, 2, [1], depth=4)
    assert blocks._pool[blocks.block_table(2)[0]].depth == 0
    filled(blocks, 3, [7], depth=3)
    blocks.add(4, [7, 8], depth=1)
    assert blocks._pool[blocks.block_table(4)[0]].depth == 1


# Who comes back


def test_blocks_of_a_branch_that_comes_back_outlive_those_of_one_that_does_not():
    for returning in (0, 1):
        blocks = BlockManager(4, 2, "cost")
        for seq_id in (0, 1):
            filled(blocks, seq_id, [seq_id, 1, 2, 3])
        for seq_id in (0, 1):
            blocks.free(seq_id, returns=seq_id == returning)
        filled(blocks, 2, [7, 7, 7, 7])
        assert blocks.match([returning, 1, 2, 3, 0]) == 4
        assert blocks.match([1 - returning, 1, 2, 3, 0]) == 0


def test_an_expectation_ends_with_the_branch_and_outlives_the_block():
    blocks = BlockManager(2, 1, "cost")
    filled(blocks, 0, [1])
    blocks.fork(0, 1)
    blocks.free(0, returns=True)
    blocks.free(1, returns=True)
    cached = next(b for b in blocks._pool._blocks if b.digest)
    assert cached.num_awaited == 2
    blocks.free(1)
    assert cached.num_awaited == 1
    filled(blocks, 2, [8, 9])  # evicts it
    blocks.free(2)
    assert blocks.match([1, 0]) == 0
    filled(blocks, 3, [1])
    assert blocks._pool[blocks.block_table(3)[0]].num_awaited == 1
    blocks.fork(0, 4)
    assert blocks._pool[blocks.block_table(3)[0]].num_awaited == 2
    blocks.add(0, [1, 5])
    blocks.free(4)
    blocks.free(4)  # of a sequence that is not expected: nothing
    assert blocks._pool[blocks.block_table(3)[0]].num_awaited == 0
    check_integrity(blocks)


def test_a_table_that_is_taken_back_early_is_still_expected_for_all_that_it_had():
    blocks = BlockManager(4, 1, "cost")
    filled(blocks, 0, [1, 2, 3])
    blocks.free(0, returns=True)
    filled(blocks, 1, [8, 9])  # evicts the end
    blocks.add(0, [1, 2, 3, 4])
    assert blocks.num_tokens(0) == 2
    blocks.free(0, returns=True)
    blocks.free(1)
    blocks.reset()
    filled(blocks, 2, [1, 2, 3])
    assert [blocks._pool[i].num_awaited for i in blocks.block_table(2)] == [1, 1, 1]


def test_the_scheduler_says_who_comes_back():
    blocks = BlockManager(4, 4, "cost")
    scheduler = Scheduler(blocks, 64, 8, BlockBytes(1, 0))
    kept = Sequence(0, list(range(8)), kept=True)

    def run(sequence):
        request = Request(sequence.seq_id, sequence, None, 0, len(sequence.token_ids), None)
        scheduler.add(request)
        step = scheduler.schedule()
        scheduler.commit(step.scheduled)
        scheduler.finish(request)
        check_integrity(blocks)
        return step

    def awaited():
        return sorted(b.num_awaited for b in blocks._pool._blocks if b.digest)

    run(kept)
    run(Sequence(1, list(range(50, 61))))  # 3 blocks: the idle sequence is taken back
    assert 0 not in blocks and 1 in awaited()
    run(kept)
    assert sum(awaited()) == 0
    run(Sequence(2, list(range(70, 81))))
    assert 1 in awaited()
    scheduler.release(kept)
    assert sum(awaited()) == 0


# Pins


def test_pinned_blocks_stay_until_they_are_unpinned():
    blocks = BlockManager(4, 2, "lru")
    filled(blocks, 0, [1, 2, 3, 4, 5])
    blocks.pin(0)
    blocks.pin(0)
    blocks.free(0)
    assert blocks.num_pinned == blocks.num_cached == 2 and blocks.num_free == 2
    for seq_id in range(1, 9):
        filled(blocks, seq_id, [10 * seq_id] * 4)
        blocks.free(seq_id)
    assert blocks.match([1, 2, 3, 4, 5]) == 4
    blocks.unpin(0)
    blocks.unpin(0)
    check_integrity(blocks)
    filled(blocks, 9, [7] * 7)
    assert blocks.match([1, 2, 3, 4, 5]) == 0


def test_a_sequence_that_is_pinned_while_it_runs_keeps_what_it_computes_later():
    blocks = BlockManager(6, 2)
    filled(blocks, 0, [1, 2])
    blocks.pin(0)
    blocks.reserve(0, 4)
    blocks.commit(0, [3, 4])
    blocks.free(0, returns=True)
    assert blocks.num_pinned == 2
    blocks.add(0, [1, 2, 3, 4, 5, 6])
    blocks.reserve(0, 6)
    blocks.commit(0, [5, 6])
    blocks.free(0)
    assert blocks.num_pinned == 3
    check_integrity(blocks)


def test_a_pinned_sequence_that_is_taken_back_early_keeps_all_that_it_had():
    blocks = BlockManager(6, 2)
    filled(blocks, 0, [1, 2, 3, 4, 5, 6])
    blocks.pin(0)
    blocks.free(0, returns=True)
    blocks.add(0, [1, 2, 3, 4, 9])
    blocks.free(0)
    assert blocks.num_pinned == 3
    check_integrity(blocks)


def test_nobody_writes_into_a_pinned_block():
    blocks = BlockManager(4, 2)
    filled(blocks, 0, [1, 2])
    blocks.pin(0)
    blocks.free(0)
    filled(blocks, 1, [1, 2, 3])
    blocks.rewind(1, 1)
    (copy,) = blocks.reserve(1, 2)
    assert copy.source != copy.destination
    blocks.commit(1, [9])
    check_integrity(blocks)
    assert blocks.match([1, 2, 0]) == 2


def test_a_cache_that_is_full_of_pinned_blocks_says_so():
    blocks = BlockManager(4, 2)
    for seq_id in (0, 1):
        filled(blocks, seq_id, [seq_id, 2, 3])
        blocks.pin(seq_id)
        blocks.free(seq_id)
    filled(blocks, 2, [7, 7, 7])
    blocks.add(3, [8])
    with pytest.raises(CacheFullError, match=r"0 are free and 0 evictable.*2 blocks of 2 pinned sequences.*unpin"):
        blocks.reserve(3, 1)
    scheduler = Scheduler(blocks, 64, 8, BlockBytes(1, 0))
    request = Request(4, Sequence(4, [5, 5, 5]), None, 0, 3, None)
    scheduler.add(request)
    (failed,) = scheduler.schedule().ended
    assert "2 blocks of 2 pinned sequences" in str(failed.error)
    blocks.reset()
    assert blocks.num_pinned == 0 and blocks.can_reserve(3, 2)
    check_integrity(blocks)


# What is remembered


def test_an_eviction_is_explained_and_says_whether_it_was_needed_again():
    blocks = BlockManager(2, 2, "rksc")
    assert blocks.evictions == [] and blocks.num_recomputed_tokens == 0
    filled(blocks, 0, [1, 2, 3, 4], depth=2)
    blocks.free(0)
    filled(blocks, 1, [7, 8])
    (eviction,) = blocks.evictions
    assert (eviction.num_tokens, eviction.depth, eviction.policy, eviction.num_uses) == (4, 2, "rksc", 1)
    assert eviction.importance == 1.0 and eviction.priority[0] == pytest.approx(1 / 3)
    assert not eviction.needed_again
    blocks.free(1)
    filled(blocks, 2, [1, 2, 3, 4])
    assert eviction.needed_again and blocks.num_recomputed_tokens == 2
    assert [e.needed_again for e in blocks.evictions] == [True, False]
    blocks.free(2)
    filled(blocks, 3, [7, 8])
    assert blocks.num_recomputed_tokens == 4 and blocks.num_evicted_blocks == 3


def test_what_a_reset_forgot_was_not_evicted():
    blocks = BlockManager(2, 2)
    filled(blocks, 0, [1, 2, 3, 4])
    blocks.free(0)
    filled(blocks, 1, [7, 8])
    blocks.free(1)
    blocks.reset()
    filled(blocks, 2, [1, 2, 3, 4])
    assert blocks.num_evicted_blocks == 1 and blocks.num_recomputed_tokens == 0


def test_the_log_is_bounded(monkeypatch):
    monkeypatch.setattr(eviction, "MAX_EVICTIONS", 5)
    blocks = BlockManager(1, 1)
    for seq_id in range(12):
        filled(blocks, seq_id, [seq_id])
        blocks.free(seq_id)
    assert blocks.num_evicted_blocks == 11 and len(blocks.evictions) == 5
    filled(blocks, 20, [0])  # long forgotten: as good as new
    assert blocks.num_recomputed_tokens == 0
    blocks.free(20)
    filled(blocks, 21, [10])
    assert blocks.num_recomputed_tokens == 1


def test_a_policy_of_ones_own():
    def newest(block):
        return (-block.last_use,)

    blocks = BlockManager(2, 1, newest)
    for seq_id in (0, 1, 2):
        filled(blocks, seq_id, [seq_id])
        blocks.free(seq_id)
    assert [blocks.match([i, 9]) for i in (0, 1, 2)] == [1, 0, 1]
    assert blocks.evictions[0].policy == "newest"


def test_a_policy_that_takes_no_account_of_time_evicts_leaves_alone():
    def shallow_last(block):
        return (block.depth,)

    blocks = BlockManager(3, 1, shallow_last)
    filled(blocks, 0, [1])
    blocks.free(0)  # a leaf, and a candidate
    filled(blocks, 1, [1, 2])
    blocks.free(1)  # the same priority as before, but something builds on it now
    filled(blocks, 2, [7, 8])
    assert blocks.match([1, 2, 0]) == 1


def test_a_chain_has_one_candidate_at_a_time():
    blocks = BlockManager(8, 1)
    filled(blocks, 0, [1, 2, 3, 4, 5])
    blocks.free(0)
    assert len(blocks._pool._victims) == 1
    filled(blocks, 1, [10, 11, 12, 13])  # evicts one
    assert len(blocks._pool._victims) == 1 and blocks.match([1, 2, 3, 4, 5, 0]) == 4


def test_a_block_that_more_wait_for_than_when_it_was_offered_is_judged_anew():
    blocks = BlockManager(2, 1, "cost")
    for seq_id in (0, 1):
        filled(blocks, seq_id, [seq_id])
    for seq_id in (0, 1):
        blocks.free(seq_id, returns=True)
    blocks.fork(0, 2)  # two wait for the older block now, one for the other
    filled(blocks, 3, [9])
    assert blocks.match([0, 5]) == 1 and blocks.match([1, 5]) == 0


def test_the_least_recent_goes_first_after_many_hits_without_pressure():
    blocks = BlockManager(4, 1, "lru")
    for token in range(4):
        filled(blocks, token, [token])
    for token in range(4):
        blocks.free(token)
    for seq_id, token in enumerate([3, 2, 1, 0, 3], start=4):
        blocks.add(seq_id, [token, 9])
        blocks.free(seq_id)
    filled(blocks, 9, [8])
    assert [blocks.match([token, 9]) for token in range(4)] == [1, 1, 0, 1]


def test_what_is_pinned_stays_pinned_when_all_blocks_are_lost():
    blocks = BlockManager(4, 2)
    blocks.pin(0)
    blocks.clear()
    filled(blocks, 0, [1, 2])
    blocks.free(0)
    assert blocks.num_pinned == 1
    check_integrity(blocks)

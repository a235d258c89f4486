"""Rooms of blocks in view of layers with a window: who holds them, who gives them back, what that does to prefixes.

That what they hold is right, after any history, is tested in `test_rsbcm.py`.
"""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from integrity import check_integrity

from minirksc.cache.hybrid import HybridManager, WindowCopy, WindowPool, min_blocks
from minirksc.cache.rsbcm import BlockManager
from minirksc.errors import CacheFullError, ConfigError


def manager(window, block_size=4, spare=0, num_blocks=64):
    num_rooms = min_blocks(window, block_size) + spare
    return HybridManager(num_blocks, block_size, WindowPool(num_rooms, window, block_size))


def write(blocks, seq_id, token_ids):
    """The next tokens of a sequence, in one step; the copies that it asked for."""
    copies = blocks.reserve(seq_id, blocks.num_tokens(seq_id) + len(token_ids))
    blocks.commit(seq_id, token_ids)
    check_integrity(blocks)
    return copies


def compute(blocks, seq_id, token_ids, **options):
    """A whole prompt, in steps as large as the pool allows; how many tokens were adopted."""
    blocks.add(seq_id, token_ids, **options)
    adopted = begin = blocks.num_tokens(seq_id)
    while begin < len(token_ids):
        end = min(len(token_ids), begin + blocks.max_chunk_tokens)
        write(blocks, seq_id, token_ids[begin:end])
        begin = end
    return adopted


def rooms(blocks, seq_id):
    return [place for place, room in enumerate(blocks.window_table(seq_id)) if room >= 0]


@given(num_tokens=st.integers(0, 300), window=st.integers(1, 100), size=st.integers(1, 16))
def test_first_needed_and_first_kept_by_their_definition(num_tokens, window, size):
    pool = WindowPool(min_blocks(window, size), window, size)

    def first_seen(query):
        return next(key for key in range(query + 1) if key > query - window)

    assert pool.first_needed(num_tokens) == first_seen(num_tokens) // size
    assert pool.first_kept(num_tokens) == first_seen(max(0, num_tokens - 1)) // size


def test_without_a_window_nothing_is_ever_in_view():
    blocks = BlockManager(8, 4)
    assert blocks.max_chunk_tokens >= 10**9
    compute(blocks, 0, list(range(9)))
    assert sum(blocks.window_counts) == 0
    assert blocks.window_table(0) == blocks.block_table(0)


@pytest.mark.parametrize("window", [1, 3, 4, 5, 16, 17])
def test_a_pool_that_one_sequence_could_get_stuck_in_is_refused(window):
    least = min_blocks(window, 4)
    WindowPool(least, window, 4)
    with pytest.raises(ConfigError, match=f"{least - 1} blocks .* {least} .* window of {window} .*kv_cache_bytes"):
        WindowPool(least - 1, window, 4)


@settings(max_examples=150)
@given(data=st.data(), size=st.sampled_from([1, 2, 3, 4, 8]), window=st.integers(1, 20), spare=st.integers(0, 5))
def test_a_sequence_alone_can_always_write_the_largest_chunk(data, size, window, spare):
    """Whatever was cached before, adopted, forked, merged or rewound."""
    blocks = manager(window, size, spare, num_blocks=400)
    chunk = blocks.max_chunk_tokens
    assert chunk >= size
    seq_id = 0
    for _ in range(data.draw(st.integers(1, 4))):
        prompt = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=50))
        blocks.add(seq_id, prompt, use_cache=data.draw(st.booleans()))
        rest = prompt[blocks.num_tokens(seq_id) :]
        for _ in range(data.draw(st.integers(1, 5))):
            num_tokens = data.draw(st.one_of(st.just(chunk), st.integers(1, chunk)))
            assert blocks.can_reserve(seq_id, blocks.num_tokens(seq_id) + chunk)
            write(blocks, seq_id, (rest + [data.draw(st.integers(0, 1))] * chunk)[:num_tokens])
            rest = rest[num_tokens:]
            action = data.draw(st.sampled_from(["go on", "fork", "become a fork", "rewind"]))
            if action == "rewind":
                blocks.rewind(seq_id, blocks.num_tokens(seq_id) - 1)
                assert blocks.can_reserve(seq_id, blocks.num_tokens(seq_id) + chunk)
                write(blocks, seq_id, [2])
            elif action != "go on":
                blocks.fork(seq_id, seq_id + 1)
                blocks.free(seq_id if action == "become a fork" else seq_id + 1)
                seq_id += action == "become a fork"
            check_integrity(blocks)
        blocks.free(seq_id)
        seq_id += 1
    assert blocks.windows.num_used == 0


@pytest.mark.parametrize(("window", "size"), [(1, 1), (1, 4), (5, 4), (8, 4), (9, 4), (32, 16), (33, 16)])
def test_a_sequence_holds_its_window_however_long_it_grows(window, size):
    blocks = manager(window, size, num_blocks=600)
    blocks.add(0, [1])
    for num_tokens in range(1, 500):
        write(blocks, 0, [num_tokens % 7])
        first = max(0, num_tokens - window) // size
        assert blocks.windows.num_used == -(-num_tokens // size) - first
        assert set(range(first, -(-num_tokens // size))) <= set(rooms(blocks, 0))
    assert blocks.num_used == -(-499 // size)
    blocks.free(0)
    assert blocks.num_used == blocks.windows.num_used == 0
    blocks.reset()
    assert blocks.windows.num_free == blocks.windows.num_blocks


def test_rooms_enough_for_all_blocks_change_nothing():
    """Against a manager without windows: the same tables, copies and matches after any operations."""
    rng = random.Random(3)
    plain, windowed = BlockManager(20, 4), HybridManager(20, 4, WindowPool(20, 6, 4))
    live, next_id, num_adopted = [], 0, 0
    for _ in range(2000):
        action = rng.random()
        if action < 0.3 or not live:
            prompt = [rng.randrange(2) for _ in range(rng.randrange(1, 24))]
            assert plain.match(prompt) == windowed.match(prompt)
            copies = [blocks.add(next_id, prompt, depth=next_id % 3) for blocks in (plain, windowed)]
            num_adopted += plain.num_tokens(next_id)
            live.append(next_id)
            next_id += 1
        elif action < 0.7:
            seq_id, tokens = rng.choice(live), [rng.randrange(2) for _ in range(rng.randrange(1, 6))]
            end = plain.num_tokens(seq_id) + len(tokens)
            assert plain.can_reserve(seq_id, end) == windowed.can_reserve(seq_id, end)
            if not plain.can_reserve(seq_id, end):
                live.remove(seq_id)
                for blocks in (plain, windowed):
                    blocks.free(seq_id)
                continue
            copies = [blocks.reserve(seq_id, end) for blocks in (plain, windowed)]
            for blocks in (plain, windowed):
                blocks.commit(seq_id, tokens)
        elif action < 0.8:
            seq_id = rng.choice(live)
            for blocks in (plain, windowed):
                blocks.fork(seq_id, next_id)
            live.append(next_id)
            next_id += 1
        else:
            seq_id = live.pop(rng.randrange(len(live)))
            for blocks in (plain, windowed):
                blocks.free(seq_id)
        assert copies[0] == [copy for copy in copies[1] if not isinstance(copy, WindowCopy)]
        assert all(plain.block_table(seq_id) == windowed.block_table(seq_id) for seq_id in live)
        check_integrity(windowed)
    assert num_adopted > 1000 and plain.num_evicted_blocks > 150


# What is adopted


def test_a_prefix_whose_window_is_gone_is_adopted_as_far_as_one_is_left():
    blocks = manager(window=8, spare=4)  # 9 rooms
    prompt = list(range(40))
    compute(blocks, 0, prompt)
    blocks.free(0)
    assert blocks.match([*prompt, 99]) == 40  # the last of its 10 blocks have kept their rooms
    assert blocks.match([*prompt[:6], 99]) == 0  # the first has none: it is no window, nor can it be copied from
    assert blocks.num_cached == 10

    compute(blocks, 1, list(range(100, 116)))  # takes four rooms: those of the blocks that left the window first
    blocks.free(1)
    assert blocks.match([*prompt, 99]) == 40
    compute(blocks, 2, list(range(200, 228)))  # takes all others, so that no window is whole anywhere
    blocks.free(2)
    assert blocks.match([*prompt, 99]) == 0
    assert compute(blocks, 3, [*prompt, 99]) == 0
    assert blocks.windows.num_used <= 9


@settings(max_examples=150)
@given(
    size=st.integers(1, 5),
    window=st.integers(1, 14),
    spare=st.integers(0, 12),
    num_blocks=st.integers(1, 12),
    others=st.lists(st.integers(1, 12), max_size=4),
)
def test_adopted_is_the_longest_prefix_that_has_the_window_before_its_end(size, window, spare, num_blocks, others):
    blocks = manager(window, size, spare, num_blocks=400)
    prompt = list(range(num_blocks * size))
    compute(blocks, 0, prompt)
    for seq_id, num_tokens in enumerate(others, start=1):  # take some of the rooms that are not in view
        blocks.add(seq_id, [1000 * seq_id])
        if blocks.can_reserve(seq_id, num_tokens):
            write(blocks, seq_id, range(1000 * seq_id, 1000 * seq_id + num_tokens))
        blocks.free(seq_id)

    with_room = set(rooms(blocks, 0))

    def has_window(num_whole):
        return {key // size for key in range(max(0, num_whole * size - window + 1), num_whole * size)} <= with_room

    for num_equal in range(num_blocks + 1):
        longest = max(num_whole for num_whole in range(num_equal + 1) if has_window(num_whole))
        assert blocks.match([*prompt[: num_equal * size], -1]) == longest * size


def test_no_block_before_the_window_is_asked_for():
    blocks = manager(window=6)  # 5 rooms
    compute(blocks, 0, list(range(40)))
    blocks.add(1, [100])
    write(blocks, 1, list(range(100, 112)))  # takes all that are out of view
    assert rooms(blocks, 0) == [8, 9]
    assert blocks.match([*range(40), 99]) == 40


def test_a_prefix_inside_the_first_window_needs_all_of_its_blocks():
    blocks = manager(window=16, spare=4)
    compute(blocks, 0, list(range(12)))
    assert blocks.match([*range(12), 99]) == 12
    assert blocks.match([*range(10), 99]) == 10  # two tokens of the third block by copy
    blocks.add(1, [*range(10), 99])
    assert rooms(blocks, 1) == [0, 1, 2]


def test_blocks_before_the_window_are_adopted_without_room():
    blocks = manager(window=4, spare=8)
    compute(blocks, 0, list(range(21)))
    blocks.free(0)
    in_view = blocks.windows.num_used
    assert in_view == 0
    blocks.add(1, list(range(21)))
    assert blocks.num_tokens(1) == 20 and blocks.num_used == 5
    # The query at 20 sees 17..20, all of the fifth block but its first token.
    assert blocks.windows.num_used == 1 and rooms(blocks, 1)[-1] == 4
    write(blocks, 1, [20])
    check_integrity(blocks)


def test_a_partial_block_is_left_out_when_no_room_is_left_for_its_copy():
    blocks = HybridManager(64, 4, WindowPool(4, 4, 4))
    compute(blocks, 0, [1, 2, 3, 4])
    blocks.add(1, [5])
    write(blocks, 1, [5])
    blocks.reserve(1, 10)  # three of four rooms
    assert blocks.add(2, [1, 2, 9]) == []  # the fourth is that of the only source
    assert blocks.num_tokens(2) == 0 and blocks.match([1, 2, 9]) == 2
    check_integrity(blocks)


# Who holds what


def test_a_fork_shares_the_rooms_and_each_gives_up_its_own_view():
    blocks = manager(window=6, spare=12)
    compute(blocks, 0, list(range(10)))
    used = blocks.windows.num_used
    for child in (1, 2):
        blocks.fork(0, child)
    assert blocks.windows.num_used == used and blocks.window_table(1) == blocks.window_table(0)
    shared = blocks.window_table(0)[1]
    _, copy = write(blocks, 1, [50])
    assert copy.source == blocks.window_table(0)[2] and copy.destination == blocks.window_table(1)[2]
    for token in range(20):
        write(blocks, 1, [token])
    assert blocks.windows.num_used == used + 2  # what the child sees now is its own, the others still see theirs
    assert blocks.window_table(0)[1] == blocks.window_table(2)[1] == shared
    for seq_id in (0, 2):
        blocks.free(seq_id)
        check_integrity(blocks)
    assert blocks.windows.num_used == 2


def test_equal_blocks_are_merged_with_their_rooms():
    blocks = manager(window=8, spare=8)
    prompt = list(range(10))
    blocks.add(0, prompt)
    blocks.add(1, prompt)
    for seq_id in (0, 1):
        blocks.reserve(seq_id, 10)
    assert blocks.windows.num_used == 6
    for seq_id in (0, 1):
        blocks.commit(seq_id, prompt)
        check_integrity(blocks)
    assert blocks.block_table(0)[:2] == blocks.block_table(1)[:2] and blocks.num_used == 4
    assert blocks.window_table(0)[:2] == blocks.window_table(1)[:2] and blocks.windows.num_used == 4


def test_an_equal_block_that_lost_its_room_takes_over_the_newcomers():
    blocks = manager(window=4, spare=0)  # 4 rooms
    compute(blocks, 0, list(range(30)))
    assert blocks.window_table(0)[0] == -1
    blocks.fork(0, 1)  # holds the same blocks, none of which it sees
    blocks.free(0)
    blocks.add(2, list(range(30)), use_cache=False)
    blocks.reserve(2, 4)
    own = blocks.window_table(2)[0]
    blocks.commit(2, list(range(4)))
    check_integrity(blocks)
    assert blocks.block_table(2)[0] == blocks.block_table(1)[0]
    assert blocks.window_table(2)[0] == own
    assert blocks.match([*range(4), 99]) == 4  # others can begin there again
    write(blocks, 2, [4, 5])
    blocks.free(2)
    check_integrity(blocks)


def test_a_block_out_of_view_that_nobody_can_find_keeps_no_room():
    blocks = manager(window=2, spare=10)
    blocks.add(0, [1])
    blocks.reserve(0, 12)  # reserved and never written
    assert blocks.windows.num_used == 3
    write(blocks, 0, [1, 1, 1, 1])  # fills a block, which is indexed
    blocks.free(0)
    assert blocks.windows.num_cached == 1 and blocks.num_cached == 1


def test_eviction_of_a_block_gives_back_its_room():
    blocks = HybridManager(5, 4, WindowPool(5, 4, 4))
    compute(blocks, 0, list(range(16)))
    blocks.free(0)
    assert blocks.windows.num_cached == 4
    compute(blocks, 1, list(range(50, 66)))
    assert blocks.num_evicted_blocks == 3 and blocks.match([*range(16), 99]) < 16


def test_a_full_window_pool_is_an_error_that_names_it():
    blocks = manager(window=4)  # 4 rooms, all of which one sequence can use in a step
    blocks.add(0, [1])
    blocks.reserve(0, 16)
    blocks.add(1, [2])
    assert not blocks.can_reserve(1, 1) and blocks.can_reserve(1, 0, total=200)
    with pytest.raises(CacheFullError, match="for windows 0 and 0 of 4; raise kv_cache_bytes"):
        blocks.reserve(1, 1)
    blocks.free(0)
    assert blocks.can_reserve(1, 16) and not blocks.can_reserve(1, 17)


def test_rewinding_by_one_finds_the_window_of_the_last_token():
    for window in range(1, 12):
        blocks = manager(window, num_blocks=20)
        compute(blocks, 0, list(range(40)))
        for num_tokens in range(40, 50):
            blocks.fork(0, 1)
            blocks.rewind(1, num_tokens - 1)
            check_integrity(blocks)
            seen = range(max(0, num_tokens - window), num_tokens - 1)
            assert {position // 4 for position in seen} <= set(rooms(blocks, 1))
            write(blocks, 1, [99])
            blocks.free(1)
            write(blocks, 0, [num_tokens])


def test_what_has_left_the_window_cannot_be_rewound_to_and_clearing_frees_every_room():
    blocks = manager(4, num_blocks=20)
    compute(blocks, 0, list(range(40)))
    assert blocks.can_rewind(0, 39) and not blocks.can_rewind(0, 20)
    blocks.clear()
    check_integrity(blocks)
    assert blocks.windows.num_free == blocks.windows.num_blocks and 0 not in blocks


def test_a_pinned_window_that_lost_a_room_while_its_sequence_was_back_is_not_held_any_more():
    blocks = manager(window=8, spare=0)  # 5 rooms
    prompt = list(range(40))
    compute(blocks, 0, prompt)
    blocks.pin(0)
    blocks.free(0)
    assert blocks.windows.num_used == 2
    blocks.add(0, prompt)  # the last block is its own: one token is left to compute
    compute(blocks, 1, [100, 101, 102, 103, 104])  # takes the room of the pinned one
    blocks.free(0)
    check_integrity(blocks)
    assert blocks.windows.num_used == 2 and blocks.num_pinned == 10
    assert blocks.match([*prompt, 99]) == 36
    blocks.unpin(0)
    check_integrity(blocks)

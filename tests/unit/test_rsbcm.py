"""The block manager against a naive model that simulates the KV itself.

The model keeps, for every block, the tokens physically written into it, applying the copies that the manager
asks for; for every room of the window pool likewise. Whatever happens, every sequence must read back through its
tables exactly its own tokens: all of them, and of the layers with a window what the window reaches.
"""

import hashlib
import math
import random
import struct
from types import SimpleNamespace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from integrity import check_integrity, pinned_in_view

from minirksc.cache.eviction import POLICIES
from minirksc.cache.hybrid import HybridManager, WindowCopy, WindowPool, min_blocks
from minirksc.cache.rsbcm import BlockManager
from minirksc.errors import CacheFullError, ConfigError

SALTS = (b"", b"tenant")


class Simulation:
    """A block manager, the KV that its caller would hold, and what each sequence should contain.

    With a window, `spare` is what the window pool has beyond the least.
    """

    def __init__(self, num_blocks, block_size, policy, window=None, spare=0):
        if window is None:
            self.windows = SimpleNamespace(num_blocks=0, num_free=0, num_cached=0, num_used=0)
            self.blocks = BlockManager(num_blocks, block_size, policy)
        else:
            self.windows = WindowPool(min_blocks(window, block_size) + spare, window, block_size)
            self.blocks = HybridManager(num_blocks, block_size, self.windows, policy)
        self.size, self.window = block_size, window
        # (salt, history) stands for the KV of a token: it depends on every token before it.
        self.kv, self.window_kv = {}, {}
        self.tokens = {}
        self.salts = {}
        self.away = {}  # sequences whose table was taken back and who return: seq_id -> (tokens, salt)
        self.pinned = {}  # seq_id -> (tokens of the full blocks that stay, salt); None while its table was never closed
        self.approximate = {}  # seq_id -> (first position whose KV is not the model's own, whose it is)
        self.rewindable = set()  # with a window: sequences whose last token may be computed once more
        self.next_id = 0

    def add(self, token_ids, salt, use_cache=True, seq_id=None):
        if seq_id is None:
            seq_id, self.next_id = self.next_id, self.next_id + 1
        expected = self.blocks.match(token_ids, salt) if use_cache else 0
        free_before = self.blocks.num_free + self.blocks.num_cached - self.blocks.num_pinned
        rooms_before = self.windows.num_free + self.windows.num_cached
        self.copy(self.blocks.add(seq_id, token_ids, salt=salt, use_cache=use_cache))
        adopted = self.blocks.num_tokens(seq_id)
        assert adopted < len(token_ids) or not token_ids
        if adopted != expected:  # only the partial block may be left out, and only for want of room
            num_whole = expected // self.size
            assert adopted == num_whole * self.size
            no_block = free_before <= num_whole + 1
            assert no_block or (self.window and rooms_before <= min(num_whole, self.num_in_view(adopted)) + 1)
        self.tokens[seq_id], self.salts[seq_id] = list(token_ids[:adopted]), salt
        return seq_id

    def num_in_view(self, num_tokens):
        """Blocks that hold what the query after so many tokens sees."""
        return -(-num_tokens // self.size) - max(0, num_tokens - self.window + 1) // self.size

    def extend(self, seq_id, token_ids):
        """Reserve, write, commit; False when there is no room."""
        old = self.tokens[seq_id]
        end = len(old) + len(token_ids)
        if not self.blocks.can_reserve(seq_id, end):
            before = self.state(seq_id)
            with pytest.raises(CacheFullError):
                self.blocks.reserve(seq_id, end)
            assert self.state(seq_id) == before
            return False
        needed = self.blocks.blocks_needed(seq_id, end)
        used = self.blocks.num_used, self.windows.num_used
        self.copy(self.blocks.reserve(seq_id, end))
        assert self.blocks.num_used <= used[0] + needed
        assert self.windows.num_used <= used[1] + needed
        table, window_table = self.blocks.block_table(seq_id), self.blocks.window_table(seq_id)
        new = [*old, *token_ids]
        for position in range(len(old), end):
            history = self.history(seq_id, new, position)
            place, offset = divmod(position, self.size)
            self.kv[table[place], offset] = history
            self.window_kv[window_table[place], offset] = history
        self.check_reads(seq_id, new, len(old))  # as the attention of this step reads
        self.blocks.commit(seq_id, token_ids)
        self.tokens[seq_id] = new
        self.rewindable.add(seq_id)
        return True

    def history(self, seq_id, tokens, position):
        """What the KV of a token depends on."""
        begin, whose = self.approximate.get(seq_id, (math.inf, None))
        return self.salts[seq_id], tuple(tokens[: position + 1]), whose if position >= begin else None

    def keep_out_of_index(self, seq_id):
        """What it computes from here on is of no use to other prompts."""
        self.blocks.keep_out_of_index(seq_id, len(self.tokens[seq_id]))
        self.approximate.setdefault(seq_id, (len(self.tokens[seq_id]), seq_id))

    def state(self, seq_id):
        counts = [(pool.num_free, pool.num_cached, pool.num_used) for pool in (self.blocks, self.windows)]
        return list(self.blocks.block_table(seq_id)), list(self.blocks.window_table(seq_id)), counts

    def fork(self, seq_id):
        child, self.next_id = self.next_id, self.next_id + 1
        used = self.blocks.num_used, self.windows.num_used
        self.blocks.fork(seq_id, child, depth=child % 5)
        assert (self.blocks.num_used, self.windows.num_used) == used
        self.tokens[child], self.salts[child] = list(self.tokens[seq_id]), self.salts[seq_id]
        if seq_id in self.approximate:
            self.approximate[child] = self.approximate[seq_id]
        if seq_id in self.rewindable:
            self.rewindable.add(child)
        return child

    def rewind(self, seq_id, num_tokens):
        self.blocks.rewind(seq_id, num_tokens)
        if num_tokens < len(self.tokens[seq_id]):
            self.rewindable.discard(seq_id)
        del self.tokens[seq_id][num_tokens:]

    def least_rewind(self, seq_id):
        """To how few tokens the sequence may be rewound."""
        if self.window is None:
            return 0
        return len(self.tokens[seq_id]) - (seq_id in self.rewindable)

    def free(self, seq_id, returns=False):
        if returns:
            self.away[seq_id] = self.tokens[seq_id], self.salts[seq_id]
        if seq_id in self.pinned:
            table = self.blocks.block_table(seq_id)
            indexed = [self.blocks._pool[block_id].digest is not None for block_id in table]
            stays = self.tokens[seq_id][: [*indexed, False].index(False) * self.size]
            before = self.pinned[seq_id]
            if before is None or before[0][: len(stays)] != stays or len(stays) > len(before[0]):
                self.pinned[seq_id] = stays, self.salts[seq_id]
        self.blocks.free(seq_id, returns=returns)
        del self.tokens[seq_id], self.salts[seq_id]
        self.approximate.pop(seq_id, None)
        self.rewindable.discard(seq_id)

    def come_back(self, seq_id):
        tokens, salt = self.away.pop(seq_id)
        self.add(tokens or [0], salt, seq_id=seq_id)
        if tokens:
            self.extend(seq_id, tokens[len(self.tokens[seq_id]) :])

    def forget(self, seq_id):
        del self.away[seq_id]
        self.blocks.free(seq_id)

    def pin(self, seq_id):
        self.blocks.pin(seq_id)
        self.pinned.setdefault(seq_id, None)

    def unpin(self, seq_id):
        self.blocks.unpin(seq_id)
        self.pinned.pop(seq_id, None)

    def reset(self):
        self.blocks.reset()
        self.pinned.clear()
        assert self.blocks.num_cached == self.blocks.num_pinned == 0

    def copy(self, copies):
        moves = [tuple(c) for c in copies if not isinstance(c, WindowCopy)]
        self.kv |= {(new, i): self.kv.get((old, i)) for old, new in moves for i in range(self.size)}
        in_window = [tuple(c) for c in copies if isinstance(c, WindowCopy)]
        assert len(in_window) == (0 if self.window is None else len(moves)) and all(min(c) >= 0 for c in in_window)
        self.window_kv |= {(new, i): self.window_kv.get((old, i)) for old, new in in_window for i in range(self.size)}

    def check_reads(self, seq_id, tokens, first_query):
        """What the queries at positions from first_query on find, each with the tokens up to its own stored."""
        table, window_table = self.blocks.block_table(seq_id), self.blocks.window_table(seq_id)
        assert len(table) == len(window_table)
        for position in range(len(tokens)):
            expected = self.history(seq_id, tokens, position)
            place, offset = divmod(position, self.size)
            assert self.kv[table[place], offset] == expected
            if self.window is not None and position > first_query - self.window:
                assert self.window_kv[window_table[place], offset] == expected

    def check(self):
        check_integrity(self.blocks)
        for pool in (self.blocks, self.windows):
            assert pool.num_free + pool.num_cached + pool.num_used == pool.num_blocks
        in_view = set()
        for seq_id, tokens in self.tokens.items():
            num_tokens = len(tokens)
            assert self.blocks.num_tokens(seq_id) == num_tokens
            # The next query stands after all tokens; before it the last token may be computed once more.
            self.check_reads(seq_id, tokens, num_tokens - (seq_id in self.rewindable))
            if self.window is not None:
                in_view.update(self.blocks.block_table(seq_id)[max(0, num_tokens - self.window) // self.size :])
        if self.window is None:
            for kept in filter(None, self.pinned.values()):
                assert self.blocks.match([*kept[0], -1], kept[1]) >= len(kept[0])
        else:
            for seq_id in self.blocks._pinned:
                in_view.update(self.blocks._index.get(d).block_id for d in pinned_in_view(self.blocks, seq_id))
        assert self.windows.num_used <= len(in_view), "room that no window needs is held"


def run_random_operations(
    num_operations, seed, num_blocks=24, block_size=4, policy="rksc", check_every=1, window=None, spare=0
):
    """Random operations with every invariant checked; for long runs by hand."""
    rng = random.Random(seed)
    sim = Simulation(num_blocks, block_size, policy, window, spare)
    prompts = [[rng.randrange(3) for _ in range(40)] for _ in range(4)]
    num_adopted = 0
    for step in range(num_operations):
        live = list(sim.tokens)
        action = rng.random()
        if len(live) > 12:  # many sequences make every check slow and find nothing new
            sim.free(rng.choice(live))
        elif action < 0.2 or not live:
            prompt = [*rng.choice(prompts)[: rng.randrange(1, 30)], rng.randrange(3)]
            seq_id = sim.add(prompt, rng.choice(SALTS), rng.random() < 0.9)
            num_adopted += sim.blocks.num_tokens(seq_id)
            if not sim.extend(seq_id, prompt[len(sim.tokens[seq_id]) :][: rng.randrange(1, 40)]):
                sim.free(rng.choice(live or [seq_id]))
        elif action < 0.6:
            seq_id = rng.choice(live)
            if not sim.extend(seq_id, [rng.randrange(3) for _ in range(rng.randrange(1, 7))]):
                sim.free(rng.choice(live))
        elif action < 0.72 and len(live) < 12:
            sim.fork(rng.choice(live))
        elif action < 0.8:
            seq_id = rng.choice(live)
            sim.rewind(seq_id, rng.randint(sim.least_rewind(seq_id), len(sim.tokens[seq_id])))
        elif action < 0.88:
            sim.free(rng.choice(live), returns=rng.random() < 0.5)
        elif action < 0.92 and sim.away:
            seq_id = rng.choice(sorted(sim.away))
            sim.come_back(seq_id) if rng.random() < 0.7 else sim.forget(seq_id)
        elif action < 0.95:
            seq_id = rng.choice(live)
            sim.blocks.observe(seq_id, [rng.random() for _ in range(len(sim.blocks.block_table(seq_id)) + 1)])
        elif action < 0.96 and len(sim.pinned) < 2:
            sim.pin(rng.choice(live))
        elif action < 0.99:
            sim.unpin(rng.choice(sorted(sim.pinned) or live))
        else:
            sim.reset()
        if step % check_every == 0:
            sim.check()
    return sim, num_adopted


@pytest.mark.parametrize("policy", POLICIES)
def test_ten_thousand_random_operations(policy):
    sim, _ = run_random_operations(10_000 // len(POLICIES) + 1, seed=1, policy=policy)
    assert sim.blocks.num_evicted_blocks > 100


# (window, spare rooms): windows smaller and larger than a block of 4, at its borders, as large as the sequences.
@pytest.mark.parametrize(("window", "spare"), [(1, 0), (3, 8), (4, 2), (5, 20), (8, 0), (13, 5), (30, 10), (200, 30)])
def test_random_operations_with_a_window(window, spare):
    sim, num_adopted = run_random_operations(2_000, seed=window, window=window, spare=spare)
    assert sim.blocks.num_evicted_blocks > 100 and num_adopted > 200


class BlockManagerMachine(RuleBasedStateMachine):
    """The same, with hypothesis in the lead: it shrinks what fails."""

    windows = st.none()

    @initialize(
        num_blocks=st.integers(1, 12),
        block_size=st.integers(1, 4),
        policy=st.sampled_from(sorted(POLICIES)),
        spare=st.integers(0, 6),
        data=st.data(),
    )
    def start(self, num_blocks, block_size, policy, spare, data):
        self.sim = Simulation(num_blocks, block_size, policy, data.draw(self.windows), spare)

    @rule(prompt=st.lists(st.integers(0, 1), min_size=1, max_size=12), salt=st.sampled_from(SALTS), cache=st.booleans())
    def add(self, prompt, salt, cache):
        seq_id = self.sim.add(prompt, salt, cache)
        self.sim.extend(seq_id, prompt[len(self.sim.tokens[seq_id]) :])

    @rule(prompt=st.lists(st.integers(0, 1), min_size=1, max_size=12))
    def adopt_only(self, prompt):
        self.sim.add(prompt, SALTS[0])

    @precondition(lambda self: self.sim.tokens)
    @rule(data=st.data(), tokens=st.lists(st.integers(0, 1), min_size=1, max_size=6))
    def extend(self, data, tokens):
        self.sim.extend(self.pick(data), tokens)

    @precondition(lambda self: self.sim.tokens)
    @rule(data=st.data())
    def fork(self, data):
        self.sim.fork(self.pick(data))

    @precondition(lambda self: self.sim.tokens)
    @rule(data=st.data())
    def keep_out_of_index(self, data):
        self.sim.keep_out_of_index(self.pick(data))

    @precondition(lambda self: self.sim.tokens)
    @rule(data=st.data())
    def rewind(self, data):
        seq_id = self.pick(data)
        least = self.sim.least_rewind(seq_id)
        self.sim.rewind(seq_id, data.draw(st.integers(least, len(self.sim.tokens[seq_id]))))

    @precondition(lambda self: self.sim.tokens)
    @rule(data=st.data(), returns=st.booleans())
    def free(self, data, returns):
        self.sim.free(self.pick(data), returns)

    @precondition(lambda self: self.sim.away)
    @rule(data=st.data(), comes=st.booleans())
    def come_back_or_not(self, data, comes):
        seq_id = data.draw(st.sampled_from(sorted(self.sim.away)))
        self.sim.come_back(seq_id) if comes else self.sim.forget(seq_id)

    @precondition(lambda self: self.sim.tokens)
    @rule(data=st.data(), mass=st.lists(st.floats(0, 1) | st.just(math.nan), max_size=6))
    def observe(self, data, mass):
        self.sim.blocks.observe(self.pick(data), mass)

    @precondition(lambda self: self.sim.tokens)
    @rule(data=st.data())
    def pin(self, data):
        self.sim.pin(self.pick(data))

    @precondition(lambda self: self.sim.pinned)
    @rule(data=st.data())
    def unpin(self, data):
        self.sim.unpin(data.draw(st.sampled_from(sorted(self.sim.pinned))))

    @rule()
    def reset(self):
        self.sim.reset()

    @invariant()
    def intact(self):
        if hasattr(self, "sim"):
            self.sim.check()

    def pick(self, data):
        return data.draw(st.sampled_from(sorted(self.sim.tokens)))


class WindowMachine(BlockManagerMachine):
    """With a pool apart."""

    windows = st.integers(1, 9)


TestBlockManagerMachine = BlockManagerMachine.TestCase
TestBlockManagerMachine.settings = settings(max_examples=150, stateful_step_count=40)
TestWindowMachine = WindowMachine.TestCase
TestWindowMachine.settings = settings(max_examples=100, stateful_step_count=40)


def filled(blocks, seq_id, tokens, **options):
    """Adds a sequence and writes all of its tokens."""
    blocks.add(seq_id, tokens, **options)
    blocks.reserve(seq_id, len(tokens))
    blocks.commit(seq_id, tokens[blocks.num_tokens(seq_id) :])


def test_a_full_hit_leaves_one_token_to_compute():
    blocks = BlockManager(8, 4)
    filled(blocks, 0, list(range(8)))
    copies = blocks.add(1, list(range(8)))
    assert blocks.num_tokens(1) == 7  # one whole block and three tokens of the next, by copy
    assert blocks.block_table(1)[0] == blocks.block_table(0)[0]
    assert [c.source for c in copies] == [blocks.block_table(0)[1]]
    assert blocks.add(2, [0]) == [] and blocks.num_tokens(2) == 0


def test_salts_never_mix():
    blocks = BlockManager(8, 2)
    filled(blocks, 0, [1, 2, 3, 4, 5], salt=b"a")
    assert blocks.match([1, 2, 3, 4, 5], b"b") == 0
    assert blocks.match([1, 2, 3, 4, 5], b"a") == 4


def test_what_is_approximate_is_found_by_forks_alone():
    blocks = BlockManager(8, 2)
    filled(blocks, 0, [1, 2, 3])
    blocks.keep_out_of_index(0, 3)
    blocks.reserve(0, 8)
    blocks.commit(0, [4, 5, 6, 7, 8])
    assert blocks.match([*range(1, 9), 0]) == 2  # the second block is half approximate
    blocks.fork(0, 1)
    filled(blocks, 2, [*range(1, 9), 0])
    assert blocks.num_shared_tokens(1) == 8 and blocks.num_shared_tokens(2) == 2
    check_integrity(blocks)


@pytest.mark.parametrize("root_tag", [b"", b"salt:", b"block:"])
@pytest.mark.parametrize("block_tag", [b"", b"block:"])
def test_no_salt_can_be_spelt_to_continue_anothers_history(root_tag, block_tag):
    blocks = BlockManager(8, 2)
    filled(blocks, 0, [1, 2, 3, 4, 5])
    root = hashlib.sha256(root_tag).digest()
    salt = block_tag + root + struct.pack("<2q", 1, 2)  # what the key of [1, 2] could be the hash of
    assert blocks.match([3, 4, 5], salt) == 0
    blocks.add(1, [3, 4, 5], salt=salt)
    assert blocks.num_tokens(1) == 0
    check_integrity(blocks)


def test_bookkeeping_does_not_grow_with_the_number_of_sequences():
    blocks = BlockManager(64, 4)
    for seq_id in range(300):  # a hit each time, and never any pressure
        filled(blocks, seq_id, list(range(9)))
        blocks.reserve(seq_id, 40)
        blocks.free(seq_id)
        check_integrity(blocks)
    assert blocks.num_evicted_blocks == 0


def test_an_evicted_block_is_not_found_under_its_old_tokens():
    blocks = BlockManager(2, 2)
    filled(blocks, 0, [1, 2, 3, 4])
    blocks.free(0)
    assert blocks.num_cached == 2
    filled(blocks, 1, [7, 8, 9, 9])
    assert blocks.num_evicted_blocks == 2
    assert blocks.match([1, 2, 3, 4]) == 0
    assert blocks.match([7, 8, 9, 9]) == 3


def test_a_shared_partial_block_is_copied_at_the_first_write_and_not_before():
    blocks = BlockManager(8, 4)
    filled(blocks, 0, [1, 2, 3, 4, 5])
    blocks.fork(0, 1)
    assert blocks.num_used == 2 and blocks.num_shared_tokens(1) == 5
    (copy,) = blocks.reserve(1, 6)
    assert copy.source == blocks.block_table(0)[1] and copy.destination == blocks.block_table(1)[1]
    assert blocks.reserve(0, 6) == []  # the parent is alone on it now
    assert blocks.num_shared_tokens(1) == 4


def test_the_parent_may_write_first():
    blocks = BlockManager(8, 4)
    filled(blocks, 0, [1, 2, 3, 4, 5])
    blocks.reserve(0, 12)  # blocks that are reserved and not written stay the parent's
    blocks.fork(0, 1)
    reserved = blocks.block_table(0)[2]
    assert blocks.block_table(1) == blocks.block_table(0)[:2]
    (copy,) = blocks.reserve(0, 12)
    assert copy.source == blocks.block_table(1)[1]
    assert reserved in blocks.block_table(0) and len(blocks.block_table(0)) == 3
    check_integrity(blocks)


def test_rewinding_into_an_indexed_block_never_changes_what_others_find():
    blocks = BlockManager(8, 2)
    filled(blocks, 0, [1, 2, 3, 4])
    blocks.fork(0, 1)
    blocks.rewind(0, 3)
    (copy,) = blocks.reserve(0, 4)
    blocks.commit(0, [9])
    assert copy.source == blocks.block_table(1)[1]
    assert blocks.match([1, 2, 3, 4, 0]) == 4 and blocks.match([1, 2, 3, 9, 0]) == 4
    check_integrity(blocks)


def test_only_leaves_are_evicted_and_what_runs_is_pinned():
    blocks = BlockManager(4, 1, "lru")
    filled(blocks, 0, [1, 2, 3])
    blocks.free(0)
    filled(blocks, 1, [1, 9])  # touches the first block, shares it
    assert blocks.num_used == 2
    filled(blocks, 2, [5])  # takes the leaf [1, 2, 3]
    assert blocks.match([1, 2, 3, 0]) == 2
    filled(blocks, 3, [6])
    assert blocks.match([1, 2, 3, 0]) == 1
    blocks.add(4, [7])
    assert not blocks.can_reserve(4, 1)
    with pytest.raises(CacheFullError, match="evictable"):
        blocks.reserve(4, 1)


@pytest.mark.parametrize(("policy", "survivor"), [("lru", 1), ("lfu", 0), ("rksc", 0)])
def test_policies_choose_differently(policy, survivor):
    blocks = BlockManager(2, 1, policy)
    filled(blocks, 0, [1], depth=0)
    for seq_id in (10, 11, 12):  # often used, and before the other one
        blocks.fork(0, seq_id)
        blocks.free(seq_id)
    filled(blocks, 1, [2], depth=3)
    blocks.free(0)
    blocks.free(1)
    filled(blocks, 2, [3])
    assert [blocks.match([1, 0]), blocks.match([2, 0])] == [int(survivor == 0), int(survivor == 1)]


def test_a_partial_block_is_not_taken_from_the_only_evictable_source():
    blocks = BlockManager(1, 4)
    filled(blocks, 0, [1, 2, 3, 4])
    blocks.free(0)
    assert blocks.add(1, [1, 2, 9]) == []
    assert blocks.num_tokens(1) == 0 and blocks.match([1, 2, 9]) == 2
    check_integrity(blocks)


def test_runs_of_blocks_are_consecutive_when_there_is_room():
    blocks = BlockManager(32, 2)
    filled(blocks, 0, list(range(12)))
    filled(blocks, 1, list(range(50, 62)))
    for seq_id in (0, 1):
        table = blocks.block_table(seq_id)
        assert table == list(range(table[0], table[0] + 6))


def test_a_table_grows_into_its_neighbour_rather_than_into_a_lower_hole():
    blocks = BlockManager(8, 2)
    filled(blocks, 0, [1, 2, 3, 4])
    filled(blocks, 1, [5, 6, 7, 8])
    blocks.free(0)
    blocks.reset()
    blocks.reserve(1, 8)
    assert blocks.block_table(1) == [2, 3, 4, 5]


def test_a_total_that_the_pool_can_never_hold_is_no_room():
    blocks = BlockManager(4, 2)
    blocks.add(0, [1])
    assert blocks.can_reserve(0, 2, total=8) and not blocks.can_reserve(0, 2, total=9)


def test_bad_sizes_and_policies():
    for num_blocks, block_size in ((0, 4), (4, 0), (-1, 4)):
        with pytest.raises(ConfigError, match="smaller than one block"):
            BlockManager(num_blocks, block_size)
    with pytest.raises(ConfigError, match="rksc, lru, lfu"):
        BlockManager(4, 4, "random")

"""Every invariant of a block manager, checked by reading its state."""

from collections import Counter

from minirksc.cache import eviction
from minirksc.cache.index import block_digest


def check_integrity(manager):
    """Raises an AssertionError that names the block, table or sequence that is wrong."""
    blocks = [manager._pool[block_id] for block_id in range(manager.num_blocks)]
    for table in manager._tables.values():
        check_table(manager, table)
    check_claims(manager, blocks)
    check_pool(manager, blocks)
    for block in blocks:
        if block.digest is not None:
            check_indexed(manager, block)
    assert len(manager._index) == sum(block.digest is not None for block in blocks), "stale index entry"
    assert all(manager._index._first.values()), "the index keeps a salt that no block has"
    check_log(manager)
    if hasattr(manager, "windows"):
        check_windows(manager, blocks)


def check_table(manager, table):
    """Its blocks are as many as its tokens need, and hold no other's."""
    name, size, num_tokens = f"table {table.seq_id}", manager.block_size, len(table.token_ids)
    assert manager._tables[table.seq_id] is table, f"{name} is another's"
    assert len(table.block_ids) * size >= num_tokens, f"{name} is too short"
    assert len(table.digests) == num_tokens // size, f"digests of {name}"
    assert len(set(table.block_ids)) == len(table.block_ids), f"{name} repeats a block"
    digest = b""
    for place, expected in enumerate(table.digests):
        block = manager._pool[table.block_ids[place]]
        digest = block_digest(digest, table.salt, table.token_ids[place * size : (place + 1) * size])
        assert digest == expected, f"digest {place} of {name}"
        assert block.digest in (None, digest), f"block {block.block_id} of {name} is indexed as another's"
        is_exact = (place + 1) * size <= table.exact_len
        assert block.digest is not None or not is_exact, f"block {block.block_id} of {name} is not indexed"
        assert block.digest is None or block.salt == table.salt, f"block {block.block_id}: another salt's"
    is_indexed = [manager._pool[block_id].digest is not None for block_id in table.block_ids]
    assert is_indexed == sorted(is_indexed, reverse=True), f"{name} has an indexed block and not all before it"
    is_shared = [manager._pool[block_id].num_references > 1 for block_id in table.block_ids]
    assert is_shared == sorted(is_shared, reverse=True), f"{name} shares a block and not all before it"
    assert sum(is_shared) <= -(-num_tokens // size), f"{name} shares a block that was never written"


def check_claims(manager, blocks):
    """Counts are those of the sequences that claim, and every indexed block knows its own."""
    for claims, count in ((manager._awaited, "num_awaited"), (manager._pinned, "num_pins")):
        expected = Counter(digest for digests in claims.values() for digest in digests)
        assert dict(claims._counts) == dict(expected), f"{count}: wrong counts"
        for block in blocks:
            number = 0 if block.digest is None else expected[block.digest]
            assert getattr(block, count) == number, f"block {block.block_id}: wrong {count}"
    for seq_id in manager._awaited:
        assert seq_id not in manager, f"sequence {seq_id} has a table and is awaited"
    for seq_id in manager._pinned:
        for digest in manager._pinned[seq_id]:
            assert manager._index.get(digest) is not None, f"sequence {seq_id} pins a block that is not indexed"


def check_pool(manager, blocks):
    """Each block is free, cached or held, exactly once, and can be found."""
    pool = manager._pool
    references = Counter(block_id for table in manager._tables.values() for block_id in table.block_ids)
    for block in blocks:
        name, block_id = f"block {block.block_id}", block.block_id
        assert block.num_references == references[block_id], f"{name}: wrong reference count"
        is_free, is_cached, is_pinned = (block_id in one for one in (pool.free, pool.cached, pool.pinned))
        states = [is_free, is_cached, is_pinned, block.num_references > 0]
        assert sum(states) == 1, f"{name} is not in exactly one state: {states}"
        assert not is_free or block.digest is None, f"{name}: free but indexed"
        assert not (is_cached or is_pinned) or block.digest, f"{name}: cached but not indexed"
        assert not is_cached or not block.num_pins, f"{name} is pinned and could be evicted"
        assert not is_pinned or block.num_pins, f"{name} is kept and not pinned"
    assert len(pool._free_heap) <= 2 * len(pool), "the heap of free blocks grows"
    assert len(pool._victims) <= 2 * len(pool), "the heap of victims grows"
    assert pool.free.issubset(pool._free_heap), "a free block cannot be found"
    leaves = {(pool._priority(pool[i]), i) for i in pool.cached if not pool[i].children}
    assert leaves.issubset(pool._victims), "a cached leaf cannot be found"


def check_indexed(manager, block):
    """An indexed block is full, in its place in the tree, and not wanted or held more than its parent."""
    index, parent, name = manager._index, block.parent, f"block {block.block_id}"
    previous, num_before = b"", 0
    if parent is not None:
        assert parent.digest is not None, f"{name}: its parent is not indexed"
        previous, num_before = parent.digest, parent.num_tokens_before + manager.block_size
        if block.num_references:
            assert parent.num_references, f"{name} is held, its parent is not"
        assert parent.num_pins >= block.num_pins, f"{name} is pinned, its parent is not"
    assert block.num_tokens_before == num_before, f"{name}: wrong place"
    assert len(block.token_ids) == manager.block_size, f"{name}: indexed but not full"
    assert block.digest == block_digest(previous, block.salt, block.token_ids), f"{name}: wrong digest"
    assert index._blocks.get(block.digest) is block, f"{name}: the index has another block"
    siblings = index._first.get(block.salt, {}) if parent is None else parent.children
    assert siblings.get(block.digest) is block, f"{name}: its parent does not know it"
    for child in block.children.values():
        assert child.parent is block, f"{name}: a child has another parent"


def check_log(manager):
    """It is bounded, and what counts as lost was not computed again."""
    log = manager._log
    assert len(log._lost) <= len(log._entries) <= eviction.MAX_EVICTIONS, "the log of evictions grows"
    entries = {id(entry) for _, entry in log._entries}
    for digest, entry in log._lost.items():
        assert id(entry) in entries and not entry.needed_again, f"block {entry.block_id} is not lost"
        assert manager._index.get(digest) is None, f"block {entry.block_id} is in the index and counts as lost"


def check_windows(manager, blocks):
    """Each room is free, cached or in view of as many windows as say so, and every window has its blocks."""
    windows, views = manager.windows, Counter()
    assert manager._begins.keys() == manager._tables.keys(), "windows of other sequences than those with a table"
    for seq_id, table in manager._tables.items():
        begin = manager._begins[seq_id]
        needed = windows.first_needed(len(table.token_ids))
        assert begin <= min(needed, len(table.block_ids)), f"table {seq_id} lost what is in its window"
        views.update(table.block_ids[begin:])
    assert set(manager._pin_begins) <= set(manager._pinned), "windows of sequences that are not pinned"
    for seq_id in manager._pinned:
        if seq_id not in manager:
            views.update(manager._index.get(d).block_id for d in pinned_in_view(manager, seq_id))
    seen = {}
    for block in blocks:
        name, block_id, room = f"block {block.block_id}", block.block_id, windows.room(block.block_id)
        assert windows._num_views.get(block_id, 0) == views[block_id], f"{name}: wrong count of views"
        if room < 0:
            assert block_id not in windows._num_views, f"{name} has views and no room"
            assert views[block_id] == 0, f"{name} is in view and has no room"
            continue
        assert room not in seen, f"{name} shares the room {room}"
        seen[room] = block_id
        assert block.num_references or block.digest, f"{name}: free with a window"
        assert (views[block_id] == 0) == (block_id in windows._cached), f"{name}: wrongly cached in the window"
        assert views[block_id] or block.digest is not None, f"{name} keeps a window that cannot be found"
    assert sorted([*seen, *windows._free]) == list(range(windows.num_blocks)), "rooms are lost or double"
    assert set(windows._cached) <= set(seen.values()), "a cached room is another block's"


def pinned_in_view(manager, seq_id):
    """Digests of the blocks whose rooms a pinned sequence holds while it has no table."""
    return [] if seq_id in manager else manager._pinned[seq_id][manager._pin_begins.get(seq_id, 0) :]

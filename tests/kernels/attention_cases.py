"""Batches for tests of the attention: random queries, and a cache that is NaN wherever no query may look."""

import torch
from hypothesis import strategies as st

from minirksc.kernels.attention.batch import AttentionBatch
from minirksc.kernels.attention.paged_attention_native import block_shape_native
from minirksc.kernels.kv.layer_cache import TILE, LayerCache, multiply_out, read_slots, write_slots
from minirksc.kernels.native.ops import has_bf16_products

SCALE = 0.25


def make_case(
    query_lens,
    context_lens,
    *,
    heads=(4, 2),
    head_dim=16,
    block_size=4,
    window=None,
    tables=None,
    seed=0,
    dtype=torch.float32,
    consecutive=False,
    apart=None,
    is_int8=False,
):
    """Random queries, and a cache that is NaN wherever no query may look.

    With `is_int8` the NaN is in the scales, since no int8 can be one.
    `apart` numbers the blocks of the keys anew: "all" gives every row the place of each block that some row sees,
    "own" only of those that the row itself sees; the others are -1.
    """
    gen = torch.Generator().manual_seed(seed)
    needed = [-(-n // block_size) for n in context_lens]
    if tables is None:
        num_blocks = sum(needed) + 3
        ids = torch.arange(num_blocks) if consecutive else torch.randperm(num_blocks, generator=gen)
        ids = iter(ids.tolist())
        tables = [[next(ids) for _ in range(n)] for n in needed]
    first_keys = [
        0 if window is None else max(0, context - query - window + 1)
        for query, context in zip(query_lens, context_lens, strict=True)
    ]
    seen = {
        block_id: None
        for table, first, n in zip(tables, first_keys, needed, strict=True)
        for block_id in table[first // block_size : n]
    }
    kv_tables = tables
    num_blocks = max(map(max, tables)) + 2
    if apart is not None:
        num_blocks = len(seen) + 2
        rooms = torch.randperm(num_blocks - 1, generator=gen).tolist()  # the last is free: -1 as an index finds NaN
        room_of = dict(zip(seen, rooms, strict=False))
        kv_tables = [
            [
                -1 if apart == "own" and place < first // block_size else room_of.get(block_id, -1)
                for place, block_id in enumerate(table)
            ]
            for table, first in zip(tables, first_keys, strict=True)
        ]
    cache = torch.full((num_blocks, block_size, 2, heads[1], head_dim), float("nan"), dtype=dtype)
    for table, first, context in zip(kv_tables, first_keys, context_lens, strict=True):
        for position in range(first, context):
            slot = (table[position // block_size], position % block_size)
            if cache[slot].isnan().any():
                cache[slot] = torch.randn((2, heads[1], head_dim), generator=gen).to(dtype)
    cache = quantised(cache) if is_int8 else LayerCache(cache)
    cu = [0]
    for n in query_lens:
        cu.append(cu[-1] + n)
    qkv = torch.randn((cu[-1], heads[0] + 2 * heads[1], head_dim), generator=gen).to(dtype)
    q = qkv[:, : heads[0]]  # strided, as the decoder passes it
    kv = qkv[:, heads[0] :].unflatten(1, (2, heads[1]))
    for i, (n, context) in enumerate(zip(query_lens, context_lens, strict=True)):
        for j in range(n):
            position = context - n + j
            slot = (kv_tables[i][position // block_size], position % block_size)
            kv[cu[i] + j] = multiply_out(cache.kv[slot], None if cache.scales is None else cache.scales[slot], dtype)
    batch = AttentionBatch(
        cu_seqlens_q=cu,
        context_lens=context_lens,
        block_tables=tables,
        kv_tables=kv_tables,
        slots=torch.empty(0, dtype=torch.int64),  # where the new keys go: the store's business
        block_size=block_size,
        device=torch.device("cpu"),
        window=window,
    )
    return q, kv, cache, batch


def quantised(kv):
    """An int8 cache of what a plain one holds; where that is NaN, so are the scales."""
    scales = kv.float().abs().amax(-1) / 127  # NaN of any NaN
    return LayerCache((kv.float() / scales.unsqueeze(-1)).nan_to_num(99).round().to(torch.int8), scales)


def in_tiles(cache):
    """The same in tiles, NaN too; whole blocks are whole tiles."""
    num_blocks, block_size, _, num_kv_heads, head_dim = cache.kv.shape
    tiles = cache.kv.new_empty(num_blocks, block_size // TILE, 2, num_kv_heads, TILE, head_dim)
    write_slots(tiles, torch.arange(num_blocks * block_size), cache.kv.flatten(0, 1))
    return LayerCache(tiles)


def run_in_tiles(run, cache):
    """Calls it with the same cache in tiles, and brings back what it left there. Blocks may be of any size."""
    slots = cache.kv.flatten(0, 1)
    room = slots.new_full((-len(slots) % TILE, *slots.shape[1:]), float("nan"))
    tiles = in_tiles(LayerCache(torch.cat((slots, room)).unflatten(0, (-1, TILE))))
    run(tiles)
    after = read_slots(tiles.kv, torch.arange(len(slots) + len(room)))
    assert after[len(slots) :].isnan().all()
    slots.copy_(after[: len(slots)])


def has_tiles(q, cache):
    """Whether a cache of such sizes is one of tiles, on a processor that multiplies bfloat16 numbers."""
    block_size, _, num_kv_heads, head_dim = cache.kv.shape[1:]
    if not has_bf16_products or cache.kv.dtype != torch.bfloat16:
        return False
    return len(block_shape_native(q.shape[1], num_kv_heads, head_dim, block_size, cache.kv.dtype)) == 5


NESTED = [
    [1, 2, 3, 4, 5, 6, 7, 8, 9, 20],
    [1, 2, 3, 4, 5, 10, 11, 12, 13, 14, 21],
    [1, 2, 3, 4, 5, 6, 7, 8, 9, 22],
    [1, 2, 3, 4, 5, 10, 11, 12, 13, 14, 23],
    [40, 41],
]


@st.composite
def batches(draw, head_dims=(8, 12)):
    """Arguments of `make_case`: rows that share the beginning of one prefix or of a branch of it."""
    size = draw(st.sampled_from([1, 2, 3, 4, 16, 32]))
    sequences = draw(
        st.lists(
            st.tuples(st.integers(1, 6), st.integers(0, 40), st.integers(0, 30), st.booleans()), min_size=1, max_size=7
        )
    )
    root = list(range(100, 130))
    fork_at = draw(st.integers(0, 12))
    branch = root[:fork_at] + list(range(200, 230 - fork_at))
    tables, lens, queries = [], [], []
    free = iter(range(300, 5000))
    for query, past, shared, is_branch in sequences:
        query = draw(st.sampled_from([1, query]))  # decode rows are what shares
        context = query + past
        total = -(-context // size)
        num_shared = min(shared, past // size, len(root))
        prefix = (branch if is_branch else root)[:num_shared]
        tables.append(prefix + [next(free) for _ in range(total - num_shared)])
        lens.append(context)
        queries.append(query)
    windows = st.one_of(st.none(), st.sampled_from([1, size, size + 1, max(1, size - 1), 37]), st.integers(1, 50))
    num_kv_heads = draw(st.sampled_from([1, 2]))
    return (
        queries,
        lens,
        {
            "tables": tables,
            "block_size": size,
            "heads": (num_kv_heads * draw(st.sampled_from([1, 4, 5, 8])), num_kv_heads),
            "head_dim": draw(st.sampled_from(head_dims)),
            "window": draw(windows),
            "apart": draw(st.sampled_from([None, "all", "own"])),
            "dtype": draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
            "is_int8": draw(st.booleans()),
            "seed": draw(st.integers(0, 99)),
        },
    )

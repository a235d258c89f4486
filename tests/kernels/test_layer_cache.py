"""A cache in tiles: where each number lies, and which models have one."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minirksc.kernels.attention import paged_attention_native as attention_native
from minirksc.kernels.attention.paged_attention_native import PIECE_TILES, block_shape_native
from minirksc.kernels.kv.layer_cache import TILE, LayerCache, plain_block_shape, read_slots, write_slots


@given(data=st.data())
@settings(max_examples=50)
def test_each_number_lies_where_products_read_it(data):
    num_tiles, num_kv_heads = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    head_dim = 2 * data.draw(st.integers(1, 9))
    kv = torch.full((2, num_tiles, 2, num_kv_heads, TILE, head_dim), float("nan"))
    slots = data.draw(st.lists(st.integers(0, 2 * num_tiles * TILE - 1), unique=True, min_size=1))
    rows = torch.randn(len(slots), 2, num_kv_heads, head_dim)
    write_slots(kv, torch.tensor(slots), rows)
    assert kv.isfinite().sum() == rows.numel()
    assert torch.equal(read_slots(kv, torch.tensor(slots, dtype=torch.int32)), rows)
    memory = kv.flatten().tolist()
    for _ in range(20):
        i, head, d = (data.draw(st.integers(0, n - 1)) for n in (len(slots), num_kv_heads, head_dim))
        tile, key = divmod(slots[i], TILE)
        keys, values = ((tile * 2 + part) * num_kv_heads * TILE * head_dim for part in (0, 1))
        at = head * TILE * head_dim
        assert memory[keys + at + d // 2 * 2 * TILE + 2 * key + d % 2] == rows[i, 0, head, d]
        assert memory[values + at + key // 2 * 2 * head_dim + 2 * d + key % 2] == rows[i, 1, head, d]


def test_slot_by_slot_it_is_what_it_says():
    kv = torch.zeros(2, 3, 2, 1, 4)
    rows = torch.randn(2, 2, 1, 4)
    write_slots(kv, torch.tensor([4, 0]), rows)
    assert torch.equal(kv[1, 1], rows[0]) and torch.equal(kv[0, 0], rows[1])
    assert torch.equal(read_slots(kv, torch.tensor([0, 4])), rows.flip(0))


@pytest.mark.parametrize("has_products", [True, False])
def test_which_models_have_tiles(has_products, monkeypatch):
    monkeypatch.setattr(attention_native, "has_bf16_products", has_products)
    sizes = {"num_heads": 6, "num_kv_heads": 3, "head_dim": 64, "block_size": 32, "dtype": torch.bfloat16}
    plain = plain_block_shape(**sizes)
    assert plain == (32, 2, 3, 64)
    shape = block_shape_native(**sizes)
    assert shape == ((2, 2, 3, 16, 64) if has_products else plain)
    assert LayerCache(torch.empty(1, *shape)).is_tiled == has_products
    for other in ({"dtype": torch.float32}, {"dtype": torch.int8}, {"head_dim": 80}, {"num_heads": 300}):
        assert block_shape_native(**sizes | other) == plain_block_shape(**sizes | other)
    assert block_shape_native(**sizes | {"block_size": 8}) == (8, 2, 3, 64)


def test_what_is_compiled_has_the_same_sizes():
    header = (Path(__file__).parents[2] / "kernels" / "native" / "ops.h").read_text(encoding="utf-8")
    assert f"constexpr int64_t KV_TILE = {TILE};" in header
    assert f"constexpr int64_t PIECE_TILES = {PIECE_TILES};" in header

"""The launch table has an entry that fits for every combination that the launcher lets pass."""

from itertools import product

import pytest
import torch

from minirksc.kernels.attention.batch import KEY_CHUNK
from minirksc.kernels.attention.launch_table import (
    ARCHITECTURES,
    architecture,
    attention_tile,
    compile_options,
    dot_precision,
    max_head_dim,
    max_short_rows,
    num_programs,
    product_dtype,
)
from minirksc.kernels.kv.kv_check import MAX_BLOCK_SIZE

# Shared memory of a program: what smaller relatives of sm_80 have too, and what the others can have.
SHARED_BYTES = {"sm_80": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
BLOCK_SIZES = [1 << i for i in range(MAX_BLOCK_SIZE.bit_length())]
KINDS = [(torch.float32, torch.float32), (torch.float32, torch.int8), (torch.float16, torch.float16)]
KINDS += [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.int8)]


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("dtype", "kv_dtype"), KINDS)
def test_every_supported_shape_has_a_launch_that_holds_it(arch, dtype, kv_dtype):
    products = product_dtype(dtype, kv_dtype)
    for head_dim in range(1, max_head_dim(products) + 1):
        most = max_short_rows(head_dim, products)
        for rows, block_size in product([None, *range(1, most + 1)], BLOCK_SIZES):
            tile = attention_tile(arch, head_dim, block_size, rows, dtype, kv_dtype)
            assert tile.rows >= max(16, rows or most)  # a group of heads is never cut
            assert tile.rows.bit_count() == tile.tile.bit_count() == tile.warps.bit_count() == 1
            assert tile.warps * 32 * tile.registers <= 65536
            assert tile.tile >= 16 and KEY_CHUNK % tile.tile == 0 and tile.stages >= 1


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_keys_and_values_in_flight_leave_room(arch):
    """What the pipeliner surely needs; all of it is measured by bench.static_kernels."""
    for head_dim, rows in product((64, 128, 256, 512), (16, 32, 64, None)):
        rows = rows if rows is None else min(rows, max_short_rows(head_dim, torch.bfloat16))
        tile = attention_tile(arch, head_dim, 16, rows, torch.bfloat16, torch.bfloat16)
        buffers = max(1, tile.stages - 1)
        assert 2 * buffers * tile.tile * head_dim * 2 <= SHARED_BYTES[arch]


def test_architectures_without_an_entry_take_the_nearest(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.version, "hip", None)
    for capability, expected in {
        (7, 5): "sm_80",
        (8, 0): "sm_80",
        (8, 9): "sm_80",
        (9, 0): "sm_90",
        (10, 0): "sm_100",
        (10, 3): "sm_100",
        (12, 0): "sm_80",
    }.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert architecture(cuda) == expected
    monkeypatch.setattr(torch.version, "hip", "6.3")
    assert architecture(cuda) == "gfx942"
    assert architecture(torch.device("cpu")) in ARCHITECTURES and num_programs(torch.device("cpu")) > 0


def test_options_of_the_compiler():
    for arch in ARCHITECTURES:
        is_nvidia = arch.startswith("sm_")
        assert compile_options(arch, 168).get("maxnreg") == (168 if is_nvidia else None)
        assert dot_precision(arch) == ("tf32x3" if is_nvidia else "ieee")

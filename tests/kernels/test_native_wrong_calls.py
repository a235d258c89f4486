"""Wrong calls of the compiled operations are refused, or right: see `wrong_calls.py`."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minirksc.errors import ConfigError
from minirksc.kernels.attention.paged_attention_native import paged_attention_native
from minirksc.kernels.kv.layer_cache import LayerCache
from minirksc.kernels.kv.placement import HeadNorms, Placement
from minirksc.kernels.native.ops import kv_store_native
from minirksc.kernels.weights.int8_weight import Int8Weight
from minirksc.kernels.weights.native_weight import Bf16Weight, WidenedWeight

HERE = Path(__file__).parent
sys.path.append(str(HERE))  # in importlib mode pytest does not add it
attention, forms = importlib.import_module("attention_cases"), importlib.import_module("forms")
pytestmark = forms.needs_native


def test_wrong_calls_neither_read_nor_write_beyond_their_tensors():
    """In a process of its own, which may end by a signal."""
    done = subprocess.run([sys.executable, HERE / "wrong_calls.py", "0", "400"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.parametrize("slot", [-1, -(2**40), 48, 2**40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_tiled", [False, True])
def test_a_slot_that_the_cache_has_not_is_refused_before_anything_is_written(is_tiled, dtype, slot):
    kv = torch.zeros((3, 1, 2, 2, 16, 8) if is_tiled else (3, 16, 2, 2, 8), dtype=dtype)
    qkv = torch.ones(3, 8, 8, dtype=dtype)
    before = qkv.clone()
    slots = torch.tensor([3, 5, slot])
    with pytest.raises(ConfigError, match=f"slot {slot} of token 2 is none of the cache, which has 0 to 47"):
        kv_store_native(qkv, HeadNorms(4, None, None, True, 1e-5), Placement(None, None, LayerCache(kv), slots))
    assert torch.equal(qkv, before) and not kv.any()


@pytest.mark.parametrize("kind", [pytest.param(Bf16Weight, marks=forms.needs_bf16), WidenedWeight])
@pytest.mark.parametrize("row", [-1, 40, 63, 2**40])  # 40 of them, in panels of 16 or 32
def test_a_row_that_the_matrix_has_not_is_refused(kind, row):
    packed = kind.pack(torch.ones(40, 8, dtype=kind.dtype))
    with pytest.raises(ConfigError, match=f"row {row} is none of the matrix, which has 0 to 39"):
        packed.rows(torch.tensor([0, row]))


@forms.needs_bf16
@pytest.mark.parametrize("make", [Bf16Weight.pack, Int8Weight])
def test_a_product_of_the_wrong_size_is_refused(make):
    packed = make(torch.ones(40, 64, dtype=torch.bfloat16))
    x = torch.ones(2, 64, dtype=torch.bfloat16)
    for wrong in (x[:, :62], x.float(), x[0], x.to("meta")):
        with pytest.raises(ConfigError, match=r"x is .*takes \[tokens, 64\] torch.bfloat16"):
            packed(wrong, None)
    for wrong in (x[0, :39], x[0].repeat(2)[::2][:40], torch.ones(40)):
        with pytest.raises(ConfigError, match=r"bias is .*takes \[40\] torch.bfloat16"):
            packed(x, wrong)


@pytest.mark.parametrize("is_tiled", [False, pytest.param(True, marks=forms.needs_bf16)])
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kv_tables": [[0, 99, 1]]}, "reads slots 0 to 1599, with 1 queries and a cache of 112"),
        ({"kv_tables": [[0, -1, 1]]}, "reads slots -16"),
        ({"kv_tables": [[0, 1]]}, "sequence 0 has 1 new of 40 tokens in blocks for 32"),
        ({"context_lens": [49]}, "sequence 0 has 1 new of 49 tokens in blocks for 48"),
        ({"cu_seqlens_q": [0, 2]}, "a batch of 2 tokens .* with 1 queries"),
        ({"cu_seqlens_q": [0, 41]}, "sequence 0 has 41 new of 40 tokens"),
        ({"block_size": 8}, "blocks for 24|takes blocks of 8 tokens"),
        ({"window": 0}, "a window of 0"),
    ],
)
def test_a_batch_that_does_not_go_with_the_cache_is_refused(is_tiled, changes, words):
    q, kv, cache, batch = attention.make_case([1], [40], head_dim=32, block_size=16, dtype=torch.bfloat16)
    cache = attention.in_tiles(cache) if is_tiled else cache
    for name, value in changes.items():
        setattr(batch, name, value)
    with pytest.raises(ConfigError, match=words):
        paged_attention_native(q, kv, cache, batch, 0.2, None)

"""The tensors of the KV cache: what is copied where."""

from types import SimpleNamespace

import pytest
import torch

from minirksc.cache.hybrid import WindowCopy
from minirksc.cache.rsbcm import BlockCopy
from minirksc.engine.kv_tensors import KvCache
from minirksc.kernels.kv.kv_copy import copy_blocks_reference, copy_blocks_torch
from minirksc.kernels.kv.layer_cache import plain_block_shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("copy_blocks", [copy_blocks_torch, copy_blocks_reference])
def test_each_copy_is_made_in_the_layers_of_its_pool_alone(copy_blocks, dtype):
    layers = [SimpleNamespace(window=window, num_kv_heads=1, head_dim=2, kv_layer=None) for window in (None, 8)]
    spec = SimpleNamespace(layers=layers, num_heads=1)
    backend = SimpleNamespace(copy_blocks=copy_blocks, block_shape=plain_block_shape)
    cache = KvCache(spec, 6, 3, 4, dtype, torch.device("cpu"), backend)
    full, window = cache.layers
    for layer in cache.layers:
        for tensor in filter(torch.is_tensor, layer):
            for block_id, block in enumerate(tensor):
                block.fill_(block_id)
    cache.copy([BlockCopy(0, 1), BlockCopy(2, 3), WindowCopy(0, 2), BlockCopy(4, 5)])
    assert full.kv[:, 0, 0, 0, 0].tolist() == [0, 0, 2, 2, 4, 4]
    assert window.kv[:, 0, 0, 0, 0].tolist() == [0, 1, 0]
    cache.copy([BlockCopy(5, 0)])
    assert window.kv[:, 0, 0, 0, 0].tolist() == [0, 1, 0]
    if dtype == torch.int8:
        assert window.scales[:, 0, 0, 0].tolist() == [0, 1, 0]

"""How many kernels a decode step takes on the Triton backend: a launch costs microseconds, whatever it computes.

Counted on meta tensors, which have shapes and no numbers: nothing is computed, so contexts can be long.
"""

import importlib
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from minirksc import LLM, SamplingParams
from minirksc.engine.runner import Runner
from minirksc.kernels.attention.batch import AttentionBatch
from minirksc.kernels.backend import BACKENDS
from minirksc.models.decoder import Decoder
from minirksc.models.families import load_config, spec_from_config
from minirksc.models.weights.rules import iter_weights

sys.path.append(str(Path(__file__).parents[1] / "kernels"))  # in importlib mode pytest does not add it
recording = importlib.import_module("recording")

META = torch.device("meta")
BLOCK_SIZE, NUM_BLOCKS = 16, 1024
LONG = 4000  # more than one range of keys, so that partials are merged
SIZES = {"hidden": 32, "head_dim": 16}


def decode_step(folder, context_lens, kv_dtype=torch.float32):
    """What one decode step launches for sequences of these lengths that share nothing."""
    spec = spec_from_config(load_config(folder))
    weights = ((name, tensor.to(META)) for name, tensor in iter_weights(folder, spec, torch.float32))
    model = Decoder(spec, weights, BACKENDS["triton"])
    cache = Runner(model, NUM_BLOCKS, 0, BLOCK_SIZE, kv_dtype).cache
    rows = len(context_lens)
    ends = [0]
    for length in context_lens:
        ends.append(ends[-1] - -length // BLOCK_SIZE)
    tables = [list(range(begin, end)) for begin, end in pairwise(ends)]
    ids = torch.zeros(rows, dtype=torch.int64, device=META)
    batch = AttentionBatch(range(rows + 1), context_lens, tables, tables, ids, block_size=BLOCK_SIZE, device=META)
    with torch.inference_mode(), recording.recorded_launches(run=False) as names:
        logits = model.forward(ids, ids, ids, {None: batch}, cache.layers, None)
    assert logits.shape == (rows, spec.vocab_size)
    return Counter(names)


def one_layer(tiny_llama, context_lens, kv_dtype=torch.float32):
    """What a layer adds to a step: of 3 layers less that of 1, halved."""
    counts = decode_step(tiny_llama(layers=3, **SIZES), context_lens, kv_dtype)
    counts.subtract(decode_step(tiny_llama(layers=1, **SIZES), context_lens, kv_dtype))
    assert all(count >= 0 and count % 2 == 0 for count in counts.values()), counts
    return Counter({name: count // 2 for name, count in counts.items() if count})


@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.int8])
def test_a_layer_takes_at_most_ten_launches(tiny_llama, kv_dtype):
    launches = one_layer(tiny_llama, [LONG], kv_dtype)
    products = {name: count for name, count in launches.items() if name.startswith("aten::")}
    assert products == {"aten::mm": 4}  # qkv, output, gate and up, down; no other operation of torch
    assert launches["_merge_partials_kernel"] == 1  # the longest way
    assert launches.total() <= 10, launches


def test_more_sequences_launch_nothing_more(tiny_llama):
    assert one_layer(tiny_llama, [LONG, 17, LONG + 5]) == one_layer(tiny_llama, [LONG])
    assert "_merge_partials_kernel" not in one_layer(tiny_llama, [40, 17])


def test_a_step_that_runs_launches_what_is_counted(tiny_llama):
    folder, prompt = tiny_llama(layers=1, **SIZES), [5, 9, 21, 40, 7]
    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True, detokenize=False)
    with LLM(folder, backend="triton", dtype="float32", block_size=BLOCK_SIZE, kv_cache_bytes="1MiB") as llm:
        expected = llm.generate([prompt], params)[0].outputs[0].token_ids
        llm.reset_prefix_cache()
        request = llm.engine.add_request(llm.engine.new_sequence(prompt), params.resolved({}))
        llm.engine.step()
        with recording.recorded_launches() as names:
            llm.engine.step()
    assert request.output_token_ids == expected
    launched = Counter(name for name in names if name.endswith("_kernel"))
    launched.subtract(["_confidence_kernel", "_merge_kernel"])  # the choice of a token comes after the decoder
    counted = decode_step(folder, [len(prompt) + 1])
    assert +launched == Counter({name: count for name, count in counted.items() if name.endswith("_kernel")})


def test_the_recorder_counts_what_computes_and_nothing_else():
    x = torch.ones(2, 3)
    with recording.recorded_launches() as names, torch.inference_mode():
        y = torch.nn.functional.linear(x, torch.empty(4, 3).zero_()).view(-1)[None].transpose(0, 1)
        y.add_(1)
    assert names == ["aten::zero_", "aten::mm", "aten::add_.Tensor"]

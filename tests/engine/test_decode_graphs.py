"""Decode steps as graphs: their bookkeeping, with a recorder that calls the step again instead of a GPU's."""

import pytest
import torch

from minirksc import LLM, SamplingParams
from minirksc.engine.graphs import DecodeGraphs, padded_size

PROMPTS = [[5, 9, 13, 7, 7], [3], list(range(2, 20)), [5, 9, 13, 7, 8]]
GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, detokenize=False)


class Replayer:
    """Does what is recorded again, on whatever the same tensors now hold, and writes to the same result."""

    def __init__(self, failure=None):
        self.num_recorded = 0
        self.failure = failure

    def record(self, run):
        if self.failure is not None:
            raise self.failure
        self.num_recorded += 1
        out = run().clone()

        def replay():
            out.copy_(run())

        return replay, out


def with_graphs(llm, max_batch=16, recorder=None):
    runner = llm.engine.runner
    recorder = recorder or Replayer()
    size = llm.engine.blocks.block_size
    runner.recorded = DecodeGraphs(runner.model, runner.cache.layers, size, max_batch, 128, recorder)
    return runner.recorded


@pytest.fixture
def llm(tiny_llama):
    folder = tiny_llama(layers=2, hidden=32, head_dim=16)
    with LLM(str(folder), backend="triton", dtype="float32", kv_cache_bytes="1MiB", max_model_len=128) as llm:
        yield llm


def outputs(llm, prompts=PROMPTS, params=GREEDY):
    return [out.outputs[0].token_ids for out in llm.generate(prompts, params)]


def test_sizes():
    assert [padded_size(n) for n in (1, 2, 3, 4, 5, 8, 9, 16, 17, 60, 64)] == [1, 2, 4, 4, 8, 8, 16, 16, 24, 64, 64]


def test_tokens_are_those_of_eager_steps(llm):
    expected = outputs(llm, PROMPTS)
    graphs = with_graphs(llm)
    assert outputs(llm, PROMPTS) == expected
    assert outputs(llm, PROMPTS[:3]) == expected[:3]  # a padded batch
    assert outputs(llm, PROMPTS[2:3]) == expected[2:3]
    assert graphs.num_steps == 9 and graphs.eager_steps == {"prompts in the batch": 3}


def test_a_size_is_recorded_once(llm):
    recorder = Replayer()
    graphs = with_graphs(llm, recorder=recorder)
    outputs(llm)
    first = recorder.num_recorded
    outputs(llm)
    assert recorder.num_recorded == first == graphs.num_recordings
    outputs(llm, PROMPTS[:3])  # 3 rows are served by the graph of 4
    assert recorder.num_recorded == first


def test_padding_rows_neither_read_nor_write_the_cache(llm):
    graphs = with_graphs(llm)
    layers = llm.engine.runner.cache.layers
    for layer in layers:
        layer.kv.fill_(float("nan"))  # whatever is read of what nobody wrote shows in the tokens
    expected = outputs(llm, PROMPTS)
    written = [layer.kv.isfinite().flatten(2).all(-1) for layer in layers]
    tokens = sum(len(prompt) for prompt in PROMPTS) + 3 * len(PROMPTS)  # the last token's keys are never needed
    assert all(int(slots.sum()) == tokens for slots in written)
    for layer in layers:
        layer.kv.fill_(float("nan"))
    llm.reset_prefix_cache()
    assert outputs(llm, PROMPTS[:3]) == expected[:3]
    tokens = sum(len(prompt) for prompt in PROMPTS[:3]) + 9
    assert all(int(layer.kv.isfinite().flatten(2).all(-1).sum()) == tokens for layer in layers)
    assert graphs.num_steps == 6


def test_buffers_stay_where_they_are(llm):
    seen = []

    class Watcher(Replayer):
        def record(self, run):
            replay, out = super().record(run)
            seen.append((run, out.data_ptr()))
            return replay, out

    graphs = with_graphs(llm, recorder=Watcher())
    pointers = [t.data_ptr() for t in (graphs._token_ids, graphs._positions, *graphs._slots.values())]
    outputs(llm)
    outputs(llm, PROMPTS[:2])
    assert pointers == [t.data_ptr() for t in (graphs._token_ids, graphs._positions, *graphs._slots.values())]
    assert len({out for _, out in seen}) == len(seen)


def test_logits_outlive_the_next_step(llm):
    graphs = with_graphs(llm)
    kept = []
    forward = graphs.forward

    def keep(batch, mass=None):
        logits = forward(batch, mass)
        if logits is not None:
            kept.append((logits, logits.clone()))
        return logits

    graphs.forward = keep
    outputs(llm)
    assert len(kept) == 3 and all(torch.equal(a, b) for a, b in kept)


def test_batches_that_no_graph_serves_say_why(llm):
    graphs = with_graphs(llm, max_batch=2)
    expected = outputs(llm)
    assert graphs.num_steps == 0
    assert graphs.eager_steps == {"prompts in the batch": 1, "more than 2 rows": 3}
    failing = with_graphs(llm, recorder=Replayer(RuntimeError("no such stream")))
    assert outputs(llm) == expected
    assert failing.eager_steps["recording failed: no such stream"] == 3 and failing.num_steps == 0

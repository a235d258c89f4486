"""Decode steps replayed from tapes of compiled operations give what the same steps give one operation at a time."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

from minirksc import LLM, SamplingParams
from minirksc.engine.gates import Seat
from minirksc.engine.mass import MASS_INTERVAL
from minirksc.engine.tapes import MAX_ROWS
from minirksc.errors import ConfigError
from minirksc.kernels.native.ops import has_bf16_products, native, rms_norm_native
from minirksc.kernels.native.tape import NativeRecorder, NotRecordableError
from minirksc.models.families import load_config, spec_from_config

sys.path.append(str(Path(__file__).parents[1] / "models"))  # in importlib mode pytest does not add it
zoo, rows = importlib.import_module("zoo"), importlib.import_module("zoo_rows")

pytestmark = pytest.mark.skipif(native is None, reason="nothing is compiled")
needs_bf16 = pytest.mark.skipif(not has_bf16_products, reason="this processor does not multiply bfloat16")
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False)
SAMPLED = SamplingParams(temperature=0.9, top_p=0.9, max_tokens=12, ignore_eos=True, detokenize=False, seed=3)
PROMPTS = [[7, 9, 13] * 9 + [i] * (1 + 5 * i) for i in range(5)]


def outputs(llm, prompts, params=GREEDY):
    return [(out.outputs[0].token_ids, out.outputs[0].cumulative_logprob) for out in llm.generate(prompts, params)]


@needs_bf16
@pytest.mark.parametrize("quantize", ["none", "int8"])
@pytest.mark.parametrize(
    "row_id",
    ["llama-gqa", "qwen2-sliding", "mistral-window", "gemma2-softcaps", "gemma3_text-linear", "gemma4_text-shared-kv"],
)
def test_tokens_and_probabilities_are_those_of_eager_steps(row_id, quantize, zoo_dir):
    row = rows.BY_ID.get(row_id) or next(row for row in rows.ROWS if row.model_type == row_id.split("-")[0])
    folder = zoo.build(row, zoo_dir / row.id)
    options = {"dtype": "bfloat16", "quantize": quantize, "kv_cache_bytes": "8MiB", "eviction": "lru"}
    if quantize != "none" and any(layer.head_dim % 8 for layer in spec_from_config(load_config(folder)).layers):
        with pytest.raises(ConfigError, match="head_dim"):
            LLM(folder, **options)
        return
    with LLM(folder, enforce_eager=True, **options) as eager, LLM(folder, **options) as llm:
        for params in (GREEDY, SAMPLED):
            for prompts in (PROMPTS, PROMPTS[:2], PROMPTS[4:]):
                assert outputs(llm, prompts, params) == outputs(eager, prompts, params)
                llm.reset_prefix_cache()
                eager.reset_prefix_cache()
        stats = llm.stats()
        others = {reason: n for reason, n in stats["eager_steps"].items() if reason != "prompts in the batch"}
        assert eager.stats()["num_recorded_steps"] == 0
        if llm.stats()["backend"] == "native" and not others:
            assert stats["num_recorded_steps"] > 50
        else:  # whoever cannot be recorded says what is in the way
            assert stats["num_recorded_steps"] == 0 and all("compiled operation" in reason for reason in others)


@needs_bf16
def test_steps_that_no_tape_serves_are_counted(tiny_llama):
    folder = tiny_llama(layers=2, hidden=32, head_dim=32)
    with LLM(folder, dtype="bfloat16", kv_cache_bytes="8MiB", eviction="lru") as llm:
        outputs(llm, [[i, i + 1] for i in range(MAX_ROWS + 1)])
        assert llm.stats()["num_recorded_steps"] == 0
        assert llm.stats()["eager_steps"] == {"prompts in the batch": 1, f"more than {MAX_ROWS} rows": 11}
        outputs(llm, [[3, 4]])
        assert llm.stats()["num_recorded_steps"] == 11


class Watching:
    """A layer gate at which nobody leaves."""

    def __init__(self, layers):
        self.layers = layers

    def after_layer(self, layer, rows):
        return {}


@needs_bf16
@pytest.mark.parametrize(("layers", "num_recorded"), [((), 7), ((1,), 0)])
def test_a_gate_that_no_layer_asks_keeps_no_step_from_its_tape(tiny_llama, layers, num_recorded):
    folder = tiny_llama(layers=2, hidden=32, head_dim=32)
    with LLM(folder, dtype="bfloat16", kv_cache_bytes="8MiB") as llm:
        engine = llm.engine
        params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False).resolved({})
        engine.add_request(engine.new_sequence([3, 4, 5]), params, seat=Seat(Watching(layers), 0))
        while engine.has_work:
            engine.step()
        assert llm.stats()["num_recorded_steps"] == num_recorded


@needs_bf16
def test_steps_that_measure_attention_are_recorded_too(tiny_llama):
    """The same tokens, and the same mass of every block; layers that are not measured have none."""
    folder = tiny_llama(layers=6, hidden=32, head_dim=32)
    params = SamplingParams(temperature=0, max_tokens=2 * MASS_INTERVAL + 3, ignore_eos=True, detokenize=False)
    runs = []
    for options in ({"enforce_eager": True}, {}):
        seen = []
        with LLM(folder, dtype="bfloat16", kv_cache_bytes="8MiB", eviction="rksc", **options) as llm:
            observe = llm.engine.blocks.observe
            llm.engine.blocks.observe = lambda seq_id, mass, of=observe, to=seen: (to.append(mass), of(seq_id, mass))
            tokens = [out.outputs[0].token_ids for out in llm.generate(PROMPTS, params)]
            stats = llm.stats()
        runs.append((tokens, seen))
    assert runs[0] == runs[1] and len(seen) == 2 * len(PROMPTS)
    assert all(sum(mass) == pytest.approx(1, abs=1e-4) for mass in seen)
    assert stats["num_recorded_steps"] == 2 * MASS_INTERVAL + 2
    assert stats["eager_steps"].keys() == {"prompts in the batch"}


@needs_bf16
def test_forks_and_new_sequences_between_replays(tiny_llama):
    """A tape follows the block tables, wherever they are and however many share them."""
    folder = tiny_llama(layers=2, hidden=32, head_dim=32)
    tokens = []
    for options in ({"enforce_eager": True}, {}):
        with LLM(folder, dtype="bfloat16", kv_cache_bytes="8MiB", block_size=4, **options) as llm:
            root = llm.branch(list(range(5, 90)))
            branches = root.fork(4)
            for branch in branches[1:]:
                branch.append([branch.path[-1] + 9])
            for _ in range(3):
                llm.extend(branches, GREEDY)
                branches[-1].prune()
                branches = [*branches[:-1], *branches[0].fork(1)]
            tokens.append([branch.token_ids for branch in branches])
    assert tokens[0] == tokens[1]


def test_what_is_recorded_is_done_again_on_the_same_memory():
    x, weight = torch.randn(3, 8), torch.randn(8)
    recorder = NativeRecorder()
    replay, out = recorder.record(lambda: rms_norm_native(rms_norm_native(x, weight, 1e-5), None, 1e-5))
    for seed in range(3):
        x.copy_(torch.randn(3, 8, generator=torch.Generator().manual_seed(seed)))
        replay()
        assert torch.equal(out, rms_norm_native(rms_norm_native(x, weight, 1e-5), None, 1e-5))


def test_recordings_share_memory_one_after_the_other():
    recorder = NativeRecorder()
    small, large = torch.randn(2, 8), torch.randn(900, 2000)
    runs = [lambda x=x: rms_norm_native(rms_norm_native(x, None, 1e-5), None, 1e-5) for x in (small, large, small)]
    recorded = [recorder.record(run) for run in runs]
    for (replay, out), run in [*zip(recorded, runs, strict=True)] * 2:
        replay()
        assert torch.equal(out, run())
    assert sum(chunk.numel() for chunk in recorder._chunks) < 3 * large.numel() * 4


@pytest.mark.parametrize(
    "run", [lambda x: x * 2, lambda x: x.add_(1), lambda x: torch.cat((x, x)), lambda x: x.t().contiguous()]
)
def test_what_torch_computes_is_not_recordable(run):
    with pytest.raises(NotRecordableError, match="is no compiled operation"):
        NativeRecorder().record(lambda: rms_norm_native(run(torch.randn(3, 8)), None, 1e-5))
    NativeRecorder().record(lambda: rms_norm_native(torch.empty(2, 4), None, 1e-5))  # recording has ended all the same


def test_what_reads_numbers_is_not_recordable():
    with pytest.raises(NotRecordableError, match="tolist may read"):
        NativeRecorder().record(lambda: torch.empty(len(torch.empty(3).tolist())))


def test_the_compiled_operations_measure_themselves():
    native.begin_timing()
    with pytest.raises(RuntimeError, match="measuring already"):
        native.begin_timing()
    x = torch.randn(3, 8)
    replay, _ = NativeRecorder().record(lambda: rms_norm_native(x, None, 1e-5))
    once = native.end_timing()
    assert list(once) == ["add_rms_norm"] and once["add_rms_norm"] > 0
    native.begin_timing()
    replay()
    assert list(native.end_timing()) == ["add_rms_norm"]
    with pytest.raises(RuntimeError, match="not measuring"):
        native.end_timing()

"""The engine with device="cuda", on a device that does not exist: see `tests/kernels/virtual_cuda.py`.

The same calls on the CPU's torch backend give the same tokens.
"""

import importlib
import json
import sys
from itertools import chain
from pathlib import Path

import pytest
from integrity import check_integrity

from minirksc import LLM, SamplingParams, Solver, SolverConfig
from minirksc.calibrate.collect import Recorder
from minirksc.errors import NumericalError
from minirksc.rksc.exits import LayerExit

pytest.importorskip("triton")
sys.path.append(str(Path(__file__).parents[1] / "kernels"))  # in importlib mode pytest does not add it
virtual_cuda = importlib.import_module("virtual_cuda")
cuda = virtual_cuda.cuda
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, which the interpreter computes with

LAYERS = 3
PROMPTS = [list(range(3, 14)), [5, 9, 13]]
GREEDY = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, detokenize=False)
DRAWN = SamplingParams(
    temperature=0.8,
    top_k=20,
    top_p=0.9,
    min_p=0.01,
    repetition_penalty=1.2,
    presence_penalty=0.1,
    frequency_penalty=0.1,
    logit_bias={5: 1.0},
    min_tokens=2,
    logprobs=2,
    prompt_logprobs=1,
    seed=1,
    max_tokens=2,
    detokenize=False,
)


def open_llm(tiny_llama, on_cuda=True, window=None, **options):
    folder = tiny_llama(layers=LAYERS, hidden=32, heads=2, kv_heads=1, head_dim=16, intermediate=32, tokenizer=True)
    if window is not None:
        folder = with_window(folder, window)
    device = {"device": "cuda"} if on_cuda else {"device": "cpu", "backend": "torch"}
    return LLM(str(folder), **{"dtype": "float32", "kv_cache_bytes": "1MiB", "max_model_len": 256, **device, **options})


def with_window(folder, window):
    """The same weights as a Mistral whose queries see so many keys."""
    copy = folder.with_name(f"{folder.name}-window-{window}")
    copy.mkdir(exist_ok=True)
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": window}
    for name in ("attention_bias", "mlp_bias"):
        del config[name]
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def generate(llm):
    return [out.outputs[0].token_ids for out in llm.generate(PROMPTS, GREEDY)], []


def draw(llm):
    outputs = llm.generate(PROMPTS, DRAWN)
    logprobs = [p for out in outputs for step in out.prompt_logprobs[1:] for p in step.values()]
    return [out.outputs[0].token_ids for out in outputs], logprobs


def branch_and_score(llm):
    kids = llm.branch(PROMPTS[0]).fork(2)
    for index, kid in enumerate(kids):
        kid.append([30 + index] * (index + 1))
    llm.extend(kids, GREEDY)
    scores = llm.score(kids, [11, 12], [[20], [21, 22]])
    early = LayerExit(llm.lens([20, 21]), LAYERS, margin=0.0, patience=1)
    llm.score(kids, [11, 12], [[20], [21]], early)
    assert early.exit_layers == {0: 2, 1: 2}
    recorder = Recorder(llm.lens, (20, 21), LAYERS)  # of `calibrate`
    llm.score(kids, [11, 12], [[20], [21]], recorder)
    margins = [*early.margins.values(), *chain(*recorder.noted.values())]
    return [kid.output_token_ids for kid in kids], scores.flatten().tolist() + margins


def share(llm):
    wordings = ["please say: 12 and 3?", "say, please: 12 and 3?"]
    config = SolverConfig(
        branches=2, tokens_per_step=2, verify="never", sharing="semantic", tau=-9.0, uncalibrated=True, hints=[(), ()]
    )
    result = Solver(llm, config).solve(wordings[0], wordings)
    assert [branch.sharing for branch in result.branches] == ["exact", "semantic"]
    return [branch.token_ids for branch in result.branches], []


USES = {
    "generate": (generate, {}),
    "a window, in chunks": (generate, {"max_batch_tokens": 8, "window": 4, "block_size": 8}),
    "an int8 cache": (generate, {"kv_cache_dtype": "int8"}),
    "evicted by importance": (generate, {"eviction": "rksc"}),
    "draw": (draw, {}),
    "branch and score": (branch_and_score, {}),
    "share": (share, {}),
}


@pytest.mark.parametrize("use", USES)
def test_the_tokens_are_those_of_the_cpu(tiny_llama, cuda, use):
    run, options = USES[use]
    with open_llm(tiny_llama, on_cuda=False, **options) as llm:
        tokens, numbers = run(llm)
    assert cuda.num_launches == 0
    with open_llm(tiny_llama, **options) as llm:
        found, found_numbers = run(llm)
        assert found == tokens and found_numbers == pytest.approx(numbers, abs=1e-3)
        assert llm.stats()["backend"] == "triton" and llm.stats()["device"] == "cuda:0"
        check_integrity(llm.engine.blocks)
    assert cuda.num_launches > 0


def test_logits_in_bfloat16_are_near_those_of_float32(tiny_llama, cuda):
    with open_llm(tiny_llama, on_cuda=False) as llm:
        exact = llm.logits(PROMPTS[1])
    with open_llm(tiny_llama, dtype="bfloat16") as llm:
        found = llm.logits(PROMPTS[1]).cpu()
    assert (found - exact).norm() < 0.05 * exact.norm()


def test_nan_in_the_weights_fails_the_request_by_name(tiny_llama, cuda):
    with open_llm(tiny_llama) as llm:
        llm.engine.runner.model.layers[1].attn_norm[3] = float("nan")
        with pytest.raises(NumericalError, match="NaN"):
            llm.generate(PROMPTS[1:], GREEDY)

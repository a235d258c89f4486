"""Matrices of 8 bits: near the model that they are rounded from, and never without a word."""

import pytest
import torch

from minirksc import LLM, SamplingParams, SolverConfig
from minirksc.cli.generate import main
from minirksc.errors import ConfigError
from minirksc.kernels.native.ops import has_bf16_products, native
from minirksc.rksc.gates_file import settings_of

needs_bf16 = pytest.mark.skipif(not has_bf16_products, reason="this processor has no AVX512-BF16 and VNNI")
GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True, detokenize=False)
PROMPT = [7, 9, 13, 40, 41, 42, 43, 11] * 6


def open_llm(folder, **options):
    return LLM(folder, **({"dtype": "bfloat16", "kv_cache_bytes": "4MiB"} | options))


@needs_bf16
@pytest.mark.parametrize("tie", [True, False])
def test_logits_are_near_those_of_the_model(tiny_llama, tie):
    folder = tiny_llama(layers=3, dtype="bfloat16", tie=tie)
    with open_llm(folder) as llm:
        expected, weight_bytes = llm.logits(PROMPT), llm.stats()["weight_bytes"]
    with open_llm(folder, quantize="int8") as llm:
        logits, stats = llm.logits(PROMPT), llm.stats()
        again = llm.logits(PROMPT)
    distance = (logits - expected).square().mean().sqrt() / expected.std()
    assert 0 < distance < 0.1
    assert torch.equal(logits, again)
    assert stats["quantize"] == "int8" and stats["backend"] == "native" and stats["weight_bytes"] < weight_bytes
    with open_llm(folder, quantize="int8") as llm:
        assert torch.equal(llm.logits(PROMPT), logits)  # loading rounds alike each time


@needs_bf16
def test_branches_and_batches_are_as_alone(tiny_llama):
    with open_llm(tiny_llama(layers=3, dtype="bfloat16"), quantize="int8") as llm:
        root = llm.branch(PROMPT)
        branches = root.fork(3)
        for index, branch in enumerate(branches):
            branch.append([20 + index])
        llm.extend(branches, GREEDY)
        for index, branch in enumerate(branches):
            llm.reset_prefix_cache()
            (alone,) = llm.generate([[*PROMPT, 20 + index]], GREEDY)
            assert branch.output_token_ids == alone.outputs[0].token_ids


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float32"}, "not float32"),
        ({"backend": "torch"}, "the torch one"),
        ({"backend": "reference"}, "the reference one"),
        ({"quantize": "int4"}, "none, int8"),
    ],
)
def test_where_it_cannot_be_it_is_refused(tiny_llama, options, message):
    if options.get("dtype") == "float32" and native is None:
        pytest.skip("nothing is compiled")
    with pytest.raises(ConfigError, match=message):
        open_llm(tiny_llama(), **({"quantize": "int8"} | options))


@needs_bf16
def test_gates_of_the_one_are_not_tested_on_the_other(tiny_llama):
    folder, config = tiny_llama(dtype="bfloat16"), SolverConfig()
    with open_llm(folder) as llm, open_llm(folder, quantize="int8") as rounded:
        plain, int8 = settings_of(config, llm), settings_of(config, rounded)
    assert {**plain, "quantize": "int8"} == int8 and "quantize" not in plain


@needs_bf16
def test_the_command_line_names_the_approximation(tiny_llama, capsys):
    folder = str(tiny_llama(layers=2, dtype="bfloat16", tokenizer=True))
    options = ["--model", folder, "--kv-cache-bytes", "4MiB", "--max-tokens", "4", "--stats"]
    assert main([*options, "--quantize", "int8", "a word"]) == 0
    assert "model: bfloat16, int8 (approximate) matrices of" in capsys.readouterr().err
    assert main([*options, "a word"]) == 0
    assert "approximate" not in capsys.readouterr().err

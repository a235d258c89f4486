"""Attention mass: measured in some decode steps, for policies that ask for it, without changing a token."""

from types import SimpleNamespace

import pytest
import torch
from integrity import check_integrity

from minirksc import LLM, SamplingParams
from minirksc.engine.mass import MASS_INTERVAL, measured_layers

PROMPT = [(7 * i) % 89 + 5 for i in range(60)]
PARAMS = SamplingParams(temperature=0, max_tokens=2 * MASS_INTERVAL + 3, ignore_eos=True, detokenize=False)


def run(model, prompts, **options):
    seen = []
    with LLM(model, block_size=8, kv_cache_bytes="2MiB", **options) as llm:
        observe = llm.engine.blocks.observe
        llm.engine.blocks.observe = lambda seq_id, mass: (seen.append((seq_id, mass)), observe(seq_id, mass))
        tokens = [out.outputs[0].token_ids for out in llm.generate(prompts, PARAMS)]
        check_integrity(llm.engine.blocks)
        importances = [block.importance for block in llm.engine.blocks._pool._blocks if block.digest]
    return tokens, seen, importances


@pytest.mark.parametrize("policy", ["rksc", "cost"])
def test_measured_in_every_nth_decode_step_and_no_token_changes(tiny_llama, policy):
    model = tiny_llama(layers=6)
    prompts = [PROMPT, [*PROMPT[:30], 9, 8], [5, 6, 7]]
    tokens, seen, importances = run(model, prompts, eviction=policy)
    expected, nothing, _ = run(model, prompts, eviction="lru")
    assert tokens == expected
    assert nothing == []
    assert len(seen) == 2 * len(prompts)
    assert all(sum(mass) == pytest.approx(1, abs=1e-4) for _, mass in seen)
    assert any(importance != 1 for importance in importances)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_mass_is_what_the_softmax_gives(tiny_llama, backend):
    with LLM(tiny_llama(layers=4), block_size=8, kv_cache_bytes="2MiB", backend=backend) as llm:
        runner, masses = llm.engine.runner, []
        forward = runner.forward

        def noted(batch, depth=None, mass=None):
            logits = forward(batch, depth, mass)
            masses.extend([] if mass is None else [(mass.layers, torch.stack(mass.masses))])
            return logits

        runner.forward = noted
        llm.generate([PROMPT, PROMPT[:9]], PARAMS)
    assert masses
    for layers, mass in masses:
        assert len(layers) == len(mass)
        assert mass.sum(-1).allclose(torch.ones(mass.shape[:2]), atol=1e-4)


@pytest.mark.parametrize(
    ("windows", "expected"),
    [([None] * 8, (2, 4, 6)), ([8] * 8, (2, 4, 6)), ([8, None] * 4, (3, 5, 7)), ([8, 8, None], (2,)), ([None], (0,))],
)
def test_layers_that_see_everything_are_measured_where_there_are_some(windows, expected):
    spec = SimpleNamespace(layers=[SimpleNamespace(window=window) for window in windows], num_layers=len(windows))
    assert measured_layers(spec) == expected

"""Tokens that leave a pass in the midst of a prompt, and use the KV of another sequence from there on."""

import pytest
import torch
from integrity import check_integrity

from minirksc import LLM, SamplingParams
from minirksc.engine.gates import Borrow, Seat

LAYERS, AT = 5, 1  # tokens leave after layer AT
PROMPT = [(7 * i) % 89 + 5 for i in range(70)]
PARAMS = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, detokenize=False)


class BorrowAt:
    """Row 0 borrows given offsets from a sequence."""

    layers = (AT,)

    def __init__(self, seq_id, offsets, positions):
        self.verdict = Borrow(offsets, seq_id, positions)

    def after_layer(self, layer, rows):
        return dict.fromkeys(rows.rows, self.verdict) if rows.ends[0] else {}


@pytest.fixture(params=[("torch", "auto"), ("reference", "auto"), ("torch", "int8")], ids="-".join)
def llm(tiny_llama, request):
    backend, kv = request.param
    options = {"backend": backend, "kv_cache_dtype": kv, "block_size": 8, "kv_cache_bytes": "2MiB"}
    with LLM(tiny_llama(layers=LAYERS), **options) as llm:
        yield llm
        check_integrity(llm.engine.blocks)


def branch_that_borrows(llm, prompt, root, offsets, positions):
    (branch,) = llm.branches([prompt], share=False, seats=[Seat(BorrowAt(root.seq_id, offsets, positions), 0)])
    return branch


def kv_of(llm, branch, layer, position):
    table = llm.engine.blocks.block_table(branch.seq_id)
    return llm.engine.runner.cache.layers[layer].kv[table[position // 8], position % 8]  # [2, heads, head_dim]


def test_equal_tokens_at_equal_places_borrow_what_they_would_have_computed(llm):
    (expected,) = llm.generate([PROMPT], PARAMS)
    root = llm.branch(PROMPT)
    before = llm.stats()
    offsets = [*range(5), *range(9, 30), 33, *range(40, 60)]
    branch = branch_that_borrows(llm, PROMPT, root, offsets, offsets)
    after = llm.stats()
    saved = len(offsets) * (LAYERS - AT - 1)
    assert branch.num_saved_layer_rows == saved
    assert after["num_saved_layer_rows"] - before["num_saved_layer_rows"] == saved
    assert after["num_layer_rows"] - before["num_layer_rows"] == len(PROMPT) * LAYERS - saved
    assert after["num_prefilled_tokens"] - before["num_prefilled_tokens"] == len(PROMPT) - len(offsets)
    llm.extend([branch], PARAMS)
    assert branch.output_token_ids == expected.outputs[0].token_ids


def test_moved_tokens_have_the_values_of_their_source_and_turned_keys(llm):
    root = llm.branch(PROMPT)
    shift = 3
    prompt = [90, 91, 92, *PROMPT]
    positions = list(range(10, 50))
    offsets = [position + shift for position in positions]
    branch = branch_that_borrows(llm, prompt, root, offsets, positions)
    for layer in range(LAYERS):
        for source, place in zip(positions, offsets, strict=True):
            theirs, ours = kv_of(llm, root, layer, source), kv_of(llm, branch, layer, place)
            if layer <= AT:  # its own, in another context; of layer 0 the values are the token's alone
                assert layer == 0 or not torch.equal(theirs[1], ours[1])
                continue
            assert torch.equal(theirs[1], ours[1])
            assert not torch.equal(theirs[0], ours[0])
            if llm.config.kv_cache_dtype == "auto":
                assert float(theirs[0].norm()) == pytest.approx(float(ours[0].norm()), rel=1e-5)
    llm.extend([branch], PARAMS)
    assert len(branch.output_token_ids) == 6


def test_borrowed_kv_is_shared_with_forks_and_with_nobody_else(llm):
    root = llm.branch(PROMPT)
    prompt = [90, *PROMPT]
    seat = Seat(BorrowAt(root.seq_id, list(range(20, 50)), list(range(19, 49))), 0)
    (branch,) = llm.branches([prompt], seats=[seat])  # not private: its salt is everybody's
    forks = branch.fork(2)
    assert all(fork.num_shared_tokens == len(prompt) for fork in forks)
    llm.extend(forks, PARAMS)
    for one in (branch, *forks):
        one.prune()
    check_integrity(llm.engine.blocks)
    (out,) = llm.generate([[*prompt, *forks[0].output_token_ids, 7]], PARAMS)
    assert out.num_cached_tokens <= 20  # what it computed itself, before the first borrowed token
    with LLM(llm.config.model, kv_cache_dtype=llm.config.kv_cache_dtype, backend=llm.config.backend) as fresh:
        (expected,) = fresh.generate([[*prompt, *forks[0].output_token_ids, 7]], PARAMS)
    assert out.outputs[0].token_ids == expected.outputs[0].token_ids


def test_others_in_the_batch_do_not_notice(llm):
    root = llm.branch(PROMPT)
    others = [[30 + i, *PROMPT[i:]] for i in range(3)]
    expected = [out.outputs[0].token_ids for out in llm.generate(others, PARAMS)]
    llm.reset_prefix_cache()
    engine = llm.engine
    seat = Seat(BorrowAt(root.seq_id, list(range(20, 50)), list(range(20, 50))), 0)
    requests = [engine.add_request(engine.new_sequence(p, share=False), PARAMS.resolved({})) for p in others[:2]]
    requests.append(engine.add_request(engine.new_sequence(PROMPT, share=False), PARAMS.resolved({}), seat=seat))
    requests.append(engine.add_request(engine.new_sequence(others[2], share=False), PARAMS.resolved({})))
    while engine.has_work:
        engine.step()
    assert [request.output_token_ids for request in (*requests[:2], requests[3])] == expected


def test_a_sequence_that_borrowed_is_computed_exactly_after_a_preemption(llm):
    (expected,) = llm.generate([[90, *PROMPT]], PARAMS)
    root = llm.branch(PROMPT)
    branch = branch_that_borrows(llm, [90, *PROMPT], root, list(range(20, 50)), list(range(19, 49)))
    while llm.engine.scheduler._reclaim():
        pass
    assert not branch.has_kv([0])
    llm.extend([branch], PARAMS)
    assert branch.output_token_ids == expected.outputs[0].token_ids

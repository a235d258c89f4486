"""Depth gates: rows that leave save their layers, leave nothing behind, and change nothing for the others."""

import math

import pytest
import torch
from integrity import check_integrity

from minirksc import LLM, SamplingParams
from minirksc.engine.gates import LEAVE, Seat
from minirksc.errors import ConfigError

PROMPT = [(7 * i) % 89 + 5 for i in range(50)]
QUESTION = [11, 12, 13, 14, 15]
CHOICES = [[20], [21]]
LAYERS = 6


class LeaveAt:
    """Lets given rows leave after given layers; notes what it was shown."""

    def __init__(self, layer_of, layers=range(LAYERS)):
        self.layers = layers
        self.layer_of = layer_of
        self.seen = {}

    def after_layer(self, layer, rows):
        hidden = rows.last()
        assert hidden.shape[0] == len(rows.rows)
        for index, row in enumerate(rows.rows):
            self.seen[row, layer] = hidden[index].clone()
            assert torch.equal(rows.hidden(index)[-1], hidden[index])
            assert len(rows.positions[index]) == len(rows.hidden(index))
        return {row: LEAVE for row in rows.rows if self.layer_of.get(row) == layer}


@pytest.fixture(params=["torch", "reference"])
def llm(tiny_llama, request):
    options = {"backend": request.param, "block_size": 8, "kv_cache_bytes": "2MiB"}
    with LLM(tiny_llama(layers=LAYERS, heads=4, kv_heads=2), **options) as llm:
        yield llm
        check_integrity(llm.engine.blocks)


@pytest.fixture()
def kids(llm):
    root = llm.branch(PROMPT)
    kids = root.fork(4)
    for index, kid in enumerate(kids):
        kid.append([30 + index] * (index + 1))
    llm.extend(kids, SamplingParams(temperature=1.0, seed=1, max_tokens=4, ignore_eos=True, detokenize=False))
    return kids


def counted(llm, call):
    before = llm.stats()
    result = call()
    after = llm.stats()
    names = [name for name in after if name.startswith("num_") and "blocks" not in name]
    return result, {name: after[name] - before[name] for name in names}


def test_a_gate_that_lets_nobody_leave_changes_nothing(llm, kids):
    plain, work = counted(llm, lambda: llm.score(kids, QUESTION, CHOICES))
    gate = LeaveAt({})
    gated, gated_work = counted(llm, lambda: llm.score(kids, QUESTION, CHOICES, gate=gate))
    assert torch.equal(plain, gated)
    assert gated_work == work
    assert work["num_saved_layer_rows"] == 0
    assert work["num_layer_rows"] == LAYERS * work["num_prefilled_tokens"]
    assert len(gate.seen) == len(kids) * LAYERS


def test_rows_that_leave_save_their_layers_and_the_others_do_not_notice(llm, kids):
    plain, work = counted(llm, lambda: llm.score(kids, QUESTION, CHOICES))
    num_rows = work["num_prefilled_tokens"] // len(kids)  # one token of each has no KV yet
    assert num_rows == len(QUESTION) + 1
    gate = LeaveAt({1: 2, 3: 2})
    gated, gated_work = counted(llm, lambda: llm.score(kids, QUESTION, CHOICES, gate=gate))
    assert gated_work["num_layer_rows"] == num_rows * (2 * LAYERS + 2 * 3)
    assert gated_work["num_saved_layer_rows"] == num_rows * 2 * (LAYERS - 3)
    assert gated_work["num_prefilled_tokens"] == num_rows * 2
    assert torch.allclose(plain[[0, 2]], gated[[0, 2]], atol=1e-6)
    assert gated[[1, 3]].isnan().all()
    assert (1, 3) not in gate.seen and (0, 5) in gate.seen


def test_rows_leave_one_by_one_until_none_is_left(llm, kids):
    gate = LeaveAt({0: 0, 1: 1, 2: 3, 3: 4})
    scores, work = counted(llm, lambda: llm.score(kids, QUESTION, CHOICES, gate=gate))
    assert scores.isnan().all()
    assert work["num_layer_rows"] == (len(QUESTION) + 1) * (1 + 2 + 4 + 5)
    assert work["num_prefilled_tokens"] == 0


def test_hidden_rows_are_those_of_the_whole_pass(llm, kids):
    whole, narrowed = LeaveAt({}), LeaveAt({0: 1, 2: 3})
    for gate in (whole, narrowed):
        llm.score(kids, QUESTION, CHOICES, gate=gate)
    for key, hidden in narrowed.seen.items():
        assert torch.allclose(hidden, whole.seen[key], atol=1e-5), key


def test_what_left_half_made_is_never_found(llm, kids):
    cached = llm.stats()["num_blocks_cached"]
    llm.score(kids, QUESTION * 4, CHOICES, gate=LeaveAt(dict.fromkeys(range(4), 2)))
    check_integrity(llm.engine.blocks)
    assert llm.stats()["num_blocks_cached"] == cached
    (out,) = llm.generate(
        [kids[0].token_ids + QUESTION * 4],
        SamplingParams(temperature=0, max_tokens=2, ignore_eos=True, detokenize=False),
    )
    assert out.num_cached_tokens <= kids[0].num_tokens


def test_a_kept_sequence_goes_on_after_its_prefill_left(llm):
    engine = llm.engine
    sequence = engine.new_sequence(PROMPT)
    sequence.kept = True
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, detokenize=False).resolved({})

    def run(**options):
        request = engine.add_request(sequence, params, **options)
        while not request.finished:
            engine.step()
        return request

    request = run(prefill_only=True, seat=Seat(LeaveAt({7: 1}), 7))
    assert request.finish_reason == "gate" and request.exit_layer == 2
    assert engine.blocks.num_tokens(sequence.seq_id) == 0
    assert engine.stats()["num_blocks_used"] == 0
    check_integrity(engine.blocks)
    request = run()
    expected = llm.generate([PROMPT], params)[0].outputs[0].token_ids
    assert request.output_token_ids == expected
    engine.release(sequence)


def test_requests_without_a_gate_share_the_step(llm):
    engine = llm.engine
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, detokenize=False).resolved({})
    expected = llm.generate([PROMPT], params)[0].outputs[0].token_ids
    llm.reset_prefix_cache()
    plain = engine.add_request(engine.new_sequence(PROMPT, share=False), params)
    seats = [Seat(LeaveAt({0: 0}), 0), Seat(LeaveAt({0: 3}), 0)]
    gated = [
        engine.add_request(engine.new_sequence(PROMPT[i + 1 :], share=False), params, seat=seat)
        for i, seat in enumerate(seats)
    ]
    while engine.has_work:
        engine.step()
    assert plain.output_token_ids == expected
    assert [request.exit_layer for request in gated] == [1, 4]
    assert all(request.output_token_ids == [] for request in gated)


def test_a_request_at_a_gate_is_not_cut_where_a_whole_step_can_take_it(tiny_llama):
    with LLM(tiny_llama(layers=LAYERS), block_size=8, kv_cache_bytes="2MiB", max_batch_tokens=80) as llm:
        branches = [llm.branch([5 + i, *PROMPT[:3]], share=False) for i in range(3)]
        gate = LeaveAt({0: 1, 1: 1, 2: 1})
        llm.score(branches, PROMPT, CHOICES, gate=gate)
        assert len(gate.seen) == 3 * 2  # each once a layer, though a step has room for one and a half
        check_integrity(llm.engine.blocks)


def test_a_question_longer_than_a_step_is_decided_at_its_end(tiny_llama):
    with LLM(tiny_llama(layers=LAYERS), block_size=8, kv_cache_bytes="2MiB", max_batch_tokens=32) as llm:
        branch = llm.branch(PROMPT[:5])
        ends = []

        class Ends(LeaveAt):
            def after_layer(self, layer, rows):
                ends.extend(rows.ends)
                return dict.fromkeys(rows.rows, LEAVE) if rows.ends[0] else {}

        llm.score([branch], PROMPT, CHOICES, gate=Ends({}))
        assert ends == [False] * LAYERS + [True]


def test_choices_of_several_tokens_have_no_gate(llm, kids):
    with pytest.raises(ConfigError, match="more than one token"):
        llm.score(kids, QUESTION, [[1, 2], [3]], gate=LeaveAt({}))


@pytest.mark.parametrize("decisions", [{1: None}, {1: "leave"}, {9: LEAVE}])
def test_a_decision_that_is_none_or_about_another_row_is_refused_by_name(llm, kids, decisions):
    class Wrong(LeaveAt):
        def after_layer(self, layer, rows):
            return decisions

    (row, decision), *_ = decisions.items()
    with pytest.raises(
        ConfigError, match=f"a gate decided .*{'Leave' if row == 9 else decision}.* for row {row} after"
    ):
        llm.score(kids, QUESTION, CHOICES, gate=Wrong({}))
    assert torch.equal(llm.score(kids, QUESTION, CHOICES), llm.score(kids, QUESTION, CHOICES))


def test_one_question_a_branch(llm, kids):
    questions = [[11], [12, 13], [14], [15, 16, 17]]
    together = llm.score(kids, questions, CHOICES)
    alone = torch.cat([llm.score([kid], q, CHOICES) for kid, q in zip(kids, questions, strict=True)])
    assert torch.allclose(together, alone, atol=1e-6)
    with pytest.raises(ConfigError, match="3 questions for 4 branches"):
        llm.score(kids, questions[:3], CHOICES)


def test_the_lens_at_the_last_layer_is_the_model(llm):
    prompt = PROMPT[:20]
    hidden = {}

    class Last(LeaveAt):
        def after_layer(self, layer, rows):
            hidden[layer] = rows.last()
            return {}

    scores = llm.score([llm.branch(prompt)], QUESTION, CHOICES, gate=Last({}))
    model = llm.engine.runner.model
    two = model.lens([20, 21])(hidden[LAYERS - 1])
    assert torch.allclose(two.softmax(-1), scores, atol=1e-5)
    assert torch.allclose(model.lens()(hidden[LAYERS - 1])[:, [20, 21]], two, atol=1e-5)
    assert math.isfinite(float(model.lens([20, 21])(hidden[0]).sum()))

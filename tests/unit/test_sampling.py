"""The sampler against plain arithmetic, and the keyed random numbers."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minirksc.engine import sampling
from minirksc.engine.sampling import SamplingRow, top_logprobs_of, uniform
from minirksc.kernels.confidence import confidence_torch as confidence
from minirksc.kernels.draw import draw_native, draw_torch
from minirksc.kernels.native.ops import native
from minirksc.options import SamplingParams


def make_row(seed=0, path=(), position=0, prompt=(), output=(), forbidden=(), **options):
    params = SamplingParams(**options).resolved({})
    return SamplingRow(params, [*prompt, *output], output, seed, path, position, frozenset(forbidden))


FORMS = [draw_torch, pytest.param(draw_native, marks=pytest.mark.skipif(native is None, reason="nothing is compiled"))]


@pytest.fixture(params=FORMS, autouse=True, scope="module")
def form(request):
    global sample
    sample = partial(sampling.sample, confidence=confidence, draw=request.param)


def draw(logits, *rows):
    return sample(torch.tensor(logits), rows)


def plain_probabilities(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """The rules, one after the other, in plain Python."""
    scaled = [x / temperature for x in logits]
    top = max(scaled)
    weights = {i: math.exp(x - top) for i, x in enumerate(scaled)}
    order = sorted(weights, key=lambda i: (-weights[i], i))
    if top_k > 0:
        order = order[:top_k]
    total = sum(weights[i] for i in order)
    kept, mass = [], 0.0
    for i in order:
        if mass >= top_p and top_p < 1:
            break
        kept.append(i)
        mass += weights[i] / total
    total = sum(weights[i] for i in kept)
    kept = [i for i in kept if weights[i] / total >= min_p * weights[kept[0]] / total]
    total = sum(weights[i] for i in kept)
    return {i: weights[i] / total for i in kept}


LOGITS = [1.0, 3.0, -2.0, 2.5, 0.3, 3.1, -1.0]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 3},
        {"top_p": 0.7},
        {"min_p": 0.3},
        {"top_k": 4, "top_p": 0.8, "temperature": 2.0},
    ],
)
def test_frequencies_are_those_of_the_truncated_distribution(options):
    num_draws = 4000
    rows = [make_row(position=i, **{"temperature": 1.0, **options}) for i in range(num_draws)]
    drawn = draw([LOGITS] * num_draws, *rows)
    expected = plain_probabilities(LOGITS, **options)
    counts = {i: 0 for i in range(len(LOGITS))}
    for one in drawn:
        counts[one.token_id] += 1
    assert all(counts[i] == 0 for i in counts if i not in expected)
    chi_square = sum((counts[i] - num_draws * p) ** 2 / (num_draws * p) for i, p in expected.items())
    assert chi_square < 30  # at most 6 degrees of freedom; the keys are fixed


@given(
    logits=st.lists(st.integers(-64, 64).map(lambda i: i / 8), min_size=2, max_size=20),
    temperature=st.floats(0.25, 3), top_k=st.integers(0, 22), top_p=st.floats(0.05, 1), min_p=st.floats(0, 0.9),
    position=st.integers(0, 1000),
)  # fmt: skip
def test_only_tokens_of_the_truncated_distribution_are_drawn(logits, temperature, top_k, top_p, min_p, position):
    row = make_row(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, position=position)
    (one,) = draw([logits], row)
    # Borders of top_p and min_p are a matter of rounding: allow what a hair more would allow.
    allowed = plain_probabilities(logits, temperature, top_k, min(1.0, top_p + 1e-9), min_p * (1 - 1e-9))
    equal_logits = {i for i, x in enumerate(logits) for j in allowed if x == logits[j]}
    assert one.token_id in equal_logits


def test_a_token_does_not_depend_on_its_batch():
    gen = torch.Generator().manual_seed(0)
    logits = torch.randn((9, 700), generator=gen) * 2
    options = [
        {"temperature": 0}, {"temperature": 0.7}, {"temperature": 1, "top_p": 0.9}, {"temperature": 1, "top_k": 5},
        {"temperature": 1.5, "min_p": 0.1}, {"temperature": 0, "repetition_penalty": 1.5}, {"temperature": 1},
        {"temperature": 3.0, "top_p": 0.999}, {"temperature": 1, "top_k": 650},
    ]  # fmt: skip
    rows = [make_row(seed=i, path=(i,), prompt=[1, 2, 3], **o) for i, o in enumerate(options)]
    together = [one.token_id for one in sample(logits, rows)]
    alone = [sample(logits[i : i + 1], [row])[0].token_id for i, row in enumerate(rows)]
    assert together == alone


def test_equal_logits_at_the_border_do_not_depend_on_the_batch():
    # Few distinct values, as from a bfloat16 model, so that the k-th likeliest has many equals.
    logits = torch.zeros(1, 3000)
    logits[0, ::7] = 0.5
    mate = make_row(temperature=1.0, top_k=700)
    likeliest = set(logits[0].sort(descending=True, stable=True).indices[:600].tolist())
    for position in range(60):
        row = make_row(position=position, temperature=1.0, top_k=600)
        (alone,) = sample(logits, [row])
        together = sample(logits.expand(2, -1), [row, mate])[0]
        assert alone.token_id == together.token_id and alone.token_id in likeliest


def test_logits_of_minus_infinity_do_not_widen_the_search_or_get_drawn():
    logits = torch.full((1, 5000), -math.inf)
    logits[0, [7, 4000]] = torch.tensor([1.0, 0.5])
    rows = [make_row(position=i, temperature=1.0, top_k=3, top_p=0.99) for i in range(50)]
    assert {one.token_id for one in sample(logits.expand(50, -1), rows)} == {7, 4000}


def test_greedy_takes_the_smallest_of_equals_and_leaves_logits_alone():
    logits = torch.tensor([[1.0, 2.0, 2.0], [1.0, 2.0, 2.0]])
    before = logits.clone()
    rows = [make_row(temperature=0), make_row(temperature=0, logit_bias={2: 0.5})]
    assert [one.token_id for one in sample(logits, rows)] == [1, 2]
    assert torch.equal(logits, before)


def test_penalties_and_bans():
    row = make_row(temperature=0, presence_penalty=2.0, output=[1])
    assert draw([[1.0, 2.5]], row)[0].token_id == 0
    row = make_row(temperature=0, frequency_penalty=0.6, output=[1, 1, 1])
    assert draw([[1.0, 2.5]], row)[0].token_id == 0
    row = make_row(temperature=0, repetition_penalty=2.0, prompt=[1])
    assert draw([[1.5, 2.5]], row)[0].token_id == 0
    assert draw([[1.0, 9.0]], make_row(temperature=0, forbidden=[1, 99]))[0].token_id == 0
    assert draw([[0.0, 0.0]], make_row(temperature=1.0, logit_bias={0: -100.0}))[0].token_id == 1


def test_a_tiny_repetition_penalty_does_not_make_logits_infinite():
    row = make_row(temperature=1.0, repetition_penalty=1e-300, prompt=[2])
    assert draw([[0.0, 1.0, 2.0, 3.0]], row)[0].token_id == 2


@pytest.mark.oracle
def test_repetition_penalty_is_that_of_transformers():
    from transformers import RepetitionPenaltyLogitsProcessor

    from minirksc.engine.sampling import _penalise

    gen = torch.Generator().manual_seed(3)
    logits = torch.randn((1, 30), generator=gen)
    seen = [3, 7, 7, 12]
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([seen]), logits.clone())
    actual = logits.clone()
    _penalise(actual[0], make_row(temperature=0, repetition_penalty=1.7, prompt=seen[:2], output=seen[2:]))
    torch.testing.assert_close(actual, expected)


def test_logprobs_are_of_the_models_own_distribution():
    row = make_row(temperature=0, logprobs=2, logit_bias={0: 50.0})
    (one,) = draw([LOGITS], row)
    raw = torch.tensor(LOGITS).log_softmax(-1)
    assert one.token_id == 0 and one.logprob == pytest.approx(float(raw[0]), abs=1e-5)
    assert list(one.top_logprobs) == [5, 1, 0]
    assert one.top1_probability == pytest.approx(float(raw.max().exp()), abs=1e-5)
    (plain,) = draw([LOGITS], make_row(temperature=0))
    assert plain.top_logprobs is None
    (chosen,) = draw([LOGITS], make_row(temperature=0, logprobs=0))
    assert list(chosen.top_logprobs) == [5]
    # Rows that ask for different numbers of them, or none, get what each asked for.
    mixed = draw([LOGITS] * 3, *(make_row(temperature=0, logprobs=k) for k in (None, 1, 99)))
    assert [one.top_logprobs and len(one.top_logprobs) for one in mixed] == [None, 1, len(LOGITS)]
    assert list(mixed[2].top_logprobs.values()) == pytest.approx(sorted(raw.tolist(), reverse=True), abs=1e-5)
    tops = top_logprobs_of(torch.tensor([LOGITS, LOGITS]), [2, 5], 1)
    assert [list(top) for top in tops] == [[5, 2], [5]]
    assert tops[0][2] == pytest.approx(float(raw[2]), abs=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_is_not_finite_fails_alone(bad):
    rows = [make_row(temperature=0), make_row(temperature=1.0), make_row(temperature=0)]
    good, failed, other = draw([[0.0, 1.0], [bad, 0.0], [2.0, 1.0]], *rows)
    assert (good.token_id, other.token_id) == (1, 0) and good.failure is None
    assert failed.token_id == -1 and "1 " in failed.failure
    (dead,) = draw([[-math.inf, -math.inf]], make_row(temperature=1.0))
    assert "every token" in dead.failure


def test_random_numbers_are_pinned_and_uniform():
    # A change here would change every seeded result that anybody has kept.
    assert [uniform(0, (), 0), uniform(1, (), 0), uniform(0, (3, 1), 17)] == PINNED
    counts = [0] * 16
    for i in range(8000):
        counts[int(uniform(i % 7, (i,), i // 7) * 16)] += 1
    assert sum((c - 500) ** 2 / 500 for c in counts) < 40
    assert len({uniform(1, (2,), 3), uniform(12, (), 3), uniform(1, (), 23), uniform(1, (2, 3), 0)}) == 4


PINNED = [0.3859926107094097, 0.48055380340761744, 0.41974839052383717]

"""Confidence: the fast forms against the reference and against what the formulas say."""

import importlib
import math
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minirksc.errors import ConfigError
from minirksc.kernels.confidence import (
    MAX_PART,
    MAX_VOCAB,
    confidence_reference,
    confidence_torch,
    confidence_triton,
    part_launch,
)
from minirksc.kernels.native.ops import confidence_native

sys.path.append(str(Path(__file__).parent))  # in importlib mode pytest does not add it
forms = importlib.import_module("forms")

# The interpreter's numpy warns of infinities and NaN, which are what some of these rows are made of.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton", "ignore::RuntimeWarning:numpy")

FAST = forms.parameters([confidence_torch, confidence_triton, confidence_native])
FORMS = [*forms.parameters([confidence_reference]), *FAST]
KERNELS = FAST[1:]
NUMBERS = ("top1_probability", "entropy", "logsumexp", "mean_logit")


def randn(*shape, scale=3.0, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def close(fast, slow):
    assert torch.equal(fast.argmax, slow.argmax)
    for name in NUMBERS:
        torch.testing.assert_close(getattr(fast, name), getattr(slow, name), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0, 9), (1, 1), (1, 2), (3, 41), (5, 997), (2, MAX_PART + 1), (2, 49152)])
@pytest.mark.parametrize("form", FAST)
def test_fast_equals_reference(form, shape, dtype):
    logits = randn(*shape).to(dtype)
    wide = torch.full((shape[0], shape[1] + 3), math.nan, dtype=dtype)
    for rows in (logits, wide[:, 2:-1].copy_(logits)):  # contiguous, and a slice
        result = form(rows)
        assert result.argmax.dtype == torch.int64 and all(
            getattr(result, name).dtype == torch.float32 for name in NUMBERS
        )
        close(result, confidence_reference(rows))


@pytest.mark.parametrize("form", forms.parameters([confidence_torch, confidence_native]))
def test_forms_of_a_cpu_take_any_stride(form):
    for rows in (randn(3, 82)[:, ::2], randn(41, 3).t(), randn(1, 41).expand(3, 41)):
        close(form(rows), confidence_reference(rows))


@pytest.mark.parametrize("form", KERNELS)
@pytest.mark.parametrize("vocab", [151936, 262144, 300007])
def test_large_vocabularies(form, vocab):
    logits = randn(1, vocab)
    close(form(logits), confidence_reference(logits))


@pytest.mark.parametrize("form", KERNELS)
@settings(max_examples=30)
@given(
    st.integers(1, 3),
    st.integers(1, 3 * MAX_PART),
    st.sampled_from([0.0, 1.0, 30.0]),
    st.sampled_from([0.0, 0.5, 0.999]),
    st.sampled_from([-1e4, 0.0, 1e4]),
    st.integers(0, 99),
)
def test_kernel_equals_reference(form, rows, vocab, scale, masked, offset, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn((rows, vocab), generator=generator) * scale + offset).round(decimals=1)  # with ties
    logits = logits.masked_fill(torch.rand((rows, vocab), generator=generator) < masked, -math.inf)
    logits[:, int(torch.randint(vocab, (), generator=generator))] = offset  # at least one is finite
    result, expected = form(logits), confidence_reference(logits)
    exact = logits.double()
    lse = exact.logsumexp(-1)
    logprobs = exact - lse.unsqueeze(-1)
    entropy = -torch.where(logprobs.isinf(), 0.0, logprobs.exp() * logprobs).sum(-1)
    assert torch.equal(result.argmax, expected.argmax)
    torch.testing.assert_close(result.logsumexp.double(), lse, atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(result.top1_probability.double(), logprobs.amax(-1).exp(), atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(result.entropy.double(), entropy, atol=1e-4, rtol=1e-5)  # whatever the offset
    torch.testing.assert_close(result.mean_logit.double(), exact.mean(-1), atol=1e-4, rtol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_known_values(form):
    uniform = form(torch.zeros(1, 8))
    assert uniform.top1_probability.item() == pytest.approx(1 / 8)
    assert uniform.entropy.item() == pytest.approx(math.log(8), abs=1e-6)
    assert uniform.argmax.item() == 0  # ties go to the smallest index
    assert uniform.mean_logit.item() == 0 and uniform.self_certainty(8).item() == pytest.approx(0, abs=1e-6)
    one = form(torch.tensor([[float("-inf"), 5.0, float("-inf")]]))
    assert one.argmax.item() == 1 and one.top1_probability.item() == 1
    assert one.entropy.item() == pytest.approx(0, abs=1e-6)
    assert one.mean_logit.item() == -math.inf and one.self_certainty(3).item() == math.inf
    huge = form(torch.tensor([[1e30, 0.0, -1e30]]))
    assert huge.top1_probability.item() == 1 and huge.entropy.item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("form", FORMS)
@given(st.integers(2, 40), st.sampled_from([-100.0, 0.0, 100.0]), st.integers(0, 99))
@settings(max_examples=15)
def test_self_certainty_is_the_divergence_from_the_uniform(form, vocab, offset, seed):
    logits = randn(2, vocab, seed=seed) + offset
    uniform = torch.full((2, vocab), 1 / vocab, dtype=torch.float64)
    divergence = torch.nn.functional.kl_div(logits.double().log_softmax(-1), uniform, reduction="none").sum(-1)
    torch.testing.assert_close(form(logits).self_certainty(vocab).double(), divergence, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_one_logit_of_minus_infinity_takes_the_mean_and_nothing_else(form):
    logits = randn(2, 2 * MAX_PART + 3)
    expected = form(logits)
    logits[0, 5] = -math.inf  # of so many that the others hardly notice
    result = form(logits)
    assert result.mean_logit[0] == -math.inf and result.mean_logit[1] == expected.mean_logit[1]
    for name in NUMBERS[:-1]:
        torch.testing.assert_close(getattr(result, name), getattr(expected, name), atol=0.1, rtol=0.1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("first", [0, 7, MAX_PART - 1, MAX_PART, 2 * MAX_PART + 5])
@pytest.mark.parametrize("rest", [-1.0, -math.inf])
def test_ties_go_to_the_smallest_index_across_parts(form, first, rest):
    logits = torch.full((1, 3 * MAX_PART - 7), rest)
    logits[0, [first, 2 * MAX_PART + 9, 3 * MAX_PART - 8]] = 4.0
    assert form(logits).argmax.tolist() == [first]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("vocab", [2, 2 * MAX_PART + 3])
@pytest.mark.parametrize(
    "bad", [[math.nan, 0.0], [math.inf, 0.0], [-math.inf, -math.inf], [-math.inf, math.nan], [math.nan] * 2]
)
def test_bad_rows_have_no_finite_numbers_and_leave_others_alone(form, vocab, bad):
    logits = torch.full((3, vocab), -math.inf)
    logits[[0, 2], :2] = torch.tensor([1.0, 2.0])
    logits[1, 0], logits[1, -1] = bad
    result = form(logits)
    assert not math.isfinite(result.logsumexp[1])
    assert math.isnan(result.top1_probability[1]) and math.isnan(result.entropy[1])
    assert 0 <= result.argmax[1].item() < vocab  # means nothing, but can be used as an index
    for row in (0, 2):
        assert result.argmax[row].item() == 1 and math.isfinite(result.entropy[row])


@pytest.mark.parametrize("form", [FORMS[0], *KERNELS])
@pytest.mark.parametrize("vocab", [1, 2 * MAX_PART + 3])
def test_the_logsumexp_of_nothing_is_minus_infinity(form, vocab):
    result = form(torch.full((1, vocab), -math.inf))
    assert result.logsumexp.tolist() == [-math.inf] and result.argmax.tolist() == [0]


def test_parts_are_powers_of_two_and_not_wider_than_needed():
    for vocab in (1, 2, 997, 4096, 4097, 262144, MAX_VOCAB):
        block, num_warps = part_launch(vocab)
        assert block & (block - 1) == 0 and block < 2 * vocab + 1 and block // num_warps >= min(block, 512)
        assert math.ceil(vocab / block) <= 4096


@pytest.mark.parametrize(
    ("logits", "words"),
    [
        (torch.zeros(2, 8, dtype=torch.float64), "float64"),
        (torch.zeros(2, 0), r"\[2, 0\]"),
        (torch.zeros(8), r"\[8\]"),
        (torch.zeros(1).expand(1, MAX_VOCAB + 1), str(MAX_VOCAB)),
        (torch.zeros(2, 16)[:, ::2], "stride 2"),
    ],
)
def test_what_the_kernel_cannot_serve_is_refused(logits, words):
    with pytest.raises(ConfigError, match=words):
        confidence_triton(logits)

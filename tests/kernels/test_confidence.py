"""Confidence: the fast form against the reference and against what the formulas say."""

import math

import pytest
import torch
from minirksc.kernels.confidence import confidence, confidence_reference


def randn(*shape, scale=3.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) * scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (3, 41), (5, 997), (2, 49152)])
def test_fast_equals_reference(shape, dtype):
    logits = randn(*shape).to(dtype)
    for rows in (logits, torch.cat((logits, logits), -1)[:, ::2]):  # contiguous and strided
        fast, slow = confidence(rows), confidence_reference(rows)
        assert torch.equal(fast.argmax, slow.argmax)
        for name in ("top1_probability", "entropy", "logsumexp"):
            torch.testing.assert_close(getattr(fast, name), getattr(slow, name), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("form", [confidence, confidence_reference])
def test_known_values(form):
    uniform = form(torch.zeros(1, 8))
    assert uniform.top1_probability.item() == pytest.approx(1 / 8)
    assert uniform.entropy.item() == pytest.approx(math.log(8), abs=1e-6)
    assert uniform.argmax.item() == 0  # ties go to the smallest index
    one = form(torch.tensor([[float("-inf"), 5.0, float("-inf")]]))
    assert one.argmax.item() == 1 and one.top1_probability.item() == 1
    assert one.entropy.item() == pytest.approx(0, abs=1e-6)
    huge = form(torch.tensor([[1e30, 0.0, -1e30]]))
    assert huge.top1_probability.item() == 1 and huge.entropy.item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("form", [confidence, confidence_reference])
@pytest.mark.parametrize("bad", [[math.nan, 0.0], [math.inf, 0.0], [-math.inf, -math.inf]])
def test_bad_rows_have_no_finite_logsumexp_and_leave_others_alone(form, bad):
    result = form(torch.tensor([[1.0, 2.0], bad]))
    assert not math.isfinite(result.logsumexp[1])
    assert result.argmax[0].item() == 1 and math.isfinite(result.entropy[0])

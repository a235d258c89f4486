"""Similarity of hidden states: each form against float64, and what a weighted cosine must obey."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minirksc.errors import ConfigError
from minirksc.kernels.similarity import (
    MAX_SIZE,
    layer_weights,
    similarity_reference,
    similarity_torch,
    similarity_triton,
)

# The interpreter's numpy warns of infinities and NaN, which are what some of these rows are made of.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

FORMS = [similarity_reference, similarity_torch, similarity_triton]
TOLERANCE = 2e-6  # inputs of any dtype are exact in float32


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(actual, expected):
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected.double(), atol=TOLERANCE, rtol=0)


def exact(hidden, anchor, weights):
    h, a = hidden.double(), anchor.double().expand_as(hidden)
    cosines = (h * a).sum(-1) / (h.norm(dim=-1) * a.norm(dim=-1))
    return (cosines.nan_to_num(0.0) * weights.double()).sum(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(0, 2, 8), (1, 1, 1), (3, 5, 77), (2, 3, 576)])
@pytest.mark.parametrize("one_anchor", [True, False])
def test_similarity(one_anchor, shape, form, dtype):
    hidden = randn(*shape, dtype=dtype)
    anchor = randn(*shape[one_anchor:], dtype=dtype, seed=1)
    weights = layer_weights(shape[1], 1.5)
    close(form(hidden, anchor, weights), exact(hidden, anchor, weights))


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 3),
    st.integers(1, 4),
    st.integers(1, 300),
    st.booleans(),
    st.sampled_from([torch.float32, torch.float16]),
    st.integers(0, 3),
)
def test_kernel_of_slices_in_poisoned_memory(pairs, layers, size, one_anchor, dtype, gap):
    wide = torch.full((pairs, layers + gap, size + gap), float("nan"), dtype=dtype)
    hidden = wide[:, gap:, :size].copy_(randn(pairs, layers, size, dtype=dtype))
    anchor = randn(pairs, layers, size, dtype=dtype, seed=1)
    anchor = anchor.transpose(0, 1).contiguous().transpose(0, 1)  # as [layers, pairs, size] lies
    anchor = randn(layers, size, dtype=dtype, seed=1) if one_anchor else anchor
    weights = layer_weights(layers, 1.5)
    close(similarity_triton(hidden, anchor, weights), exact(hidden, anchor, weights))


@pytest.mark.parametrize("form", FORMS)
def test_like_opposite_and_orthogonal(form):
    hidden, weights = randn(3, 4, 32), layer_weights(4, 1.5)
    close(form(hidden, hidden * 7, weights), torch.ones(3))
    close(form(hidden, hidden * -0.1, weights), -torch.ones(3))
    x, y = torch.tensor([[[3.0, 0.0]]]), torch.tensor([[[0.0, 2.0]]])
    assert form(x, y, torch.ones(1)).tolist() == [0.0]


@pytest.mark.parametrize("form", FORMS)
def test_a_zero_vector_is_like_nothing_and_nan_is_not_hidden(form):
    hidden, weights = torch.ones(3, 2, 8), torch.tensor([0.25, 0.75])
    anchor = hidden.clone()
    hidden[0, 1], anchor[1, 0], anchor[2, 1, 3] = 0.0, 0.0, math.nan
    result = form(hidden, anchor, weights)
    close(result[:2], torch.tensor([0.25, 0.75]))
    assert result[2].isnan()


@given(st.integers(1, 100), st.floats(0, 5))
def test_layer_weights(num_layers, alpha):
    weights = layer_weights(num_layers, alpha)
    assert weights.dtype == torch.float32 and weights.sum().item() == pytest.approx(1, abs=1e-5)
    total = sum(math.exp(alpha * k / num_layers) for k in range(1, num_layers + 1))
    expected = [math.exp(alpha * k / num_layers) / total for k in range(1, num_layers + 1)]
    assert weights.tolist() == pytest.approx(expected, rel=1e-5)


ONES = torch.ones(2)


@pytest.mark.parametrize(
    ("hidden", "anchor", "weights", "words"),
    [
        (torch.zeros(3, 2, 8).double(), torch.zeros(2, 8).double(), ONES, "float64"),
        (torch.zeros(3, 2, 8), torch.zeros(2, 8).half(), ONES, "float16"),
        (torch.zeros(2, 8), torch.zeros(2, 8), ONES, r"\[2, 8\]"),
        (torch.zeros(3, 2, 8), torch.zeros(1, 2, 8), ONES, r"\[1, 2, 8\]"),
        (torch.zeros(1, 2, MAX_SIZE + 1), torch.zeros(2, MAX_SIZE + 1), ONES, f"1 to {MAX_SIZE}"),
        (torch.zeros(3, 2, 16)[..., ::2], torch.zeros(2, 8), ONES, "2 and 1"),
        (torch.zeros(3, 2, 8), torch.zeros(2, 8), torch.ones(3), r"\[3\]"),
        (torch.zeros(3, 2, 8), torch.zeros(2, 8), ONES.double(), "float64"),
    ],
)
def test_what_the_kernel_cannot_serve_is_refused(hidden, anchor, weights, words):
    with pytest.raises(ConfigError, match=words):
        similarity_triton(hidden, anchor, weights)

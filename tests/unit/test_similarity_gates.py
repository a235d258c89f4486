import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench.similarity_measures import MEASURES, Nearest, Pooled, Whitened
from minirksc.errors import ConfigError
from minirksc.rksc.similarity import Alignment, PrefixStates, Sigma

DEPTH = 3
SIZE = 16


def states(token_ids, seed=0, layers=range(DEPTH), noise=0.0):
    """A token's state depends on its id, and a little on where it stands."""
    table = torch.randn(DEPTH, 64, SIZE, generator=torch.Generator().manual_seed(seed))
    places = 0.01 * torch.randn(DEPTH, 64, SIZE, generator=torch.Generator().manual_seed(7))
    extra = torch.randn(DEPTH, len(token_ids), SIZE, generator=torch.Generator().manual_seed(8))
    hidden = {i: table[i, token_ids] + places[i, : len(token_ids)] + noise * extra[i] for i in layers}
    return PrefixStates(token_ids, hidden)


def similarity(gate, root, branch, **options):
    layers = gate.layers(DEPTH)
    return gate.similarity(states(root, layers=layers), states(branch, layers=layers, **options))


token_ids = st.lists(st.integers(0, 63), min_size=1, max_size=20)


@pytest.mark.parametrize("gate", MEASURES.values(), ids=list(MEASURES))
@given(ids=token_ids)
def test_equal_wordings_have_1(gate, ids):
    assert similarity(gate, ids, ids) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("gate", MEASURES.values(), ids=list(MEASURES))
@given(root=token_ids, branch=token_ids)
def test_no_wording_has_more_than_1(gate, root, branch):
    value = similarity(gate, root, branch)
    assert math.isfinite(value)
    assert value <= 1.0


@pytest.mark.parametrize("gate", MEASURES.values(), ids=list(MEASURES))
@pytest.mark.parametrize("which", [0, 1])
def test_nan_in_either_wording_gives_nan(gate, which):
    layers = gate.layers(DEPTH)
    pair = [states([1, 2, 3, 4, 5], layers=layers), states([1, 2, 6, 4, 5], layers=layers)]
    pair[which].hidden[layers[-1]][-1, 3] = math.nan
    assert math.isnan(gate.similarity(*pair))


@pytest.mark.parametrize("gate", MEASURES.values(), ids=list(MEASURES))
def test_layers_are_within_the_depth(gate):
    for depth in (1, 2, 9):
        assert gate.layers(depth)
        assert set(gate.layers(depth)) <= set(range(depth))


@pytest.mark.parametrize("gate", [Sigma(), Pooled(), Whitened(), Alignment()], ids=lambda gate: gate.name)
def test_a_state_that_moves_makes_it_smaller(gate):
    ids = [1, 2, 3, 4, 5, 6, 7, 8]
    small, large = (similarity(gate, ids, ids, noise=noise) for noise in (0.01, 0.3))
    assert large < small < 1


def test_sigma_is_the_published_formula():
    root, branch = states([1, 2, 3]), states([1, 2, 9])
    ours, theirs = (torch.stack([p.hidden[i][-1] for i in range(DEPTH)]) for p in (root, branch))
    cosines = torch.nn.functional.cosine_similarity(theirs.double(), ours.double(), dim=-1)  # [layers]
    weights = torch.exp(1.5 * torch.arange(DEPTH).double() / DEPTH)
    expected = float((cosines * weights).sum() / weights.sum())
    assert Sigma().similarity(root, branch) == pytest.approx(expected, abs=1e-6)


def test_a_vector_of_length_0_is_like_none():
    zero = PrefixStates([1], {layer: torch.zeros(1, SIZE) for layer in range(DEPTH)})
    assert Sigma().similarity(zero, states([1])) == Sigma().similarity(states([1]), zero) == 0.0


def test_sigma_sees_the_last_token_alone():
    assert similarity(Sigma(), [1, 2, 3, 4], [9, 8, 3, 4]) == pytest.approx(1.0, abs=1e-5)


def test_pooled_counts_in_the_spread_of_the_root():
    root = PrefixStates([0, 1, 2, 3], {0: torch.tensor([[9.0, 9.0], [1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]])})
    moved = PrefixStates([0, 1, 2, 3], {0: root.hidden[0] + torch.tensor([0.5, 0.0])})
    spread = math.sqrt(2 / 3)
    assert Pooled().similarity(root, moved) == pytest.approx(1 - 0.5 / spread)


def test_whitened_is_not_ruled_by_one_huge_dimension():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(30, SIZE, generator=generator)
    scaled = hidden * torch.tensor([1000.0] + [1.0] * (SIZE - 1))
    change = torch.zeros(SIZE)
    change[5] = 2.0
    ids = list(range(30))
    plain = Whitened().similarity(PrefixStates(ids, {0: hidden}), PrefixStates(ids, {0: hidden + change}))
    huge = Pooled().similarity(PrefixStates(ids, {0: scaled}), PrefixStates(ids, {0: scaled + change}))
    assert plain < 0.8
    assert huge > 0.99  # what Pooled makes of the same change beside a dimension that drowns it


def test_alignment_follows_tokens_that_moved_to_another_place():
    root, branch = [1, 2, 3, 4, 5, 6, 7, 8], [20, 1, 2, 3, 4, 5, 6, 7, 8]
    one_more = similarity(Alignment(), root, branch)
    assert similarity(Alignment(), root, list(range(30, 38))) == 0.0
    assert 0.85 < one_more < 1.0


def test_alignment_counts_a_lost_token_like_a_new_one():
    longer, shorter = [1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 4, 5, 6, 7, 8]
    forth, back = similarity(Alignment(1.0), longer, shorter), similarity(Alignment(1.0), shorter, longer)
    assert forth == pytest.approx(back, abs=0.02)


def test_nearest_takes_a_stand_in_that_is_close():
    ids = list(range(20))
    table = torch.randn(64, SIZE, generator=torch.Generator().manual_seed(0))
    table[40] = table[5] + 0.05
    root = PrefixStates(ids, {2: table[ids]})
    close, far = ([*ids[:5], other, *ids[6:]] for other in (40, 41))
    near = Nearest().similarity(root, PrefixStates(close, {2: table[close]}))
    assert near > 0.95
    assert Nearest().similarity(root, PrefixStates(far, {2: table[far]})) < near


def test_states_of_several_layers_are_refused_where_one_is_taken():
    with pytest.raises(ConfigError, match="states of 3 layers"):
        Pooled().similarity(states([1, 2, 3]), states([1, 2, 3]))


def test_gates_go_by_their_names():
    assert all(gate.name == name for name, gate in MEASURES.items())
    assert set(MEASURES) >= {"sigma", "pooled", "whitened", "alignment"}

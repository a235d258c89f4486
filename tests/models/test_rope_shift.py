"""Keys that are moved: turned by a difference of positions, they are those of their new positions."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minirksc.errors import UnsupportedModelError
from minirksc.kernels.rope import rope_reference
from minirksc.models.families import spec_from_config
from minirksc.models.rope import KINDS, UNSHIFTABLE, Rotary
from minirksc.models.spec import RopeSpec

CPU = torch.device("cpu")
HEAD_DIM = 24
ORIGINAL = ("original_max_position_embeddings", 32.0)
YARN = (("factor", 4.0), ORIGINAL, ("beta_fast", 32.0), ("beta_slow", 1.0), ("truncate", 1.0))
LLAMA3 = (("factor", 8.0), ("low_freq_factor", 1.0), ("high_freq_factor", 4.0), ORIGINAL)
SHIFTABLE = {
    "default": RopeSpec("default", 10000.0, 24),
    "default, part of a head": RopeSpec("default", 500000.0, 10),
    "default, one pair": RopeSpec("default", 10000.0, 2),
    "linear": RopeSpec("linear", 10000.0, 24, (("factor", 3.0),)),
    "yarn": RopeSpec("yarn", 10000.0, 24, YARN, 1.19),
    "llama3": RopeSpec("llama3", 500000.0, 16, LLAMA3),
    "proportional": RopeSpec("proportional", 1e6, 24, (("factor", 2.0), ("partial_rotary_factor", 0.25))),
}
FACTORS = tuple(1 + 0.1 * i for i in range(12)), tuple(3 + 0.7 * i for i in range(12))
OTHERS = {
    "dynamic": RopeSpec("dynamic", 10000.0, 24, (("factor", 4.0), ORIGINAL)),
    "longrope": RopeSpec(
        "longrope", 10000.0, 24, (("short_factor", FACTORS[0]), ("long_factor", FACTORS[1]), ORIGINAL), 1.2
    ),
}


def key_at(rotary, positions, keys, sequence_len=10**6):
    """Keys `[tokens, heads, head_dim]` as they are stored at these positions, in float32."""
    lens = torch.full_like(positions, sequence_len)
    keys = keys.clone()
    rope_reference(keys, *rotary.tables(positions, lens, torch.float32))
    return keys


def check_moves(rotary, old, shifts, head_dim=HEAD_DIM):
    keys = torch.randn((len(old), 2, head_dim), generator=torch.Generator().manual_seed(len(old)))
    moved = key_at(rotary, old, keys)
    cos, sin = rotary.shift_tables(shifts)
    assert cos.dtype == sin.dtype == torch.float32
    rope_reference(moved, cos, sin)
    new = old + shifts
    # Each angle is rounded to float32 once: of the old position, of the new one and of the difference.
    angle_error = 2.0**-24 * (old + new + shifts.abs()).max().item()
    tolerance = 1e-5 + 6 * angle_error  # elements of about 4, and an attention factor
    torch.testing.assert_close(moved, key_at(rotary, new, keys), atol=tolerance, rtol=1e-5)


def test_every_kind_is_tried():
    assert {spec.kind for spec in SHIFTABLE.values()} == KINDS.keys() - UNSHIFTABLE.keys()
    assert OTHERS.keys() == UNSHIFTABLE.keys()


@pytest.mark.parametrize("rope", SHIFTABLE.values(), ids=SHIFTABLE)
@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 131072), st.integers(0, 131072)), min_size=1, max_size=5))
def test_a_moved_key_is_the_key_of_its_new_position(rope, places):
    old, new = torch.tensor(places).unbind(1)
    rotary = Rotary(rope, CPU)
    assert rotary.can_shift
    check_moves(rotary, old, new - old)


@pytest.mark.parametrize("rope", SHIFTABLE.values(), ids=SHIFTABLE)
def test_short_ways_are_exact(rope):
    """Within a few hundred tokens the tolerance is that of float32, and a wrong formula would show at once."""
    old = torch.tensor([0, 0, 1, 7, 40, 100, 255, 255])
    check_moves(Rotary(rope, CPU), old, torch.tensor([0, 1, -1, 200, -33, 0, -255, 3]))


@pytest.mark.parametrize("rope", SHIFTABLE.values(), ids=SHIFTABLE)
def test_there_and_back_and_nowhere(rope):
    rotary = Rotary(rope, CPU)
    keys = torch.randn((3, 2, HEAD_DIM), generator=torch.Generator().manual_seed(0))
    shifts = torch.tensor([5, -900, 0])
    moved = keys.clone()
    rope_reference(moved, *rotary.shift_tables(shifts))
    assert torch.equal(moved[2], keys[2])
    assert torch.equal(moved[..., rope.rotary_dim :], keys[..., rope.rotary_dim :])
    torch.testing.assert_close(moved.norm(dim=-1), keys.norm(dim=-1))  # no attention factor
    assert not torch.allclose(moved[:2], keys[:2], atol=0.1)
    rope_reference(moved, *rotary.shift_tables(-shifts))
    torch.testing.assert_close(moved, keys, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", UNSHIFTABLE)
def test_kinds_that_no_difference_of_positions_moves(kind):
    rotary = Rotary(OTHERS[kind], CPU)
    assert not rotary.can_shift
    with pytest.raises(UnsupportedModelError, match=f"{kind} rope cannot be moved.*compute them anew"):
        rotary.shift_tables(torch.tensor([3]))
    # Two keys that are 40 apart, from two places: the angles between them differ.
    positions = torch.tensor([[3, 43], [60, 100]])
    keys = torch.ones((2, 1, HEAD_DIM))
    lens = (20, 10**6) if kind == "longrope" else (10**6, 10**6)
    apart = [key_at(rotary, pair, keys, sequence_len) for pair, sequence_len in zip(positions, lens, strict=True)]
    products = [(low * high).sum() for low, high in apart]
    assert abs(products[0] - products[1]) > 0.1


@pytest.mark.oracle
def test_every_rope_of_the_zoo():
    pytest.importorskip("transformers")
    sys.path.append(str(Path(__file__).parent))  # in importlib mode pytest does not add it
    zoo, rows = importlib.import_module("zoo"), importlib.import_module("zoo_rows")
    specs = [spec_from_config(row.published or zoo.make_config(row).to_dict()) for row in rows.ROWS]
    ropes = {(layer.rope, layer.head_dim) for spec in specs for layer in spec.layers if layer.rope is not None}
    assert {rope.kind for rope, _ in ropes} == KINDS.keys()
    old, shifts = torch.tensor([0, 3, 60, 89, 200]), torch.tensor([89, -3, -31, 0, 55])
    for rope, head_dim in ropes:
        rotary = Rotary(rope, CPU)
        assert rotary.can_shift == (rope.kind not in UNSHIFTABLE)
        if rotary.can_shift:
            check_moves(rotary, old, shifts, head_dim)

"""Memory in large pages behaves as any other: whatever the system says to the request."""

import mmap

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minirksc.kernels.huge_pages import ALIGNMENT, CHUNK_BYTES, MIN_BYTES, PAGE, Arena, empty

DTYPES = (torch.int32, torch.bfloat16, torch.uint8)


@pytest.fixture(params=["given", "refused", "unknown"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes of asking for large pages."""
    if request.param == "refused":
        monkeypatch.setattr(mmap, "MADV_HUGEPAGE", -1, raising=False)  # no such advice: OSError
    elif request.param == "unknown":
        monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)


@pytest.mark.parametrize("shape", [(3, 5), (PAGE // 2 + 1, 3), (0, 4), ()])
def test_a_tensor_has_its_shape_and_can_be_written(system: None, shape: tuple[int, ...]) -> None:
    tensor = empty(*shape, dtype=torch.bfloat16)
    assert tensor.shape == shape and tensor.dtype == torch.bfloat16 and tensor.is_contiguous()
    assert not tensor.any()
    tensor.fill_(1)
    assert tensor.sum(dtype=torch.float64) == tensor.numel()


def test_a_tensor_begins_with_a_page_where_there_are_large_ones() -> None:
    if hasattr(mmap, "MADV_HUGEPAGE"):
        assert empty(7, dtype=torch.uint8).data_ptr() % PAGE == 0


@given(st.lists(st.tuples(st.integers(0, 2 * MIN_BYTES), st.sampled_from(DTYPES)), max_size=20))
def test_tensors_of_an_arena_share_nothing(wanted: list[tuple[int, torch.dtype]]) -> None:
    arena = Arena()
    tensors = [arena.empty(size, 1, dtype=dtype) for size, dtype in wanted]
    for number, tensor in enumerate(tensors):
        tensor.fill_(number)
    for number, (tensor, (size, dtype)) in enumerate(zip(tensors, wanted, strict=True)):
        assert tensor.shape == (size, 1) and tensor.dtype == dtype and (tensor == number).all()
        assert tensor.data_ptr() % ALIGNMENT == 0 or not tensor.numel()


def test_an_arena_goes_on_when_a_chunk_is_full(system: None) -> None:
    arena = Arena()
    first, larger, last = (arena.empty(size, dtype=torch.uint8) for size in (CHUNK_BYTES, CHUNK_BYTES + 1, MIN_BYTES))
    for number, tensor in enumerate((first, larger, last)):
        tensor[0] = tensor[-1] = number
    assert [tensor[-1].item() for tensor in (first, larger, last)] == [0, 1, 2] and len(larger) == CHUNK_BYTES + 1
    assert larger[0] == 1 and last[0] == 2


def test_what_nobody_keeps_of_small_tensors_is_given_back() -> None:
    arena = Arena()
    storages = {arena.empty(MIN_BYTES - 1, dtype=torch.uint8).untyped_storage().nbytes() for _ in range(3)}
    assert storages == {MIN_BYTES - 1}  # of their own, not a piece of a chunk

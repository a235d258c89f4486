"""Work that threads share is done once, whoever comes for it: results are the same with any number of them."""

import importlib
import sys
import threading
from pathlib import Path

import pytest
import torch

from minirksc.kernels.attention.paged_attention_native import paged_attention_native
from minirksc.kernels.draw import Draw, draw_native
from minirksc.kernels.gated_act import gated_act_reference
from minirksc.kernels.native.ops import confidence_native, gated_act_native
from minirksc.kernels.native.tape import NativeRecorder
from minirksc.kernels.weights.linear import Linear, NativePacker
from minirksc.kernels.weights.native_weight import WidenedWeight

sys.path.append(str(Path(__file__).parent))  # in importlib mode pytest does not add it
attention, forms = map(importlib.import_module, ("attention_cases", "forms"))

pytestmark = forms.needs_native
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def _threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def operations(dtype):
    """Each as a function of nothing; large enough to be shared."""
    linear = Linear(randn(450, 130).bfloat16().to(dtype), None, NativePacker())
    x, gate_up, logits = randn(5, 130, dtype=dtype), randn(40, 1024, dtype=dtype), randn(9, 9001)
    tables = [[*range(40), 100 + i] for i in range(9)]
    case = attention.make_case(
        [1] * 9, [641 + i for i in range(9)], tables=tables, block_size=16, head_dim=32, dtype=dtype
    )
    prompt = attention.make_case([70, 1, 33], [200, 90, 33], block_size=16, head_dim=32, dtype=dtype)
    cases = [(q, kv, attention.in_tiles(c) if attention.has_tiles(q, c) else c, b) for q, kv, c, b in (case, prompt)]
    draws = [Draw(temperature=0.7, top_k=0, top_p=0.9, min_p=0.0, uniform=i / 9) for i in range(9)]
    return [
        lambda: linear(x),
        lambda: gated_act_native(gate_up, "silu"),
        lambda: torch.stack([part.double() for part in confidence_native(logits)]),
        lambda: draw_native(logits, draws),
        *(lambda case=case: paged_attention_native(*case, 0.2, None) for case in cases),
    ]


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_number_of_threads_gives_the_same(dtype):
    for index, operation in enumerate(operations(dtype)):
        torch.set_num_threads(1)
        alone = operation()
        for count in (2, 3, 7):
            torch.set_num_threads(count)
            for _ in range(5):
                assert torch.equal(operation(), alone), (index, count)


def test_callers_in_several_threads_do_not_meet():
    torch.set_num_threads(2)
    some = operations(torch.float32)
    expected = [operation() for operation in some]
    wrong = []

    def run():
        for _ in range(30):
            wrong.extend(i for i, operation in enumerate(some) if not torch.equal(operation(), expected[i]))

    callers = [threading.Thread(target=run) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


@pytest.mark.parametrize("num_rows", [65534, 65535, 65536, 200_001])
def test_more_items_than_are_counted_one_by_one(num_rows):
    torch.set_num_threads(2)
    weight = randn(40, 8).bfloat16().float()
    indices = torch.arange(num_rows) * 7 % 40
    assert torch.equal(WidenedWeight.pack(weight).rows(indices), weight[indices])


def test_a_recorded_run_is_shared_call_by_call():
    torch.set_num_threads(3)
    gate_up = randn(40, 1024)
    replay, out = NativeRecorder().record(lambda: gated_act_native(gated_act_native(gate_up, "silu"), "gelu"))
    for seed in range(20):
        gate_up.copy_(randn(40, 1024, seed=seed))
        replay()
        expected = gated_act_reference(gated_act_reference(gate_up, "silu"), "gelu")
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)

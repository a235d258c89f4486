"""bench.roofline: what it counts."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]

# The repository's root is not on the path (see conftest.py), so that the package is loaded from its file.
_spec = importlib.util.spec_from_file_location("bench", ROOT / "bench" / "__init__.py")
sys.modules.setdefault("bench", importlib.util.module_from_spec(_spec))

from bench.roofline import GROUPS, Limits, measure, work_of  # noqa: E402
from minirksc import LLM  # noqa: E402


@pytest.fixture(scope="module")
def folder(tiny_llama):
    return tiny_llama(layers=3, dtype="bfloat16", tie=False)


@pytest.fixture(scope="module")
def llm(folder):
    with LLM(folder, kv_cache_bytes="4MiB", threads=1, dtype="float32") as llm:
        yield llm


def test_work_is_that_of_all_matrices_and_visible_keys(folder, llm):
    matrices = {name: w for name, w in load_file(folder / "model.safetensors").items() if w.ndim == 2}
    head, embed = matrices.pop("lm_head.weight").numel(), matrices.pop("model.embed_tokens.weight").numel()
    assert head == embed
    numbers = sum(weight.numel() for weight in matrices.values())
    stats = llm.stats()["weight_bytes"]
    assert stats in (2 * (numbers + head), 4 * (numbers + head))  # 4 where torch has no FBGEMM
    spec = llm.spec
    kv = 2 * spec.layers[0].num_kv_heads * spec.layers[0].head_dim * 4
    pair = 4 * spec.num_heads * spec.layers[0].head_dim
    whole = work_of(llm, range(1, 6), 5, 0)
    assert whole.num_flops == 2 * 5 * numbers + 3 * pair * 15
    assert whole.num_bytes == stats + 3 * kv * 5
    step = work_of(llm, [9, 9], 11, 2)
    assert step.num_flops == 2 * (2 * numbers + 2 * head) + 3 * pair * 18
    assert step.num_bytes == stats + 3 * kv * 11
    narrow = replace(spec, layers=(replace(spec.layers[0], window=4), *spec.layers[1:]))
    windowed = work_of(SimpleNamespace(spec=narrow, engine=llm.engine), [9, 9], 11, 2)
    assert step.num_flops - windowed.num_flops == pair * 2 * 5
    assert step.num_bytes - windowed.num_bytes == kv * 7


def test_a_bound_is_the_larger_of_both():
    limits = Limits(bytes_per_s=10.0, flops_per_s=100.0)
    assert limits.bound_s(50, 100) == 5 and limits.bound_s(50, 1000) == 10


def test_phases_run_and_what_operators_took_is_counted(llm):
    limits = iter([Limits(1.0, 1.0), Limits(10.0, 1e30), Limits(20.0, 1e30)])  # the first is of the run that warms up
    rows = measure(llm, list(range(5, 45)), 3, 2, lambda dtype: next(limits))
    assert [row["phase"] for row in rows] == ["prompt of 40", "decode, 1 sequence", "decode, 3 branches"]
    for row in rows:
        assert len(row["seconds"]) == 2 and min(row["seconds"]) > 0
        assert row["bound_s"] == [row["num_bytes"] / 10, row["num_bytes"] / 20]
        assert set(row["operator_s"]) == {*GROUPS, "other operators"}
        assert row["operator_s"]["products with weights"] > 0 and row["operator_s"]["attention"] > 0

"""bench.backends: what it compares."""

import importlib.util
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from minirksc.kernels.native.ops import has_bf16_products, native

ROOT = Path(__file__).resolve().parents[2]

# The repository's root is not on the path (see conftest.py), so that the package is loaded from its file.
_spec = importlib.util.spec_from_file_location("bench", ROOT / "bench" / "__init__.py")
sys.modules.setdefault("bench", importlib.util.module_from_spec(_spec))

from bench.backends import ARMS, make_page, measure_distance, measure_speed  # noqa: E402

pytestmark = pytest.mark.skipif(native is None, reason="nothing is compiled")


def test_speed_of_each_phase_and_distance_of_each_backend(tiny_llama):
    folder = tiny_llama(layers=3, dtype="bfloat16", tie=False)
    options = Namespace(model=folder, dtype="bfloat16", threads=1, branches=3, repeats=2)
    speed = measure_speed(options, list(range(5, 45)))
    arms = set(ARMS) if has_bf16_products else set(ARMS) - {"native, int8"}
    assert len({row["phase"] for row in speed}) == 3 and {row["arm"] for row in speed} == arms
    assert len(speed) == 3 * len(arms) * 2 and all(row["total_s"] > 0 for row in speed)
    distance = {row["backend"]: row for row in measure_distance(options, list(range(5, 45)))}
    exact = distance.pop("reference, float32")
    assert exact["largest"] == 0 and exact["same_argmax"] == 1
    assert set(distance) == {"reference", "torch", "native"} | (arms & {"native, int8"})
    for row in distance.values():
        assert 0 < row["rms"] <= row["largest"] < row["spread"] and row["same_argmax"] > 0.8
        assert row["loss"] == pytest.approx(exact["loss"], abs=0.1)
    page = str(make_page(speed, list(distance.values()), options))
    assert "| decode, 3 branches | native |" in page and "| native | bfloat16 |" in page

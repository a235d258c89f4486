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

from bench.backends import ARMS, make_page, measure_distance  # noqa: E402

pytestmark = pytest.mark.skipif(native is None, reason="nothing is compiled")


def test_distance_of_each_backend(tiny_llama):
    folder = tiny_llama(layers=3, dtype="bfloat16", tie=False)
    options = Namespace(model=folder, dtype="bfloat16", threads=1)
    distance = {row["backend"]: row for row in measure_distance(options, list(range(5, 45)))}
    exact = distance.pop("reference, float32")
    assert exact["largest"] == 0 and exact["same_argmax"] == 1 and exact["dtype"] == "float32"
    left_out = {"reference, float32"} if has_bf16_products else {"reference, float32", "native, int8"}
    assert set(distance) == set(ARMS) - left_out
    for row in distance.values():
        assert 0 < row["rms"] <= row["largest"] < row["spread"] and row["same_argmax"] > 0.8
        assert row["loss"] == pytest.approx(exact["loss"], abs=0.1)
    assert "| native | bfloat16 |" in str(make_page(list(distance.values()), options))

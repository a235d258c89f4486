"""No field of a spec can be changed without a test of the zoo failing; see `mutation.py`."""

import importlib
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
sys.path.append(str(Path(__file__).parent))  # in importlib mode pytest does not add it
mutation = importlib.import_module("mutation")


@pytest.mark.oracle
@pytest.mark.slow
def test_every_mutant_is_killed(tmp_path_factory):
    fate = mutation.run(tmp_path_factory.getbasetemp() / "zoo")
    assert len(fate) > 500
    assert [key for key, killer in fate.items() if killer is None] == []

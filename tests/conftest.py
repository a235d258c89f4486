"""Fixtures for all tests."""

import importlib
import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

# No test says anything about time: an example may take as long as a busy machine needs.
settings.register_profile("untimed", settings(deadline=None))
settings.load_profile("untimed")

# Before anything imports Triton: kernels run in its interpreter, on the CPU.
os.environ["TRITON_INTERPRET"] = "1"

ROOT = Path(__file__).resolve().parent.parent

# These are the tests of this clone, whichever is installed, unless another folder is named in PYTHONPATH.
named = [Path(entry) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
if not any(path.resolve() != ROOT and (path / "minirksc").is_dir() for path in named):
    sys.path.insert(0, str(ROOT))
    importlib.import_module("minirksc")

# transformers looks for an installed top-level package named `kernels`; the repository's folder of that name
# must not be taken for it.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
sys.path.append(str(ROOT / "tests" / "unit"))  # for `integrity`; in importlib mode pytest does not add it


# So that tests import bench from its folder.
_bench = importlib.util.spec_from_file_location("bench", ROOT / "bench" / "__init__.py")
sys.modules.setdefault("bench", importlib.util.module_from_spec(_bench))


def _load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


write_tiny_llama = _load(ROOT / "tests" / "models" / "tiny.py").write_tiny_llama


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    """Factory of tiny random Llama checkpoints, one folder per set of arguments."""
    made = {}

    def make(**options):
        key = json.dumps(options, sort_keys=True)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("tiny_llama")
            write_tiny_llama(made[key], **options)
        return made[key]

    return make


@pytest.fixture(scope="session")
def zoo_dir(tmp_path_factory):
    """Where all tests of the session find the checkpoints of `tests/models/zoo.py` that one of them has built."""
    return tmp_path_factory.getbasetemp() / "zoo"

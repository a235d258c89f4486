"""A few random items of each fuzzer with every run of the tests; with `-m slow`, enough to find something new."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import minirksc

HERE = Path(__file__).parent
FEW = {"checkpoints.py": 80, "templates.py": 40, "state.py": 200}
MANY = {"checkpoints.py": 3000, "templates.py": 1000, "state.py": 6000, "state.py --requests": 20_000}


def run(fuzzer, count, seed):
    script, *options = fuzzer.split()
    command = [sys.executable, str(HERE / script), "--seed", str(seed), *(options or ["--count"]), str(count)]
    # A process of its own: whose children are forked has never used OpenMP, and imports the same project.
    environment = {**os.environ, "PYTHONPATH": str(Path(minirksc.__file__).parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]


@pytest.mark.parametrize("fuzzer", FEW)
def test_a_few(fuzzer):
    run(fuzzer, FEW[fuzzer], seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("fuzzer", MANY)
def test_many(fuzzer):
    run(fuzzer, MANY[fuzzer], seed=1_000_000)

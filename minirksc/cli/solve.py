"""Command line: `python -m minirksc.solve [PROMPT | -]`, which is `generate` with the solver always on.

It takes as many branches as `SolverConfig` does where nothing says how many.
"""

from functools import partial

from minirksc.cli import generate
from minirksc.rksc.solver_config import SolverConfig

main = partial(generate.main, prog="python -m minirksc.solve", branches=SolverConfig.branches)
"""Runs a command line as `generate.main` does; returns the exit code."""

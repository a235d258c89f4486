"""Command line: `python -m minirksc.solve [PROBLEM | -]`: as `generate`, with the solver on."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from minirksc.cli import generate
from minirksc.rksc.solver import SolverConfig

if TYPE_CHECKING:
    from minirksc.llm import LLM


def main(
    arguments: Sequence[str] | None = None,
    make_llm: Callable[..., "LLM"] | None = None,
    prog: str = "python -m minirksc.solve",
) -> int:
    """Runs a command line; returns the exit code. The arguments are those of `generate.main`."""
    return generate.main(arguments, make_llm, prog, branches=SolverConfig.branches)

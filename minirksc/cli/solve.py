"""Command line: `python -m minirksc.solve [PROMPT | -]`, which is `generate` with the solver always on.

It takes as many branches as `SolverConfig` does where nothing says how many.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from minirksc.cli import generate
from minirksc.rksc.solver_config import SolverConfig

if TYPE_CHECKING:
    from minirksc.llm import LLM


def main(
    arguments: Sequence[str] | None = None,
    make_llm: Callable[..., "LLM"] | None = None,
    prog: str = "python -m minirksc.solve",
) -> int:
    """Runs a command line; returns the exit code.

    Args:
        arguments: words of the command line; None: the process's own.
        make_llm: function that opens a model, given the engine's options; None: `LLM`.
        prog: name under which it was called, for messages.
    """
    return generate.main(arguments, make_llm, prog, branches=SolverConfig.branches)

"""minirksc: a compact LLM inference engine for multi-branch reasoning.

Public names are imported on first use, so that `import minirksc` needs neither torch nor a GPU.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minirksc.branch import Branch
    from minirksc.config import SamplingParams
    from minirksc.llm import LLM
    from minirksc.request import CompletionOutput, RequestOutput
    from minirksc.solver import Solver, SolverConfig, SolveResult

__version__ = "0.1.0"

# In a plain clone kernels/ and models/ lie beside this folder, not inside it; a wheel puts them inside.
_here = Path(__file__).resolve().parent
if not (_here / "kernels").is_dir() and (_here.parent / "kernels").is_dir():
    __path__.append(str(_here.parent))

_HOMES = {
    "LLM": "llm",
    "SamplingParams": "config",
    "Branch": "branch",
    "RequestOutput": "request",
    "CompletionOutput": "request",
    "Solver": "solver",
    "SolverConfig": "solver",
    "SolveResult": "solver",
}
__all__ = [
    "LLM",
    "Branch",
    "CompletionOutput",
    "RequestOutput",
    "SamplingParams",
    "SolveResult",
    "Solver",
    "SolverConfig",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"minirksc.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'minirksc' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

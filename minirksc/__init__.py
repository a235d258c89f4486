"""minirksc: a compact LLM inference engine for multi-branch reasoning.

Public names are imported on first use, so that `import minirksc` needs neither torch nor a GPU.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minirksc.version import __version__ as __version__

if TYPE_CHECKING:
    from minirksc import errors
    from minirksc.engine.branch import Branch, BranchProgress
    from minirksc.engine.engine import Engine
    from minirksc.engine.gates import LEAVE, Borrow, GateRows, LayerGate, Seat
    from minirksc.engine.outputs import CompletionOutput, RequestOutput, StreamChunk
    from minirksc.engine.session import Session
    from minirksc.errors import (
        BranchError,
        CacheFullError,
        ChatTemplateError,
        CheckpointError,
        ConfigError,
        EngineBusyError,
        EngineClosedError,
        EngineForkedError,
        MinirkscError,
        NumericalError,
        PromptError,
        TokenizerError,
        UnsupportedModelError,
    )
    from minirksc.llm import LLM
    from minirksc.options import EngineConfig, SamplingParams
    from minirksc.rksc.results import BranchResult, SolveResult
    from minirksc.rksc.solver import Solver
    from minirksc.rksc.solver_config import SolverConfig

# Where links are checked out as text files, kernels/ and models/ lie beside this folder and are nothing inside it.
_here = Path(__file__).resolve().parent
if not (_here / "kernels").is_dir() and (_here.parent / "kernels").is_dir():
    __path__.append(str(_here.parent))

_HOMES = {
    "llm": ("LLM",),
    "options": ("EngineConfig", "SamplingParams"),
    "engine.branch": ("Branch", "BranchProgress"),
    "engine.engine": ("Engine",),
    "engine.gates": ("LEAVE", "Borrow", "LayerGate", "GateRows", "Seat"),
    "engine.outputs": ("CompletionOutput", "RequestOutput", "StreamChunk"),
    "engine.session": ("Session",),
    "rksc.results": ("BranchResult", "SolveResult"),
    "rksc.solver": ("Solver",),
    "rksc.solver_config": ("SolverConfig",),
    "errors": (
        "BranchError",
        "CacheFullError",
        "ChatTemplateError",
        "CheckpointError",
        "ConfigError",
        "EngineBusyError",
        "EngineClosedError",
        "EngineForkedError",
        "MinirkscError",
        "NumericalError",
        "PromptError",
        "TokenizerError",
        "UnsupportedModelError",
    ),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
__all__ = [
    "LEAVE",
    "LLM",
    "Borrow",
    "Branch",
    "BranchError",
    "BranchProgress",
    "BranchResult",
    "CacheFullError",
    "ChatTemplateError",
    "CheckpointError",
    "CompletionOutput",
    "ConfigError",
    "Engine",
    "EngineBusyError",
    "EngineClosedError",
    "EngineConfig",
    "EngineForkedError",
    "GateRows",
    "LayerGate",
    "MinirkscError",
    "NumericalError",
    "PromptError",
    "RequestOutput",
    "SamplingParams",
    "Seat",
    "Session",
    "SolveResult",
    "Solver",
    "SolverConfig",
    "StreamChunk",
    "TokenizerError",
    "UnsupportedModelError",
    "errors",
]


def __getattr__(name: str) -> Any:
    if name == "errors":
        return import_module("minirksc.errors")
    if name in _HOME_OF:
        return getattr(import_module(f"minirksc.{_HOME_OF[name]}"), name)
    raise AttributeError(f"module 'minirksc' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

"""minirksc: a compact LLM inference engine for multi-branch reasoning.

Public names are imported on first use, so that `import minirksc` needs neither torch nor a GPU.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minirksc.version import __version__ as __version__

if TYPE_CHECKING:
    from minirksc import errors as errors
    from minirksc.engine.branch import Branch as Branch
    from minirksc.engine.branch import BranchProgress as BranchProgress
    from minirksc.engine.engine import Engine as Engine
    from minirksc.engine.gates import LEAVE as LEAVE
    from minirksc.engine.gates import Borrow as Borrow
    from minirksc.engine.gates import GateRows as GateRows
    from minirksc.engine.gates import LayerGate as LayerGate
    from minirksc.engine.gates import Seat as Seat
    from minirksc.engine.outputs import CompletionOutput as CompletionOutput
    from minirksc.engine.outputs import RequestOutput as RequestOutput
    from minirksc.engine.outputs import StreamChunk as StreamChunk
    from minirksc.engine.session import Session as Session
    from minirksc.errors import BranchError as BranchError
    from minirksc.errors import CacheFullError as CacheFullError
    from minirksc.errors import ChatTemplateError as ChatTemplateError
    from minirksc.errors import CheckpointError as CheckpointError
    from minirksc.errors import ConfigError as ConfigError
    from minirksc.errors import EngineBusyError as EngineBusyError
    from minirksc.errors import EngineClosedError as EngineClosedError
    from minirksc.errors import EngineForkedError as EngineForkedError
    from minirksc.errors import MinirkscError as MinirkscError
    from minirksc.errors import NumericalError as NumericalError
    from minirksc.errors import PromptError as PromptError
    from minirksc.errors import TokenizerError as TokenizerError
    from minirksc.errors import UnsupportedModelError as UnsupportedModelError
    from minirksc.llm import LLM as LLM
    from minirksc.options import EngineConfig as EngineConfig
    from minirksc.options import SamplingParams as SamplingParams
    from minirksc.rksc.results import BranchResult as BranchResult
    from minirksc.rksc.results import SolveResult as SolveResult
    from minirksc.rksc.solver import Solver as Solver
    from minirksc.rksc.solver_config import SolverConfig as SolverConfig

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
        *("BranchError", "CacheFullError", "ChatTemplateError", "CheckpointError", "ConfigError", "EngineBusyError"),
        *("EngineClosedError", "EngineForkedError", "MinirkscError", "NumericalError", "PromptError", "TokenizerError"),
        "UnsupportedModelError",
    ),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
__all__ = sorted([*_HOME_OF, "errors"])


def __getattr__(name: str) -> Any:
    if name == "errors":
        return import_module("minirksc.errors")
    if name in _HOME_OF:
        return getattr(import_module(f"minirksc.{_HOME_OF[name]}"), name)
    raise AttributeError(f"module 'minirksc' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

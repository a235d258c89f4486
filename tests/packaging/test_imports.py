"""Who may import whom, and that nothing changes the process it runs in."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {"minirksc": "minirksc.", "kernels": "minirksc.kernels.", "models": "minirksc.models."}

# What every module may import, and for each room the others that it may import from. Inside a room all is free. The
# package's own file, `__main__` files and those that stand for one may import all, and nothing imports them.
COMMON = {"errors", "version", "json_file", "options", "option_fields", "option_values", "token_ids", "vllm_names"}
ROOMS = {
    "cache": set(),
    "kernels": set(),
    "models": {"kernels"},
    "text": set(),
    "checkpoints": {"text", "models"},
    "engine": {"cache", "text", "models", "kernels", "checkpoints"},
    "trace": set(),
    "rksc": {"engine", "text", "models", "kernels", "trace"},
    "calibrate": {"rksc", "engine"},
    "llm": {"engine", "rksc"},
}
ROOMS["cli"] = set(ROOMS)
EXEMPT = {"minirksc", "minirksc.generate", "minirksc.solve"}
# These modules and rooms, and whatever they import, run without torch and triton: policy is plain Python.
NO_TORCH = (
    *sorted(COMMON),
    "cache",
    "text",
    "trace",
    "rksc",
    "calibrate",
    "engine.gates",
    "engine.host",
    "engine.prompts",
    "engine.request",
    "engine.scheduler",
    "engine.signals",
    "engine.stopping",
    "engine.threads",
    "checkpoints.folder",
    "checkpoints.hub",
    "models.spec",
    "models.explain.reasons",
    "cli.main",
    "cli.evidence_file",
)
WITH_TORCH = {"minirksc.rksc.asks", "minirksc.rksc.similarity"}  # of those rooms: they compare hidden states
# These import them once they run, where wordings are to be compared.
REACH_TORCH = {"minirksc.rksc.solver", "minirksc.calibrate.collect"}
# What changes the whole process or depends on its environment, and the modules that may use it all the same.
PROCESS_STATE = {
    "torch.set_num_threads": {"minirksc.llm"},  # the `threads` option; undone by close()
    "torch.set_num_interop_threads": set(),
    "torch.set_default_dtype": set(),
    "torch.set_default_device": set(),
    "torch.set_default_tensor_type": set(),
    "torch.set_grad_enabled": {"minirksc.engine.torch_modes"},  # puts back what a step that was interrupted has changed
    "torch.set_float32_matmul_precision": set(),
    "torch.use_deterministic_algorithms": set(),
    "torch.manual_seed": set(),
    "torch.seed": set(),
    "torch.random.manual_seed": set(),
    "torch.cuda.manual_seed": set(),
    "torch.cuda.manual_seed_all": set(),
    "random.seed": set(),
    "numpy.random.seed": set(),
    # The command lines; and what OpenMP was told, which `threads` warns about.
    "os.environ": {
        "minirksc.cli.command",
        "minirksc.cli.parser",
        "minirksc.cli.generate",
        "minirksc.checkpoints.sources",
        "minirksc.llm",
    },
    "os.getenv": set(),
    "os.putenv": set(),
    "os.chdir": set(),
    "warnings.simplefilter": set(),
    "warnings.filterwarnings": set(),
    "signal.signal": {"minirksc.cli.interrupts"},
    "logging.basicConfig": {"minirksc.cli.generate"},
}


def _modules():
    """Name of every module -> its syntax tree."""
    found = {}
    for folder, prefix in FOLDERS.items():
        for file in sorted((ROOT / folder).rglob("*.py")):
            parts = file.relative_to(ROOT / folder).with_suffix("").parts
            name = (prefix + ".".join(parts)).removesuffix(".__init__")
            found[name] = ast.parse(file.read_text(encoding="utf-8"), str(file))
    return found


def _is_type_checking(test):
    return "TYPE_CHECKING" in {getattr(test, "id", None), getattr(test, "attr", None)}


def imports_of(tree, for_types=False):
    """Dotted names that imports name, those inside functions included, and those for types alone if asked for."""
    names = set()
    todo = [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and _is_type_checking(node.test) and not for_types:
            todo += node.orelse
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write imports in full"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        todo += ast.iter_child_nodes(node)
    return names


def process_state_in(tree):
    """Names out of PROCESS_STATE that a module mentions, and torch.backends settings that it makes."""
    local = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.split(".")[0]
                local[alias.asname or top] = alias.name if alias.asname else top
        elif isinstance(node, ast.ImportFrom):
            local |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}

    def full_name(node):
        if isinstance(node, ast.Attribute):
            return f"{full_name(node.value)}.{node.attr}"
        return local.get(node.id, node.id) if isinstance(node, ast.Name) else "?"

    used = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name):
            name = full_name(node)
            is_setting = isinstance(node.ctx, ast.Store) and name.startswith("torch.backends.")
            if name in PROCESS_STATE or is_setting:
                used.add(name)
    return used


MODULES = _modules()
IMPORTS = {name: imports_of(tree) for name, tree in MODULES.items()}


def own_imports(module, imports=IMPORTS):
    """Modules of this project that one imports."""
    found = set()
    for name in imports[module]:
        while name and name not in MODULES:
            name = name.rpartition(".")[0]
        found |= {name} if name else set()
    return found - {module}


def room_of(module):
    """minirksc.engine.calls -> engine, minirksc.llm -> llm, minirksc.errors -> COMMON."""
    name = module.split(".")[1]
    return "COMMON" if name in COMMON else name


WITH_TYPES = {name: imports_of(tree, for_types=True) for name, tree in MODULES.items()}
GRAPH = {module: own_imports(module, WITH_TYPES) for module in MODULES}
RULED = sorted(module for module in MODULES if module not in EXEMPT and not module.endswith(".__main__"))
ARROWS = [pytest.param(a, b, id=f"{a} -> {b}") for a in RULED for b in sorted(GRAPH[a])]


@pytest.mark.parametrize(("module", "other"), ARROWS)
def test_a_room_imports_from_those_that_it_may(module, other):
    assert other not in EXEMPT and not other.endswith(".__main__")
    assert room_of(other) in {"COMMON", room_of(module)} | ROOMS.get(room_of(module), set())


def test_every_module_is_in_a_room():
    rooms = {file.parent.name for file in (ROOT / "minirksc").glob("*/__init__.py") if not file.parent.is_symlink()}
    assert len(rooms) >= 8
    assert rooms | {"kernels", "models", "llm"} == set(ROOMS)
    assert {room_of(module) for module in RULED} == {*ROOMS, "COMMON"}


def test_no_files_import_each_other_in_a_circle():
    graphlib.TopologicalSorter(GRAPH).prepare()  # the error names one


def test_the_package_itself_imports_nothing_but_its_version_at_once():
    assert own_imports("minirksc") == {"minirksc.version"}


def plain_modules():
    """Modules that NO_TORCH speaks of."""
    named = tuple(f"minirksc.{name}" for name in NO_TORCH)
    inside = tuple(f"{name}." for name in named)
    return [one for one in RULED if (one in named or one.startswith(inside)) and one not in WITH_TORCH]


@pytest.mark.parametrize("module", [one for one in plain_modules() if one not in REACH_TORCH])
def test_policy_modules_reach_no_torch(module):
    seen, todo = set(), [module]
    while todo:
        name = todo.pop()
        seen.add(name)
        heavy = {i for i in IMPORTS[name] if i.split(".")[0] in ("torch", "triton", "transformers")}
        assert not heavy, f"{module} reaches {heavy} through {name}"
        todo += own_imports(name) - seen


@pytest.mark.parametrize("modules", [["minirksc"], ["minirksc", *plain_modules()]])
def test_importing_loads_no_torch(modules):
    script = "import sys, importlib\nfor name in sys.argv[1:]: importlib.import_module(name)\n"
    script += "print(*{'torch', 'triton', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script, *modules], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("package", ["kernels", "models"])
def test_source_folders_are_no_top_level_packages(package):
    done = subprocess.run(
        [sys.executable, "-c", f"import {package}"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert f"ImportError: import this package as minirksc.{package}" in done.stderr


@pytest.mark.parametrize("module", sorted(MODULES))
def test_no_process_wide_state(module):
    allowed = {name for name, modules in PROCESS_STATE.items() if module in modules}
    assert process_state_in(MODULES[module]) - allowed == set()


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import torch\ntorch.manual_seed(0)", "torch.manual_seed"),
        ("import torch as t\nt.set_default_dtype(t.float16)", "torch.set_default_dtype"),
        ("from torch import set_num_threads as f\nf(1)", "torch.set_num_threads"),
        ("import torch\ntorch.backends.mkldnn.enabled = False", "torch.backends.mkldnn.enabled"),
        ("import os\nos.environ['X'] = '1'", "os.environ"),
    ],
)
def test_the_scan_sees_process_wide_state(source, found):
    assert process_state_in(ast.parse(source)) == {found}


def test_the_scan_lets_generators_and_questions_pass():
    source = "import torch\ntorch.Generator().manual_seed(0)\ntorch.get_num_threads()"
    assert process_state_in(ast.parse(source)) == set()


def test_the_scan_sees_lazy_imports_but_not_those_for_types():
    source = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\n"
    source += "def f():\n    from triton import language\n"
    assert imports_of(ast.parse(source)) == {"typing.TYPE_CHECKING", "triton.language"}
    assert imports_of(ast.parse(source), for_types=True) == {"typing.TYPE_CHECKING", "triton.language", "torch"}

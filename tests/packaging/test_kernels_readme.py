"""What kernels/README.md says is true: its files, functions and figures exist, and its picture is well made."""

import ast
import json
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest

from minirksc.kernels.attention.launch_table import TABLE

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "kernels"
README = (KERNELS / "README.md").read_text(encoding="utf-8")
STATIONS = sorted(set(re.findall(r"`([\w/]+\.py):(\w+)`", README)))
FILES = sorted(set(re.findall(r"`([\w/]+\.(?:py|json))[:`]", README)))
CONSTANTS = re.findall(r"`([\w/]+\.py):([A-Z_]+)` = ([\d.]+)", README)
MODULES = sorted(set(re.findall(r"python -m (bench\.\w+)", README)))
QUOTED = re.findall(r"^```py\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
PICTURES = re.findall(r"!\[([^\]]+)\]\(([^)]+)\)", README)
SVG = "{http://www.w3.org/2000/svg}"
TARGETS = ("cuda:80", "cuda:90")


def path_of(file):
    """Files without a folder are in kernels/."""
    return ROOT / file if "/" in file else KERNELS / file


def definitions(file):
    """Functions, classes and constants of a module, by name."""
    found = {}
    for node in ast.parse(path_of(file).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found.update((target.id, node) for target in targets if isinstance(target, ast.Name))
    return found


def row_of(first_cell):
    """The other cells of the table row that begins so."""
    lines = [line for line in README.splitlines() if line.startswith(f"| {first_cell} |")]
    assert len(lines) == 1, (first_cell, lines)
    return [cell.strip().strip("*") for cell in lines[0].strip("|").split("|")][1:]


def test_the_tour_holds_what_is_tested_here():
    assert len(STATIONS) >= 20
    assert len(CONSTANTS) >= 3
    assert MODULES and QUOTED and len(PICTURES) == 1


@pytest.mark.parametrize(("file", "name"), STATIONS)
def test_station_exists(file, name):
    assert name in definitions(file)


@pytest.mark.parametrize("file", FILES)
def test_mentioned_file_exists(file):
    assert path_of(file).is_file()


@pytest.mark.parametrize("module", MODULES)
def test_mentioned_command_exists(module):
    assert (ROOT / f"{module.replace('.', '/')}.py").is_file()


@pytest.mark.parametrize("code", QUOTED, ids=range(len(QUOTED)))
def test_quoted_code_is_in_a_kernel(code):
    assert any(code in file.read_text(encoding="utf-8") for file in KERNELS.rglob("*.py"))


@pytest.mark.parametrize(("file", "name", "value"), CONSTANTS)
def test_constant_has_the_value(file, name, value):
    assert ast.literal_eval(definitions(file)[name].value) == float(value)


def test_the_launch_spoken_of_is_the_one_of_the_table():
    assert "tiles of 64 keys" in README
    assert "with 5 stages instead of 3" in README
    assert "On sm_90 128 rows on 8 warps" in README
    for architecture in ("sm_80", "sm_90"):
        decode = TABLE[architecture][16][128]
        assert (decode.rows, decode.tile, decode.stages, decode.warps) == (16, 64, 3, 4)
    prefill = TABLE["sm_90"][0][128]
    assert (prefill.rows, prefill.warps) == (128, 8)


def test_ten_launches_of_a_layer_in_order():
    numbers = [int(number) for number in re.findall(r"^\| (\d+) \|", README, re.MULTILINE)]
    assert numbers == list(range(1, 11))


@pytest.mark.parametrize("engine", ["vLLM 0.32.0", "SGLang 0.5.23"])
def test_figures_of_others_are_those_of_the_report(engine):
    rivals = json.loads((ROOT / "bench" / "rival_kernels.json").read_text(encoding="utf-8"))["kernels"]
    *issues, keys, buffers = row_of(engine)
    found = {r["target"]: r for r in rivals if (r["engine"], r["rival"]) == (engine, "d128")}
    assert issues == [f"{found[target]['issue']:.0%}" for target in TARGETS]
    assert all(f"{keys} keys a tile" in found[target]["kernel"] for target in TARGETS)
    assert all(found[target]["buffers"] == int(buffers) for target in TARGETS)


def test_own_figures_are_what_the_compiler_gives(tmp_path):
    triton = pytest.importorskip("triton")
    if not triton.__version__.startswith("3.9."):
        pytest.skip(f"the tour quotes Triton 3.9, this is {triton.__version__}")
    program = f"""
import json, os
os.environ.pop("TRITON_INTERPRET", None)
from bench.kernel_cases import all_cases
from bench.static_kernels import TARGETS, _compiled
for name in ("decode d128 b16 bf16", "decode d128 b64 bf16"):
    case = next(case for case in all_cases() if case.name == name)
    for target in {TARGETS!r}:
        print(json.dumps(_compiled(case, case.launches(TARGETS[target].architecture)[0], target)))
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    for first_cell, usages in (("as it is", rows[:2]), ("blocks of 64", rows[2:])):
        cells = [cell for usage in usages for cell in (str(usage["loop"]["total"]), f"{usage['issue']:.0%}")]
        assert row_of(first_cell) == [*cells, str(usages[0]["buffers"])]
        assert all(usage["spill_bytes"] == 0 for usage in usages)


def test_picture_is_well_made():
    (_, file) = PICTURES[0]
    picture = ElementTree.parse(KERNELS / file).getroot()
    assert picture.tag == f"{SVG}svg"
    for name in ("title", "desc"):
        assert picture.findtext(f"{SVG}{name}", "").strip()
    assert picture.findtext(f"{SVG}title") == PICTURES[0][0]
    assert "prefers-color-scheme: dark" in picture.findtext(f"{SVG}style", "")
    styles = set(re.findall(r"\.([a-z]+)[ ,]", picture.findtext(f"{SVG}style")))
    used = {name for element in picture.iter() for name in element.get("class", "").split()}
    assert used == styles


def test_what_is_drawn_lies_in_the_picture():
    picture = ElementTree.parse(KERNELS / PICTURES[0][1]).getroot()
    _, _, width, height = map(float, picture.get("viewBox").split())
    boxes = [
        tuple(float(box.get(name, 0)) for name in ("x", "y", "width", "height")) for box in picture.iter(f"{SVG}rect")
    ]
    assert all(x >= 0 and y >= 0 and x + w <= width and y + h <= height for x, y, w, h in boxes)


def test_drawn_tiles_hold_the_blocks_of_the_drawn_table():
    picture = ElementTree.parse(KERNELS / PICTURES[0][1]).getroot()
    numbers = [
        (float(text.get("y")), float(text.get("x")), text.text)
        for text in picture.iter(f"{SVG}text")
        if text.text.isdigit()
    ]

    def row(y):
        return [number for _, _, number in sorted(entry for entry in numbers if entry[0] == y)]

    assert row(90) == row(302) == ["5", "2", "9", "0", "7", "3", "10"]
    assert row(190) == [str(block) for block in range(12)]
    assert f"{', '.join(row(90)[:-1])} and {row(90)[-1]}" in picture.findtext(f"{SVG}desc")
    columns = sorted(x for y, x, _ in numbers if y == 90)
    assert {right - left for left, right in pairwise(columns)} == {80}  # each under the middle of its block

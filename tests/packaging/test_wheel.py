"""The wheel holds exactly the three source folders, what is compiled, and works without the repository beside it."""

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"minirksc": "minirksc", "kernels": "minirksc/kernels", "models": "minirksc/models"}


STAYS_BEHIND = (".md", ".svg", ".cpp", ".h", ".so")  # read beside the code; compiled


def source_files():
    """Where each file of the source folders must lie in the wheel."""
    return {
        f"{target}/{file.relative_to(ROOT / folder).as_posix()}"
        for folder, target in PACKAGES.items()
        for file in (ROOT / folder).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts and file.suffix not in STAYS_BEHIND
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel that was built from an sdist, so that a file missing in either is missing here."""
    tree = tmp_path_factory.mktemp("wheel") / "source"
    tree.mkdir()
    for name in PACKAGES:
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    out = tree.parent / "dist"
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, tree]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return archive.read(name).decode()


def test_wheel_holds_the_source_folders_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    compiled = {name for name in packed if name.endswith(".so")}
    assert packed - compiled == source_files()
    # One extension for all versions of Python; none where there is no compiler, see pyproject.toml.
    assert compiled <= {"minirksc/kernels/_native.abi3.so"} and (compiled or not shutil.which("g++"))


def test_wheel_carries_the_licence(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("/licenses/LICENSE")]
        assert archive.read(name) == (ROOT / "LICENSE").read_bytes()
    assert "Apache License" in (ROOT / "LICENSE").read_text()


def test_one_version(metadata):
    import minirksc

    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert minirksc.__version__ == declared
    assert f"\nVersion: {declared}\n" in metadata


def test_every_module_of_the_unpacked_wheel_can_be_imported(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    modules = [
        name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for name in sorted(source_files())
        if name.endswith(".py") and not name.endswith("__main__.py")
    ]
    script = (
        "import importlib, sys\n"
        "for name in sys.argv[2:]:\n"
        "    file = importlib.import_module(name).__file__\n"
        "    assert file.startswith(sys.argv[1]), f'{name} comes from {file}'\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), *modules],
        cwd=tmp_path,  # first on sys.path, before an editable install
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr

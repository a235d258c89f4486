"""Wheel, sdist and editable install hold the source folders and what is compiled, no more, and work on their own."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"minirksc": "minirksc", "kernels": "minirksc/kernels", "models": "minirksc/models"}


COMPILED = (".cpp", ".h")
STAYS_BEHIND = (".md", ".svg", ".so")  # read beside the code; made from it


def source_files(left_out=STAYS_BEHIND + COMPILED):
    """Where each file of the source folders must lie in the wheel."""
    return {
        f"{target}/{file.relative_to(ROOT / folder).as_posix()}"
        for folder, target in PACKAGES.items()
        for file in (ROOT / folder).rglob("*")  # goes through no link
        if file.is_file() and "__pycache__" not in file.parts and file.suffix not in left_out
    }


def modules():
    """Names of the modules of the source folders."""
    names = (name.removesuffix(".py") for name in sorted(source_files()) if name.endswith(".py"))
    return [name.removesuffix("/__init__").replace("/", ".") for name in names]


@pytest.fixture(scope="module")
def built(source):
    """An sdist, and a wheel that was built from it, so that a file missing in either is missing here."""
    out = source.parent / "dist"
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def wheel(built):
    (path,) = built.glob("*.whl")
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


def test_sdist_holds_the_source_folders_and_what_is_compiled(built):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        assert all(member.isfile() or member.isdir() for member in archive)  # no links, which not every system has
        packed = {member.name.partition("/")[2] for member in archive if member.isfile()}
    assert {name for name in packed if name.startswith("minirksc/")} == source_files(STAYS_BEHIND)
    assert not {name for name in packed if name.startswith(("kernels/", "models/"))}


def test_editable_install_finds_the_source_folders_and_nothing_else(clone, tmp_path):
    script = "import sys; from setuptools import build_meta; print(build_meta.build_editable(sys.argv[1]))"
    without_compiler = {**os.environ, "CC": "false", "CXX": "false"}
    command = [sys.executable, "-c", script, tmp_path]
    done = subprocess.run(command, cwd=clone, env=without_compiler, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    installed = tmp_path / "site"
    with zipfile.ZipFile(tmp_path / done.stdout.split()[-1]) as archive:
        archive.extractall(installed)
    script = (
        "import importlib.util, pkgutil, site, sys\n"
        "site.addsitedir(sys.argv[1])\n"
        "import minirksc\n"
        "print(*(one.name for one in pkgutil.walk_packages(minirksc.__path__, 'minirksc.')))\n"
        "print(*(importlib.util.find_spec(name) for name in ('kernels', 'models', 'tests', 'bench')))\n"
    )
    # -S: nothing that is installed is seen, but for what minirksc needs.
    environment = {**os.environ, "PYTHONPATH": f"{installed}{os.pathsep}{sysconfig.get_path('purelib')}"}
    command = [sys.executable, "-S", "-c", script, installed]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found, outside = done.stdout.splitlines()
    assert set(found.split()) == set(modules()) - {"minirksc"}
    assert set(outside.split()) == {"None"}
    assert (clone / "minirksc" / "py.typed").is_file()


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
    script = (
        "import importlib, sys\n"
        "for name in sys.argv[2:]:\n"
        "    file = importlib.import_module(name).__file__\n"
        "    assert file.startswith(sys.argv[1]), f'{name} comes from {file}'\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), *modules()],
        cwd=tmp_path,  # first on sys.path, before an editable install
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


def test_the_wheel_is_typed_and_has_the_console_script(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    assert (tmp_path / "minirksc" / "py.typed").is_file()
    script = (
        "import sys; from importlib.metadata import distributions\n"
        "(found,) = distributions(name='minirksc', path=[sys.argv.pop(1)])\n"
        "(entry,) = found.entry_points.select(group='console_scripts')\n"
        "assert entry.name == 'minirksc'\n"
        "entry.load()()\n"
    )
    command = [sys.executable, "-c", script, tmp_path, "--version"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("minirksc ")

"""A clone runs without being installed, also where git has written the links as text files; nothing is there twice."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import sys, os, collections
import minirksc.kernels.rope, minirksc.models.spec
print(minirksc.kernels.rope.__file__, minirksc.models.spec.__file__)
loaded = [name for name in sys.modules if name.partition(".")[0] in ("minirksc", "kernels", "models")]
files = collections.Counter(os.path.realpath(sys.modules[name].__file__) for name in loaded)
assert set(files.values()) == {1}, files
assert all(name.partition(".")[0] == "minirksc" for name in loaded), loaded
"""


@pytest.fixture(params=["links", "text files"])
def checkout(request, clone):
    """A clone with the links, or with what git makes of them where a file system has none."""
    for name in ("kernels", "models"):
        link = clone / "minirksc" / name
        assert link.is_symlink() and link.readlink().as_posix() == f"../{name}"
        if request.param == "text files":
            link.unlink()
            link.write_text(f"../{name}")
    return clone


def python(folder, *arguments):
    """In the environment of these tests; what lies in the working directory comes first."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def test_a_clone_runs_without_installing(checkout):
    for module in ("minirksc", "minirksc.generate", "minirksc.solve", "minirksc.calibrate"):
        done = python(checkout, "-m", module, "--version")
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith("minirksc ")
    done = python(checkout, "-m", "minirksc.models", "--json")
    assert done.returncode == 0, done.stderr


def test_each_module_is_there_once(checkout):
    done = python(checkout, "-c", SCRIPT)
    assert done.returncode == 0, done.stderr
    assert all(file.startswith(f"{checkout}{os.sep}") for file in done.stdout.split())


@pytest.mark.parametrize("package", ["kernels", "models"])
def test_source_folders_are_no_top_level_packages(checkout, package):
    done = python(checkout, "-c", f"import {package}")
    assert done.returncode == 1
    assert f"ImportError: import this package as minirksc.{package}" in done.stderr

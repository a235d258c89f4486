"""A tree as a fresh clone has it."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NEEDED = ("minirksc", "kernels", "models", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture
def clone(tmp_path):
    """A copy of what git lists, or of all there is of it where there is no git; links are copied as links."""
    return copy_tree(tmp_path / "clone")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """As `clone`, one for all tests of a file."""
    return copy_tree(tmp_path_factory.mktemp("source") / "tree")


def copy_tree(folder):
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *NEEDED]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode == 0 and done.stdout:
        for name in filter(None, done.stdout.split("\0")):
            if (ROOT / name).exists():  # and has not just been deleted
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, folder / name, follow_symlinks=False)
        return folder
    left_out = shutil.ignore_patterns("__pycache__", "*.so")
    for name in NEEDED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=left_out)
        else:
            shutil.copy(ROOT / name, folder)
    return folder

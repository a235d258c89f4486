"""Ids of the hub: what is downloaded, and what is said when nothing can be."""

import errno
import json
import os
import subprocess
import sys
import types

import pytest

from minirksc.checkpoints.hub import is_hub_id, wanted_files
from minirksc.checkpoints.sources import resolve_model
from minirksc.errors import CheckpointError

SMALL = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]


@pytest.mark.parametrize("name", ["org/name", "Org-1/na.me_2", "org/name@main", "o/n@refs/pr/3", "o/n@v1.0-rc"])
def test_ids(name):
    assert is_hub_id(name)


@pytest.mark.parametrize(
    "name",
    ["name", "./org/name", "../name", "/org/name", "a/b/c", "org/", "/", "", "o/n@", "o/..", "~/x", "o\\n", "ö/n"],
)
def test_what_is_no_id(name):
    assert not is_hub_id(name)


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (
            [*SMALL, "model.safetensors", "README.md", "modeling_x.py", "pytorch_model.bin"],
            [*SMALL, "model.safetensors"],
        ),
        (
            ["config.json", "model-1-of-2.safetensors", "model.safetensors.index.json", "consolidated.safetensors"],
            ["config.json", "model-1-of-2.safetensors", "model.safetensors.index.json"],
        ),
        (
            ["params.json", "tekken.json", "consolidated.safetensors", "consolidated.00.pth"],
            ["params.json", "tekken.json", "consolidated.safetensors"],
        ),
        (
            ["chat_template.jinja", "additional_chat_templates/rag.jinja", "additional_chat_templates/x/y.jinja"],
            ["additional_chat_templates/rag.jinja", "chat_template.jinja"],
        ),
        (
            ["model.safetensors", "._model.safetensors", "optimizer.safetensors", "adapter_model.safetensors"],
            ["model.safetensors"],
        ),
        (["onnx/model.safetensors", "original/params.json", "x.safetensors.py", "tokenizer.json.pkl"], []),
    ],
)
def test_only_what_is_read_is_downloaded(names, wanted):
    assert wanted_files(reversed(names)) == wanted


class Hub:
    """In place of huggingface_hub: a repository, and what happens to those who ask for it."""

    def __init__(self, folder, files, listing=None, download=None, cached=False):
        self.folder, self.files, self.listing, self.download, self.cached = folder, files, listing, download, cached
        self.asked = []
        self.errors = types.SimpleNamespace(
            **{name: type(name, (Exception,), {}) for name in ("RepositoryNotFoundError", "RevisionNotFoundError")}
        )
        self.errors.GatedRepoError = type("GatedRepoError", (self.errors.RepositoryNotFoundError,), {})
        self.HfApi = lambda: self

    def model_info(self, repository, revision, timeout):
        assert timeout <= 10
        if self.listing is not None:
            raise getattr(self.errors, self.listing, OSError)("no way")
        return types.SimpleNamespace(siblings=[types.SimpleNamespace(rfilename=name) for name in self.files])

    def snapshot_download(self, repository, **options):
        self.asked.append((repository, options))
        if self.download or (options.get("local_files_only") and not self.cached):
            raise OSError("broken pipe")
        return str(self.folder)


@pytest.fixture()
def hub(tmp_path, monkeypatch):
    def make(**options):
        made = Hub(tmp_path, **{"files": [*SMALL, "model.safetensors"], **options})
        monkeypatch.setitem(sys.modules, "huggingface_hub", made)
        monkeypatch.setitem(sys.modules, "huggingface_hub.errors", made.errors)
        return made

    return make


def test_a_download(hub, tmp_path):
    made = hub(files=["config.json", "odd[1]*.safetensors", "evil.py"])
    assert resolve_model("org/name") == tmp_path
    assert resolve_model("org/name@v1") == tmp_path
    wanted = ["config.json", "odd[[]1][*].safetensors"]
    assert made.asked == [("org/name", {"revision": revision, "allow_patterns": wanted}) for revision in (None, "v1")]


def test_a_folder_or_file_of_that_name_comes_first(hub, tmp_path, monkeypatch):
    made = hub()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    (tmp_path / "org" / "file").touch()
    assert resolve_model("org/name").samefile(tmp_path / "org" / "name")
    with pytest.raises(CheckpointError, match="is a file"):
        resolve_model("org/file")
    assert made.asked == []


def test_what_is_cached_serves_without_a_network(hub, tmp_path):
    made = hub(listing="no network", cached=True)
    assert resolve_model("org/name@v1") == tmp_path
    assert made.asked == [("org/name", {"revision": "v1", "local_files_only": True})]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"listing": "no network"}, r"hub cannot be reached \(no way\).*nothing of that name is cached.*--local-dir"),
        ({"listing": "RepositoryNotFoundError"}, "neither a folder 'org/name@v1' nor a repository.*hf auth login"),
        ({"listing": "RevisionNotFoundError"}, "org/name has no revision 'v1'"),
        ({"listing": "GatedRepoError"}, "consent to its licence.*hf auth login"),
        ({"download": "fails"}, r"broke off: broken pipe; try again.*--local-dir"),
        ({"files": ["config.json", "pytorch_model.bin"]}, "has no safetensors"),
    ],
)
def test_what_goes_wrong_is_told(hub, options, message):
    hub(**options)
    with pytest.raises(CheckpointError, match=message):
        resolve_model("org/name@v1")


def test_a_full_disk_is_told(hub, monkeypatch):
    made = hub()

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "model.safetensors")

    monkeypatch.setattr(made, "snapshot_download", full)
    with pytest.raises(CheckpointError, match=r"disk is full.*org/name broke off \(model\.safetensors\).*HF_HOME"):
        resolve_model("org/name")


def test_without_the_package_the_folder_option_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"no folder 'org/name'.*pip install 'minirksc\[hub\]'.*that folder"):
        resolve_model("org/name")


@pytest.mark.parametrize("environment", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}])
def test_the_real_package_without_a_network(tmp_path, environment):
    pytest.importorskip("huggingface_hub")
    environment = {**os.environ, **environment, "HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path / "hub")}
    command = [sys.executable, "-m", "minirksc.checkpoints", "path"]

    def path(model):
        return subprocess.run([*command, model], env=environment, capture_output=True, text=True, timeout=100)

    done = path("org/name")
    assert done.returncode == 1 and done.stdout == ""
    assert "the hub cannot be reached" in done.stderr and "--local-dir" in done.stderr
    assert "Traceback" not in done.stderr
    cached = tmp_path / "hub" / "models--org--name"
    snapshot = cached / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("a" * 40)
    (snapshot / "config.json").write_text(json.dumps({}))
    assert path("org/name").stdout.strip() == str(snapshot)
    assert path("org/name@main").stdout.strip() == str(snapshot)
    assert path("org/name@other").returncode == 1

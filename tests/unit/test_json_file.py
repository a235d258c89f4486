"""Small files that are read whole: what is too large, too deep, no file or no JSON is refused, and nothing waits."""

import json
import os

import pytest

from minirksc.errors import CheckpointError, TokenizerError
from minirksc.json_file import MAX_DEPTH, MAX_JSON_BYTES, read_bytes, read_json, read_json_object, read_text

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 123\n"


def nested(depth):
    """A list in a list, so many of them."""
    return "[" * depth + "]" * depth


def test_an_object_with_or_without_a_byte_order_mark(tmp_path):
    file = tmp_path / "config.json"
    for begin in ("", "\ufeff"):
        file.write_text(begin + '{"a": "ö"}', encoding="utf-8")
        assert read_json_object(file) == {"a": "ö"} and read_text(file) == '{"a": "ö"}'
    assert read_json_object(tmp_path / "absent.json") == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not readable JSON"),
        (b"{", "not readable JSON"),
        (b"[1]", "must hold a JSON object, not list"),
        (b'{"a": "\xff"}', "is not UTF-8: invalid start byte at byte 7"),
        ('{"a": 1}'.encode("utf-16"), "is not UTF-8"),
        (b'{"a": ' + b"1" * 5000 + b"}", "not readable JSON"),
        (b'{"a": ' + nested(MAX_DEPTH).encode() + b"}", f"nested more than {MAX_DEPTH} deep"),
        (b"[" * 10**6, f"nested more than {MAX_DEPTH} deep|not readable JSON"),
        (POINTER.encode(), "pointer of Git LFS.*git lfs pull"),
    ],
)
def test_what_is_no_object_is_refused_by_name(tmp_path, content, message):
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(TokenizerError, match=f"config.json.*({message})"):
        read_json_object(file, TokenizerError)


def test_the_deepest_that_is_read(tmp_path):
    file = tmp_path / "a.json"
    file.write_text(nested(MAX_DEPTH))
    assert read_json(file) == json.loads(nested(MAX_DEPTH))


@pytest.mark.parametrize("size", [MAX_JSON_BYTES + 1, 20 << 30])
def test_a_large_file_is_not_read(tmp_path, size):
    with (tmp_path / "config.json").open("wb") as stream:
        stream.truncate(size)
    with pytest.raises(CheckpointError, match=f"has {size} bytes, and no such file needs more than {MAX_JSON_BYTES}"):
        read_json_object(tmp_path / "config.json")
    (tmp_path / "small").write_bytes(b"abc")
    assert read_bytes(tmp_path / "small", max_bytes=3) == b"abc"
    with pytest.raises(CheckpointError, match="has 3 bytes, and no such file needs more than 2"):
        read_bytes(tmp_path / "small", max_bytes=2)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_what_is_no_regular_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    (tmp_path / "device").symlink_to("/dev/zero")
    (tmp_path / "dangling").symlink_to(tmp_path / "blobs" / "gone")
    (tmp_path / "itself").symlink_to(tmp_path / "itself")
    messages = {"fifo": "no regular file", "folder": "Is a directory|no regular file", "device": "no regular file"}
    messages |= {"dangling": "link to a file that is not there", "itself": "cannot be read"}
    for name, message in messages.items():
        with pytest.raises(CheckpointError, match=f"{name}.*({message})"):
            read_json_object(tmp_path / name)
    with pytest.raises(CheckpointError, match="absent does not exist"):
        read_bytes(tmp_path / "absent")

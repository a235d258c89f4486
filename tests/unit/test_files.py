"""Files that a person names: regular, bounded, in UTF-8, and grown by one run at a time."""

import errno
import os

import pytest

from minirksc.cli import resumable
from minirksc.cli.files import check_utf8, read_file, write_file
from minirksc.cli.resumable import GrowingFile
from minirksc.errors import CheckpointError, ConfigError, MinirkscError

unix = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs FIFOs")


def special(tmp_path, kind):
    path = tmp_path / kind
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "zero":
        path.symlink_to("/dev/zero")
    elif kind == "sparse":
        with path.open("wb") as stream:
            stream.truncate(20 << 30)
    return path


@unix
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("fifo", "no regular file"), ("folder", "no regular file"), ("zero", "no regular file"),
        ("sparse", "21474836480 bytes, more than 1000"), ("nothing", "cannot be read: No such file"),
        ("x" * 300, "cannot be read: File name too long"),
    ],
)  # fmt: skip
def test_what_has_no_end_or_is_too_large_is_not_read(tmp_path, kind, message):
    path = special(tmp_path, kind)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_file(path, 1000, "--thing", CheckpointError)
    assert str(caught.value).startswith(f"--thing {path} ")


def test_a_file_within_the_limit_is_read_whole(tmp_path):
    (tmp_path / "f").write_bytes(b"\0\xff" * 500)
    assert read_file(tmp_path / "f", 1000, "f") == b"\0\xff" * 500
    with pytest.raises(ConfigError, match="1000 bytes, more than 999"):
        read_file(tmp_path / "f", 999, "f")


@pytest.mark.parametrize("text", ['"hello"\n"bye"\n', '{"prompt": "\u4f60\u597d"}', '"a"'])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"])
def test_other_encodings_are_named(text, encoding):
    bom = "\ufeff" if encoding.endswith("e") and len(text) > 3 and text[0] == "{" else ""
    with pytest.raises(ConfigError, match=f"it is text in {encoding[:6].upper()}; save it as UTF-8"):
        check_utf8((bom + text).encode(encoding), "it")


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"a", b"\0", b"\xef\xbb\xbf\"a\"\n", b'"\xff"\n', "\u4f60".encode(), b"\0\0\0\0\n\"b\"\n",
        b'"\0a\0"\0\n"good"\n', b'\xff\xfegarbage\n"good"\n',
    ],
)  # fmt: skip
def test_one_bad_line_is_no_other_encoding(raw):
    check_utf8(raw, "it")


def test_one_run_at_a_time_writes_a_file(tmp_path):
    path = tmp_path / "out"
    with GrowingFile(path, "--output") as first:
        with pytest.raises(ConfigError, match=f"--output {path} is being written by another run"):
            GrowingFile(path, "--output")
        first.add(b"one\n")
    with GrowingFile(path, "--output") as second:
        second.add(b"two\n")
        second.truncate(4)
        second.add(b"three\n")
        second.sync()
    assert path.read_bytes() == b"one\nthree\n"


def test_where_there_are_no_locks_that_is_said(tmp_path, monkeypatch, capsys):
    def no_locks(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(resumable.fcntl, "flock", no_locks)
    with GrowingFile(tmp_path / "a", "--output") as out:
        out.add(b"one\n")
    assert "cannot be locked (No locks available)" in capsys.readouterr().err
    monkeypatch.setattr(resumable, "fcntl", None)
    with GrowingFile(tmp_path / "a", "--output") as out:
        out.add(b"two\n")
    assert "let no other run write it" in capsys.readouterr().err
    assert (tmp_path / "a").read_bytes() == b"one\ntwo\n"


@unix
@pytest.mark.parametrize("kind", ["fifo", "folder", "zero"])
def test_only_regular_files_grow(tmp_path, kind):
    with pytest.raises(ConfigError, match="no regular file"):
        GrowingFile(special(tmp_path, kind), "--output")
    with pytest.raises(ConfigError, match="cannot be written"):
        GrowingFile(tmp_path / "no" / "such", "--output")


class Filling:
    """A stream whose disk has room for some bytes yet."""

    def __init__(self, stream, room, error):
        self._stream, self._room, self._error = stream, room, error

    def write(self, data):
        if not self._room:
            raise self._error
        data = bytes(data[: self._room])
        self._room -= len(data)
        return self._stream.write(data[:3]) if len(data) > 3 else self._stream.write(data)

    def __getattr__(self, name):
        return getattr(self._stream, name)


@pytest.mark.parametrize("room", range(0, 12))
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_full_disk_leaves_whole_lines(tmp_path, room, error):
    path = tmp_path / "out"
    with GrowingFile(path, "--output") as out:
        out._stream = Filling(out._stream, room, error)
        expected = MinirkscError if isinstance(error, OSError) else KeyboardInterrupt
        with pytest.raises(expected) as caught:
            for _ in range(4):
                out.add(b"line\n")
    content = path.read_bytes()
    assert content in (b"", b"line\n", b"line\nline\n") and len(content) <= room
    if isinstance(error, OSError):
        assert f"--output {path} cannot be written: No space left" in str(caught.value)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_text_file_is_written_or_named(tmp_path):
    write_file(tmp_path / "f", "h\u00e9")
    assert (tmp_path / "f").read_bytes() == "h\u00e9".encode()
    for wrong in (tmp_path, tmp_path / "no" / "such"):
        with pytest.raises(MinirkscError, match=f"{wrong} cannot be written"):
            write_file(wrong, "x")

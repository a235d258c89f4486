"""Standard streams that are closed, broken or full, in every command; Ctrl-C; signals of a process of its own."""

import contextlib
import errno
import io
import json
import os
import signal
import subprocess
import sys

import pytest

from minirksc import LLM
from minirksc.cli.generate import main

unix = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")


def never(**options):
    raise AssertionError("the model was loaded")


@pytest.fixture(scope="module")
def folder(tiny_llama):
    return tiny_llama(tokenizer=True, chat=True, max_len=256)


@pytest.fixture(scope="module")
def llm(folder):
    with LLM(folder, kv_cache_bytes="2MiB") as llm:
        yield llm


class Full(io.StringIO):
    """Takes some writes, then none."""

    def __init__(self, num_writes=0):
        super().__init__()
        self._num_writes = num_writes

    def flush(self):
        if not self._num_writes:
            raise OSError(errno.ENOSPC, "No space left on device")
        self._num_writes -= 1


WORK = {
    "text": ["hi", "--max-tokens", "9"],
    "samples": ["hi", "--n", "2", "--max-tokens", "2"],
    "json": ["hi", "--json", "--max-tokens", "2"],
    "solve": ["2+2?", "--branches", "2", "--tokens-per-step", "2", "--trace", "{}/trace.json"],
    "solve as json": ["2+2?", "--branches", "2", "--tokens-per-step", "2", "--json", "--trace", "{}/trace.json"],
    "help": ["--help"],
    "version": ["--version"],
}


@pytest.mark.parametrize("work", WORK)
@pytest.mark.parametrize("num_writes", [0, 1])
@pytest.mark.parametrize("stderr", [None, Full(), io.StringIO()])
def test_what_stdout_does_not_take_ends_with_1(llm, tmp_path, monkeypatch, work, num_writes, stderr):
    if num_writes and work in ("json", "solve as json", "help", "version"):
        num_writes = 0  # one write is all of them
    monkeypatch.setattr(sys, "stdout", Full(num_writes))
    monkeypatch.setattr(sys, "stderr", stderr)
    arguments = [argument.format(tmp_path) for argument in WORK[work]]
    assert main(arguments, make_llm=lambda **options: contextlib.nullcontext(llm)) == 1
    if type(stderr) is io.StringIO:
        assert "standard output: [Errno 28] No space left on device" in stderr.getvalue()
        assert "Traceback" not in stderr.getvalue()
    if work.startswith("solve"):
        assert json.loads((tmp_path / "trace.json").read_text())["nodes"]


@pytest.mark.parametrize("arguments", WORK.values())
def test_a_closed_stdout_ends_with_1_before_a_model_is_loaded(tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.setattr(sys, "stdout", None)
    assert main([argument.format(tmp_path) for argument in arguments], make_llm=never) == 1
    err = capsys.readouterr().err
    assert "standard output is closed" in err and err.count("\n") == 1


@pytest.mark.parametrize("stream", [None, Full()])
def test_a_batch_needs_no_standard_streams(llm, tmp_path, monkeypatch, stream):
    (tmp_path / "in").write_text('"a"\n"b"\n')
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    arguments = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--max-tokens", "2", "--stats"]
    assert main(arguments, make_llm=lambda **options: contextlib.nullcontext(llm)) == 0
    assert len((tmp_path / "out").read_text().splitlines()) == 2


@unix
@pytest.mark.parametrize(
    ("command", "stream"),
    [
        *((["minirksc.generate", "--version"], stream) for stream in ("closed", "full", "broken")),
        (["minirksc.calibrate", "--help"], "closed"),
        (["minirksc.checkpoints", "path", "{}"], "full"),
        (["minirksc.models", "llama"], "broken"),
    ],
)
def test_every_command_says_what_was_not_delivered(folder, command, stream):
    read, write = os.pipe()
    os.close(read)
    stdout = {"closed": ">&-", "full": ">/dev/full", "broken": f">&{write}"}[stream]
    line = " ".join([sys.executable, "-m", *command]).format(folder)
    done = subprocess.run(["bash", "-c", f"{line} {stdout}"], stderr=subprocess.PIPE, text=True, pass_fds=[write])
    os.close(write)
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("minirksc: error: standard output") and done.stderr.count("\n") == 1


@unix
def test_no_file_takes_the_place_of_a_closed_stream(folder, tmp_path):
    """A file that is opened while descriptor 2 is free becomes what compiled code writes its messages to."""
    (tmp_path / "in").write_text('"a"\n"b"\n')
    script = (
        "import os, sys; from minirksc.cli.generate import main; code = main(); os.write(1, b'1'); os.write(2, b'2');"
    )
    line = f'{sys.executable} -c "{script} sys.exit(code)" --model {folder} --threads 1 --max-tokens 2'
    line += f" --input {tmp_path}/in --output {tmp_path}/out <&- >&- 2>&-"
    assert subprocess.run(["bash", "-c", line], check=False).returncode == 0
    assert [json.loads(text)["line"] for text in (tmp_path / "out").read_text().splitlines()] == [1, 2]


def heed():
    """In a child: Ctrl-C is not ignored, as it is by whatever was started in a shell's background."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("module", ["minirksc.options", "torch"])
def test_ctrl_c_while_modules_are_imported(folder, module):
    line = [sys.executable, "-X", "importtime", "-m", "minirksc.generate", "--model", str(folder), "hi"]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed)
    for text in process.stderr:
        if text.split("|")[-1].strip().split(".")[0:2] == module.split(".")[0:2]:
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and out == "", err
    assert "Traceback" not in err and err.splitlines()[-1] == "minirksc: interrupted"


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("ignored", [True, False])
def test_ctrl_c_stays_ignored_where_it_was(ignored):
    script = "import os, signal, sys; from minirksc.cli import interrupts as i; i.leave_at_once();"
    script += "i.run_process(lambda: os.kill(os.getpid(), signal.SIGINT) or 5)"
    line = ("trap '' INT; " if ignored else "") + f"exec {sys.executable} -c '{script}'"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False, preexec_fn=heed)
    assert (done.returncode, done.stderr) == (5 if ignored else 130, "")

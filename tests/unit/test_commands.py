"""The console script `minirksc` and its commands: how they are found, what else is answered, and how they end."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from minirksc.cli import generate, main, solve

ROOT = Path(__file__).resolve().parents[2]
START = "from minirksc.cli.main import start; start()"
"""What the console script does."""


def python(*arguments, stdout=subprocess.PIPE):
    """A process that finds this clone first."""
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=120)


def test_help_names_every_command(capsys):
    assert main.main(["--help"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("usage: minirksc COMMAND") and err == ""
    rows = [line.split()[0] for line in out.splitlines() if line.startswith("  ") and not line.startswith("  -")]
    assert rows == list(main.COMMANDS) == ["generate", "solve", "calibrate", "models", "checkpoints"]


def test_version(capsys):
    from minirksc import __version__

    assert main.main(["--version"]) == 0
    assert capsys.readouterr().out == f"minirksc {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "a command is missing; there are generate, solve, calibrate, models, checkpoints"),
        (["genrate", "hi"], "'genrate' is no command; did you mean generate?"),
        (["model", "--help"], "'model' is no command; did you mean models?"),
        (["xyz"], "'xyz' is no command; there are generate, solve, calibrate, models, checkpoints"),
        (["--json", "models"], "'--json' is no command; there are"),
        (["--vers"], "'--vers' is no command; there are"),
        (["main"], "'main' is no command; there are"),
        (["a\x1b[2J\nb"], r"'a\x1b[2J\nb' is no command; there are"),
        (["x" * 10_000], "is no command; there are"),
    ],
)
def test_what_is_no_command_is_wrong_usage(capsys, arguments, message):
    assert main.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("minirksc: error: ") and message in err
    assert err.count("\n") == 1 and len(err) < 500


@pytest.mark.parametrize("command", ["generate", "solve", "calibrate", "models", "checkpoints"])
def test_help_of_a_command_shows_how_it_was_called(capsys, command):
    assert main.main([command, "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"usage: minirksc {command} ")


@pytest.mark.parametrize("command", ["solve", "checkpoints"])
def test_a_module_is_the_same_command_by_another_name(capsys, command):
    done = python("-m", f"minirksc.{command}", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    main.main([command, "--help"])
    called = capsys.readouterr().out.replace(f"minirksc {command}", f"python -m minirksc.{command}")
    assert " ".join(called.split()) == " ".join(done.stdout.split())  # lines may break elsewhere


def test_both_forms_give_the_same_result():
    console, module = python("-c", START, "models", "--json"), python("-m", "minirksc.models", "--json")
    assert (console.returncode, console.stderr, console.stdout) == (0, "", module.stdout)
    assert json.loads(console.stdout)["types"]


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["xyz"], []])
def test_nothing_heavy_is_imported_for_an_answer_of_its_own(arguments):
    code = "import json, sys, minirksc.cli.main as m; m.main(sys.argv[1:]); print(json.dumps(list(sys.modules)))"
    loaded = json.loads(python("-c", code, *arguments).stdout.splitlines()[-1])
    heavy = {"torch", "triton", "numpy", "jinja2", "tokenizers", "rich", "tqdm", "transformers"}
    assert not heavy & set(loaded)
    ours = {f"minirksc.cli.{name}" for name in ("main", "interrupts", "command", "terminal")}
    ours |= {"minirksc", "minirksc.version", "minirksc.errors", "minirksc.cli"}
    assert {name for name in loaded if name.startswith("minirksc")} == ours


def branches_of(monkeypatch, arguments, module=solve):
    """How many branches a command line would solve with; None: it generates."""
    found = []

    def run(job, make_llm):
        found.append(job.solver_config and job.solver_config.branches)
        return 0

    monkeypatch.setattr(generate.Job, "run", run)
    assert module.main(arguments) == 0
    return found.pop()


def test_solve_takes_eight_branches_unless_told_otherwise(monkeypatch):
    monkeypatch.delenv("MINIRKSC_BRANCHES", raising=False)
    assert branches_of(monkeypatch, ["2+2?"]) == 8
    assert branches_of(monkeypatch, ["2+2?", "--branches", "3"]) == 3
    assert branches_of(monkeypatch, ["2+2?"], module=generate) is None
    monkeypatch.setenv("MINIRKSC_BRANCHES", "5")
    assert branches_of(monkeypatch, ["2+2?"]) == 5
    assert branches_of(monkeypatch, ["2+2?", "--branches", "3"]) == 3
    assert branches_of(monkeypatch, ["2+2?"], module=generate) == 5


def test_solve_needs_no_branches_for_options_of_the_solver(monkeypatch, capsys):
    monkeypatch.delenv("MINIRKSC_BRANCHES", raising=False)
    assert branches_of(monkeypatch, ["2+2?", "--verify", "never"]) == 8
    assert generate.main(["2+2?", "--verify", "never"]) == 2
    assert solve.main(["2+2?", "--n", "2"]) == 2
    assert "--verify needs --branches" in capsys.readouterr().err


def heed():
    """In a child: Ctrl-C is not ignored, as it is by whatever was started in a shell's background."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("begin", [["-c", START, "models"], ["-m", "minirksc", "models"], ["-m", "minirksc.models"]])
@pytest.mark.parametrize("module", ["minirksc.cli.terminal", "torch.nn"])
def test_ctrl_c_while_a_command_is_imported(begin, module):
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", *begin],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed,
    )
    for text in process.stderr:
        if text.split("|")[-1].strip() == module:
            break
    process.send_signal(signal.SIGINT)
    out, err = process.stdout.read(), process.stderr.read()  # communicate() would lose what has been read ahead
    process.wait(timeout=60)
    assert process.returncode == 130 and out == "", err
    assert "Traceback" not in err and err.splitlines()[-1] == "minirksc: interrupted"


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["models"], ["solve", "--help"]])
def test_a_closed_stdout_ends_with_1(monkeypatch, capsys, arguments):
    monkeypatch.setattr(sys, "stdout", None)
    assert main.main(arguments) == 1
    err = capsys.readouterr().err
    assert "standard output is closed" in err and err.count("\n") == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("arguments", ["--help", "--version"])
def test_a_full_stdout_ends_with_1(arguments):
    with open("/dev/full", "w") as full:
        done = python("-c", START, arguments, stdout=full)
    assert done.returncode == 1
    assert done.stderr.startswith("minirksc: error: standard output") and done.stderr.count("\n") == 1

"""The console script `minirksc`, and every `python -m minirksc...`: which command, and how it begins and ends.

A command is imported once it is known which, so that `--help` and a wrong word take no time. Nothing else is imported
before Ctrl-C is taken care of.
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from typing import NoReturn

from minirksc.cli.interrupts import leave_at_once, run_process

COMMANDS = {
    "generate": "text from prompts, one or a file of them",
    "solve": "a problem with many branches, verified, and the best answer",
    "calibrate": "thresholds of early exits, tested on a file of problems",
    "models": "what a model is made of, and which run here",
    "checkpoints": "the folder of a model, and GGUF files made into one",
}
"""Name of a module of this folder -> what the command gives."""


def start(command: str | None = None) -> NoReturn:
    """Runs a command line as this process; Ctrl-C ends it at any moment, also while modules are imported.

    Args:
        command: name of the command; None: the first argument says it.
    """
    leave_at_once()
    # Imported before the process runs it: from then on Ctrl-C is an exception, which an import would lose.
    run_process(_chosen(sys.argv[1:]) if command is None else partial(_main_of(command), None))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `minirksc COMMAND ...`; returns the exit code.

    Args:
        arguments: words of the command line; None: the process's own.
    """
    return _chosen(sys.argv[1:] if arguments is None else arguments)()


def _chosen(words: Sequence[str]) -> Callable[[], int]:
    """What does the work of a command line."""
    if words and words[0] in COMMANDS:
        return partial(_main_of(words[0]), words[1:], prog=f"minirksc {words[0]}")
    from minirksc.cli.command import run_command

    return partial(run_command, partial(_refuse, words[:1]))


def _main_of(command: str) -> Callable[..., int]:
    found: Callable[..., int] = import_module(f"minirksc.cli.{command}").main
    return found


def _refuse(words: Sequence[str]) -> NoReturn:
    """Answers --help and --version, and says of another word, or of none, which commands there are.

    Raises:
        SystemExit: it was answered.
        UsageError: it is no command.
    """
    from minirksc.cli.command import CommandParser, UsageError
    from minirksc.errors import did_you_mean

    table = "\n".join(f"  {name:12} {text}" for name, text in COMMANDS.items())
    parser = CommandParser(
        prog="minirksc",
        usage="%(prog)s COMMAND ...",
        description="An inference engine for language models and multi-branch reasoning.",
        epilog=f"commands (each has a --help of its own, and is also `python -m minirksc.COMMAND`):\n{table}",
    )
    _, unknown = parser.parse_known_args(words)
    if not unknown:
        raise UsageError(f"a command is missing; there are {', '.join(COMMANDS)}")
    meant = did_you_mean(unknown[0], COMMANDS, 1) or f"there are {', '.join(COMMANDS)}"
    raise UsageError(f"{unknown[0]!r:.200} is no command; {meant}")

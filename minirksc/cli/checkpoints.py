"""Command line: `python -m minirksc.checkpoints import-gguf SRC DST`, or `path MODEL`.

The first converts a GGUF file into a checkpoint folder, the second says where the folder of a model is. Exit codes: 0,
1 when something cannot be read or written, 2 for a wrong command line, 130 when interrupted.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from minirksc.checkpoints.gguf_import import DTYPES
from minirksc.checkpoints.sources import import_gguf, resolve_model
from minirksc.cli.command import CommandParser, run_command
from minirksc.cli.terminal import show


def main(arguments: Sequence[str] | None = None, prog: str = "python -m minirksc.checkpoints") -> int:
    """The command line; returns the exit code."""
    # A folder's name is for programs too: its bytes stay as they are.
    return run_command(lambda: partial(_run, _parse(arguments, prog)), encoding_errors="surrogateescape")


def _parse(arguments: Sequence[str] | None, prog: str) -> argparse.Namespace:
    parser = CommandParser(prog=prog, description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    gguf = commands.add_parser("import-gguf", help="convert a GGUF file into a checkpoint folder")
    gguf.add_argument("source", metavar="SRC", type=Path)
    gguf.add_argument("destination", metavar="DST", type=Path)
    gguf.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the weights (%(default)s)")
    path = commands.add_parser("path", help="print the folder of a model, converting it if need be")
    path.add_argument("model", metavar="MODEL")
    return parser.parse_args(arguments)


def _run(options: argparse.Namespace) -> int:
    if options.command == "path":
        folder = resolve_model(options.model)
    else:
        folder = import_gguf(options.source, options.destination, dtype=options.dtype, progress=True)
    show(str(folder))
    return 0

"""Command line: `python -m minirksc.models [MODEL | --compare A B] [--json]`.

Without arguments the table of supported types; for a checkpoint what it is made of and why; with --compare what
differs between two. Text and JSON go to stdout, errors to stderr. Exit codes: 0, 1 when something cannot be read,
2 for a wrong command line, 130 when interrupted.
"""

import argparse
import dataclasses
import difflib
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from minirksc.checkpoints.folder import check_config
from minirksc.checkpoints.sources import ALIASES, resolve_model
from minirksc.cli.command import CommandParser, UsageError, run_command
from minirksc.cli.output import print_json
from minirksc.cli.terminal import is_terminal, show, visible
from minirksc.errors import CheckpointError
from minirksc.models.explain.compare import compare, refused_types, type_rows, type_spec
from minirksc.models.explain.explain import Explanation, explain, explain_folder
from minirksc.models.explain.page import MIN_WIDTH, WIDTH, compare_page, model_page, types_page
from minirksc.models.families import FAMILIES, REFUSED, WRAPPERS

EPILOG = """examples:
  python -m minirksc.models
  python -m minirksc.models smollm2-135m
  python -m minirksc.models --compare llama gemma3_text
"""


def main(arguments: Sequence[str] | None = None, prog: str = "python -m minirksc.models") -> int:
    """Runs a command line; returns the exit code."""
    return run_command(lambda: partial(_run, _parse(arguments, prog)))


def _parse(arguments: Sequence[str] | None, prog: str) -> argparse.Namespace:
    parser = CommandParser(
        prog=prog,
        description="Which models run here, what each is made of, and why.",
        epilog=EPILOG,
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help="checkpoint folder, alias, or model_type")
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help="what differs between two of these")
    parser.add_argument(
        "--ignore-config-key", action="append", default=[], metavar="NAME", help="pass over a field of config.json"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    if options.model is not None and options.compare is not None:
        raise UsageError(f"--compare takes two models, and {options.model!r} is one more; leave it out")
    return options


def _run(options: argparse.Namespace) -> int:
    width = _width()
    if options.compare is not None:
        a, b = _pair(*options.compare)
        found = compare(a.spec, b.spec)
        record: dict[str, Any] = {"a": a.name, "b": b.name, "differences": [dataclasses.asdict(d) for d in found]}
        text = compare_page((a.name, b.name), found, width)
    elif options.model is not None:
        model = _model(options.model, options.ignore_config_key)
        record = dataclasses.asdict(model)
        text = model_page(model, _is_type(options.model), width)
    else:
        rows, refused = type_rows(), refused_types()
        record = {"types": [dataclasses.asdict(row) for row in rows], "refused": refused}
        text = types_page(rows, refused, width)
    if options.json:
        print_json(record)
    else:
        show(visible(text))
    return 0


def _pair(first: str, second: str) -> tuple[Explanation, Explanation]:
    """Two models; a type gets the sizes of the checkpoint that it is compared with."""
    if _is_type(first) and not _is_type(second):
        b = _model(second)
        return explain(first, type_spec(first, b.spec)), b
    if _is_type(second) and not _is_type(first):
        return _pair(second, first)[::-1]
    return _model(first), _model(second)


def _model(name: str, ignored: Sequence[str] = ()) -> Explanation:
    """A checkpoint by its folder or alias, or a type; `ignored` fields of its config.json are passed over."""
    if _is_type(name):
        return explain(name, type_spec(name))
    known = [*FAMILIES, *WRAPPERS]
    is_path = os.path.lexists(name) or os.sep in name
    if name not in ALIASES and not is_path and (close := difflib.get_close_matches(name, known, n=1, cutoff=0.8)):
        raise CheckpointError(f"there is no folder, alias or model_type {name!r:.300}; did you mean {close[0]}?")
    folder = resolve_model(name)
    check_config(folder)
    return explain_folder(name if str(folder) == name else f"{name} ({folder})", folder, ignored)


def _is_type(name: str) -> bool:
    """A folder or an alias of that name comes first."""
    return name in {*FAMILIES, *WRAPPERS, *REFUSED} and name not in ALIASES and not Path(name).is_dir()


def _width() -> int:
    """Of the terminal, within what the pages are made for; of a file or a pipe, the most."""
    columns = os.get_terminal_size(sys.stdout.fileno()).columns if is_terminal(sys.stdout) else WIDTH
    return max(MIN_WIDTH, min(columns, WIDTH))

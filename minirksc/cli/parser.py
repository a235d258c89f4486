"""Command lines derived from classes of options, and the environment beside them.

Each option of a class is declared once, in `minirksc.options` or `minirksc.rksc.solver_config`, and has here a flag, a
check of its value alone and a line of help. What was not given is None, so that whoever reads it knows.
"""

import argparse
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from minirksc.cli.command import CommandParser, UsageError
from minirksc.errors import ConfigError, did_you_mean
from minirksc.option_fields import Options
from minirksc.options import EngineConfig
from minirksc.vllm_names import ENGINE_NAMES, SAMPLING_NAMES

SINGULAR = {"ignore_config_keys": "ignore_config_key"}
"""Options that hold several values, whose flag is given once for each."""


def flag_of(name: str) -> str:
    """The flag of an option: `--top-p` for top_p."""
    return "--" + SINGULAR.get(name, name).replace("_", "-")


def variable_of(name: str) -> str:
    """The variable of the environment for it: `MINIRKSC_TOP_P`."""
    return "MINIRKSC_" + SINGULAR.get(name, name).upper()


def names_in(config: type[Options], without: Sequence[str] = ()) -> tuple[str, ...]:
    """Names of the options of a class but for some, in their order."""
    return tuple(name for name in config.declared if name not in without)


def given(options: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """Those of some options that were given, and their values."""
    return {name: value for name in names if (value := getattr(options, name)) is not None}


def label(options: argparse.Namespace, name: str, flag: str = "") -> str:
    """An option as the user gave it: its variable, or its flag, which may have another form."""
    return variable_of(name) if name in options.variables else flag or flag_of(name)


def add_options(
    group: Any,
    config: type[Options],
    names: Iterable[str],
    defaults: Mapping[str, str] | None = None,
    choices: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Adds options of a class to a parser or to a group of one.

    Args:
        group: `argparse.ArgumentParser`, or a group of its arguments.
        config: class of the options.
        names: names of the options, in the order of the help.
        defaults: default in words of an option for which the command has one of its own.
        choices: choices of an option of which the command takes some alone.
    """
    for name in names:
        one = config.declared[name]
        text = one.explained((defaults or {}).get(name)).replace("%", "%%")
        details: dict[str, Any] = {"dest": name, "default": None, "help": text}
        if bool in one.kinds:
            group.add_argument(flag_of(name), action="store_true", **details)
            continue
        if one.is_list:
            details |= {"action": "append", "help": f"{text}; may be repeated"}
        if one.choices:
            details["choices"] = (choices or {}).get(name, one.choices)
        else:
            details["metavar"] = one.metavar or {int: "N", float: "X"}.get(one.kinds[0], "TEXT")
        group.add_argument(flag_of(name), type=value_reader(config, name), **details)


def value_reader(config: type[Options], name: str) -> Callable[[str], Any]:
    """A type for argparse: it reads the text of one option, and checks it as the class does."""
    one = config.declared[name]
    kind: Any = str if one.read is not None else one.kinds[0]

    def read(text: str) -> Any:
        value = one.also.get(text, kind(text))
        if one.choices:  # argparse says which there are
            return value
        try:
            config.checked(name, [value] if one.is_list else value)
        except ConfigError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
        return value

    read.__name__ = kind.__name__  # what argparse calls it in its messages
    return read


class Parser(CommandParser):
    """Takes options from the environment too, and knows what an unknown one may have meant."""

    def parse(self, arguments: Sequence[str] | None) -> argparse.Namespace:
        """Options from the command line and the environment; `variables` has the names of the latter.

        Raises:
            UsageError: an option is unknown or its value is not allowed.
        """
        options, unknown = self.parse_known_args(arguments)
        names = [name for name in vars(options) if name != "prompt"]
        if unknown:
            flag = unknown[0].split("=")[0]
            if not flag.startswith("-"):
                raise UsageError(f"unexpected argument {flag!r}; put text with spaces into quotes")
            raise UsageError(f"unknown option {flag!r}{_meant(flag, names)}")
        read = {name: self._read_variable(name) for name in names if getattr(options, name) is None}
        options.variables = [name for name, value in read.items() if value is not None]
        vars(options).update(read)
        return options

    def _read_variable(self, name: str) -> Any:
        """The value of an option by its variable; None if there is none."""
        variable = variable_of(name)
        text = os.environ.get(variable)
        if not text:
            return None
        if name not in {action.dest for action in self._actions if action.nargs == 0}:  # it takes a value
            try:
                return getattr(self.parse_known_args([f"{flag_of(name)}={text}"])[0], name)
            except UsageError as error:
                raise UsageError(f"{variable}={text!r}: {error}") from error
        if text.lower() in ("1", "true", "yes"):
            return True
        if text.lower() not in ("0", "false", "no"):
            raise UsageError(f"{variable}={text!r} must be 1 or 0")
        return False if name == "chat" else None  # only --chat has an opposite


def _meant(flag: str, names: Sequence[str]) -> str:
    """What may have been meant by an unknown flag: an option of vLLM, or one that looks alike.

    Args:
        flag: unknown flag.
        names: names of the options that there are.
    """
    theirs = {**SAMPLING_NAMES, **ENGINE_NAMES}.get(flag.removeprefix("--").replace("-", "_"))
    if theirs is not None and theirs.instead in names:
        return f"; vLLM calls it so, here it is {flag_of(theirs.instead)}"
    if theirs is not None and theirs.instead not in EngineConfig.declared:  # of that there is no flag
        return f": {theirs.instead}"
    meant = did_you_mean(flag, ["--no-chat", *map(flag_of, names)], 2)
    return f"; {meant}" if meant else ""

"""How an option is declared, once, and what follows from that: its check, its name in an error, its explanation.

A class of options is a frozen dataclass made from `Options`, with `finished` above it. A field gives an option its
name, type and default, `option` its range, and the docstring its text: an entry under "Attributes:", which comes last,
and whose "(default: ...)" says what a default stands for. Parsers of command lines are derived from the same in
`minirksc.cli.parser`. Which options there are is not known here.
"""

import functools
import inspect
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from types import NoneType, UnionType
from typing import Any, ClassVar, Self, TypeVar, get_args, get_origin

from minirksc.errors import ConfigError, brief, did_you_mean

T = TypeVar("T")

MAX_FLOAT = 1e30
"""Logits are float32: with this bound no option can make one overflow."""

REQUIRED: Any = MISSING
"""Default of an option that must be given."""

MESSAGES = {
    "none": "{name} None is not a value; leave it out for the default",
    "bool": "{name} {value} must be True or False",
    "choice": "{name} {value} is unknown; choose one of {allowed}",
    "int": "{name} {value} must be an integer, {allowed}",
    "int range": "{name} {value} is out of range; it must be {allowed}",
    "float": "{name} {value} must be a number, {allowed}",
    "float range": "{name} {value} is out of range; it must be {allowed}",
    "from": "at least {low}",
    "between": "{low} to {high}",
}
"""What is said of a value that is refused; the last two say which whole numbers are allowed."""


@dataclass(frozen=True)
class Option:
    """What is declared of an option; what stands elsewhere than in the call of `option` is added by `finished`.

    Attributes:
        low: least number that is allowed.
        high: largest number that is allowed.
        above: True where `low` itself is not allowed.
        choices: texts that are allowed.
        also: other spellings of values, and what they mean.
        read: function of name and value that checks a value of another kind and gives it the form of the field.
        metavar: word for a value in a command line's help.
        name: name of the field.
        kinds: types of its values; NoneType is one of them where None is a value.
        default: value where none is given, or `REQUIRED`.
        text: what it is or does.
        unset: what the default stands for, where it does not say so itself.
    """

    low: float | None = None
    high: float | None = None
    above: bool = False
    choices: Sequence[str] = ()
    also: Mapping[Any, Any] = field(default_factory=dict)
    read: Callable[[str, Any], Any] | None = None
    metavar: str | None = None
    name: str = ""
    kinds: tuple[Any, ...] = ()
    default: Any = None
    text: str = ""
    unset: str = ""

    @property
    def is_list(self) -> bool:
        """Whether it holds several values."""
        return any(get_origin(kind) is Sequence for kind in self.kinds)

    def explained(self, default: str | None = None, show_choices: bool = False) -> str:
        """The option in words: what it does, which values it takes, and its default.

        Args:
            default: default in words, where it is not that of the class.
            show_choices: True names choices; argparse does that itself.
        """
        notes = [", ".join(self.choices)] if show_choices and self.choices else []
        if float in self.kinds and self.low is not None and self.high is not None:
            notes.append(f"{'above ' if self.above else ''}{self.low:g} to {self.high:g}")
        is_silent = self.default is REQUIRED or self.default is False or self.default in (None, ())
        shown = f"{self.default:g}" if isinstance(self.default, float) else str(self.default)
        default = default or self.unset or ("" if is_silent else shown)
        if default:
            notes.append(f"default: {default}")
        return self.text + (f" ({'; '.join(notes)})" if notes else "")


def option(default: T, *, hash: bool | None = None, **details: Any) -> T:
    """A field of a class of options that has more than a default.

    Args:
        default: value where none is given; `REQUIRED`: one must be.
        hash: False leaves it out of the hash, as of `dataclasses.field`.
        details: attributes of `Option`.
    """
    return field(default=default, hash=hash, metadata={"option": Option(**details)})


@dataclass(frozen=True)
class Theirs:
    """An option that vLLM has under a name that is unknown here.

    Attributes:
        instead: our name of it, or what to do without it.
        neutral: values that change nothing, and are taken for that reason.
    """

    instead: str
    neutral: tuple[Any, ...] = ()

    def is_neutral(self, value: Any) -> bool:
        """Whether it is such a value: of the same type, since True is not 1."""
        return any(type(value) is type(one) and value == one for one in self.neutral)


class Options:
    """Base of a class of options: checks each when it is made.

    Attributes:
        declared: options by their names.
        theirs: names that users of vLLM know.
        aliases: other names of its options, which are taken.
        messages: what is said of a value that is refused.
    """

    declared: ClassVar[Mapping[str, Option]] = {}
    theirs: ClassVar[Mapping[str, Theirs]] = {}
    aliases: ClassVar[Mapping[str, str]] = {}
    messages: ClassVar[Mapping[str, str]] = MESSAGES

    def __post_init__(self) -> None:
        for name, one in self.declared.items():
            if (value := getattr(self, name)) is not one.default:  # which is right as it is
                object.__setattr__(self, name, self.checked(name, value))
        self._check_contradictions()

    def _check_contradictions(self) -> None:
        """Raises ConfigError where options, each right alone, do not go together."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """From names and values as they arrive in a file or a request.

        Raises:
            ConfigError: a name is unknown (what may have been meant is said) or a value is out of range.
        """
        return cls(**cls._by_own_names(values))

    @classmethod
    def checked(cls, name: str, value: Any) -> Any:
        """The value of an option, in the form that its field has.

        Raises:
            ConfigError: it is of a wrong kind, out of range or no choice.
        """
        one = cls.declared[name]
        if one.also and isinstance(value, (str, NoneType)) and value in one.also:
            return one.also[value]
        if value is None and one.default is not REQUIRED:
            if NoneType in one.kinds:
                return None
            raise ConfigError(cls.messages["none"].format(name=name, value=None))
        if one.read is not None:
            return one.read(name, value)
        kind = one.kinds[0]
        if one.choices and not (isinstance(value, str) and value in one.choices):
            allowed = ", ".join(one.choices)
            raise ConfigError(cls.messages["choice"].format(name=name, value=brief(value), allowed=allowed))
        if kind is bool and not isinstance(value, bool):  # "false" would switch on
            raise ConfigError(cls.messages["bool"].format(name=name, value=brief(value)))
        if kind in (int, float):
            check_number(name, value, kind, one, cls.messages)
        return value

    @classmethod
    def _by_own_names(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Values by our names, without those of vLLM's options that change nothing."""
        found: dict[str, Any] = {}
        for name, value in values.items():
            own = cls.aliases.get(name, name)
            if own in found:
                both = " and ".join(other for other in (own, *cls.aliases) if other in values)
                raise ConfigError(f"{both} are the same option; give one")
            if own in cls.declared:
                found[own] = value
            elif not (name in cls.theirs and cls.theirs[name].is_neutral(value)):
                raise ConfigError(cls._unknown(name, value))
        for name, one in cls.declared.items():
            if one.default is REQUIRED and name not in found:
                raise ConfigError(f"option {name!r} is missing; it has no default")
        return found

    @classmethod
    def _unknown(cls, name: Any, value: Any) -> str:
        """What to say of a name that is no option's."""
        if name in cls.theirs:
            instead = cls.theirs[name].instead
            if instead in cls.declared:
                return f"unknown option {name!r}; vLLM calls it {name}, here it is {instead}"
            return f"{name}={brief(value)} is not an option here: {instead}"
        meant = did_you_mean(str(name), cls.declared, 2) or f"known: {', '.join(cls.declared)}"
        return f"unknown option {name!r}; {meant}"


C = TypeVar("C", bound=Options)

_ENTRY = re.compile(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", re.MULTILINE)
"""An option in a docstring."""


def finished(cls: type[C]) -> type[C]:
    """Decorator above `dataclass`: names are checked by the constructor too, and `help` explains each option."""
    make = cls.__init__

    @functools.wraps(make)
    def init(self: Any, **values: Any) -> None:
        make(self, **cls._by_own_names(values))

    cls.__init__ = init  # type: ignore[method-assign]
    about, title, entries = inspect.cleandoc(cls.__doc__ or "").partition("Attributes:\n")
    texts = {name: " ".join(text.split()) for name, text in _ENTRY.findall(entries)}
    cls.declared = {one.name: _declared(one, texts.get(one.name, "")) for one in fields(cls)}  # type: ignore[arg-type]
    rows = [f"{name}: {one.explained(show_choices=True)}" for name, one in cls.declared.items()]
    rows = [textwrap.fill(row, 112, initial_indent=" " * 4, subsequent_indent=" " * 8) for row in rows]
    cls.__doc__ = about + title + "\n".join(rows)
    return cls


def _declared(one: Field[Any], entry: str) -> Option:
    """The whole of an option.

    Args:
        one: its field.
        entry: its entry in the docstring; empty where docstrings are left out of the program.
    """
    text, _, unset = entry.removesuffix(".").removesuffix(")").partition(" (default: ")
    if not unset:
        text = entry.removesuffix(".")
    kinds = get_args(one.type) if isinstance(one.type, UnionType) else (one.type,)
    begun: Option = one.metadata.get("option", Option())
    return replace(begun, name=one.name, kinds=kinds, default=one.default, text=text, unset=unset)


def check_number(name: str, value: Any, kind: type, bounds: Option, messages: Mapping[str, str] = MESSAGES) -> None:
    """Refuses what is no number, or outside its bounds.

    Args:
        name: what the number is called.
        value: anything.
        kind: int or float.
        bounds: option that has them; a float without them is within `MAX_FLOAT`.
        messages: as of `Options`.

    Raises:
        ConfigError: it is refused.
    """
    is_int, is_float = kind is int, kind is float
    low = -MAX_FLOAT if is_float and bounds.low is None else bounds.low
    high = MAX_FLOAT if is_float and bounds.high is None else bounds.high
    wrong = None
    if isinstance(value, bool) or not isinstance(value, int if is_int else (int, float)):
        wrong = kind.__name__
    # NaN compares false, and an int beyond all floats compares where math.isfinite would raise.
    elif not (low is None or low <= value) or not (high is None or value <= high) or (bounds.above and value == low):
        wrong = f"{kind.__name__} range"
    if wrong:
        allowed = messages["from" if high is None else "between"].format(low=low, high=high)
        if is_float:
            allowed = f"{'above' if bounds.above else 'at least'} {low:g}, at most {high:g}"
        raise ConfigError(messages[wrong].format(name=name, value=brief(value), allowed=allowed))

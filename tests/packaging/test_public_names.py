"""What `minirksc` itself exports: the same names for those who run it and for those who check types."""

import ast
import inspect
from pathlib import Path

import pytest

import minirksc
from minirksc import errors

TREE = ast.parse(Path(minirksc.__file__).read_text(encoding="utf-8"))
FOR_TYPES = {
    alias.name: node.module
    for block in TREE.body
    if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
    for node in block.body
    for alias in node.names
}


@pytest.mark.parametrize("name", minirksc.__all__)
def test_a_name_is_the_thing_of_its_module(name):
    found = getattr(minirksc, name)
    assert name in dir(minirksc)
    if inspect.isclass(found):
        assert (found.__module__, found.__name__) == (FOR_TYPES[name], name)


def test_types_see_the_same_names():
    assert set(FOR_TYPES) == set(minirksc.__all__)


def test_every_error_is_exported():
    raised = {name for name, one in vars(errors).items() if inspect.isclass(one) and issubclass(one, Exception)}
    assert raised <= set(minirksc.__all__)


def test_another_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        minirksc.Nothing  # noqa: B018

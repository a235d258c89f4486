"""`python -m minirksc.models`; see `minirksc.cli.models`."""

from minirksc.cli.main import start

start("models")

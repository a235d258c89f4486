"""`python -m minirksc`, which is the console script `minirksc`; see `minirksc.cli.main`."""

from minirksc.cli.main import start

start()

"""`python -m minirksc.checkpoints`; see `minirksc.cli.checkpoints`."""

from minirksc.cli.main import start

start("checkpoints")

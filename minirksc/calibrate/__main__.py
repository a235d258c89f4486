"""`python -m minirksc.calibrate`; see `minirksc.cli.calibrate`."""

from minirksc.cli.main import start

start("calibrate")

"""`python -m minirksc.calibrate`; see `minirksc.cli.calibrate`."""

if __name__ == "__main__":
    from minirksc.cli.main import start

    start("calibrate")

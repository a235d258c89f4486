"""`python -m minirksc.solve`; see `minirksc.cli.solve`."""

if __name__ == "__main__":
    from minirksc.cli.main import start

    start("solve")

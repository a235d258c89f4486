"""`python -m minirksc.generate`; see `minirksc.cli.generate`."""

if __name__ == "__main__":
    from minirksc.cli.main import start

    start("generate")

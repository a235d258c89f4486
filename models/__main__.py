"""`python -m minirksc.models`; see `minirksc.cli.models`."""

if __name__ == "__main__":
    from minirksc.cli.main import start

    start("models")

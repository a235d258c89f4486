"""`python -m minirksc`, which is the console script `minirksc`; see `minirksc.cli.main`."""

if __name__ == "__main__":
    from minirksc.cli.main import start

    start()

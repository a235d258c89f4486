"""`python -m minirksc.checkpoints`; see `minirksc.cli.checkpoints`."""

if __name__ == "__main__":
    from minirksc.cli.main import start

    start("checkpoints")

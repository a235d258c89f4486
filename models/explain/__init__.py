"""What a checkpoint is, in words: `python -m minirksc.models`."""

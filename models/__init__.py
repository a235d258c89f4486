"""Model definitions as data (`ArchSpec`) and the one decoder; imported as `minirksc.models`."""

if not __name__.startswith("minirksc."):
    raise ImportError("import this package as minirksc.models, not as a top-level package")

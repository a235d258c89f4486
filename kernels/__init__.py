"""Tensor operations of the engine, one op a file; imported as `minirksc.kernels`.

Each file holds the op's plain fp32 reference (the specification) and its fast forms. Knows nothing about
models, requests or the scheduler.
"""

if not __name__.startswith("minirksc."):
    raise ImportError("import this package as minirksc.kernels, not as a top-level package")

"""What a child of `os.fork` needs to compute: OpenMP's threads are not copied with the process.

OpenMP keeps its threads from one parallel region to the next. A child has none of them, and its first parallel region
would wait for them for ever. So right before a fork of a process that has imported this, the threads of the forking one
are ended; parent and child start new ones when they need them. Where OpenMP has no call for that, a child can compute
with one thread only.
"""

import ctypes
import os

import torch

HARD = 2
"""omp_pause_hard of omp_pause_resource_all (OpenMP 5.0): give back everything, threads included."""


def _end_threads_at_fork() -> bool:
    """Whether that can be done; torch has loaded OpenMP."""
    try:
        pause = ctypes.CDLL(None).omp_pause_resource_all
    except (AttributeError, OSError):
        return False
    os.register_at_fork(before=lambda: pause(HARD))
    return True


_ends_threads = _end_threads_at_fork()


def why_not(device: torch.device) -> str | None:
    """Why a model that was loaded before a fork cannot compute after it, in the child; None: it can."""
    if device.type == "cuda":
        return "a CUDA device cannot be used after os.fork()"
    if torch.get_num_threads() > 1 and not _ends_threads:
        return "OpenMP's threads are lost in os.fork(), and this OpenMP cannot do without them"
    return None

"""How many threads an engine computes with, and what to say where the process's settings fight it.

By default one a physical core, of the CPUs that the process may run on: a second one on the same core has no
multiplier of its own and waits for the same memory, and one without a CPU makes all others wait at every barrier.
Where fewer are wanted torch has been told (OMP_NUM_THREADS, MKL_NUM_THREADS, torch.set_num_threads), and that counts.
Pure functions: facts and the environment are arguments, and nothing is set here.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from minirksc.engine.host import Cpus, parse_cpus

BINDING = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")
"""With one of them OpenMP may have put the calling thread on one CPU, so that its affinity is not the process's."""


@dataclass(frozen=True)
class ThreadChoice:
    """How many threads to set, and what to say.

    Attributes:
        threads: number of threads.
        warnings: what the caller should know, each with its remedy.
    """

    threads: int
    warnings: tuple[str, ...] = ()


def choose_threads(asked: int | None, current: int, cpus: Cpus, environ: Mapping[str, str]) -> ThreadChoice:
    """Decides how many threads to compute with.

    Args:
        asked: number that the option gives; None: choose.
        current: number that torch is set to.
        cpus: CPUs of the process.
        environ: environment variables that OpenMP has read.
    """
    allowed = cpus.allowed
    if cpus.cores and any((environ.get(name) or "false").lower() != "false" for name in BINDING):
        allowed = frozenset(cpus.cores)  # `current` was counted before threads were bound
    num_cpus = _at_most(len(allowed), cpus.quota)
    num_cores = _at_most(len({cpus.cores.get(cpu, frozenset({cpu})) for cpu in allowed}), cpus.quota)
    told = _first_number(environ.get("OMP_NUM_THREADS", ""))
    warnings = []
    if asked is not None:
        threads = asked
        if asked > num_cpus:
            warnings.append(
                f"threads {asked} is more than the {_count(num_cpus)} that this process may use, and threads that wait "
                f"for a CPU hold up all others; use threads={num_cores} or leave it out (--threads)"
            )
    else:
        threads = min(num_cores, current)
        if told is not None and current >= num_cores < told <= num_cpus:
            threads = told  # two a core are wanted; torch may not say so, as MKL counts cores
        if told is not None and told > num_cpus:
            warnings.append(
                f"OMP_NUM_THREADS={told} is more than the {_count(num_cpus)} that this process may use, so threads is "
                f"{threads}; set the variable to {num_cpus} or less, or unset it"
            )
    wanted = threads
    for setting, limit, effect in _limits(environ):
        if limit < wanted:
            warnings.append(f"{setting} {effect}, and there are {wanted} to use; unset it, or use threads={limit}")
            threads = threads if asked is not None else min(threads, limit)
    return ThreadChoice(threads, tuple(warnings))


def _at_most(number: int, quota: float | None) -> int:
    return max(1, number if quota is None else min(number, math.ceil(quota)))


def _limits(environ: Mapping[str, str]) -> list[tuple[str, int, str]]:
    """(setting, threads that can compute at once under it, what it does) of all that hold OpenMP back."""
    found = []
    limit = _first_number(environ.get("OMP_THREAD_LIMIT", ""))
    if limit is not None:
        found.append((f"OMP_THREAD_LIMIT={limit}", limit, f"allows OpenMP {limit} threads"))
    bind = environ.get("OMP_PROC_BIND", "")
    if bind.split(",")[0].strip().lower() in ("master", "primary"):
        found.append((f"OMP_PROC_BIND={bind}", 1, "puts all threads where the first one is"))
    explicit = re.search(r"proclist=\[([^]]*)\]", environ.get("KMP_AFFINITY", ""))
    places = environ.get("OMP_PLACES", "")
    lists = {
        "GOMP_CPU_AFFINITY": environ.get("GOMP_CPU_AFFINITY", ""),
        "KMP_AFFINITY": explicit[1] if explicit else "",
        "OMP_PLACES": "" if ":" in places else places,  # {first:count:step} is a notation of its own
    }
    for name, text in lists.items():
        pinned = parse_cpus(re.sub("[{}]", " ", text))
        if pinned:
            found.append((f"{name}={environ[name]}", len(pinned), f"pins all threads to {_count(len(pinned))}"))
    return found


def _first_number(text: str) -> int | None:
    """Of "4" or, one a level of nesting, "4,2"; None where OpenMP would ignore it."""
    first = text.split(",")[0].strip()
    return int(first) if first.isdecimal() and int(first) else None


def _count(num_cpus: int) -> str:
    return f"{num_cpus} CPU{'' if num_cpus == 1 else 's'}"

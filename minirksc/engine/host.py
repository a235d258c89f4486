"""What this machine lets the process use: CPUs and memory, as Linux tells it in /proc and /sys.

Facts only; `minirksc.engine.threads` and `minirksc.engine.loading` decide. Nothing here fails: what cannot be read is
no limit. cgroups of both versions are read, the process's own and those around it.
"""

import ctypes
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path("/")
MAX_CPU = 8191
"""Linux's own limit; a larger number is no CPU."""
GUESSED_FREE_BYTES = 4 << 30
"""Where a system does not say."""
KEPT_BYTES = 31 << 20
CPU_LIMITS_V1 = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
"""Where version 1 of cgroups has what is in version 2's cpu.max."""
MEMORY_LIMITS = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""Files of a limit and of what counts towards it, and a field of memory.stat; of either version of cgroups."""


@dataclass(frozen=True)
class Cpus:
    """The CPUs of a process.

    Attributes:
        allowed: numbers of those that the calling thread may run on.
        cores: CPU of the machine -> all that are on its core; one that is missing has a core for itself.
        quota: seconds of CPU time that a cgroup gives in a second; None: no limit.
    """

    allowed: frozenset[int]
    cores: Mapping[int, frozenset[int]] = field(default_factory=dict)
    quota: float | None = None


def read_cpus(root: Path = ROOT) -> Cpus:
    """The CPUs of this process.

    Args:
        root: folder in which proc/ and sys/ are.
    """
    if hasattr(os, "sched_getaffinity"):
        allowed = frozenset(os.sched_getaffinity(0))
    else:
        allowed = frozenset(range(os.cpu_count() or 1))
    cores = {}
    for folder in (root / "sys/devices/system/cpu").glob("cpu[0-9]*"):
        siblings = parse_cpus(_text(folder / "topology/thread_siblings_list"))
        if siblings and folder.name[3:].isdecimal():
            cores[int(folder.name[3:])] = siblings
    return Cpus(allowed, cores, min(_quotas(root), default=None))


def parse_cpus(text: str) -> frozenset[int]:
    """CPUs of a list such as "0-3,8" or "0 2-10:2"; none where it is not one."""
    found: set[int] = set()
    for part in text.replace(",", " ").split():
        span, colon, step = part.partition(":")
        first, dash, last = span.partition("-")
        numbers = (first, last if dash else first, step if colon else "1")
        if not all(number.isdecimal() for number in numbers) or int(numbers[1]) > MAX_CPU or int(numbers[2]) < 1:
            return frozenset()
        found.update(range(int(numbers[0]), int(numbers[1]) + 1, int(numbers[2])))
    return frozenset(found)


def free_bytes(root: Path = ROOT) -> int:
    """Bytes of memory that the process can still fill without swapping, in what its cgroups leave it."""
    available = _field(root / "proc/meminfo", "MemAvailable")
    if available is None:
        memory = _machine_bytes(root)
        available = GUESSED_FREE_BYTES if memory is None else memory // 2
    return max(0, min([available, *(limit - used for limit, used in _memory_groups(root))]))


def total_bytes(root: Path = ROOT) -> int | None:
    """Bytes of memory and swap that the process could ever fill; None where the system does not say."""
    memory = _machine_bytes(root)
    if memory is None:
        return None
    swap = _field(root / "proc/meminfo", "SwapTotal") or 0
    return min([memory, *(limit for limit, _ in _memory_groups(root))]) + swap


def resident_bytes(root: Path = ROOT) -> tuple[int | None, int | None]:
    """(bytes of this process in memory, the most there ever were); None for what the system does not say."""
    status = root / "proc/self/status"
    now, peak = _field(status, "VmRSS"), _field(status, "VmHWM")
    if peak is None and sys.platform != "win32":
        import resource  # there is none on Windows

        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if now is not None and peak is not None:
        peak = max(peak, now)  # Linux brings it up to date with a delay
    return now, peak


def trim_heap() -> None:
    """Gives memory that was freed back to the system, which glibc by itself does only from the heap's end."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
        if trim is not None:
            trim(0)


def keep_freed_blocks() -> None:
    """Lets glibc keep up to 62 MiB that are freed: twice the largest block that ever was, which is one of 31 MiB then.

    Else it gives a layer's activations back and asks for them anew in the next: 85,000 page faults of a prompt of 1,024
    tokens, a sixth of its time. Nothing is set; it learns so from any such block, and remembers it for the process.
    Source: M_MMAP_THRESHOLD and M_TRIM_THRESHOLD in mallopt(3).
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.malloc.restype = ctypes.c_void_p
        libc.free(ctypes.c_void_p(libc.malloc(ctypes.c_size_t(KEPT_BYTES))))


def _machine_bytes(root: Path) -> int | None:
    """All memory of the machine; None where the system does not say."""
    memory = _field(root / "proc/meminfo", "MemTotal")
    if memory is None and root == ROOT and "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return memory


def _quotas(root: Path) -> Iterator[float]:
    """Seconds of CPU time in a second, of each cgroup that has a limit."""
    for folder in _cgroups(root, "cpu"):
        words = _text(folder / "cpu.max").split()
        quota, period = words if len(words) == 2 else (_text(folder / name).strip() for name in CPU_LIMITS_V1)
        if quota.isdecimal() and period.isdecimal() and int(period):  # not "max", and not -1
            yield int(quota) / int(period)


def _memory_groups(root: Path) -> Iterator[tuple[int, int]]:
    """(bytes that it may have, bytes that it has) of each cgroup with a limit.

    Pages of files that were read once do not count: they are given up before a process is killed.
    """
    for folder in _cgroups(root, "memory"):
        for limit_name, usage_name, cached_name in MEMORY_LIMITS:
            limit, usage = _text(folder / limit_name).strip(), _text(folder / usage_name).strip()
            if limit.isdecimal():
                cached = _field(folder / "memory.stat", cached_name) or 0
                yield int(limit), int(usage) - cached if usage.isdecimal() else 0


def _cgroups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of the cgroups that this process is in, from the innermost; in a container only the last may be there."""
    mounts = root / "sys/fs/cgroup"
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers and controller not in controllers.split(","):
            continue
        mount = mounts / controller if controllers else mounts
        folder = mount / path.lstrip("/")
        yield from (one for one in (folder, *folder.parents) if one.is_relative_to(mount))


def _field(file: Path, name: str) -> int | None:
    """Bytes of a line "NAME: 12 kB", or "NAME 12"."""
    for line in _text(file).splitlines():
        words = line.split()
        if len(words) > 1 and words[0].rstrip(":") == name and words[1].isdecimal():
            return int(words[1]) * (1024 if words[2:] == ["kB"] else 1)
    return None


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""

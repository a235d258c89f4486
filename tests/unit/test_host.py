"""What is read of a machine, on made-up ones: files as Linux has them, below a folder."""

import ctypes
import mmap
import os
import subprocess
import sys

import pytest

from minirksc import LLM
from minirksc.engine import host
from minirksc.engine.loading import KV_SHARE_OF_FREE_MEMORY
from minirksc.errors import CacheFullError

GIB = 1 << 30
MEMINFO = "MemTotal: 99 kB\nMemFree: 1 kB\nMemAvailable: 8388608 kB"  # 8 GiB
V2, V1 = "0::/a/b", "4:memory:/a/b\n2:cpu,cpuacct:/a/b\n1:name=systemd:/\n0::/"


@pytest.fixture()
def machine(tmp_path):
    def make(files):
        for name, text in files.items():
            file = tmp_path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{text}\n")
        return tmp_path

    return make


def groups(folder, **values):
    return {f"sys/fs/cgroup/{folder}/{name.replace('__', '.')}": value for name, value in values.items()}


def test_lists_of_cpus():
    assert host.parse_cpus("0-3,8\n") == {0, 1, 2, 3, 8}
    assert host.parse_cpus("0 2-10:4 1") == {0, 1, 2, 6, 10}
    for no_list in ("", "cores", "1-", "-1", "0-4:0", "0-4:", "0,x", "4-99999999999"):
        assert host.parse_cpus(no_list) == frozenset(), no_list


def test_a_machine_that_says_nothing(tmp_path):
    cpus = host.read_cpus(tmp_path)
    assert cpus.allowed and cpus.cores == {} and cpus.quota is None
    assert host.free_bytes(tmp_path) == host.GUESSED_FREE_BYTES
    assert host.resident_bytes(tmp_path)[0] is None
    no_sense = {
        "proc/self/cgroup": "?\n::\n0::/../..",
        "proc/meminfo": "MemAvailable: lots",
        "proc/self/status": "VmRSS:",
    }
    for name, text in no_sense.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert host.read_cpus(tmp_path).quota is None and host.free_bytes(tmp_path) == host.GUESSED_FREE_BYTES


def test_without_an_affinity_all_cpus_count(monkeypatch, tmp_path):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    for count, allowed in ((3, {0, 1, 2}), (None, {0})):
        monkeypatch.setattr(os, "cpu_count", lambda count=count: count)
        assert host.read_cpus(tmp_path).allowed == allowed


def test_siblings_are_read_by_cpu(machine):
    folder = "sys/devices/system/cpu"
    siblings = {f"{folder}/cpu{cpu}/topology/thread_siblings_list": f"{cpu % 2},{cpu % 2 + 2}" for cpu in range(4)}
    root = machine({**siblings, f"{folder}/cpufreq/boost": "1", f"{folder}/online": "0-3"})
    assert host.read_cpus(root).cores == {0: {0, 2}, 1: {1, 3}, 2: {0, 2}, 3: {1, 3}}


@pytest.mark.parametrize(
    ("own", "files", "quota"),
    [
        (V2, groups("a/b", cpu__max="150000 100000"), 1.5), (V2, groups("a/b", cpu__max="max 100000"), None),
        (V2, {**groups("a/b", cpu__max="max 100000"), **groups("a", cpu__max="400000 100000")}, 4.0),
        (V2, {**groups("a/b", cpu__max="800000 100000"), **groups("", cpu__max="50000 100000")}, 0.5),
        (V2, groups("elsewhere", cpu__max="100 100"), None),
        (V1, groups("cpu/a/b", cpu__cfs_quota_us="300000", cpu__cfs_period_us="100000"), 3.0),
        (V1, groups("cpu", cpu__cfs_quota_us="200000", cpu__cfs_period_us="100000"), 2.0),  # in a container
        (V1, groups("cpu/a/b", cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000"), None),
    ],
)  # fmt: skip
def test_quotas_of_time(machine, own, files, quota):
    assert host.read_cpus(machine({"proc/self/cgroup": own, **files})).quota == quota


V2_MEMORY = {"memory__max": 4 * GIB, "memory__current": 3 * GIB, "memory__stat": f"anon 5\ninactive_file {GIB // 2}"}
V1_MEMORY = {
    "memory__limit_in_bytes": 4 * GIB, "memory__usage_in_bytes": 3 * GIB,
    "memory__stat": f"inactive_file 7\ntotal_inactive_file {GIB // 2}",
}  # fmt: skip


@pytest.mark.parametrize(
    ("own", "files", "free"),
    [
        (V2, {}, 8 * GIB), (V2, groups("a/b", **V2_MEMORY), 3 * GIB // 2), (V2, groups("a", **V2_MEMORY), 3 * GIB // 2),
        (V2, groups("a/b", **{**V2_MEMORY, "memory__max": "max"}), 8 * GIB),
        (V2, groups("a/b", **{**V2_MEMORY, "memory__max": 99 * GIB}), 8 * GIB),
        (V2, groups("a/b", **{**V2_MEMORY, "memory__max": GIB}), 0),
        (V1, groups("memory/a/b", **V1_MEMORY), 3 * GIB // 2), (V1, groups("memory", **V1_MEMORY), 3 * GIB // 2),
        (V1, groups("memory/a/b", **{**V1_MEMORY, "memory__limit_in_bytes": 9223372036854771712}), 8 * GIB),
    ],
)  # fmt: skip
def test_free_memory_is_what_the_machine_and_all_groups_leave(machine, own, files, free):
    assert host.free_bytes(machine({"proc/meminfo": MEMINFO, "proc/self/cgroup": own, **files})) == free


@pytest.mark.parametrize(
    ("own", "files", "total"),
    [
        (V2, {}, 18 * GIB), (V2, groups("a/b", **V2_MEMORY), 6 * GIB), (V2, groups("a", **V2_MEMORY), 6 * GIB),
        (V2, groups("a/b", memory__max="max"), 18 * GIB), (V1, groups("memory/a/b", **V1_MEMORY), 6 * GIB),
    ],
)  # fmt: skip
def test_all_memory_is_that_of_the_machine_or_its_groups_and_the_swap(machine, own, files, total):
    meminfo = f"MemTotal: {16 << 20} kB\nMemAvailable: {8 << 20} kB\nSwapTotal: {2 << 20} kB\n"
    assert host.total_bytes(machine({"proc/meminfo": meminfo, "proc/self/cgroup": own, **files})) == total
    assert host.total_bytes(machine({"proc/meminfo": ""})) is None


def test_the_default_cache_is_a_part_of_what_is_free(tiny_llama, monkeypatch):
    folder = tiny_llama()
    sizes = []
    for free in (1 << 20, 1 << 22):
        monkeypatch.setattr(host, "free_bytes", lambda free=free: free)
        with LLM(folder) as llm:
            sizes.append(llm.stats()["kv_cache_bytes"])
        assert free * KV_SHARE_OF_FREE_MEMORY * 0.9 < sizes[-1] <= free * KV_SHARE_OF_FREE_MEMORY
    monkeypatch.setattr(host, "free_bytes", lambda: 1 << 50)
    with LLM(folder) as llm:
        assert llm.stats()["kv_cache_bytes"] < 1 << 34  # more would be of no use to so small a model
    monkeypatch.setattr(host, "free_bytes", lambda: 0)
    with pytest.raises(CacheFullError, match="kv_cache_bytes 0, chosen from what is free"):
        LLM(folder)
    with LLM(folder, kv_cache_bytes="1MiB") as llm:  # whoever names a size gets it
        assert llm.stats()["kv_cache_bytes"] > 1 << 19


def test_free_memory_is_asked_for_when_the_weights_are_there(tiny_llama, monkeypatch):
    order = []
    trim = host.trim_heap
    monkeypatch.setattr(host, "trim_heap", lambda: order.append("packed") or trim())
    monkeypatch.setattr(host, "free_bytes", lambda: order.append("free") or 1 << 20)
    LLM(tiny_llama()).close()
    assert order[-2:] == ["packed", "free"] and order.count("free") == 1


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_resident_memory_now_and_its_peak():
    before, _ = host.resident_bytes()
    block = mmap.mmap(-1, 64 << 20)  # what an allocator frees it may keep
    for begin in range(0, len(block), 1 << 20):
        block[begin : begin + (1 << 20)] = bytes(1 << 20)
    during, _ = host.resident_bytes()
    block.close()
    after, peak = host.resident_bytes()
    assert during - before > 60 << 20 and during - after > 60 << 20
    assert peak > during - (1 << 20)  # Linux brings both up to date with a delay


def test_the_peak_is_known_where_proc_is_not_complete(machine):
    root = machine({"proc/self/status": "VmRSS:\t 12 kB\nRssAnon: 1 kB"})
    now, peak = host.resident_bytes(root)
    assert now == 12 * 1024 and (peak is None or peak > 1 << 20)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="is about glibc")
def test_blocks_that_are_freed_are_kept():
    code = """
import ctypes
from minirksc.engine import host
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
libc.mallinfo2.restype = type("Info", (ctypes.Structure,), {"_fields_": [(name, ctypes.c_size_t) for name in names]})
def num_mapped():
    before = libc.mallinfo2().hblks
    block = libc.malloc(16 << 20)
    return libc.mallinfo2().hblks - before
print(num_mapped())
host.keep_freed_blocks()
print(num_mapped())
"""
    environment = {name: value for name, value in os.environ.items() if "MALLOC" not in name}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "0"]  # mapped for itself; from the heap


def test_freed_memory_goes_back(monkeypatch):
    host.trim_heap()
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(host.ctypes, "CDLL", None)
    host.trim_heap()  # nothing is loaded where there is no glibc
    host.keep_freed_blocks()

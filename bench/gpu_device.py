"""The GPU under test: what it is, what it could do at most, and a clock on it."""

import re
import subprocess
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

FLUSH_BYTES = 256 << 20
"""More than the L2 of any GPU of today."""

FLUSHES = 4
"""One empties the cache. The others keep the GPU busy while Python launches, so that launches are not what is timed."""

Clock = Callable[[Callable[[], object]], float]
"""Runs a call once, from a cold cache; gives its microseconds."""

SMI_FIELDS = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit", "temperature.gpu")


class Peak(NamedTuple):
    """What a device can do at most.

    Attributes:
        bandwidth: of its memory, bytes a second.
        flops: dense bfloat16 products accumulated in float32, operations a second.
        source: "data sheet" or "measured".
    """

    bandwidth: float
    flops: float
    source: str


# First match wins. TB/s and TFLOP/s of the vendors' data sheets, without sparsity.
PEAKS = (
    (r"\bB200\b", 8.0, 2250),
    (r"\bH200\b", 4.8, 989),
    (r"\bH100.*PCIe", 2.0, 756),
    (r"\bH100.*NVL", 3.9, 835),
    (r"\bH100.*HBM3", 3.35, 989),
    (r"\bA100.*PCIe.*80GB|\bA100.*80GB.*PCIe", 1.935, 312),
    (r"\bA100.*80GB", 2.039, 312),
    (r"\bA100.*40GB", 1.555, 312),
    (r"\bL40S\b", 0.864, 362),
    (r"\bL4\b", 0.3, 121),
    (r"RTX 5090(?! (D|Laptop))", 1.792, 209.5),
    (r"RTX 4090(?! (D|Laptop))", 1.008, 165.2),
    (r"RTX 3090(?! Ti)", 0.936, 71),
    (r"\bMI325X\b", 6.0, 1307),
    (r"\bMI300X\b", 5.3, 1307),
)


def known_peak(name: str) -> Peak | None:
    """The data sheet's figures for a device of that name; None where it is unknown, or only a slice of one (MIG)."""
    if "MIG" in name:
        return None
    for pattern, terabytes, teraflops in PEAKS:
        if re.search(pattern, name, re.IGNORECASE):
            return Peak(terabytes * 1e12, teraflops * 1e12, "data sheet")
    return None


def measured_peak(device: torch.device, clock: Clock) -> Peak:
    """What a plain copy and a large product reach: for devices without an entry in `PEAKS`."""
    source = torch.empty(1 << 30, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    copy_us = min(clock(lambda: target.copy_(source)) for _ in range(10))
    size = 8192
    a = torch.ones((size, size), dtype=torch.bfloat16, device=device)
    product_us = min(clock(lambda: a @ a) for _ in range(10))
    return Peak(2 * len(source) / copy_us * 1e6, 2 * size**3 / product_us * 1e6, "measured")


def cuda_clock(device: torch.device) -> Clock:
    """A clock made of two events around the call."""
    flushed = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)

    def clock(call: Callable[[], object]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        for _ in range(FLUSHES):
            flushed.zero_()
        begin.record()
        call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1000

    return clock


def device_facts(device: torch.device) -> dict[str, Any]:
    """Name, size and software of the device, for the results."""
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": properties.name,
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "capability": list(torch.cuda.get_device_capability(device)),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        **read_smi(device),
    }


def read_smi(device: torch.device) -> dict[str, str]:
    """Driver, clocks, power limit and temperature as nvidia-smi tells them now; empty where it does not run."""
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)  # as the order there may be another
    if uuid is None or torch.version.hip is not None:
        return {}
    command = ["nvidia-smi", f"--query-gpu={','.join(SMI_FIELDS)}", "--format=csv,noheader", "-i", f"GPU-{uuid}"]
    try:
        return parse_smi(subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout)
    except (OSError, subprocess.SubprocessError):
        return {}


def parse_smi(text: str) -> dict[str, str]:
    """The line that nvidia-smi prints for `SMI_FIELDS`, by field; what it does not know is left out."""
    values = [value.strip() for value in text.strip().split(",")]
    if len(values) != len(SMI_FIELDS):
        return {}
    return {name: value for name, value in zip(SMI_FIELDS, values, strict=True) if not value.startswith("[")}

"""The GPU under test: what it is, what it could do at most, and a clock on it."""

import subprocess
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

FLUSH_BYTES = 256 << 20
"""More than the L2 of any GPU of today."""

COPY_BYTES = 1 << 30
PRODUCT_SIZE = 8192
"""Of what is copied and multiplied to measure a peak."""

FLUSHES = 4
"""One empties the cache. The others keep the GPU busy while Python launches, so that launches are not what is timed."""

Clock = Callable[[Callable[[], object]], float]
"""Runs a call once, from a cold cache; gives its microseconds."""

SMI_FIELDS = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit", "temperature.gpu")


class Peak(NamedTuple):
    """What a device can do at most, as far as a plain copy and a large product reach it.

    Attributes:
        bandwidth: bytes of its memory a second.
        flops: operations a second, of dense bfloat16 products accumulated in float32.
    """

    bandwidth: float
    flops: float


def measured_peak(device: torch.device, clock: Clock) -> Peak:
    """Measures a device: the fastest of ten copies and products."""
    source = torch.empty(COPY_BYTES, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    copy_us = min(clock(lambda: target.copy_(source)) for _ in range(10))
    a = torch.ones((PRODUCT_SIZE, PRODUCT_SIZE), dtype=torch.bfloat16, device=device)
    product_us = min(clock(lambda: a @ a) for _ in range(10))
    return Peak(2 * COPY_BYTES / copy_us * 1e6, 2 * PRODUCT_SIZE**3 / product_us * 1e6)


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

"""Reads what a kernel became on a GPU out of its machine code: no GPU is needed.

NVIDIA's cubin is disassembled with the tools that Triton's wheel brings along, AMD's assembly is read as it is.
Instructions are counted once, as they stand in the code, in classes that mean the same on both; a load or store is
also counted by its width in bits ("LDG.128"). What it cannot tell is time: latencies, caches and clocks are not in
the code.

Source of the limits: CUDA C++ programming guide, technical specifications per compute capability; AMD CDNA 3
architecture and instruction set guides. Bytes a clock are the data sheets' HBM bandwidth divided by the number of
multiprocessors and the boost clock: A100 SXM 80 GB, H100 SXM, B200, MI300X.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

Instruction = tuple[int, str, int | None]
"""Place in the code, opcode, and the place that a branch goes to."""


@dataclass(frozen=True)
class Target:
    """What limits how many blocks of threads one multiprocessor (compute unit) holds.

    Attributes:
        architecture: name in the launch tables.
        block_shared_bytes: shared memory (LDS) that one block may have.
        shared_bytes, warps, blocks: limits of one multiprocessor.
        hbm_bytes: bytes that reach one multiprocessor a clock when memory runs at its peak.
    """

    architecture: str
    block_shared_bytes: int
    shared_bytes: int
    warps: int
    blocks: int
    hbm_bytes: float


TARGETS = {
    "cuda:80": Target("sm_80", 163 << 10, 164 << 10, 64, 32, 13.4),
    "cuda:90": Target("sm_90", 227 << 10, 228 << 10, 64, 32, 14.5),
    "cuda:100": Target("sm_100", 227 << 10, 228 << 10, 64, 32, 29.0),
    "hip:gfx942": Target("gfx942", 64 << 10, 64 << 10, 32, 32, 8.3),
}

# First match wins. LDGSTS copies from global to shared memory; MUFU: exp2, log2, reciprocal, square root.
NVIDIA = {
    "MMA": r"(HMMA|HGMMA|IMMA|IGMMA|QMMA|QGMMA|DMMA|UTC\w*MMA)",
    "TMA": r"(UTMA|UBLKCP)",
    "LDGSTS": r"LDGSTS",
    "LDG": r"LDG",
    "STG": r"STG",
    "LDSM": r"LDSM",
    "LDS": r"LDS",
    "STS": r"(STS|STSM)",
    "spill": r"(LDL|STL)",
    "MUFU": r"MUFU",
    "SHFL": r"(SHFL|REDUX)",
    "BAR": r"(BAR|SYNCS|DEPBAR|LDGDEPBAR|WARPSYNC|WARPGROUP)",
    "FP32": r"F(FMA|ADD|MUL|MNMX|SEL|SET|CHK)",
    "CVT": r"(F2|I2|H(ADD|MUL|FMA))",
    "ATOM": r"(ATOM|RED)",
    "CTRL": r"(BRA|EXIT|CALL|RET|BSSY|BSYNC|NOP|BREAK|YIELD)",
    "INT": r".",
}
AMD = {
    "MMA": r"v_(s?mfma|wmma)",
    "LDG": r"(global|buffer|flat)_load",
    "STG": r"(global|buffer|flat)_store",
    "ATOM": r"(global|buffer|flat)_atomic",
    "spill": r"scratch_",
    "LDS": r"ds_read",
    "STS": r"ds_write",
    "SHFL": r"(ds_b?permute|ds_swizzle|v_\w+_dpp|v_readlane|v_permlane)",
    "MUFU": r"v_(exp|log|rcp|rsq|sqrt)",
    "BAR": r"s_(barrier|waitcnt)",
    "CVT": r"v_cvt",
    "FP32": r"v_(pk_)?(fma|add_f|mul_f|max_f|sub_f|mac_f|maximum|max3)",
    "CTRL": r"s_(cbranch|branch|endpgm|nop)",
    "INT": r".",
}
_WITH_WIDTH = ("LDG", "LDGSTS", "STG", "LDS", "STS")


@dataclass(frozen=True)
class Usage:
    """What one compiled kernel takes.

    Attributes:
        warps, stages: warps and stages it was compiled for.
        registers: registers of one thread.
        spill_bytes: bytes of one thread in local (scratch) memory, where registers did not suffice.
        shared_bytes: shared memory of one block.
        blocks: blocks that one multiprocessor holds at a time, as far as registers, shared memory and warps allow.
        occupancy: share of the warps then, of those that it could hold.
        buffers: copies of the smallest pipelined tile in shared memory; 1: loads wait for the arithmetic; 0: none.
        issue: share of the issue slots that the main loop needs while memory runs at its peak; None where the bytes
            are unknown. Above about 0.6 the loop is no longer bound by memory.
        loop: instructions of the innermost loop with the most matrix products, else loads; empty without a loop.
        whole: instructions of the kernel.
    """

    warps: int
    stages: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    blocks: int
    occupancy: float
    buffers: int
    issue: float | None
    loop: dict[str, int]
    whole: dict[str, int]

    def problems(self, target: Target) -> list[str]:
        """Why the kernel is not good enough for the target; empty when it is."""
        found = []
        if self.spill_bytes:
            found.append(f"spills {self.spill_bytes} bytes a thread")
        if self.shared_bytes > target.block_shared_bytes:
            limit = target.block_shared_bytes
            found.append(f"needs {self.shared_bytes} bytes of shared memory, {target.architecture} has {limit}")
        elif not self.blocks:
            found.append("its registers do not fit on a multiprocessor")
        return found


def read(compiled: Any, target: Target, loop_bytes: int | None) -> Usage:
    """What a compiled kernel takes.

    Args:
        compiled: kernel as `triton.compile` gave it.
        target: target it was compiled for.
        loop_bytes: HBM bytes that one program moves in one iteration of its main loop.
    """
    metadata = compiled.metadata
    warps, shared = metadata.num_warps, metadata.shared
    if "cubin" in compiled.asm:
        code, registers, spill = _read_nvidia(compiled.asm["cubin"])
        classes, clocks = NVIDIA, warps / 4  # four schedulers, one instruction a clock each
        # A warp's registers are handed out by 256, and a block takes 1 KiB of shared memory for the system.
        by_registers = 65536 // _up(registers * 32, 256) // 4 * 4 // warps
        by_shared = target.shared_bytes // _up(shared + 1024, 128)
    else:
        code, registers, spill = _read_amd(compiled.asm["amdgcn"])
        classes, clocks = AMD, warps  # four SIMDs, and a wave of 64 holds one of 16 lanes for four clocks
        by_registers = min(8, 512 // max(8, _up(registers, 8))) * 4 // warps
        by_shared = target.shared_bytes // max(shared, 1)
    blocks = min(target.blocks, target.warps // warps, by_registers, by_shared)
    loop = main_loop(code, classes)
    buffers = re.findall(r"local_alloc : \(\) -> !ttg\.memdesc<(\d+)x\d+x\d+x", compiled.asm["ttgir"])
    return Usage(
        warps=warps,
        stages=getattr(metadata, "num_stages", 0),
        registers=registers,
        spill_bytes=spill,
        shared_bytes=shared,
        blocks=blocks,
        occupancy=round(blocks * warps / target.warps, 3),
        buffers=min(map(int, buffers), default=0),
        issue=round(loop["total"] * clocks * target.hbm_bytes / loop_bytes, 3) if loop and loop_bytes else None,
        loop=loop,
        whole=count([opcode for _, opcode, _ in code], classes),
    )


def count(opcodes: Sequence[str], classes: dict[str, str]) -> dict[str, int]:
    """Instructions by class, and all of them as "total".

    Loads and stores are also counted by width ("LDG.128"), matrix products by instruction ("MMA.HGMMA").
    """
    counts = Counter(total=len(opcodes))
    for opcode in opcodes:
        name = next(name for name, pattern in classes.items() if re.match(pattern, opcode))
        counts[name] += 1
        if name in _WITH_WIDTH:
            counts[f"{name}.{width(opcode)}"] += 1
        elif name == "MMA":
            counts[f"{name}.{opcode.split('.')[0]}"] += 1
    return dict(counts)


def width(opcode: str) -> int:
    """Bits that one thread moves with a load or store, of NVIDIA or AMD."""
    if amd := re.search(r"_(?:dwordx?(\d)?|[bui](\d+)|[us]?(short|byte))", opcode):
        dwords, bits, name = amd.groups()
        return int(bits) if bits else {"short": 16, "byte": 8}[name] if name else 32 * int(dwords or 1)
    nvidia = re.search(r"\.[US]?(256|128|64|16|8)\b", opcode)
    return int(nvidia[1]) if nvidia else 32


def main_loop(code: Sequence[Instruction], classes: dict[str, str]) -> dict[str, int]:
    """Counts of the innermost loop with the most matrix products, else asynchronous copies; empty without a loop.

    Only a pipelined loop copies asynchronously, so that the loop over whole tiles goes before that over edges.
    """
    loops = {(to, place) for place, _, to in code if to is not None and to < place}
    inner = [one for one in loops if not any(o != one and one[0] <= o[0] and o[1] <= one[1] for o in loops)]
    counts = [count([op for place, op, _ in code if begin <= place <= end], classes) for begin, end in inner]

    def weight(loop: dict[str, int]) -> tuple[int, int, int, int]:
        copies = sum(loop.get(name, 0) for name in ("LDGSTS", "TMA"))
        return loop.get("MMA", 0), copies, loop.get("LDG", 0), loop["total"]

    return max(counts, key=weight, default={})


def _read_nvidia(cubin: bytes) -> tuple[list[Instruction], int, int]:
    """Code, registers a thread, bytes of local memory a thread."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        resources = _output(tools / "cuobjdump", "--dump-resource-usage", file)
        listing = _output(tools / "nvdisasm", "-c", "-novliw", file)
    usage = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", resources)}
    branches: list[tuple[int, str, str | None]] = []
    labels: dict[str, int] = {}
    pending: list[str] = []
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            pending.append(label[1])
        elif found := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)", line):
            place = int(found[1], 16)
            labels.update(dict.fromkeys(pending, place))
            pending.clear()
            to = re.search(r"(\.L_x_\d+)", found[3]) if found[2].startswith("BRA") else None
            branches.append((place, found[2], to[1] if to else None))
    return _resolve(branches, labels), usage["REG"], usage.get("STACK", 0) + usage.get("LOCAL", 0)


def _read_amd(text: str) -> tuple[list[Instruction], int, int]:
    """Code, vector registers a lane (accumulation registers included), bytes of scratch memory a lane."""
    names = r"vgpr_count|vgpr_spill_count|private_segment_fixed_size"
    usage = {name: int(number) for name, number in re.findall(rf"\.({names}):\s+(\d+)", text)}
    branches: list[tuple[int, str, str | None]] = []
    labels: dict[str, int] = {}
    for place, line in enumerate(text.split(".amdgpu_metadata")[0].splitlines()):
        if label := re.match(r"(\.L\w+):", line):
            labels[label[1]] = place
        elif found := re.match(r"\s+([a-z]\w+)(?:\s+(.*))?$", line.split(";")[0].rstrip()):
            goes = found[1].startswith(("s_cbranch", "s_branch"))
            branches.append((place, found[1], found[2] if goes else None))
    spill = max(usage["private_segment_fixed_size"], 4 * usage["vgpr_spill_count"])
    return _resolve(branches, labels), usage["vgpr_count"], spill


def _resolve(code: Sequence[tuple[int, str, str | None]], labels: dict[str, int]) -> list[Instruction]:
    return [(place, opcode, labels.get(label) if label else None) for place, opcode, label in code]


def _output(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple

"""Measures this engine's kernels and the whole of it on a GPU, against others that are installed.

    python -m bench.gpu
    python -m bench.gpu --quick
    python -m bench.gpu attention --only "decode.*d128 b16: (minirksc|flashinfer)"
    python -m bench.gpu engine --only "^(?!.*transformers)"

Attention: decode, shared prefixes and prompts of one layer against the kernels of flash-attn, FlashInfer, vLLM and
SGLang. Small kernels: against torch's ops, plain and compiled. Engine: solve, decode and prefill of a checkpoint by
`bench.peers`, in a tenth of the repetitions, against transformers and what else is installed in this environment.
--only is a pattern of "part: case: arm", as in the tables, and of the arms of engines.

Results are compared with the plain specification first; an arm that is wrong is not timed. Kernels are timed with
events, from a cold L2 cache, all arms of a case in turns. Bytes are those that must move at least (what is shared
counts once, for all arms), so that a share of the peak is also how far the arm is from the best that can be. Each
result is a JSONL line of its own; what is missing or failed is a line with its reason.

Exit status 1: something of ours failed or was wrong. 2: there is no GPU, or the options are wrong.
"""

import argparse
import importlib.util
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.harness import OURS, ROOT, Row, groups_of, make_parser, names, ratios, summarise, take_turns, values
from bench.report import Page, write_lines

if TYPE_CHECKING:
    from torch import device as Device

    from bench.gpu_attention import AttentionCase
    from bench.gpu_device import Clock, Peak
    from bench.gpu_rivals import FoundRival
    from bench.gpu_small import SmallCase

# These, and torch, are imported once a GPU is found.
PARTS = ("attention", "small", "engine")

NO_GPU = """\
bench.gpu: {reason}. It needs an NVIDIA or AMD GPU, a build of torch for it, and Triton (pip install -e '.[gpu,bench]').
Without a GPU: `python -m bench.static_kernels` says what the kernels take of one, `python -m bench.peers` measures the
engine on a CPU."""

HEADINGS = ("case", "arm", "us: median (p10 .. p90)", "x best other (p10 .. p90)", "bandwidth", "FLOPs", "error")


def main() -> int:
    """The command line; returns the exit status."""
    options = parse_options()
    if reason := no_gpu_reason():
        print(NO_GPU.format(reason=reason), file=sys.stderr)
        return 2
    os.environ.pop("TRITON_INTERPRET", None)  # before Triton is imported
    # Libraries that look for a package named `kernels` must not find the repository's folder.
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
    import torch

    file = options.output or ROOT / "bench" / "results" / f"gpu-{time.strftime('%Y%m%d-%H%M%S')}.jsonl"
    device = torch.device("cuda", torch.cuda.current_device())
    common = {"bench": "gpu", "environment": environment(options)}
    rows = list(write_lines(file, run(options, device), common))
    print(make_page(rows))
    print(f"{len(rows)} results: {file}")
    if "engine" in options.parts:
        rows += run_engines(options, file.parent)
    bad = [row for row in rows if "failed" in row and row["arm"].startswith(OURS)]
    for row in bad:
        where = f"{row['part']}: {row['case']}" if "part" in row else row["workload"]
        print(f"{where}: {row['arm']}: {row['failed']}", file=sys.stderr)
    return 1 if bad else 0


def no_gpu_reason() -> str | None:
    """Why nothing can be measured here; None where it can."""
    try:
        import torch
    except ImportError as error:
        return f"torch cannot be imported ({error})"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no GPU"
    return None if importlib.util.find_spec("triton") else "Triton is not installed"


def parse_options() -> argparse.Namespace:
    """Options, with unknown parts refused."""
    common = "model kv-cache-bytes repeats warmup only quick"
    parser = make_parser("bench.gpu", __doc__, common, repeats=50, warmup=5)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all if left out")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="JSONL (in bench/results)")
    options = parser.parse_args()
    if unknown := [part for part in options.parts if part not in PARTS]:
        parser.error(f"unknown {', '.join(unknown)}; there are {', '.join(PARTS)}")
    options.parts = options.parts or list(PARTS)
    if options.warmup < 0:
        parser.error(f"--warmup {options.warmup} must be at least 0")
    return options


def run(options: argparse.Namespace, device: "Device") -> Iterator[Row]:
    """All kernels that are wanted, part by part."""
    from bench import gpu_attention, gpu_device, gpu_rivals, gpu_small

    clock = gpu_device.cuda_clock(device)
    peak = gpu_device.measured_peak(device, clock)
    measure = Measure(device, clock, peak, options.repeats, options.warmup, options.only)
    if "attention" in options.parts:
        found, missing = gpu_rivals.discover(gpu_rivals.RIVALS)
        for name, reason in missing.items():
            yield {"part": "attention", "case": "all", "arm": name, "failed": f"not importable: {reason}"}
        for case in gpu_attention.all_cases(options.quick):
            yield from measure.attention(case, found)
    if "small" in options.parts:
        for small in gpu_small.all_cases(options.quick):
            yield from measure.small(small)


class Measure:
    """How a case becomes rows, one an arm: part, case, arm; and either `failed` or what was measured.

    Args:
        device: device of the tensors.
        clock: clock that times one call.
        peak: peak of the device.
        repeats, warmup: runs of each arm.
        only: regular expression of "part: case: arm".
    """

    def __init__(self, device: "Device", clock: "Clock", peak: "Peak", repeats: int, warmup: int, only: str) -> None:
        self.device, self.clock, self.peak = device, clock, peak
        self.repeats, self.warmup, self.only = repeats, warmup, only

    def attention(self, case: "AttentionCase", rivals: Sequence["FoundRival"]) -> Iterator[Row]:
        """One case of the attention, all arms; one that memory does not hold is skipped."""
        import torch

        from bench import gpu_attention as attention
        from bench.gpu_rivals import describe

        versions: dict[str, str | None] = {OURS: None, attention.OURS_INT8: None}
        versions |= {found.rival.name: found.version for found in rivals if case.kind in found.rival.kinds}
        wanted = [arm for arm in versions if self._is_wanted("attention", case.name, arm)]
        if not wanted:
            return
        try:
            inputs = attention.AttentionInputs(case, self.device)
        except torch.OutOfMemoryError as error:
            common = {"part": "attention", "case": case.name, "arm": "all", **attention.sizes(case)}
            yield {**common, "skipped": describe(error)}
            return
        makers: dict[str, Callable[[], Callable[[], Any]]] = {OURS: inputs.ours}
        makers[attention.OURS_INT8] = partial(inputs.ours, int8=True)
        makers |= {found.rival.name: partial(found.prepare, inputs) for found in rivals}

        def prepare(arm: str) -> tuple[Callable[[], Any], float]:
            call = makers[arm]()
            return call, inputs.error(call(), int8=arm == attention.OURS_INT8)

        for row in self._rows("attention", case.name, wanted, prepare, attention.TOLERANCE):
            num_bytes = case.min_bytes(int8=row["arm"] == attention.OURS_INT8)
            yield {
                **row,
                **attention.sizes(case),
                "version": versions[row["arm"]],
                **self._shares(row, num_bytes, case.flops),
            }

    def small(self, case: "SmallCase") -> Iterator[Row]:
        """One small op, all arms."""
        from bench import gpu_small

        makers = {arm: make for arm, make in case.arms().items() if self._is_wanted("small", case.name, arm)}

        def prepare(arm: str) -> tuple[Callable[[], Any], float]:
            return case.prepare(makers[arm](), self.device)

        for row in self._rows("small", case.name, list(makers), prepare, gpu_small.TOLERANCE):
            yield {**row, **self._shares(row, case.num_bytes, None)}

    def _rows(
        self,
        part: str,
        case: str,
        arms: Sequence[str],
        prepare: Callable[[str], tuple[Callable[[], Any], float]],
        tolerance: float,
    ) -> list[Row]:
        """Prepares, checks and times the arms; what fails is a row with its reason."""
        from bench.gpu_device import read_smi
        from bench.gpu_rivals import describe

        print(f"{part}: {case}", file=sys.stderr, flush=True)
        rows: dict[str, Row] = {arm: {"part": part, "case": case, "arm": arm} for arm in arms}
        calls = {}
        for arm in arms:
            try:
                call, error = prepare(arm)
            except Exception as reason:  # whatever a library raises: one arm must not hide the others
                rows[arm]["failed"] = describe(reason)
                continue
            rows[arm]["error"] = error
            if error <= tolerance:
                calls[arm] = call
            else:
                rows[arm]["failed"] = f"wrong result: relative error {error:.2g}, {tolerance:.2g} is tolerated"
        try:
            arms_us = {arm: lambda _, call=call: {"us": self.clock(call)} for arm, call in calls.items()}
            times = list(take_turns(arms_us, range(self.repeats), self.warmup, is_quiet=True))
        except Exception as reason:
            for arm in calls:
                rows[arm]["failed"] = f"while {', '.join(calls)} took turns: {describe(reason)}"
            return list(rows.values())
        clocks = read_smi(self.device) if self.device.type == "cuda" else {}
        add_times(rows, times)
        return [{**row, "clocks": clocks} for row in rows.values()]

    def _shares(self, row: Row, num_bytes: int, flops: int | None) -> Row:
        if "failed" in row:
            return {}
        seconds = row["us"] / 1e6
        shares = {"bytes": num_bytes, "bandwidth_share": num_bytes / seconds / self.peak.bandwidth}
        if flops is not None:
            shares |= {"flops": flops, "flop_share": flops / seconds / self.peak.flops}
        return {**shares, "peak": self.peak._asdict()}

    def _is_wanted(self, part: str, case: str, arm: str) -> bool:
        return re.search(self.only, f"{part}: {case}: {arm}") is not None


def add_times(rows: dict[str, Row], times: Sequence[Row]) -> None:
    """Writes microseconds into the rows of a case, and into ours how they compare with the best other arm.

    Args:
        rows: rows by arm.
        times: one row an arm and repetition.
    """
    arms = names(times)
    for arm in arms:
        us = values(times, arm, "us")
        summary = summarise(us)
        rows[arm] |= {"us": summary.median, "us_p10": summary.p10, "us_p90": summary.p90, "repeats": len(us)}
    others = [arm for arm in arms if not arm.startswith(OURS)]
    best = min(others, key=lambda arm: rows[arm]["us"], default=None)
    for arm in arms:
        if best is not None and arm.startswith(OURS):
            ratio = summarise(ratios(times, arm, best, "us"))
            rows[arm] |= {"best_rival": best, "ratio": ratio.median, "ratio_p10": ratio.p10, "ratio_p90": ratio.p90}


def run_engines(options: argparse.Namespace, folder: Path) -> list[Row]:
    """W1 to W3 by `bench.peers`, with the engines of this environment; its rows, which are in files of its own."""
    from bench import peers

    arguments = ["--device", "cuda", "--modes", "recorded,eager", "--output", str(folder), "--only", options.only]
    arguments += ["--model", options.model, "--kv-cache-bytes", options.kv_cache_bytes]
    arguments += ["--repeats", str(max(1, options.repeats // 10))]
    arguments += ["--prefill", "1024"] if options.quick else []
    for name in ("vllm", "sglang"):
        arguments += [f"--{name}", sys.executable] if importlib.util.find_spec(name) else []
    try:
        return peers.run(peers.parse(arguments))
    except SystemExit as reason:  # of no arm that --only leaves
        print(f"engine: {reason}", file=sys.stderr)
        return []


def make_page(rows: Sequence[Row]) -> Page:
    """A table a part, in the order of the rows; what failed or is missing stands in it with its reason."""
    page = Page("Kernels on a GPU")
    for (part,), own in groups_of(rows, "part").items():
        page.heading(part)
        page.text("Ratios above 1: ours is faster; shares of the device's peak.")
        page.table(HEADINGS, [cells(row) for row in own])
    return page


def cells(row: Row) -> list[str]:
    """One row, as it stands in the table."""
    reason = row.get("failed") or row.get("skipped")
    if reason:
        return [row["case"], row["arm"], str(reason)[:80]]
    ratio = f"{row['ratio']:.2f} ({row['ratio_p10']:.2f} .. {row['ratio_p90']:.2f})" if "ratio" in row else ""
    best = f" {row['best_rival']}" if "best_rival" in row else ""
    return [
        row["case"],
        row["arm"],
        f"{row['us']:.4g} ({row['us_p10']:.4g} .. {row['us_p90']:.4g})",
        ratio + best,
        f"{row['bandwidth_share']:.0%}" if "bandwidth_share" in row else "",
        f"{row['flop_share']:.0%}" if "flop_share" in row else "",
        f"{row['error']:.1e}" if "error" in row else "",
    ]


def environment(options: argparse.Namespace) -> Row:
    """Device, versions of everything, and options: part of every line."""
    import torch

    from bench import gpu_device, gpu_rivals, harness

    facts = harness.environment(torch.get_num_threads())
    packages = ("triton", *(rival.package for rival in gpu_rivals.RIVALS))
    facts["versions"] |= {name: harness.version_of(name) for name in packages}
    return {
        **facts,
        "options": vars(options),
        **gpu_device.device_facts(torch.device("cuda", torch.cuda.current_device())),
    }


if __name__ == "__main__":
    sys.exit(main())

"""Compiles every kernel ahead of time for real GPUs, without one, and prints what it takes of them.

    python -m bench.static_kernels
    python -m bench.static_kernels --only "decode d128" --targets cuda:90

For each launch: registers, spilled bytes, shared memory, blocks a multiprocessor, buffers of the pipeline, share of
the issue slots that the main loop needs while memory runs at its peak, and the instructions of that loop (of the whole
kernel where there is no loop). The decode loops are set beside those of vLLM and SGLang. It says nothing of time.

Exit status 1: a launch does not compile, spills, or needs more shared memory than the target has.
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # before Triton is imported: an interpreted kernel cannot be compiled

import triton
from rich.console import Console
from rich.progress import track

from bench import harness
from bench.harness import Row
from bench.kernel_cases import Case, Launch, all_cases, gpu_target
from bench.report import Page, write_lines
from bench.static_report import TARGETS, read
from minirksc.errors import MinirkscError

RIVALS = Path(__file__).with_name("rival_kernels.json")
COUNTED = ("MMA", "LDG", "LDG.128", "LDGSTS.128", "LDSM", "LDS", "STS", "MUFU", "SHFL", "BAR", "FP32", "CVT", "INT")
HEADINGS = ("target", "w/st", "regs", "spill", "shared", "blocks", "occ", "bufs", "issue", *COUNTED, "total")


def main() -> int:
    """The command line; returns the exit status."""
    options = parse_options()
    cases = [case for case in all_cases() if options.only in case.name and (case.subset or not options.subset)]
    if not cases:
        sys.exit(f"--only {options.only!r} leaves no case; there are:\n" + "\n".join(case.name for case in all_cases()))
    file = options.output or harness.ROOT / "bench" / "results" / f"static-{time.strftime('%Y%m%d-%H%M%S')}.jsonl"
    facts = harness.environment(options.jobs)
    facts["versions"]["triton"] = harness.version_of("triton")
    common = {"bench": "static_kernels", "environment": facts}
    rows = list(write_lines(file, compile_all(cases, options.targets, options.jobs), common))
    print(make_page(rows))
    bad = [row for row in rows if row["problems"]]
    for row in bad:
        print(f"{row['case']}: {row['kernel']}: {row['target']}: {'; '.join(row['problems'])}", file=sys.stderr)
    print(f"{len(rows)} launches, {len(bad)} with problems; written to {file}")
    return 1 if bad else 0


def parse_options() -> argparse.Namespace:
    """Options, with unknown targets refused."""
    parser = harness.make_parser("bench.static_kernels", __doc__, "")
    known = tuple(TARGETS)
    targets_help = f"with commas ({','.join(known)})"
    parser.add_argument("--targets", type=harness.some_of(known), default=list(known), help=targets_help)
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="cases whose name has it")
    parser.add_argument("--subset", action="store_true", help="the few cases that the tests compile")
    parser.add_argument("--jobs", type=harness.positive, default=os.cpu_count() or 1, help="processes (%(default)s)")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="JSONL (in bench/results)")
    return parser.parse_args()


Job = tuple[str, int, str]
"""Case, which of its launches, target."""


def plan(cases: Sequence[Case], targets: Sequence[str]) -> tuple[list[Job], list[Row]]:
    """What is to be compiled, each code once however many cases launch it; and rows of what a launcher refused."""
    jobs, refused, seen = [], [], set()
    for case in cases:
        for target in targets:
            try:
                launches = case.launches(TARGETS[target].architecture)
            except MinirkscError as error:
                refused.append(_row(case.name, "-", target, [f"refused: {error}"]))
                continue
            for index, launch in enumerate(launches):
                source, options = launch.source(target)
                code = (target, source.hash(), options.hash())
                if code not in seen:
                    seen.add(code)
                    jobs.append((case.name, index, target))
    return jobs, refused


def compile_all(cases: Sequence[Case], targets: Sequence[str], num_jobs: int) -> Iterator[Row]:
    """Rows of all launches, what was refused first.

    Yields:
        One launch on one target: case, kernel, target, problems, and `Usage` as plain data unless it does not compile.
    """
    jobs, refused = plan(cases, targets)
    yield from refused
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache  # not the user's: what is read is compiled now
        with ProcessPoolExecutor(num_jobs, multiprocessing.get_context("spawn")) as pool:
            results = pool.map(compile_job, jobs)
            yield from track(results, "compiling", len(jobs), console=Console(stderr=True))


def compile_job(job: Job) -> Row:
    """Compiles one launch, in a process of its own kind: the launch is written down anew, since it cannot be sent."""
    name, index, target = job
    case = next(case for case in all_cases() if case.name == name)
    launch = case.launches(TARGETS[target].architecture)[index]
    try:
        return _compiled(case, launch, target)
    except Exception as error:  # whatever the compiler raises: one launch must not hide the others
        last = (str(error).strip().splitlines() or [""])[-1]
        return _row(name, launch.kernel.__name__, target, [f"does not compile: {type(error).__name__}: {last}"])


def _compiled(case: Case, launch: Launch, target: str) -> Row:
    source, options = launch.source(target)
    compiled = triton.compile(source, target=gpu_target(target), options=vars(options))
    # A kernel with no main loop of its own, such as the merge, moves other bytes.
    has_bytes = case.loop_bytes is not None and "TILE" in launch.arguments()
    usage = read(compiled, TARGETS[target], case.loop_bytes(launch.arguments()) if has_bytes else None)
    row = _row(case.name, launch.kernel.__name__, target, usage.problems(TARGETS[target]))
    return {**row, "grid": list(launch.grid), "rival": case.rival if has_bytes else None, **asdict(usage)}


def _row(case: str, kernel: str, target: str, problems: list[str]) -> Row:
    return {"case": case, "kernel": kernel, "target": target, "problems": problems}


def make_page(rows: Sequence[Row]) -> Page:
    """All launches, in the order of the cases, and decode loops of this engine and of others for the same sizes."""
    page = Page("Kernels as they are compiled")
    page.text("Launches; instructions of the main loop, or (w) of the whole kernel, of one warp.")
    compiled = [
        [row["case"], row["kernel"].strip("_").removesuffix("_kernel"), *_cells(row)]
        if "registers" in row
        else [row["case"], row["kernel"], row["target"], *row["problems"]]
        for row in rows
    ]
    page.table(["case", "kernel", *HEADINGS], compiled)
    ours = [row for row in rows if row.get("rival")]
    if not ours:
        return page
    rivals = json.loads(RIVALS.read_text(encoding="utf-8"))
    table = []
    for row in ours:
        table.append([row["rival"], "minirksc", *_cells(row)])
        for other in rivals["kernels"]:
            if (other["rival"], other["target"]) == (row["rival"], row["target"]):
                table.append([other["rival"], other["engine"], *_cells(other)])
    page.heading("decode loops, bf16, blocks of 16")
    page.table(["head_dim", "engine", *HEADINGS], table)
    page.text(rivals["source"])
    return page


def _cells(row: Row) -> Iterator[str]:
    counts = row["loop"] or row["whole"]
    yield row["target"]
    yield f"{row['warps']}/{row['stages']}"
    for name in ("registers", "spill_bytes", "shared_bytes", "blocks"):
        yield str(row[name])
    yield f"{row['occupancy']:.0%}"
    yield str(row["buffers"] or "-")
    yield "-" if row["issue"] is None else f"{row['issue']:.0%}"
    for name in COUNTED:
        yield str(counts.get(name, "-"))
    yield f"{counts['total']}{'' if row['loop'] else ' w'}"


if __name__ == "__main__":
    sys.exit(main())

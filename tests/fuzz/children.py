"""Work that may crash, hang or eat memory, item by item, in children forked from one parent.

An item is a number and the seed of all that is random in it, so any one can be repeated by itself: `--seed ITEM
--count 1`. The parent imports everything once and never computes anything; a child runs some items and says over a
pipe which one it is at, so that its death is laid to the right one.
"""

import argparse
import gc
import importlib.util
import json
import os
import resource
import select
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: a pool of threads would not survive the fork
os.environ["TQDM_DISABLE"] = "1"
ROOT = Path(__file__).resolve().parents[2]
import minirksc  # noqa: E402 - before a clone on PYTHONPATH goes: transformers must not find its folder `kernels`

PROJECT = str(Path(minirksc.__file__).parents[1])
sys.path[:] = [entry for entry in sys.path if not (Path(entry or ".") / "pyproject.toml").exists()]

OK, REFUSED, FAULT, ABORT = "ok", "refused", "FAULT", "ABORT"
MAX_ABORTS = 5
"""Library aborts that no check can foresee; each is listed."""
RUST_ABORTS = ("memory allocation of", "panicked at")

Work = Callable[[int, Callable[[str], None]], str]
"""Called with an item and what to call with a description of it; gives a word for what came of it, or raises."""


class Fault(Exception):
    """Something is wrong that raised nothing; the text says what, alike for alike faults."""


@dataclass
class Limits:
    """Of one item. CPU time is the process's; `memory` is on top of what the parent has."""

    cpu_s: int
    wall_s: float
    memory: int
    batch: int


@dataclass
class Outcome:
    """What came of an item: kind, a short text that is the same for the same fault, and all that is known."""

    item: int
    kind: str
    what: str
    notes: list[str] = field(default_factory=list)
    detail: str = ""


def load(relative: str) -> Any:
    """A helper module of the tests by its path in them."""
    path = ROOT / "tests" / relative
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def in_child(function: Callable[[], None]) -> None:
    """Runs it where its threads and imports are no burden to later children."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            function()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    if os.waitpid(pid, 0)[1]:
        raise RuntimeError(f"{function} failed; see above")


def run(items: Iterable[int], work: Work, limits: Limits) -> Iterator[Outcome]:
    """Outcomes, in order; a child that died is followed by another one from the next item on."""
    gc.collect()
    gc.freeze()  # what was imported is neither copied nor looked at by the children's collections
    left = list(items)
    try:
        while left:
            for outcome in _child(left[: limits.batch], work, limits):
                left.remove(outcome.item)
                yield outcome
    finally:
        gc.unfreeze()


def _child(items: list[int], work: Work, limits: Limits) -> Iterator[Outcome]:
    receiver, sender = os.pipe()
    with tempfile.TemporaryFile() as output:
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            os.close(receiver)
            os.setsid()
            for stream in (1, 2):
                os.dup2(output.fileno(), stream)
            _work_through(items, work, limits, sender)
        os.close(sender)
        status, current, notes = None, None, []
        try:
            for message in _messages(receiver, limits.wall_s):
                if message is None:
                    break
                if "start" in message:
                    current, notes = message["start"], []
                elif "note" in message:
                    notes.append(message["note"])
                else:
                    yield Outcome(current, message["kind"], message["what"], notes, message["detail"])
                    current = None
        finally:
            os.close(receiver)
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            status = os.waitpid(pid, 0)[1]
        if current is not None:
            output.seek(0)
            text = output.read()[-4000:].decode(errors="replace")
            yield Outcome(current, *_death(status, text, limits), notes, text)


def _death(status: int, text: str, limits: Limits) -> tuple[str, str]:
    """(kind, what) of a child that ended in the midst of an item."""
    if not os.WIFSIGNALED(status):
        return FAULT, f"exit {os.waitstatus_to_exitcode(status)}"
    number = os.WTERMSIG(status)
    if number == signal.SIGABRT and any(word in text for word in RUST_ABORTS):
        return ABORT, next(line for line in text.splitlines() if any(word in line for word in RUST_ABORTS))
    names = {signal.SIGKILL: f"more than {limits.wall_s} s", signal.SIGXCPU: f"more than {limits.cpu_s} s of CPU"}
    return FAULT, names.get(signal.Signals(number), signal.Signals(number).name)


def _messages(receiver: int, wall_s: float) -> Iterator[dict[str, Any] | None]:
    """What a child says; None when it has been silent for too long, the end when it is gone."""
    buffer = b""
    while True:
        if not select.select([receiver], [], [], wall_s)[0]:
            yield None
            return
        data = os.read(receiver, 65536)
        if not data:
            return
        *lines, buffer = (buffer + data).split(b"\n")
        yield from map(json.loads, lines)


def _work_through(items: list[int], work: Work, limits: Limits, sender: int) -> None:
    """The child's whole life."""

    def say(**message: Any) -> None:
        data = json.dumps(message).encode() + b"\n"
        while data:
            data = data[os.write(sender, data) :]

    try:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        most = _virtual_bytes() + limits.memory
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        for item in items:
            hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
            resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + limits.cpu_s + 1, hard))
            say(start=item)
            kind, what, detail = _one(item, work, lambda text: say(note=str(text)[:2000]))
            say(kind=kind, what=what, detail=detail)
            gc.collect()
    finally:
        os._exit(0)


def _one(item: int, work: Work, note: Callable[[str], None]) -> tuple[str, str, str]:
    from minirksc.errors import MinirkscError

    try:
        return OK, work(item, note), ""
    except MinirkscError as error:
        if len(str(error)) > 5000:
            return FAULT, f"{type(error).__name__} with a message of thousands of characters", str(error)[:3000]
        return REFUSED, type(error).__name__, str(error)
    except BaseException as error:  # a panic in Rust is none of the others
        return FAULT, describe(error), "".join(traceback.format_exception(error))[-6000:]


def describe(error: BaseException) -> str:
    """Type and place, the same for the same fault."""
    if isinstance(error, Fault):
        return str(error)
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename.startswith(PROJECT) and "/tests/" not in frame.filename]
    where = [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in (own or frames)[-1:]]
    return " in ".join([type(error).__name__, *where])


def _virtual_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def arguments(description: str, count: int) -> argparse.ArgumentParser:
    """The command line that all have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--seed", type=int, default=0, help="the first item (default: 0)")
    parser.add_argument("--count", type=int, default=count, help=f"how many (default: {count})")
    return parser


def report(outcomes: Iterable[Outcome], script: str, options: argparse.Namespace, repeat: str = "--count 1") -> int:
    """Prints what came of them, faults at once with the command that repeats them; returns the exit code."""
    kinds: Counter[str] = Counter()
    faults: dict[str, list[Outcome]] = {}
    begin = time.monotonic()
    for outcome in outcomes:
        kinds[f"{outcome.kind} {outcome.what if outcome.kind in (OK, REFUSED) else ''}".strip()] += 1
        if options.count == 1:
            print(*outcome.notes, outcome.detail, sep="\n")
        if outcome.kind in (FAULT, ABORT):
            alike = faults.setdefault(f"{outcome.kind}: {outcome.what}", [])
            alike.append(outcome)
            if len(alike) == 1:
                print(f"{outcome.kind}: {outcome.what}\n  python {script} --seed {outcome.item} {repeat}")
                print(*(f"  {note[:300]}" for note in outcome.notes[-4:]), sep="\n", flush=True)
    print(f"\n{sum(kinds.values())} in {time.monotonic() - begin:.0f} s")
    print(*(f"{number:8} {kind}" for kind, number in kinds.most_common()), sep="\n")
    for name, alike in sorted(faults.items(), key=lambda pair: -len(pair[1])):
        print(f"{len(alike):8} {name}  (items {', '.join(str(o.item) for o in alike[:5])})")
    num_aborts = sum(number for kind, number in kinds.items() if kind == ABORT)
    return 1 if any(kind.startswith(FAULT) for kind in kinds) or num_aborts > MAX_ABORTS else 0

"""Many requests, many of them given up at random moments: the process holds as much as after the first ones."""

import gc
import random
import resource
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from children import Fault
from interrupting import check_engine

from minirksc import LLM, SamplingParams

SIZES = {"kv_cache_bytes": "512KiB", "block_size": 8, "max_model_len": 96}
MAX_ROWS = 32
"""Of a batch: the libraries below keep something for each number of rows seen."""
WARM = 5000
"""Requests until everything that is kept on purpose is there: the log of evictions, tapes, pools of the allocator."""
MAX_GROWTH = 5 << 20
"""Bytes that the resident set may grow by after that."""
MAX_MORE = 200
"""Objects of one type, and of all, that may be there more than after `WARM` requests."""


def run(folder: Path, count: int, item: int, note: Callable[[str], None]) -> str:
    """Runs so many requests; one of its `Fault`s says what has grown."""
    rng = random.Random(item)
    warm = min(WARM, count // 2)
    before: tuple[int, Counter[str]] | None = None
    with LLM(folder, dtype="float32", threads=1, max_batch_tokens=MAX_ROWS, **SIZES) as llm:
        engine, live, num_added = llm.engine, [], 0
        while num_added < count:
            if rng.random() < 0.15:
                num_added += _stream(llm, rng)
            while len(live) < rng.randrange(1, 9):
                params = SamplingParams(
                    temperature=rng.choice((0, 1.0)), max_tokens=rng.randrange(1, 9), seed=rng.randrange(99)
                ).resolved(llm.sampling_defaults)
                live.append(engine.add_request(engine.new_sequence(_prompt(rng)), params))
                num_added += 1
            for request in rng.sample(live, min(len(live), rng.choice((0, 0, 0, 1, 2)))):
                engine.abort(request)
            engine.step()
            live = [request for request in live if not request.finished]
            if before is None and num_added >= warm:
                before = _held()
        for request in live:
            engine.abort(request)
        live.clear()
        del request
        check_engine(llm, is_owned=False, most_used=0)
        assert before is not None
        after = _held()
    grown = after[0] - before[0]
    more = Counter({name: number - before[1][name] for name, number in after[1].items()})
    kib = before[0] >> 10, after[0] >> 10
    note(f"{num_added} requests; resident KiB {kib}; more objects {more.most_common(5)}")
    if grown > MAX_GROWTH:
        raise Fault(f"resident memory grew by more than {MAX_GROWTH >> 20} MiB")
    worst, number = more.most_common(1)[0]
    if number > MAX_MORE or sum(more.values()) > MAX_MORE:
        raise Fault(f"there are ever more objects, such as {worst}")
    return f"flat: {grown / 2**20:+.1f} MiB, {sum(more.values()):+} objects"


def _prompt(rng: random.Random) -> list[int]:
    return [7] * rng.choice((0, 8, 17, 30)) + [rng.randrange(5, 261) for _ in range(rng.randrange(1, 20))]


def _stream(llm: LLM, rng: random.Random) -> int:
    """A stream, mostly closed or dropped before its end."""
    params = SamplingParams(temperature=1.0, n=rng.choice((1, 3)), max_tokens=9, seed=rng.randrange(99))
    stream = llm.stream(_prompt(rng), params)
    for _ in range(rng.randrange(12)):
        if next(stream, None) is None:
            break
    if rng.random() < 0.5:
        stream.close()
    return params.n


def _held() -> tuple[int, Counter[str]]:
    """(resident bytes, objects by type)."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize(), Counter(type(thing).__qualname__ for thing in gc.get_objects())

"""Random calls on live engines, half of them interrupted: afterwards the books are right and so is every token.

`python tests/fuzz/state.py --seed 0 --count 30000`. An item is a session of about 100 calls on one engine, repeated by
`--seed ITEM --count 100` (its real signals come at other places then). `--requests 20000` is the other mode: requests
with random aborts, and memory that stays flat.
"""

import json
import random
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import children
import flat_memory
from children import Fault, Limits
from draws import VOCAB
from session import Session

from minirksc.errors import MinirkscError

CALLS = 100
LIMITS = Limits(cpu_s=120, wall_s=600, memory=2 << 30, batch=5)


def write_models(parent: Path) -> None:
    """A plain model, and one most of whose layers have a window."""
    tiny = children.load("models/tiny.py")
    tiny.write_tiny_llama(parent / "plain", vocab=VOCAB, chat=True)
    config = tiny.write_tiny_llama(parent / "windows", layers=3, vocab=VOCAB, chat=True)
    windows = ["sliding_attention", "full_attention", "sliding_attention"]
    config |= {"model_type": "ministral", "sliding_window": 16, "layer_types": windows}
    (parent / "windows" / "config.json").write_text(json.dumps(config))


def play(parent: Path, calls: int, item: int, note: Callable[[str], None]) -> str:
    """One session."""
    warnings.simplefilter("ignore")
    rng = random.Random(item)
    session = Session(parent / rng.choice(("plain", "plain", "windows")), rng, note)
    try:
        session.run(calls)
    except MinirkscError as error:  # of a call that must not fail
        raise Fault(children.describe(error)) from error
    finally:
        note("counts " + json.dumps({**session.counts, "near ties": session.oracle.num_near_ties}))
    return ""


def counted(outcomes: Iterable[children.Outcome], totals: Counter[str]) -> Iterator[children.Outcome]:
    """The same outcomes, their counts added up."""
    for outcome in outcomes:
        if outcome.notes and outcome.notes[-1].startswith("counts "):
            totals.update(json.loads(outcome.notes.pop().removeprefix("counts ")))
        yield outcome


def main() -> int:
    parser = children.arguments("Random calls, half of them interrupted.", 30_000)
    parser.add_argument("--requests", type=int, help="instead: so many requests with random aborts, memory flat")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fuzz-state-") as folder:
        parent = Path(folder)
        children.in_child(lambda: write_models(parent))
        if options.requests is not None:
            work = lambda item, note: flat_memory.run(parent / "plain", options.requests, item, note)  # noqa: E731
            outcomes = children.run([options.seed], work, replace(LIMITS, cpu_s=3600, wall_s=3600))
            return children.report(outcomes, f"tests/fuzz/state.py --requests {options.requests}", options)
        totals: Counter[str] = Counter()
        sessions = range(options.seed, options.seed + -(-options.count // CALLS))
        work = lambda item, note: play(parent, min(CALLS, options.count), item, note)  # noqa: E731
        outcomes = counted(children.run(sessions, work, LIMITS), totals)
        code = children.report(outcomes, "tests/fuzz/state.py", options, repeat=f"--count {CALLS}")
        print(*(f"{number:8} {name}" for name, number in totals.most_common()), sep="\n")
        return code


if __name__ == "__main__":
    sys.exit(main())

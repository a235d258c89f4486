"""What happens in a solve, noted while it runs, as plain data.

docs/trace.md says what each key means; `minirksc.rksc.results` puts the trace together.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from minirksc.rksc.node import Node, finite

if TYPE_CHECKING:
    from minirksc.engine.session import Session

_SECONDS = {"prefill": "prefill_s", "extend": "decode_s", "verify": "verify_s"}


class Record:
    """The record of one solve, on its own clock.

    Args:
        session: session whose counters it reads.
        on_event: called with each event as it happens.

    Attributes:
        events: what happened, in order; plain data, at_s and seconds since the solve began.
        gates: what each gate decided, in order; plain data.
        stats: seconds by phase, and after `finish` what was counted meanwhile.
    """

    def __init__(self, session: "Session", on_event: Callable[[dict[str, Any]], None] | None = None) -> None:
        self.events: list[dict[str, Any]] = []
        self.gates: list[dict[str, Any]] = []
        self.stats: dict[str, float] = dict.fromkeys(_SECONDS.values(), 0.0)
        self._session = session
        self._on_event = on_event
        self._start = time.perf_counter()
        self._counters = self._count()
        self._blocks_used_peak = 0

    @contextmanager
    def phase(self, name: str, nodes: Sequence[Node]) -> Iterator[dict[str, Any]]:
        """Times what is done inside; the body may add plain data to the event that it yields."""
        begin = time.perf_counter()
        event: dict[str, Any] = {"event": name, "at_s": begin - self._start}
        yield event
        event["seconds"] = time.perf_counter() - begin
        event["nodes"] = [node.node_id for node in nodes]
        if name in _SECONDS:
            self.stats[_SECONDS[name]] += event["seconds"]
        used = int(self._session.stats().get("num_blocks_used", 0))
        self._blocks_used_peak = max(self._blocks_used_peak, used)
        self.events.append(event)
        if self._on_event is not None:
            self._on_event(event)

    def note(
        self,
        gate: str,
        decision: str,
        reason: str,
        *,
        node: Node | None = None,
        value: float | None = None,
        **values: Any,
    ) -> None:
        """Notes what a gate decided: its value (None where it is NaN), threshold and layer, where it has them."""
        entry = {"gate": gate, "node": None if node is None else node.node_id, "layer": None, "value": finite(value)}
        entry |= {"threshold": None, "calibrated": None, **values, "decision": decision, "reason": reason}
        self.gates.append({**entry, "at_s": time.perf_counter() - self._start})

    def finish(self) -> None:
        """Completes `stats`."""
        for name, value in self._count().items():
            self.stats[name] = value - self._counters.get(name, 0)
        self.stats["blocks_used_peak"] = self._blocks_used_peak
        self.stats["total_s"] = time.perf_counter() - self._start

    def blocks(self) -> dict[str, Any]:
        """What the cache did meanwhile, as plain data."""
        num_evicted = int(self.stats["num_evicted_blocks"])
        evictions = self._session.evictions()[-num_evicted:] if num_evicted else []
        return {
            "size": int(self._session.stats()["block_size"]),
            "used_peak": self._blocks_used_peak,
            "evicted": num_evicted,
            "evictions": [{**asdict(eviction), "priority": list(eviction.priority)} for eviction in evictions],
        }

    def _count(self) -> dict[str, int]:
        """The engine's counters, without what is a state rather than a count."""
        return {
            name: int(value)
            for name, value in self._session.stats().items()
            if name.startswith("num_") and not name.startswith("num_blocks_")
        }

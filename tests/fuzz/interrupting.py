"""Calls that an exception or a signal cuts off at any line, and what must be true of a process afterwards."""

import collections
import contextlib
import gc
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.overrides
import torch.utils._contextlib
import torch.utils._device
from children import Fault, load

import minirksc

check_integrity = load("unit/integrity.py").check_integrity
# Where lines are counted and interrupted: the project, and what it runs in whose state outlives a call.
_PACKAGE = Path(minirksc.__file__).parent
FOLDERS = tuple(
    f"{folder}{os.sep}" for folder in (_PACKAGE, *(_PACKAGE.parent / name for name in ("kernels", "models")))
)
FILES = frozenset([
    contextlib.__file__, collections.__file__, torch.overrides.__file__, torch.autograd.grad_mode.__file__,
    torch.utils._contextlib.__file__, torch.utils._device.__file__,
])  # fmt: skip
MAX_FIRST = 4
"""Power of ten of the line events that a kind of call may have that was never seen."""
INJECTED = "injected"
MIN_DELAY_S, MAX_DELAY_S = 5e-5, 0.03


class Interrupter:
    """Makes calls and cuts some of them off.

    What is known of each kind of call, how many lines it runs and which, grows with every traced one.

    Args:
        rng: chooses how and where.
    """

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._num_events: dict[str, list[int]] = {}
        self._seconds: dict[str, float] = {}
        self._lines: dict[str, dict[tuple[str, int], None]] = {}
        self._is_armed = self._has_fired = False
        self.how = "none"
        for number in (signal.SIGINT, signal.SIGALRM):
            signal.signal(number, self._on_signal)

    def call(self, kind: str, function: Callable[[], Any], how: str) -> tuple[bool, Any, BaseException | None]:
        """(whether the interruption came, the result, the exception) of one call.

        Args:
            kind: of call.
            function: the call.
            how: "none", "line" (an exception), "signal" (a real one, at a line) or "timer" (a real one, any time).
        """
        self.how = how
        result, error = None, None
        begin = time.perf_counter()
        try:
            try:
                if how == "timer":
                    self._is_armed = True
                    delay = self._rng.uniform(MIN_DELAY_S, min(MAX_DELAY_S, self._seconds.get(kind, MAX_DELAY_S)))
                    self.how = f"timer {delay * 1000:.2f} ms"
                    signal.setitimer(signal.ITIMER_REAL, delay)
                elif how != "none":
                    self._trace(kind, how)
                result = function()
            finally:
                sys.settrace(None)
                self._is_armed = False
                signal.setitimer(signal.ITIMER_REAL, 0)
        except BaseException as caught:  # whatever comes out is looked at by the caller
            error = caught
        if str(error) == INJECTED:
            error = type(error)(INJECTED)  # a caller who has caught it keeps neither its frames nor what they hold
        fired, self._has_fired = self._has_fired, False
        if not fired and how in ("none", "timer"):
            self._seconds[kind] = MIN_DELAY_S + time.perf_counter() - begin
        return fired, result, error

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._is_armed:
            self._is_armed = False
            self._has_fired = True
            raise KeyboardInterrupt(INJECTED)

    def _trace(self, kind: str, how: str) -> None:
        """From now on lines are counted; at one of them it happens."""
        rng = self._rng
        known = self._lines.setdefault(kind, {})
        counts = self._num_events.setdefault(kind, [])
        most = rng.choice(counts) if counts else int(10 ** rng.uniform(0, MAX_FIRST))
        counts[:] = [*counts[-4:], 0]
        wanted: tuple[str, int] | None = None
        countdown = 1 + rng.randrange(max(1, most))
        if known and rng.random() < 0.5:  # a rare line is as likely as a frequent one
            wanted = rng.choice(list(known))
            countdown = rng.choice((1, 1, 1, 2, 3, 10))
        kind_of_error = rng.choice((KeyboardInterrupt, MemoryError))
        state = [countdown]

        def on_line(frame: FrameType, event: str, argument: Any) -> Any:
            if event != "line":
                return on_line
            line = (frame.f_code.co_filename, frame.f_lineno)
            known[line] = None
            counts[-1] += 1
            if wanted is None or line == wanted:
                state[0] -= 1
                if state[0] == 0:
                    sys.settrace(None)
                    counts[-1] = max(counts[-1], most)  # it would have gone on
                    self.how = f"{how} at {Path(line[0]).name}:{line[1]}"
                    if how == "signal":
                        self._is_armed = True
                        signal.raise_signal(signal.SIGINT)
                    else:
                        self._has_fired = True
                        raise kind_of_error(INJECTED)
            return on_line

        def on_call(frame: FrameType, event: str, argument: Any) -> Any:
            name = frame.f_code.co_filename
            return on_line if name.startswith(FOLDERS) or name in FILES else None

        sys.settrace(on_call)


def check_process(num_threads: int) -> None:
    """No mode of torch is left on, and the threads are as before.

    Raises:
        Fault: names what is.
    """
    if torch.is_inference_mode_enabled():
        raise Fault("inference mode is left on")
    if not torch.is_grad_enabled():
        raise Fault("gradients are left off")
    if torch._C._len_torch_function_stack():
        raise Fault("a function mode is left on")
    if torch._C._len_torch_dispatch_stack():
        raise Fault("a dispatch mode is left on")
    if torch.get_num_threads() != num_threads:
        raise Fault(f"{torch.get_num_threads()} threads in place of {num_threads}")


def check_engine(llm: Any, is_owned: bool, most_used: int) -> None:
    """The books are right, and nothing is in them that nobody holds.

    Args:
        llm: to look at.
        is_owned: somebody holds an unfinished request or stream.
        most_used: blocks that those who hold something can have between them.

    Raises:
        Fault: names what is wrong.
    """
    try:
        check_integrity(llm.engine.blocks)
    except AssertionError as error:
        text = "".join(letter for letter in str(error) if not letter.isdigit())
        raise Fault(f"integrity: {text}") from error
    stats = llm.stats()
    for pool in ("num_blocks", "num_window_blocks"):
        parts = [stats[f"{pool}_{part}"] for part in ("used", "cached", "free")]
        if sum(parts) != stats[f"{pool}_total"]:
            raise Fault(f"{pool}: {parts} are not {stats[f'{pool}_total']}")
    if not is_owned and llm.engine.has_work:
        raise Fault("a request is left that nobody owns")
    if stats["num_blocks_used"] > most_used:
        gc.collect()  # what only a cycle of references keeps is gone for whoever looks closely
        if llm.stats()["num_blocks_used"] > most_used:
            raise Fault("blocks are used by nobody")
    stats = llm.stats()
    if stats["num_window_blocks_used"] > stats["num_blocks_used"] + stats["num_blocks_pinned"]:
        raise Fault("window blocks are used by nobody")

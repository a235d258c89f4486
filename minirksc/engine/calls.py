"""Which calls are in an engine right now, and which broke off.

Python may leave a function at any line: for a signal, for want of memory, for an exception of a callback; and once more
in the `finally` that cleans up after it. So nothing here relies on cleaning up. A call that enters the engine sets a
mark, which is its own frame. A mark whose frame is on no thread's stack any more is of a call that broke off, and the
next one that enters puts things in order first; a mark of a frame that still runs says that the engine is busy.
"""

import os
import sys
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from threading import get_ident
from types import FrameType

import torch

from minirksc.engine import forks
from minirksc.engine.request import Request, Sequence
from minirksc.engine.torch_modes import TorchModes
from minirksc.errors import EngineBusyError, EngineForkedError


class Mark:
    """A function while it runs.

    Args:
        frame: frame of the function, which the calling thread is executing.
        modes: torch's modes as they were before it, where it changes them.
    """

    __slots__ = ("_frame", "_modes", "_thread_id")

    def __init__(self, frame: FrameType, modes: TorchModes | None = None) -> None:
        self._frame: FrameType | None = frame
        self._thread_id = get_ident()
        self._modes = modes

    @property
    def is_own(self) -> bool:
        """Whether it is one of the calling thread."""
        return self._thread_id == get_ident()

    @property
    def is_running(self) -> bool:
        """Whether some thread is still executing it."""
        frame = sys._getframe(1) if self.is_own else sys._current_frames().get(self._thread_id)
        while frame is not None:
            if frame is self._frame:
                return True
            frame = frame.f_back
        return False

    def forget(self) -> None:
        """Lets go of the function's frame, and of all that its variables hold."""
        self._frame = None

    def restore_modes(self) -> None:
        """Switches off what the function has switched on in torch and not off; modes are a thread's own."""
        if self.is_own and self._modes is not None:
            self._modes.restore()


class Marked:
    """A `with` block on it is to be run to its end: where it breaks off, its mark stays.

    Args:
        keeps_modes: whether the block changes torch's modes, which are noted before.
    """

    def __init__(self, keeps_modes: bool = False) -> None:
        self.mark: Mark | None = None
        self._keeps_modes = keeps_modes

    def __enter__(self) -> None:
        self.mark = Mark(sys._getframe(1), TorchModes() if self._keeps_modes else None)

    def __exit__(self, kind: object, *rest: object) -> None:
        if kind is None:
            self.mark = None

    @property
    def is_running(self) -> bool:
        """Whether some thread is in the block."""
        return self.mark is not None and self.mark.is_running


class Call:
    """One call from outside, and what it has in the engine; all of it goes when the call ends.

    Args:
        end: function that is called with this at the end of a `with` block on it.
        mark: mark of the function that makes the call.
        is_alive: whether a generator, which may rest between two steps, can still go on; None: it is none.

    Attributes:
        requests: requests that were added for it; aborted with it.
        sequences: sequences that were made for it; released with it, unless they are taken out, as a branch's own.
    """

    def __init__(self, end: Callable[["Call"], None], mark: Mark, is_alive: Callable[[], bool] | None = None) -> None:
        self.requests: list[Request] = []
        self.sequences: list[Sequence] = []
        self._end = end
        self._mark = mark
        self._is_alive = is_alive

    def __enter__(self) -> "Call":
        return self

    def __exit__(self, *exception: object) -> None:
        self._end(self)

    def close(self) -> None:
        """The engine has nothing of it any more."""
        self._mark.forget()  # whose variables hold this

    @property
    def is_over(self) -> bool:
        """True when it has ended, whether or not it came to say so."""
        return not (self._mark.is_running if self._is_alive is None else self._is_alive())

    @property
    def is_elsewhere(self) -> bool:
        """True while another thread is executing it."""
        return not self._mark.is_own and self._mark.is_running


class Handle(weakref.ref[object]):
    """A reference to the object that a kept sequence goes with; its callback tells that the object is gone.

    Attributes:
        sequence: the sequence, which nothing needs then.
    """

    __slots__ = ("sequence",)
    sequence: Sequence


class Interruptible(ABC):
    """What one thread at a time is in, and may break off at any line.

    Args:
        device: device on which it computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._changes = Marked()  # of what must be whole: tables, counts and queues
        self._stepping = Marked(keeps_modes=True)  # what it computes is not written yet
        self._calls: list[Call] = []
        self._handles: dict[int, Handle] = {}  # by seq_id
        self._dropped: deque[Handle] = deque()  # those whose owner is gone
        self._pid = os.getpid()
        self._on_device = device

    def call(self, is_alive: Callable[[], bool] | None = None) -> Call:
        """Begins a call of the function that asks for it; what is added for it ends with it, however it ends.

        Args:
            is_alive: whether a generator can still go on; None: the caller is none.

        Raises:
            EngineBusyError, EngineForkedError.
        """
        self._enter()
        call = Call(self._end_call, Mark(sys._getframe(1)), is_alive)
        self._calls.append(call)
        return call

    def release_with(self, owner: object, sequence: Sequence) -> None:
        """Releases a kept sequence once an object is gone, if it has not been released before."""
        # Told at any moment and in any thread, so by something that runs no Python: an error in it would be lost.
        handle = Handle(owner, self._dropped.append)
        handle.sequence = sequence
        self._handles[sequence.seq_id] = handle

    @abstractmethod
    def _abort(self, request: Request) -> None:
        """Ends a request, if it has not finished."""

    @abstractmethod
    def _release(self, sequence: Sequence) -> None:
        """Gives back what a sequence holds."""

    @abstractmethod
    def _preempt(self) -> None:
        """After a step that broke off."""

    @abstractmethod
    def _restart(self) -> None:
        """After changes that broke off: all is made anew from what cannot be half done."""

    def _let_go(self, sequence: Sequence) -> None:
        self._handles.pop(sequence.seq_id, None)

    def _enter(self) -> Marked:
        """The way in for all that changes something; what it returns is to be held while something changes.

        What must check its arguments first enters, checks, and holds `_changes` only then.

        Raises:
            EngineBusyError: another thread is inside, or a step of this one.
            EngineForkedError: this process is a child in which nothing can be computed.
        """
        if os.getpid() != self._pid and (reason := forks.why_not(self._on_device)) is not None:
            raise EngineForkedError(
                f"this engine was made in process {self._pid} and is used in its child {os.getpid()}: {reason}; "
                "make it in the child, or use threads=1 on a CPU"
            )
        if not self._mend():
            raise EngineBusyError(
                "the engine is in the midst of a step or of another thread's call; one thread at a time drives it, "
                "and callbacks inside a step only look (on_step of extend() runs between steps)"
            )
        return self._changes

    def _mend(self) -> bool:
        """Puts in order what broke off; False: something is running inside, look only."""
        if self._changes.is_running or self._stepping.is_running:
            return False
        over = []
        for call in self._calls:
            if call.is_over:
                over.append(call)
            elif call.is_elsewhere:
                return False
        if self._stepping.mark is not None or self._changes.mark is not None:
            self._mend_step()
        for call in over:
            with self._changes:
                self._give_back(call)
        while self._dropped:
            with self._changes:
                self._release(self._dropped[0].sequence)
                self._dropped.popleft()
        return True

    def _mend_step(self) -> None:
        if self._stepping.mark is not None:
            self._stepping.mark.restore_modes()
        is_whole = self._changes.mark is None
        with self._changes:
            if is_whole:
                self._preempt()
            else:
                self._restart()
        self._stepping.mark = None

    def _end_call(self, call: Call) -> None:
        with self._enter():
            self._give_back(call)

    def _give_back(self, call: Call) -> None:
        for request in call.requests:
            self._abort(request)
        for sequence in call.sequences:
            self._release(sequence)
        if call in self._calls:
            self._calls.remove(call)
        call.close()

"""Who is in an engine right now, and who left it half way.

Python may leave a function at any line: for a signal, for want of memory, for an exception of a callback; and once more
in the `finally` that cleans up after it. So nothing here relies on cleaning up. Whoever is in the engine leaves a mark,
which is its own frame. A mark whose frame is on no thread's stack any more was left behind, and whoever enters next
puts things in order first; a mark of a frame that still runs says that the engine is busy.
"""

import sys
import weakref
from collections.abc import Callable
from threading import get_ident
from types import FrameType, TracebackType

from minirksc.request import Request, Sequence
from minirksc.torch_modes import TorchModes


class Mark:
    """A function while it runs.

    Args:
        frame: of the function, which the calling thread is executing.
        modes: what torch's modes were before it, where it changes them.
    """

    __slots__ = ("_frame", "_modes", "_thread_id")

    def __init__(self, frame: FrameType, modes: TorchModes | None = None) -> None:
        self._frame: FrameType | None = frame
        self._thread_id = get_ident()
        self._modes = modes

    @property
    def is_own(self) -> bool:
        """Whether this thread has left it."""
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
        """Switches off what the function has left on in torch; modes are a thread's own."""
        if self.is_own and self._modes is not None:
            self._modes.restore()


class Changes:
    """A `with` block on it changes what must be whole again at its end; where it is left half way, its mark stays."""

    def __init__(self) -> None:
        self.mark: Mark | None = None

    def __enter__(self) -> None:
        self.mark = Mark(sys._getframe(1))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.mark = None


class Call:
    """One call from outside, and what it has in the engine; all of it goes when the call ends.

    Args:
        end: called with this at the end of a `with` block on it.
        mark: of the function that makes the call.
        is_alive: for a generator, which may rest between two steps: whether it can still go on.

    Attributes:
        requests: added for it; aborted with it.
        sequences: made for it; released with it, unless they are taken out in the end, as somebody's handles.
    """

    def __init__(self, end: Callable[["Call"], None], mark: Mark, is_alive: Callable[[], bool] | None = None) -> None:
        self.requests: list[Request] = []
        self.sequences: list[Sequence] = []
        self._end = end
        self._mark = mark
        self._is_alive = is_alive

    def __enter__(self) -> "Call":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end(self)

    def close(self) -> None:
        """Nothing of it is left in the engine."""
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
        sequence: that nobody needs then.
    """

    __slots__ = ("sequence",)
    sequence: Sequence

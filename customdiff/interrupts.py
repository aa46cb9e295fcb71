"""Ctrl-C, SIGTERM and the death of `dvc`: one exception, raised at once or at the next safe point."""

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
_PARENT_DEATH = 1  # PR_SET_PDEATHSIG in linux/prctl.h


class Interrupted(BaseException):
    """A signal that ends the program. Not an `Exception`, so that no handler of errors swallows it.

    Attributes:
        number: the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Deferral:
    """The first signal since the start of a `deferred` block.

    Attributes:
        number: the signal, or None.
    """

    def __init__(self) -> None:
        self.number: int | None = None

    @property
    def requested(self) -> bool:
        """Whether a signal has arrived."""
        return self.number is not None

    @contextmanager
    def during(self) -> Iterator[None]:
        """End the block early when a signal arrives, for work of many seconds that can be repeated."""
        try:
            with as_exceptions():
                yield
        except Interrupted as interruption:
            self.number = interruption.number

    def check(self) -> None:
        """Raise `Interrupted` if a signal has arrived."""
        if self.number is not None:
            raise Interrupted(self.number)


@contextmanager
def as_exceptions() -> Iterator[None]:
    """Raise `Interrupted` at the first of `SIGNALS`; signals that the caller ignores stay ignored, as with nohup."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number)

    with _handled_by(stop):
        yield


@contextmanager
def deferred() -> Iterator[Deferral]:
    """Delay the first signal until `Deferral.check`; a second one raises at once."""
    deferral = Deferral()

    def note(number: int, frame: FrameType | None) -> None:
        if deferral.number is not None:
            raise Interrupted(number)
        deferral.number = number

    with _handled_by(note):
        yield deferral


@contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # signals only reach the main thread
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    taken = [number for number, old in before.items() if old is not signal.SIG_IGN]
    try:
        for number in taken:
            signal.signal(number, handler)
        yield
    finally:
        for number in taken:
            signal.signal(number, before[number])


def end_with_dvc() -> None:
    """Ask the kernel for a SIGTERM when `dvc` dies, so that a stage does not go on as an orphan; Linux only.

    The request also holds for a program that replaces this one, such as `accelerate launch`.
    """
    if "DVC_STAGE" in os.environ and sys.platform == "linux":
        end_with_parent()


def end_with_parent(number: int = signal.SIGTERM) -> None:
    """Ask the kernel for a signal when the parent of this process dies; Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PARENT_DEATH, int(number))

"""Handling of Ctrl-C and termination signals: the run finishes its step, saves its state, and ends."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import TypeVar

T = TypeVar("T")

# A terminal that closes sends SIGHUP; clusters announce the end of a job by SIGTERM, SIGUSR1 or SIGUSR2.
NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
STOPPING = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]  # Windows has the first two
HANGUP = getattr(signal, "SIGHUP", None)


class TrainingStopped(SystemExit):
    """
    A run was stopped by a signal and has saved its state.

    If nothing catches it, the program exits with status 128 + the signal number, like a program ended by the signal.
    """

    def __init__(self, number: int):
        super().__init__(128 + number)


@dataclass
class StopRequest:
    """
    Attributes:
        signal: the first signal received, or 0.
        quiet: do not acknowledge signals on standard error.
    """

    signal: int = 0
    quiet: bool = False
    _saving: bool = False
    _abort: bool = False

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Context in which further signals do not interrupt, so that the state is saved completely."""
        self._saving = True
        try:
            yield
        finally:
            self._saving = False

    def receive(self, number: int, frame: FrameType | None) -> None:
        """
        Handles a signal: the first stops after the current step, the second ends the run unsaved at the next `check`.

        Only the third interrupts immediately, because an error raised at an arbitrary point may occur in a finalizer,
        which discards it.
        """
        if self._saving and self.signal:
            self._say(number, "the state is being saved; the run ends once it is written")
        elif not self.signal:
            self.signal = number
            self._say(number, "the run saves its state and ends after this step; repeat the signal to end it unsaved")
        elif not self._abort:
            self._abort = True
            self._say(number, "the run ends unsaved")
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def check(self) -> None:
        """After a second signal, raises `KeyboardInterrupt` for Ctrl-C, else `SystemExit` with its status."""
        if self._abort:
            raise KeyboardInterrupt if self.signal == signal.SIGINT else SystemExit(128 + self.signal)

    def checked(self, items: Iterable[T]) -> Iterator[T]:
        """Yields the items, with a `check` before each."""
        for item in items:
            self.check()
            yield item

    def _say(self, number: int, text: str) -> None:
        """Writes directly to the file descriptor, since the interrupted code may be using Python's buffers."""
        if not self.quiet and sys.__stderr__ is not None:
            with contextlib.suppress(OSError, ValueError):
                os.write(sys.__stderr__.fileno(), f"\n{signal.Signals(number).name}: {text}\n".encode())


@contextlib.contextmanager
def listen_for_stop(quiet: bool = False) -> Iterator[StopRequest]:
    """
    Handles the signals in `STOPPING` within this context. An ignored SIGHUP stays ignored, as under `nohup`.

    Args:
        quiet: do not acknowledge signals on standard error.
    """
    request = StopRequest(quiet=quiet)
    before: dict[int, Callable[[int, FrameType | None], object] | int | None] = {}
    if threading.current_thread() is threading.main_thread():  # other threads may not set handlers
        for number in STOPPING:
            if number == HANGUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            before[number] = signal.signal(number, request.receive)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

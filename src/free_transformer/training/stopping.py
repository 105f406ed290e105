"""Ctrl-C and SIGTERM: the step is finished, the state saved, and the run left as if it had been planned so."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

STOPPING = (signal.SIGINT, signal.SIGTERM)


class TrainingStopped(SystemExit):
    """
    A run that was asked to stop and has saved its state. Nobody who catches it ends with status 128 + the signal's
    number, as a program does that the signal has ended.
    """

    def __init__(self, number: int):
        super().__init__(128 + number)


@dataclass
class StopRequest:
    """`signal` is 0 until one has come."""

    signal: int = 0


@contextlib.contextmanager
def listen_for_stop() -> Iterator[StopRequest]:
    """Takes SIGINT and SIGTERM for as long as it lasts; the same again ends the process at once."""
    request = StopRequest()

    def remember(number: int, _: FrameType | None) -> None:
        request.signal = number
        signal.signal(number, before[number])

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():  # no other may
        before = {number: signal.signal(number, remember) for number in STOPPING}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

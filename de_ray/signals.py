"""Ctrl-C and SIGTERM as exceptions that leave a run tidily, never in the middle of what must be finished first."""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType


def exit_on_sigterm() -> None:
    """Let SIGTERM, with which schedulers end jobs, raise `SystemExit` in the main thread; elsewhere nothing is done."""
    if in_main_thread():
        signal.signal(signal.SIGTERM, _exit)


def _exit(number: int, _: FrameType | None) -> None:
    sys.exit(128 + number)


@contextlib.contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """As `exit_on_sigterm`, while the context lasts."""
    before = signal.getsignal(signal.SIGTERM)
    exit_on_sigterm()
    try:
        yield
    finally:
        if in_main_thread():
            signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Put off SIGTERM and the first Ctrl-C until the context ends; a second Ctrl-C is taken at once.

    An exception that a handler raises inside a database's transaction leaves it open, and locks out whoever wants to
    write next: this very process, when it says that the run was ended.
    """
    if not in_main_thread():
        yield
        return
    found = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    before = {number: handler for number, handler in found.items() if handler is not None}  # None: not Python's
    came: list[int] = []

    def keep(number: int, _: FrameType | None) -> None:
        came.append(number)
        if number == signal.SIGINT:
            signal.signal(number, before[signal.SIGINT])

    for number in before:
        signal.signal(number, keep)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


@contextlib.contextmanager
def sigterm_kept() -> Iterator[None]:
    """Keep the SIGTERM handler of this process where Ray starts.

    Ray's own ends its servers before the run has said a word; and its C++ layer puts another before Python's, which
    aborts the process after three seconds, whatever it is writing.
    """
    before = signal.getsignal(signal.SIGTERM)
    yield
    if in_main_thread():
        # Where nobody has asked for SIGTERM, Ray's handler is better than none.
        signal.signal(signal.SIGTERM, before if callable(before) else signal.getsignal(signal.SIGTERM))


@contextlib.contextmanager
def compiled_interrupts_told() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM through that come while compiled code runs: Python makes a `SystemError` of them."""
    try:
        yield
    except SystemError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, (KeyboardInterrupt, SystemExit)):
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            raise
        raise cause from None


def in_main_thread() -> bool:
    """Whether signals' handlers can be set here."""
    return threading.current_thread() is threading.main_thread()

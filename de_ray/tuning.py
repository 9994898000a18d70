"""Ray Tune held to its work: nothing printed, nothing written but its own records, no signal handlers left behind."""

import contextlib
import logging
import os
import signal
from collections.abc import Iterator

from de_ray.signals import in_main_thread

QUIET = {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "RAY_AIR_NEW_OUTPUT": "0"}
"""Tune's loggers cost a trial more than its evaluation does, to write what is in `Trial` anyway; its newer output
prints tables of failed trials even when told to be silent."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep Tune from printing and from writing more than its own records."""
    before = {key: os.environ.get(key) for key in QUIET}
    level = logging.getLogger("ray.tune").level
    os.environ.update(QUIET)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # errors are raised
    try:
        yield
    finally:
        logging.getLogger("ray.tune").setLevel(level)
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value


@contextlib.contextmanager
def signals_restored() -> Iterator[None]:
    """Undo Tune's signal handlers, which it leaves behind: a later Ctrl-C would be swallowed.

    Raises:
        KeyboardInterrupt: Tune took a Ctrl-C, which it answers with the trials so far, maybe all of them; going on with
            them would not be the run that was asked for.
    """
    names = [signal.SIGINT, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else [])]
    before = {name: signal.getsignal(name) for name in names}
    installs = in_main_thread() and not int(os.environ.get("TUNE_DISABLE_SIGINT_HANDLER", "0"))
    try:
        yield
        # Tune's handler gives way to the one before it when it is called.
        if installs and signal.getsignal(signal.SIGINT) is before[signal.SIGINT]:
            raise KeyboardInterrupt
    finally:
        for name, handler in before.items():
            if signal.getsignal(name) is not handler:
                signal.signal(name, handler)

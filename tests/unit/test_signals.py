"""Signals end a run between things that must be finished, not within."""

import signal
import sys
import threading

import numpy as np
import pytest

from de_ray.quantization.cells import last_cells
from de_ray.signals import compiled_interrupts_told, ended_by_sigterm, sigterm_kept, uninterrupted


@pytest.fixture(autouse=True)
def _ctrl_c():
    """Also where the tests were started in a shell's background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_is_taken_when_what_must_be_finished_is(number, raised):
    done = False
    with ended_by_sigterm(), pytest.raises(raised) as error:
        with uninterrupted():
            signal.raise_signal(number)
            done = True
        pytest.fail("the signal was lost")
    assert done and (number == signal.SIGINT or error.value.code == 143)


def test_a_second_ctrl_c_does_not_wait_and_a_second_sigterm_does():
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("the second Ctrl-C was put off")
    done = False
    with ended_by_sigterm(), pytest.raises(SystemExit), uninterrupted():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        done = True
    assert done


def test_handlers_are_as_before_afterwards_whoever_has_set_them():
    def handlers():
        return signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    before = handlers()
    with ended_by_sigterm():
        within = handlers()
        with uninterrupted():
            pass
        with sigterm_kept():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        assert handlers() == within != before
    assert handlers() == before


def test_threads_have_no_signals_to_put_off():
    ran = []

    def work():
        with ended_by_sigterm(), uninterrupted(), sigterm_kept():
            ran.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert ran


def test_ctrl_c_within_compiled_code_is_ctrl_c_and_other_errors_of_the_system_are_what_they_are():
    costs = np.random.default_rng(0).random((256, 256))
    least = np.zeros(256)
    last_cells(least, costs)  # compiled
    before = signal.signal(signal.SIGVTALRM, signal.default_int_handler)  # SIGALRM is pytest-timeout's
    for _ in range(20):
        with pytest.raises(KeyboardInterrupt), compiled_interrupts_told():
            signal.setitimer(signal.ITIMER_VIRTUAL, 0.003)
            while True:
                last_cells(least, costs)
    signal.signal(signal.SIGVTALRM, before)
    with pytest.raises(SystemExit), compiled_interrupts_told():
        try:
            try:
                sys.exit(143)
            except SystemExit as error:
                raise SystemError("a result with an exception set") from error
        except SystemError as error:
            raise SystemError("and again") from error
    with pytest.raises(SystemError, match="another"), compiled_interrupts_told():
        raise SystemError("another")

"""Signals end a run between things that must be finished, not within."""

import signal
import threading

import pytest

from de_ray.signals import ended_by_sigterm, sigterm_kept, uninterrupted


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

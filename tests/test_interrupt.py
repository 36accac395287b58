"""A signal is noted, not died of; a second one ends the process."""

import os
import signal
import subprocess
import sys
import textwrap
import threading

import pytest

from mtl.interrupt import StopSignal


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noted_and_the_old_handler_comes_back(number):
    before = signal.getsignal(number)
    stop = StopSignal()
    with stop.listening():
        assert stop.received == 0
        os.kill(os.getpid(), number)
        assert stop.received == number
        os.kill(os.getpid(), number)  # within a second: the launcher passing the same Ctrl-C on
        assert stop.received == number
    assert signal.getsignal(number) is before


def test_the_first_signal_counts():
    stop = StopSignal()
    with stop.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
    assert stop.received == signal.SIGTERM


def test_outside_of_the_main_thread_nothing_is_touched():
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def work():
        with StopSignal().listening():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_the_process_at_once(number):
    script = textwrap.dedent(f"""
        import os, time
        from mtl.interrupt import StopSignal
        with StopSignal().listening():
            os.kill(os.getpid(), {int(number)})
            time.sleep(1.1)
            print("alive", flush=True)
            os.kill(os.getpid(), {int(number)})
            time.sleep(30)
            print("still alive")
    """)
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=20, check=False)
    assert finished.returncode == -number
    assert finished.stdout == "alive\n"
